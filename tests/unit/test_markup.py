"""Marks in the text itself: what is taken out, what stays, what is refused."""

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_pasta import EmphasisError
from vllm_pasta.request.markup import Markup, read_markdown, read_tags


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
    "piece", ["**a ", "__a ", "__a a** ", "**a\n", "`a", "\n \n", "```\n~~~\n"]
)
def test_no_text_takes_long(piece):
    """In the server's event loop a text of quadratic cost would hold up every request. With such a
    cost this takes minutes, and the suite's time limit strikes."""
    text = piece * (1_000_000 // len(piece))
    read_markdown(text, keep=False)
    with contextlib.suppress(EmphasisError):
        read_tags(text.replace("*", "<emphasis>"))


@given(st.text(alphabet="ab*_`\\<>/ \n", max_size=40) | st.text(max_size=20))
def test_any_text(text):
    """Never crashes; ranges lie in the text; text without marks is untouched."""
    for markup in (Markup("tag", "a"), Markup("markdown"), Markup("markdown", keep_marks=False)):
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
