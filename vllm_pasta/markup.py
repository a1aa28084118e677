"""Marks written into the text itself: ``<emphasis>…</emphasis>``, or Markdown's ``**bold**``.

Tags. Removed before the model sees the text. They nest (the union counts) and must balance. A
backslash before a tag takes its meaning away, and is removed. A tag is written exactly, without
spaces or attributes; anything else, ``<emphasis foo>`` say, is text.

Markdown. ``**bold**`` and ``__bold__`` as CommonMark reads them, in the common cases: no white
space just inside, no empty line within, ``__`` not inside a word, nothing inside code spans and
fenced code. What is not balanced is text. A backslash before a star or underscore takes its
meaning away. The stars stay or go, as the user chooses; backslashes go with them.
"""

import re
from dataclasses import dataclass

from vllm_pasta.errors import EmphasisError

Range = tuple[int, int]


@dataclass(frozen=True)
class Marked:
    """Text as the model shall see it, and the marked character ranges in it."""

    text: str
    ranges: tuple[Range, ...]


def read_tags(text: str, tag: str = "emphasis") -> Marked:
    """Takes tag markup out of ``text``.

    Raises:
        EmphasisError: a tag without its partner, or nothing between the two; shows the place.
    """
    pattern = re.compile(rf"(\\?)<(/?){re.escape(tag)}>")
    parts: list[str] = []
    ranges: list[Range] = []
    open_at: list[tuple[int, int]] = []  # (position in the result, position in text)
    length = last = 0
    for match in pattern.finditer(text):
        kept = text[last : match.start()]
        if match[1]:  # escaped: the tag stays, its backslash goes
            kept += match[0][1:]
        parts.append(kept)
        length += len(kept)
        last = match.end()
        if match[1]:
            continue
        if not match[2]:
            open_at.append((length, match.start()))
        elif not open_at:
            raise EmphasisError(_unbalanced(text, match.start(), f"</{tag}>", f"<{tag}>", tag))
        else:
            start, at = open_at.pop()
            if not "".join(parts)[start:].strip():
                raise EmphasisError(
                    f"nothing but white space between the tags at {_place(text, at)}",
                    field="markup",
                )
            ranges.append((start, length))
    if open_at:
        raise EmphasisError(_unbalanced(text, open_at[-1][1], f"<{tag}>", f"</{tag}>", tag))
    parts.append(text[last:])
    return Marked("".join(parts), tuple(sorted(ranges)))


_CODE = re.compile(r"(?ms)^(```+|~~~+).*?(?:^\1|\Z)|(?<!`)(`+)(?!`).+?(?<!`)\2(?!`)")
_BOLD = re.compile(
    r"(?<!\\)\*\*(?=[^\s*])(?P<stars>(?:(?!\n\s*\n)(?:\\.|[^\\]))+?)(?<=\S)(?<!\\)\*\*"
    r"|(?<![\w\\])__(?=[^\s_])(?P<lines>(?:(?!\n\s*\n)(?:\\.|[^\\]))+?)(?<=\S)(?<!\\)__(?!\w)",
    re.DOTALL,
)
_ESCAPED = re.compile(r"\\([*_])")


def read_markdown(text: str, *, keep: bool) -> Marked:
    """Finds Markdown bold in ``text``.

    Args:
        text: The text.
        keep: Whether stars and backslashes stay, which leaves the text untouched.
    """
    code = [match.span() for match in _CODE.finditer(text)]
    parts: list[str] = []
    ranges: list[Range] = []
    length = last = position = 0

    def add(piece: str, *, literal: bool = False) -> None:
        nonlocal length
        piece = piece if keep or literal else _ESCAPED.sub(r"\1", piece)
        parts.append(piece)
        length += len(piece)

    def add_between(start: int, end: int) -> None:
        for a, b in code:  # code is literal: its backslashes stay
            if start <= a and b <= end:
                add(text[start:a])
                add(text[a:b], literal=True)
                start = b
        add(text[start:end])

    while match := _BOLD.search(text, position):
        inside = next((b for a, b in code if a <= match.start() < b), None)
        if inside is not None:
            position = inside
            continue
        group = "stars" if match["stars"] is not None else "lines"
        start, end = match.span(group)
        add_between(last, start if keep else match.start())
        begin = length
        add_between(start, end)
        ranges.append((begin, length))
        last = end if keep else match.end()
        position = match.end()
    if not ranges:
        return Marked(text, ())
    add_between(last, len(text))
    return Marked("".join(parts), tuple(ranges))


@dataclass(frozen=True)
class Markup:
    """Which markup to read.

    Attributes:
        kind: "tag", "markdown" or "off".
        tag: The tag's name.
        keep_marks: Whether Markdown's stars stay.
    """

    kind: str = "off"
    tag: str = "emphasis"
    keep_marks: bool = True

    def may_be_in(self, text: str) -> bool:
        """Whether it is worth reading: cheap, and right where it says no."""
        if self.kind == "tag":
            return f"{self.tag}>" in text
        return self.kind == "markdown" and ("**" in text or "__" in text)

    def read(self, text: str) -> Marked:
        if self.kind == "tag":
            return read_tags(text, self.tag)
        if self.kind == "markdown":
            return read_markdown(text, keep=self.keep_marks)
        return Marked(text, ())


def _unbalanced(text: str, at: int, found: str, missing: str, tag: str) -> str:
    return (
        f"markup: {found} at {_place(text, at)} has no {missing}; write \\<{tag}> where the tag "
        "is meant as text"
    )


def _place(text: str, at: int) -> str:
    return f"character {at}, {text[max(0, at - 20) : at + 30]!r}"
