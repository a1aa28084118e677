"""Marks written into the text itself: ``<emphasis>…</emphasis>``, or Markdown's ``**bold**``.

Tags. Removed before the model sees the text. They nest (the union counts) and must balance. A
backslash before a tag takes its meaning away, and is removed. A tag is written exactly, without
spaces or attributes; anything else, ``<emphasis foo>`` say, is text.

Markdown. ``**bold**`` and ``__bold__`` as CommonMark reads them, in the common cases: no white
space just inside, no empty line within, ``__`` not inside a word, nothing inside code spans and
fenced code; a mark closes the nearest that is open. What is not balanced is text. A backslash
before a star or underscore takes its meaning away. The stars stay or go, as the user chooses;
backslashes go with them.
"""

import re
from bisect import bisect_left
from dataclasses import dataclass
from itertools import accumulate

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
    length = last = words_end = 0  # words_end: where the result's last word ends
    for match in pattern.finditer(text):
        kept = text[last : match.start()]
        if match[1]:  # escaped: the tag stays, its backslash goes
            kept += match[0][1:]
        parts.append(kept)
        if kept.strip():
            words_end = length + len(kept.rstrip())
        length += len(kept)
        last = match.end()
        if match[1]:
            continue
        if not match[2]:
            open_at.append((length, match.start()))
        elif not open_at:
            raise _unbalanced(text, match.start(), f"</{tag}>", f"<{tag}>", tag)
        else:
            start, at = open_at.pop()
            if words_end <= start:
                raise EmphasisError(
                    f"nothing but white space between the tags at {_place(text, at)}",
                    field="markup",
                )
            ranges.append((start, length))
    if open_at:
        raise _unbalanced(text, open_at[-1][1], f"<{tag}>", f"</{tag}>", tag)
    parts.append(text[last:])
    return Marked("".join(parts), tuple(sorted(ranges)))


_TICKS = re.compile("`+")
_PIECE = re.compile(
    r"(?P<fence>^(```+|~~~+).*?(?:^\2|\Z))|(?P<ticks>`+)|(?P<escape>\\)[*_]|\\[^\n]"
    r"|(?P<blank>\n\s*\n)|(?P<mark>\*{2,}|(?<!_)__(?!_))",
    re.DOTALL | re.MULTILINE,
)


def read_markdown(text: str, *, keep: bool) -> Marked:
    """Finds Markdown bold in ``text``, in time linear in its length.

    Args:
        text: The text.
        keep: Whether stars and backslashes stay, which leaves the text untouched.
    """
    ranges: list[Range] = []
    cuts: list[Range] = []  # marks and their backslashes: what goes, unless kept
    openers: dict[str, list[int]] = {"**": [], "__": []}  # where marks start that are open
    ticks: dict[int, list[int]] = {}  # where runs of so many backticks start
    for run in _TICKS.finditer(text):
        ticks.setdefault(len(run[0]), []).append(run.start())
    position = 0
    while match := _PIECE.search(text, position):
        position = match.end()
        if match["ticks"]:  # code up to the next run that is as long, if there is one
            same = ticks.get(len(match["ticks"]), [])
            if (next_run := bisect_left(same, position)) < len(same):
                position = same[next_run] + len(match["ticks"])
        elif match["escape"]:
            cuts.append(match.span("escape"))
        elif match["blank"]:
            openers = {"**": [], "__": []}  # bold ends with its paragraph
        elif match["mark"]:
            (start, end), kind = match.span(), match[0][:2]
            before, after = text[start - 1 : start], text[end : end + 1]
            in_word = kind == "__"  # which does not count there
            if openers[kind] and before.strip() and not (in_word and after.isalnum()):
                at = openers[kind].pop()
                for places in openers.values():  # what was opened within and not closed is text
                    while places and places[-1] > at:
                        places.pop()
                ranges.append((at + 2, start))
                cuts += [(at, at + 2), (start, start + 2)]
                start += 2
            if end - start >= 2 and after.strip() and not (in_word and before.isalnum()):
                openers[kind].append(end - 2)
    ranges.sort()
    return _without(text, ranges, sorted(cuts)) if ranges and not keep else Marked(text, (*ranges,))


def _without(text: str, ranges: list[Range], cuts: list[Range]) -> Marked:
    """``text`` with ``cuts`` taken out, which are sorted and disjoint; ``ranges`` move along."""
    starts = [start for start, _ in cuts]
    gone = [0, *accumulate(end - start for start, end in cuts)]
    kept = zip([0, *(end for _, end in cuts)], [*starts, len(text)], strict=True)

    def moved(position: int) -> int:
        return position - gone[bisect_left(starts, position)]

    return Marked(
        "".join(text[a:b] for a, b in kept), tuple((moved(a), moved(b)) for a, b in ranges)
    )


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


def _unbalanced(text: str, at: int, found: str, missing: str, tag: str) -> EmphasisError:
    return EmphasisError(
        f"{found} at {_place(text, at)} has no {missing}; write \\<{tag}> where the tag is meant "
        "as text",
        field="markup",
    )


def _place(text: str, at: int) -> str:
    return f"character {at}, {text[max(0, at - 20) : at + 30]!r}"
