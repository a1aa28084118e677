"""Marks in the text itself: what is taken out, what stays, what is refused."""

import contextlib
import re

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from benchmarks.admission import HARD
from vllm_pasta import EmphasisError
from vllm_pasta.request.markup import Markup, markdown, read_markdown, read_stars, read_tags


def inside(marked):
    return [marked.text[a:b] for a, b in marked.ranges]


@pytest.mark.parametrize(
    ("text", "clean", "marks"),
    [
        ("no marks", "no marks", []),
        ("a <emphasis>b c</emphasis> d", "a b c d", ["b c"]),
        ("<emphasis>all</emphasis>", "all", ["all"]),
        ("<emphasis>a</emphasis><emphasis>b</emphasis>", "ab", ["a", "b"]),
        ("<emphasis>a <emphasis>b</emphasis> c</emphasis>", "a b c", ["a b c", "b"]),
        ("<emphasis>two\nlines 🎉</emphasis>", "two\nlines 🎉", ["two\nlines 🎉"]),
        (r"\<emphasis>x\</emphasis>", "<emphasis>x</emphasis>", []),
        (r"\<emphasis> <emphasis>y</emphasis>", "<emphasis> y", ["y"]),
        ("<emphasis >x</emphasis >", "<emphasis >x</emphasis >", []),
        ("<b>x</b> <EMPHASIS>", "<b>x</b> <EMPHASIS>", []),
        (r"back\slash \\ stays", r"back\slash \\ stays", []),
    ],
)
def test_tags(text, clean, marks):
    marked = read_tags(text)
    assert marked.text == clean
    assert inside(marked) == marks


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a <emphasis>b", r"<emphasis> at character 2.*has no </emphasis>"),
        ("a</emphasis> b", r"</emphasis> at character 1.*has no <emphasis>"),
        ("<emphasis><emphasis>a</emphasis>", "has no </emphasis>"),
        ("</emphasis>a<emphasis>", "has no <emphasis>"),
        ("<emphasis> \n</emphasis>", "nothing but white space"),
        ("<emphasis></emphasis>", "nothing but white space"),
    ],
)
def test_unbalanced_tags(text, words):
    """The place is shown, and how to write a tag that is meant as text."""
    with pytest.raises(EmphasisError, match=words):
        read_tags(text)


def test_tag_name():
    marked = read_tags("<b>x</b> <emphasis>", "b")
    assert (marked.text, inside(marked)) == ("x <emphasis>", ["x"])
    assert read_tags("<a.b>x</a.b> <aXb>", "a.b").text == "x <aXb>"


@pytest.mark.parametrize(
    ("text", "clean", "marks"),
    [
        ("plain", "plain", []),
        ("a **b c** d", "a b c d", ["b c"]),
        ("a __b c__ d", "a b c d", ["b c"]),
        ("**a** and **b**", "a and b", ["a", "b"]),
        ("a **b\nc** d", "a b\nc d", ["b\nc"]),
        ("a **b\n\nc** d", "a **b\n\nc** d", []),
        ("2 ** 3 ** 4", "2 ** 3 ** 4", []),
        ("**open", "**open", []),
        ("snake__case__name", "snake__case__name", []),
        ("****", "****", []),
        (r"\*\*not\*\* **yes**", "**not** yes", ["yes"]),
        ("`**code**` **bold**", "`**code**` bold", ["bold"]),
        ("```\n**code**\n```\n**bold**", "```\n**code**\n```\nbold", ["bold"]),
        ("*one star* **two**", "*one star* two", ["two"]),
        ("***all three***", "*all three*", ["all three"]),
        ("**a** b** **c", "a b** **c", ["a"]),
        ("**open **shut**", "**open shut", ["shut"]),
        ("`**` **a `**` b**", "`**` a `**` b", ["a `**` b"]),
        ("`` ` **c** `` **b**", "`` ` **c** `` b", ["b"]),
        ("~~~\n**never closed**", "~~~\n**never closed**", []),
        ("Compare print(**a) and print(**b).", "Compare print(**a) and print(**b).", []),
        ("- **a**\n- b **c**", "- a\n- b c", ["a", "c"]),
        ("> **a\n> b**", "> a\n> b", ["a\n> b"]),
        ("# **a**\n**b**", "# a\nb", ["a", "b"]),
        ("    **code**\n\n**b**", "    **code**\n\nb", ["b"]),
        ("<x>\n**a**\n</x>\n\n<x>**b**</x>", "<x>\n**a**\n</x>\n\n<x>b</x>", ["b"]),
        ("**a<b c='**'>d**", "a<b c='**'>d", ["a<b c='**'>d"]),
        ("**a\r\nb**\r\n\r\n**c", "a\r\nb\r\n\r\n**c", ["a\r\nb"]),
    ],
)
def test_markdown(text, clean, marks):
    stripped = read_markdown(text, keep=False)
    assert stripped.text == clean
    assert inside(stripped) == marks
    kept = read_markdown(text, keep=True)
    assert kept.text == text  # untouched, byte for byte
    assert inside(kept) == marks


def test_markdown_nested():
    """Bold in bold counts once, and all marks go."""
    for text in ("**a __b__ c**", "__a **b** c__"):
        marked = read_markdown(text, keep=False)
        assert (marked.text, inside(marked)) == ("a b c", ["a b c", "b"])
    assert inside(read_markdown("**a __b** c__", keep=True)) == ["a __b"]


@pytest.mark.parametrize(
    "piece",
    [
        *("**a ", "__a ", "__a a** ", "**a\n", "`a", "\n \n", "```\n~~~\n", "*a**b ", "> ", "- "),
        *("<a b='", "<!--", "<![CDATA[", "1. a\n\n", "<div>\n"),
    ],
)
def test_no_text_takes_long(piece):
    """In the server's event loop a text of quadratic cost would hold up every request. With such a
    cost this takes many minutes, and the suite's time limit strikes."""
    text = piece * (200_000 // len(piece))
    read_markdown(text, keep=False)
    with contextlib.suppress(EmphasisError):
        read_tags(text.replace("*", "<emphasis>"))


PIECES = [
    *("**", "__", "*", "_", "w", "w", " ", "\n", "\n\n", "`", "``", "\\", "    ", "\t", "- ", "* "),
    *("1. ", "2) ", "> ", "# ", "## ", "```\n", "~~~\n", "<b>", "</b>", "<div>", "<x a='**'>"),
    *("<!-- ", "-->", "<?", "<http://w**w>", "(", ")", ".", "---\n", "===\n", "“", "\u00a0", "$"),
]


def strong_by_markdown_it(text):
    """What CommonMark says is strong: for each strong emphasis, the letters that stand in it.

    Every letter of `text` occurs once, so the letters say which characters those are.
    """
    found = []
    parser = MarkdownIt("commonmark").disable(["link", "image", "reference"])
    for block in parser.parse(text):
        opened = []
        for token in block.children or () if block.type == "inline" else ():
            if token.type == "strong_open":
                opened.append(len(found))
                found.append("")
            elif token.type == "strong_close":
                opened.pop()
            else:
                for i in opened:
                    found[i] += token.content
    return ["".join(filter(is_letter, letters)) for letters in found]


def is_letter(char):
    return "一" <= char <= "鿿"


@settings(max_examples=1000, deadline=None)
@example("**w\n2) w**")  # interrupts no paragraph
@example("2) **$---\n2) ## > w**)- ")  # but follows another item
@given(st.lists(st.sampled_from(PIECES), min_size=1, max_size=14).map("".join))
def test_commonmark(text):
    """The same is strong as by markdown-it-py, in paragraphs, lists, quotes, code and HTML; the
    marks are stars or underscores, and no ``w`` is lost or wrong."""
    letters = map(chr, range(ord("一"), ord("鿿")))
    text = "".join(next(letters) if char == "w" else char for char in text)
    strong = markdown.parse(text).strong
    found = ["".join(filter(is_letter, text[s.start : s.end])) for s in strong]
    assert found == strong_by_markdown_it(text)
    for s in strong:
        assert text[s.open : s.start] == text[s.end : s.close]
        assert text[s.open : s.start] in ("**", "__")


@pytest.mark.parametrize(
    ("text", "clean", "marks"),
    [
        ("no stars", "no stars", []),
        ("a **b\n\nc** d", "a b\n\nc d", ["b\n\nc"]),
        ("** b ** `**c**` **d**", " b  `c` d", [" b ", "c", "d"]),
        (r"\** **a**", "** a", ["a"]),
        ("2**3**4", "234", ["3"]),
    ],
)
def test_stars(text, clean, marks):
    """Every ** is a bracket, whatever stands around it."""
    stripped = read_stars(text, keep=False)
    assert (stripped.text, inside(stripped)) == (clean, marks)
    assert read_stars(text, keep=True).text == text
    assert inside(read_stars(text, keep=True)) == marks


@pytest.mark.parametrize(
    ("text", "words"),
    [("a **b** **c", r"\*\* at character 8, .* is not closed"), ("** **", "white space between")],
)
def test_stars_that_do_not_balance(text, words):
    with pytest.raises(EmphasisError, match=words):
        read_stars(text, keep=True)


@pytest.mark.parametrize(
    ("text", "clean", "marks"),
    [
        ('<m alpha="0.1">a</m> <m>b</m>', "a b", [((0, 1), 0.1), ((2, 3), 1.0)]),
        ("<m alpha='2'>a</m>", "a", [((0, 1), 2.0)]),
        ("<m  alpha = .5>a</m>", "a", [((0, 1), 0.5)]),
        ('<m>a <m alpha="0.1">b</m></m>', "a b", [((0, 3), 1.0), ((2, 3), 0.1)]),
        (r'\<m alpha="0.1">a', '<m alpha="0.1">a', []),
    ],
)
def test_tags_with_a_strength(text, clean, marks):
    marked = read_tags(text, "m")
    assert (marked.text, marked.marks) == (clean, marks)


@pytest.mark.parametrize("alpha", ["0", "-1", "nan", "inf", "x", "", "1e999"])
def test_tag_whose_strength_is_none(alpha):
    with pytest.raises(
        EmphasisError, match=r"alpha: expected a finite number above 0 .*character 1"
    ):
        read_tags(f' <m alpha="{alpha}">a</m>', "m")


BEES = "Read.\n\n**Bees live in hives.\n\nThey make honey.**\n\nWhat do bees make?"


@pytest.mark.parametrize(
    ("kind", "text", "words"),
    [
        ("markdown", BEES, r"\*\* at character 7.*closed in another paragraph.*stars"),
        ("markdown", "**Bees live in hives.", "is never closed"),
        ("markdown", "- __a\n- b__", "not closed within its paragraph, list item"),
        ("markdown", "<x>\n**a**\n</x>", "in HTML"),
        ("markdown", "** Important ** read it", "white space follows"),
        ("tag", "<Emphasis>a</Emphasis>", "<Emphasis> at character 0.*not a tag here"),
        ("tag", "a <emphasis level='low'>b", "<emphasis level='low'> at character 2"),
        ("tag", "a < emphasis >b", "< emphasis > at character 2"),
        ("tag", "a &lt;emphasis&gt;b", "&lt;emphasis&gt; at character 2"),
    ],
)
def test_missed(kind, text, words):
    """Somebody meant to mark something, and it does not count: why."""
    markup = Markup(kind)
    assert markup.read(text).ranges == ()
    assert re.search(words, markup.missed(text))


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("markdown", "plain"),
        ("markdown", "Compare print(**a) and print(**b)."),
        ("markdown", "def f(*a, **kwargs): return 2**3"),
        ("markdown", "`**code**`\n\n```\n**block**\n```"),
        ("markdown", r"\*\*text\*\*"),
        ("markdown", "2 ** 3 ** 4"),
        ("tag", "plain <b>"),
        ("tag", r"\<emphasis> is a tag, and emphasis a word, <emphasised> another"),
        ("stars", "plain"),
        ("off", "**a <emphasis>"),
    ],
)
def test_nothing_is_missed(kind, text):
    assert Markup(kind).missed(text) is None


def test_advice_names_the_tag_that_is_there():
    """A closing tag is alone since its opening one is another."""
    with pytest.raises(
        EmphasisError, match=r'<emphasis level="low"> at character 8 is not a tag'
    ) as e:
        read_tags('See you <emphasis level="low">soon</emphasis>.')
    assert r"write \</emphasis> where" in str(e.value)
    assert '"markup": "off"' in str(e.value)


@given(st.text(alphabet="ab*_`\\<>/ \n", max_size=40) | st.text(max_size=20))
def test_any_text(text):
    """Never crashes; ranges lie in the text; text without marks is untouched."""
    for markup in (
        Markup("tag", "a"),
        Markup("markdown"),
        Markup("markdown", keep_marks=False),
        Markup("stars", keep_marks=False),
    ):
        markup.missed(text)
        try:
            marked = markup.read(text)
        except EmphasisError:
            continue
        assert all(0 <= a < b <= len(marked.text) for a, b in marked.ranges)
        if not markup.may_be_in(text):
            assert (marked.text, marked.ranges) == (text, ())


words = st.text(alphabet="xyz é🎉", min_size=1, max_size=6).filter(str.strip)


@given(st.lists(st.tuples(words, st.booleans()), min_size=1, max_size=6))
def test_round_trip(pieces):
    """What was wrapped comes back, and nothing else."""
    text = "".join(f"<emphasis>{w}</emphasis>" if m else w for w, m in pieces)
    marked = read_tags(text)
    assert marked.text == "".join(w for w, _ in pieces)
    assert inside(marked) == [w for w, m in pieces if m]


@pytest.mark.parametrize("name", HARD)
def test_hard_texts_end(name):
    """100,000 characters that one look at each character must be enough for: where the time grows
    with the square of the length they take minutes, and `pytest` ends the test."""
    kind, text = HARD[name]
    markup = Markup(kind)
    with contextlib.suppress(EmphasisError):
        marked = markup.read(text)
        assert marked.ranges or markup.missed(text) is None or "**" in text
