"""Marks of chat messages, found in whatever a template makes of them."""

from itertools import count, pairwise

import jinja2
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_pasta import EmphasisError
from vllm_pasta.request.chat import Chat, locate_messages, read_messages
from vllm_pasta.request.chat.alignment import Alignment
from vllm_pasta.request.marks import Mark
from vllm_pasta.request.markup import Markup


def joined(content):
    return (
        content
        if isinstance(content, str)
        else "\n".join(part["text"] for part in content if part["type"] == "text")
    )


def template(messages):
    """Strips, adds words around, repeats the system message at the end."""
    body = "".join(f"<{m['role']}>{joined(m['content']).strip()}</>" for m in messages)
    system = [m for m in messages if m["role"] == "system"]
    return body + "".join(f"remember: {joined(m['content']).strip()}" for m in system)


MESSAGES = [
    {"role": "system", "content": " Be brief. "},
    {"role": "user", "content": "Say hi. Then say hi again."},
    {"role": "assistant", "content": "hi"},
    {
        "role": "user",
        "content": [
            {"type": "text", "text": "First part."},
            {"type": "image_url", "image_url": {"url": "x"}},
            {"type": "text", "text": "Second part."},
        ],
    },
    {"role": "tool", "content": None},
]


def marked(*marks, messages=MESSAGES[:4], template=template, read=None):
    """The text of each place found in the prompt, in its order."""
    prompt = template([dict(m) for m in messages])
    placed = locate_messages(Chat(messages, template), marks, prompt, read or {})
    return [prompt[a:b] for (a, b), _ in sorted(placed)]


@pytest.mark.parametrize(
    ("mark", "expected"),
    [
        (Mark(message=1), ["Say hi. Then say hi again."]),
        (Mark(message=-2), ["hi"]),
        (Mark(message=1, chars=(4, 6)), ["hi"]),
        (Mark(message=1, chars=(3, 7)), ["hi."]),  # white space at the edge is left outside
        (Mark("hi", message=1, occurrence="all"), ["hi", "hi"]),
        (Mark("hi again", message=1), ["hi again"]),
        (Mark(role="system"), ["Be brief.", "Be brief."]),  # wherever the template puts it
        (Mark(role="user"), ["Say hi. Then say hi again.", "First part.", "Second part."]),
        (Mark("part", role="user"), ["part"]),
        (Mark("t.Second", message=3), ["t.", "Second"]),  # across parts: a range in each
        (Mark(message=3, chars=(0, 5)), ["First"]),
    ],
)
def test_places(mark, expected):
    assert marked(mark) == expected


def test_canonically_equivalent_text_of_a_role():
    """As in a whole prompt, and in whichever of the role's messages it stands."""
    messages = [{"role": "user", "content": text} for text in ("A cafe\u0301.", "No.", "Café 2")]
    assert marked(Mark("caf\u00e9", role="user"), messages=messages) == ["cafe\u0301"]


def test_several_marks_overlap():
    assert marked(Mark("Say hi", message=1), Mark("hi. Then", message=1), Mark(message=2)) == [
        "Say hi. Then",
        "hi",
    ]


@pytest.mark.parametrize(
    ("mark", "words"),
    [
        (Mark(message=9), r"4 messages \(0 to 3\), got 9"),
        (Mark(message=-5), "got -5"),
        (
            Mark(role="critic"),
            "no message of role 'critic'; there are 'assistant', 'system', 'user'",
        ),
        (Mark("bye", message=1), "'bye' is not in the prompt"),
        (Mark("bye", role="user"), "'bye' is not in the prompt"),
        (Mark(message=2, chars=(0, 3)), r"message 2 has 2 characters, got \[0, 3\]"),
        (Mark(message=0, chars=(0, 1)), "nothing but white space"),
    ],
)
def test_refused(mark, words):
    with pytest.raises(EmphasisError, match=words):
        marked(mark)


@pytest.mark.parametrize(
    ("message", "mark", "words"),
    [
        ({"role": "tool", "content": None}, Mark(message=0), "message 0 has no text"),
        (
            {"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]},
            Mark(message=0),
            "message 0 has no text: it calls a tool",
        ),
        ({"role": "assistant"}, Mark(role="assistant"), "no message of role 'assistant' has text"),
    ],
)
def test_message_without_text(message, mark, words):
    with pytest.raises(EmphasisError, match=words):
        locate_messages(Chat([message], template), [mark], "", {})


def test_template_without_text():
    with pytest.raises(EmphasisError, match="gives no text"):
        locate_messages(Chat(MESSAGES, lambda _: None), [Mark(message=1)], "", {})


def test_messages_are_not_changed():
    before = repr(MESSAGES)
    marked(Mark(role="user"), Mark(role="system"))
    assert repr(MESSAGES) == before


def test_private_use_characters_in_the_prompt():
    """The sentinels are characters that the prompt does not have."""
    messages = [{"role": "user", "content": "\ue000 a \ue001 b"}]
    assert marked(Mark("a", message=0), messages=messages) == ["a"]


@pytest.mark.parametrize("image", ["", "<image>", "\n\n<|vision|><pad><pad>\n"])
def test_image_parts(image):
    """A template that renders image parts: they stay outside, and break nothing."""

    def with_images(messages):
        return "".join(
            f"<{m['role']}>"
            + "".join(part["text"] if part["type"] == "text" else image for part in m["content"])
            for m in messages
        )

    picture = {"type": "image_url", "image_url": {"url": "x"}}
    parts = [picture, {"type": "text", "text": "What is this, "}, picture, picture,
             {"type": "text", "text": " and this?"}, picture]  # fmt: skip
    messages = [{"role": "user", "content": parts}]
    for mark, expected in (
        (Mark(message=0), ["What is this,", "and this?"]),
        (Mark("this,  and", message=0), ["this,", "and"]),
        (Mark(message=0, chars=(5, 7)), ["is"]),
    ):
        assert marked(mark, messages=messages, template=with_images) == expected


def test_markup_by_message():
    """Read in each text by itself: what the template adds is left alone, and so are marks that
    only another message or part would close."""
    messages = [
        {"role": "system", "content": "<b>Be</b> brief"},
        {"role": "user", "content": [{"type": "text", "text": "a <b>b</b>"}, "<b>c</b>"]},
        {"role": "tool", "content": None},
    ]
    clean, reading = read_messages(messages, Markup("tag", "b"))
    texts = [text for texts in Chat(clean, template).texts for _, text in texts]
    assert texts == ["Be brief", "a b", "c"]
    assert reading.changed
    assert reading.marks == {
        (0, None): [((0, 2), 1.0)],
        (1, 0): [((2, 3), 1.0)],
        (1, 1): [((0, 1), 1.0)],
    }
    assert messages[0]["content"] == "<b>Be</b> brief"  # ours is a copy
    split = [{"role": "user", "content": [{"type": "text", "text": "**a"}, "b**"]}]
    assert read_messages(split, Markup("markdown"))[1].marks == {}
    split = [{"role": "user", "content": "<b>a"}, {"role": "user", "content": "b</b>"}]
    with pytest.raises(EmphasisError, match=r"message 0: <b> at character 0.*has no </b>"):
        read_messages(split, Markup("tag", "b"))


def test_markup_of_roles_that_are_not_trusted():
    """What a tool returned and what the assistant said is text, balanced or not."""
    messages = [
        {"role": role, "content": "Hi <b>there</b>"}
        for role in ("system", "developer", "user", "assistant", "tool")
    ]
    messages.append({"role": "tool", "content": "</b> alone"})
    clean, reading = read_messages(messages, Markup("tag", "b"))
    assert [index for index, _ in reading.marks] == [0, 1, 2]
    assert [m["content"] for m in clean[3:]] == [m["content"] for m in messages[3:]]
    with pytest.raises(EmphasisError, match="message 5: </b>"):
        read_messages(messages, Markup("tag", "b", roles=("tool",)))


def jinja(source, **names):
    """A chat template as models have it, run anew each time."""
    compiled = jinja2.Environment().from_string(source)
    return lambda messages: compiled.render(
        messages=messages, **{name: value() for name, value in names.items()}
    )


TURNS = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Name a colour."},
    {"role": "assistant", "content": "<think>\nRed is a colour.\n</think>\n\nIt is red."},
    {"role": "user", "content": "Another one. Answer in JSON."},
]
PLAIN = "{% for m in messages %}<{{ m.role }}>\n{{ m.content }}</>\n{% endfor %}"
SPLIT = PLAIN.replace("m.content }}", "m.content.split('</think>')[-1].lstrip('\n') }}")
DROPS = PLAIN.replace(
    "{{ m.content }}", "{% if '</think>' not in m.content %}{{ m.content }}{% endif %}"
)
HEAD = PLAIN.replace("m.content }}", "m.content[:14] }}")
INNER = PLAIN.replace("m.content }}", "m.content[3:-3] }}")


def counter():
    """Never the same twice, in length neither."""
    return count(7).__next__


@pytest.mark.parametrize(
    ("source", "mark", "expected"),
    [
        (SPLIT, Mark(message=2), ["It is red."]),
        (SPLIT, Mark(role="assistant"), ["It is red."]),
        (SPLIT, Mark("It is red", message=2), ["It is red"]),
        (SPLIT, Mark("colour.\n</think>\n\nIt is", message=2), ["It is"]),
        (DROPS, Mark(role="user"), ["Name a colour.", "Another one. Answer in JSON."]),
        (HEAD, Mark(message=3), ["Another one. A"]),
        (INNER, Mark(message=3), ["ther one. Answer in JS"]),
        (INNER, Mark("one. Answer", message=3), ["one. Answer"]),
    ],
)
@pytest.mark.parametrize("clock", [False, True])
def test_template_that_cuts(source, mark, expected, clock):
    """What of the message is visible is emphasised, whether or not the rest stays the same."""
    if clock:
        source = "It is {{ now }}. [{{ id }}]\n" + source + "<{{ id }}>"
    numbers = counter()
    template = jinja(source, now=lambda: 2 ** numbers(), id=lambda: f"{hash(str(numbers()))}")
    assert marked(mark, messages=TURNS, template=template) == expected


@pytest.mark.parametrize(
    ("source", "mark", "words"),
    [
        (SPLIT, Mark("Red is", message=2), "leaves this part of message 2 out"),
        (DROPS, Mark(message=2), "leaves this part of message 2 out"),
        (DROPS, Mark(role="assistant"), "leaves this part of the messages of role 'assistant' out"),
        (
            PLAIN.replace("{{ m.content }}", "{{ m.content if m.content == 'Be brief.' }}"),
            Mark(message=0),
            "writes message 0 differently",
        ),
    ],
)
def test_nothing_of_it_is_visible(source, mark, words):
    """Refused by name, with advice that can be followed."""
    with pytest.raises(EmphasisError, match=words):
        marked(mark, messages=TURNS, template=jinja(source))


def test_message_that_the_template_leaves_out():
    """It is skipped under a role, and refused by name even where another mark is found."""
    messages = [{"role": "user", "content": "one"}, {"role": "user", "content": "two"}]
    last = jinja("<{{ messages[-1].content }}>")
    assert marked(Mark(role="user"), messages=messages, template=last) == ["two"]
    assert marked(Mark(message=1), messages=messages, template=last) == ["two"]
    with pytest.raises(EmphasisError, match="message 0 out"):
        marked(Mark(message=0), Mark(message=1), messages=messages, template=last)


def test_template_that_looks_into_a_message():
    """It sees marks that it did not expect; the prompt is that of the message without."""
    source = (
        "{% for m in messages %}{% if m.content.startswith('Name') %}[ask] {% endif %}"
        "{{ m.content }} ({{ m.content | length }})\n{% endfor %}"
    )
    assert marked(Mark(message=1), messages=TURNS, template=jinja(source)) == ["Name a colour."]


def test_strengths():
    """Each place keeps its mark's factor; where marks overlap the strongest counts."""
    prompt = template([dict(m) for m in MESSAGES[:4]])
    marks = [Mark("Say hi. Then", message=1, alpha=0.1), Mark("Then say", message=1, alpha=0.5)]
    placed = locate_messages(
        Chat(MESSAGES[:4], template), marks, prompt, {(2, None): [((0, 2), 2.0)]}
    )
    assert [(prompt[a:b], alpha) for (a, b), alpha in sorted(placed)] == [
        ("Say hi.", 0.1),
        ("Then say", 0.5),
        ("hi", 2.0),
    ]


lines = st.lists(st.sampled_from(["a b", "a", "", "b b", "x y z"]), max_size=8).map("\n".join)


@given(lines, lines, st.integers(0, 30), st.integers(0, 30))
def test_alignment(first, second, a, b):
    """A place that is found has the same text, and order is kept; equal texts match wholly."""
    alignment = Alignment(first, second)
    start, end = sorted((min(a, len(first)), min(b, len(first))))
    if (moved := alignment.moved(start, end)) is not None:
        assert second[slice(*moved)] == first[start:end]
    assert all(i + n <= k and j + n <= m for (i, j, n), (k, m, _) in pairwise(alignment.blocks))
    assert Alignment(first, first).moved(start, end) in ((start, end), None if not first else 0)
