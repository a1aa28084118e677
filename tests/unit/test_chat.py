"""Marks of chat messages, found in whatever a template makes of them."""

import pytest

from vllm_pasta import EmphasisError
from vllm_pasta.request.chat import Chat, mark_messages, read_markup, take_out
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


def marked(*marks, messages=MESSAGES[:4]):
    chat = Chat(messages, template)
    prompt = template([dict(m) for m in messages])
    text, opening, closing = mark_messages(chat, marks, prompt)
    text, enclosed = take_out(text, opening, closing)
    assert text == prompt
    return [prompt[a:b] for a, b in enclosed]


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


def test_message_without_text():
    with pytest.raises(EmphasisError, match="nothing but white space"):
        mark_messages(Chat(MESSAGES, template), [Mark(message=4)], "")


def test_template_without_text():
    with pytest.raises(EmphasisError, match="gives no text"):
        mark_messages(Chat(MESSAGES, lambda _: None), [Mark(message=1)], "")


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
    prompt = with_images(messages)
    for mark, expected in (
        (Mark(message=0), ["What is this,", "and this?"]),
        (Mark("this,  and", message=0), ["this,", "and"]),
        (Mark(message=0, chars=(5, 7)), ["is"]),
    ):
        marked_text = mark_messages(Chat(messages, with_images), [mark], prompt)
        text, enclosed = take_out(*marked_text)
        assert text == prompt
        assert [prompt[a:b] for a, b in enclosed] == expected


def test_markup_by_message():
    """Read in each text by itself: what the template adds is left alone, and so are marks that
    only another message or part would close."""
    messages = [
        {"role": "system", "content": "<b>Be</b> brief"},
        {"role": "user", "content": [{"type": "text", "text": "a <b>b</b>"}, "<b>c</b>"]},
        {"role": "tool", "content": None},
    ]
    clean, marked = read_markup(Chat(messages, template), Markup("tag", "b"))
    assert [text for texts in clean.texts() for _, text in texts] == ["Be brief", "a b", "c"]
    assert marked == {(0, None): [(0, 2)], (1, 0): [(2, 3)], (1, 1): [(0, 1)]}
    assert messages[0]["content"] == "<b>Be</b> brief"  # ours is a copy
    split = [{"role": "user", "content": [{"type": "text", "text": "**a"}, "b**"]}]
    assert read_markup(Chat(split, template), Markup("markdown"))[1] == {}
    split = [{"role": "user", "content": "<b>a"}, {"role": "user", "content": "b</b>"}]
    with pytest.raises(EmphasisError, match=r"message 0: <b> at character 0.*has no </b>"):
        read_markup(Chat(split, template), Markup("tag", "b"))


def test_take_out():
    assert take_out("a(b)c((d)e]]", "(", ")]") == ("abcde", [(1, 2), (3, 4), (3, 5)])
    assert take_out("a(b)c", "(", ")]") == ("abc", [])  # a mark that the template left out


def test_message_that_the_template_leaves_out():
    """A mark is not lost because another is found."""

    def last(messages):
        return f"<{messages[-1]['content']}>"

    messages = [{"role": "user", "content": "one"}, {"role": "user", "content": "two"}]
    found = {}
    for marks in ([Mark(message=1)], [Mark(message=0), Mark(message=1)]):
        text, enclosed = take_out(*mark_messages(Chat(messages, last), marks, "<two>"))
        assert text == "<two>"
        found[len(marks)] = enclosed
    assert found == {1: [(1, 4)], 2: []}
