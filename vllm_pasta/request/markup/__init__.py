"""Marks written into the text itself.

**Tags** (``"tag"``): ``<emphasis>…</emphasis>``, or ``<emphasis alpha="0.1">…</emphasis>`` with a
strength of its own. They are removed before the model sees the text. They nest (where they overlap
the strongest counts) and must balance. A backslash before a tag takes its meaning away, and is
removed. Anything that is not written exactly so, ``<emphasis foo>`` say, is text.

**Markdown** (``"markdown"``): what CommonMark calls strong emphasis, ``**bold**`` and ``__bold__``:
within one paragraph or heading, not in code and HTML. What is not balanced is text.

**Stars** (``"stars"``): every ``**`` is a bracket, whatever stands around it: the first opens, the
next closes, over paragraphs, lists and code. They must balance; ``\\**`` is text. For prompts whose
every ``**`` is a mark, as those of SEKA's benchmarks.

In both the stars stay or go, as the user chooses; backslashes go with them.
"""

import re
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

from vllm_pasta.errors import EmphasisError
from vllm_pasta.request.marks import parse_alpha
from vllm_pasta.request.markup import markdown

Range = tuple[int, int]

MARKUPS = ("tag", "markdown", "stars", "off")

ROLES = ("system", "developer", "user")
"""Roles whose messages are read for markup, unless the operator says otherwise. An assistant's
answer and a tool's result are other people's words: a web page must not steer the model."""


@dataclass(frozen=True)
class Marked:
    """Text as the model shall see it, and the marked character ranges in it.

    Attributes:
        text: The text.
        ranges: Half-open, sorted.
        alphas: A factor for each range; empty where all are 1, full strength.
    """

    text: str
    ranges: tuple[Range, ...]
    alphas: tuple[float, ...] = ()

    @property
    def marks(self) -> list[tuple[Range, float]]:
        """Each range with its factor."""
        return list(zip(self.ranges, self.alphas or (1.0,) * len(self.ranges), strict=True))


def read_tags(text: str, tag: str = "emphasis") -> Marked:
    """Takes tag markup out of ``text``.

    Raises:
        EmphasisError: a tag without its partner, nothing between the two, or an ``alpha`` that is
            no factor; shows the place.
    """
    name = re.escape(tag)
    pattern = re.compile(
        rf"(?P<escape>\\?)(?:(?P<close></{name}>)"
        rf"|<{name}(?:\s+alpha\s*=\s*(?P<alpha>\"[^\"<>]*\"|'[^'<>]*'|[^\s\"'<>]+))?>)"
    )
    parts: list[str] = []
    found: list[tuple[Range, float]] = []
    open_at: list[tuple[int, re.Match[str]]] = []  # (position in the result, the tag)
    length = last = words_end = 0  # words_end: where the result's last word ends
    for match in pattern.finditer(text):
        kept = text[last : match.start()]
        if match["escape"]:  # the tag stays, its backslash goes
            kept += match[0][1:]
        parts.append(kept)
        if kept.strip():
            words_end = length + len(kept.rstrip())
        length += len(kept)
        last = match.end()
        if match["escape"]:
            continue
        if not match["close"]:
            open_at.append((length, match))
        elif not open_at:
            raise _unbalanced(text, match, f"<{tag}>", tag)
        else:
            start, opening = open_at.pop()
            if words_end <= start:
                raise EmphasisError(
                    f"nothing but white space between the tags at {_place(text, opening.start())}",
                    field="markup",
                )
            found.append(((start, length), _alpha(opening, text)))
    if open_at:
        raise _unbalanced(text, open_at[-1][1], f"</{tag}>", tag)
    parts.append(text[last:])
    return _marked("".join(parts), found)


def read_markdown(text: str, *, keep: bool) -> Marked:
    """Finds Markdown's strong emphasis in ``text``, in time linear in its length.

    Args:
        text: The text.
        keep: Whether stars and backslashes stay, which leaves the text untouched.
    """
    read = markdown.parse(text)
    ranges = [(strong.start, strong.end) for strong in read.strong]
    if keep or not ranges:
        return Marked(text, tuple(ranges))
    cuts = [(at, at + 1) for at in read.escapes]
    for strong in read.strong:
        cuts += [(strong.open, strong.start), (strong.end, strong.close)]
    return _without(text, ranges, sorted(cuts))


def read_stars(text: str, *, keep: bool) -> Marked:
    """Finds what stands between each ``**`` and the next, wherever they are.

    Raises:
        EmphasisError: an odd number of them, or nothing between two; shows the place.
    """
    at, cuts = [], []
    for match in re.finditer(r"(\\?)\*\*", text):
        if match[1]:
            cuts.append((match.start(), match.start() + 1))
        else:
            at.append(match.start())
    if len(at) % 2:
        raise EmphasisError(
            f"** at {_place(text, at[-1])} opens and is not closed: with markup stars every ** is "
            "a mark; write \\** where stars are meant as text",
            field="markup",
        )
    ranges = [(a + 2, b) for a, b in zip(at[::2], at[1::2], strict=True)]
    for start, end in ranges:
        if not text[start:end].strip():
            raise EmphasisError(
                f"nothing but white space between the stars at {_place(text, start - 2)}",
                field="markup",
            )
    if keep or not ranges:
        return Marked(text, tuple(ranges))
    return _without(text, ranges, sorted([*cuts, *((a, a + 2) for a in at)]))


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
        kind: "tag", "markdown", "stars" or "off".
        tag: The tag's name.
        keep_marks: Whether stars stay.
        roles: Roles of a chat whose messages are read; those of others are text.
    """

    kind: str = "off"
    tag: str = "emphasis"
    keep_marks: bool = True
    roles: tuple[str, ...] = ROLES

    def may_be_in(self, text: str) -> bool:
        """Quick check: False means that ``text`` holds no markup, True that it may."""
        if self.kind == "tag":
            return f"<{self.tag}" in text or f"</{self.tag}>" in text
        if self.kind == "markdown":
            return "**" in text or "__" in text
        return self.kind == "stars" and "**" in text

    def read(self, text: str) -> Marked:
        """The text as the model shall see it, and its marks.

        Raises:
            EmphasisError: the markup is malformed; shows the place.
        """
        if self.kind == "tag":
            return read_tags(text, self.tag)
        if self.kind == "markdown":
            return read_markdown(text, keep=self.keep_marks)
        if self.kind == "stars":
            return read_stars(text, keep=self.keep_marks)
        return Marked(text, ())

    def missed(self, text: str) -> str | None:
        """Why a text in which `read` finds nothing is likely to be meant otherwise.

        Returns:
            A sentence that shows the first mark that someone seems to have written and why it
            does not count; None where there is none.
        """
        if self.kind == "tag":
            near = _near_tag(text, self.tag)
            return near and f"{near[0]} at {_place(text, near.start())} {_exactly(self.tag)}"
        return _missed_bold(text) if self.kind == "markdown" else None


def _near_tag(text: str, tag: str) -> re.Match[str] | None:
    """What looks like the tag and is not it, first in ``text``."""
    name = re.escape(tag)
    near = re.compile(rf"(?<!\\)(?:<\s*+/?+\s*+{name}\b[^<>]*+>|&lt;/?{name}&gt;)", re.IGNORECASE)
    exact = re.compile(rf"</?{name}>|<{name}\s+alpha\s*=\s*[^<>]*>")
    return next((m for m in near.finditer(text) if not exact.fullmatch(m[0])), None)


def _exactly(tag: str) -> str:
    return f'is not a tag here: write <{tag}>…</{tag}>, or <{tag} alpha="0.1">…</{tag}>, exactly so'


_BOLD = re.compile(r"(?<!\\)(?:\*\*+|(?<!_)__(?!_))")
_LINE_START = re.compile(r"[ \t]*(?:(?:[-+*>]|\d{1,9}[.)]|#{1,6})[ \t]+)*")
_UNPACKED = re.compile(r"[(,]\s*\*\*\w")


def _missed_bold(text: str) -> str | None:
    """`Markup.missed` for Markdown in which nothing is strong.

    Runs in code do not count, nor do lone ones that read as a program's (``f(**options)``,
    ``2**3``): a run does that opens a word, at a line's start or after white space or a bracket.
    """
    read = markdown.parse(text)
    code, html = sorted(read.code), sorted(read.html)
    runs = [run for run in _BOLD.finditer(text) if not _is_in(code, run.start(), run.end())]
    closing: list[re.Match[str] | None] = []  # for each run, the next that can close it
    following: dict[str, re.Match[str]] = {}
    for run in reversed(runs):
        closing.append(following.get(run[0][0]))
        if _closes(text, run):
            following[run[0][0]] = run
    closing.reverse()
    searched, line_open = 0, _end_of_line_start(text, 0)
    for i, (run, closed) in enumerate(zip(runs, closing, strict=True)):
        start, end = run.span()
        before, after = text[start - 1 : start], text[end : end + 1]
        if line := text.rfind("\n", searched, start) + 1:
            line_open = _end_of_line_start(text, line)
        searched = end
        opens_line = line_open == start
        if not (opens_line or before.isspace() or before in "([{\"'“‘«"):
            continue
        shown = f"{run[0][:2]} at {_place(text, start)}"
        if not after.strip():
            if opens_line and after and closed is None and len(runs) > i + 1:
                return f"{shown} opens nothing, since white space follows it"
            continue
        if _is_in(html, start, start + 1):
            return (
                f"{shown} is in HTML, which Markdown leaves as it is; leave a line empty after the "
                "HTML tag"
            )
        if closed is not None:
            if re.search(r"\n[ \t]*\r?\n", text[end : closed.start()]):
                return (
                    f"{shown} is closed in another paragraph, and Markdown's bold ends with its "
                    'paragraph; mark each paragraph, or send "markup": "stars", in which every ** '
                    "is a mark"
                )
            return f"{shown} is not closed within its paragraph, list item or heading"
        if not _UNPACKED.search(text[max(0, start - 20) : end + 1]):
            return f"{shown} is never closed"
    return None


def _end_of_line_start(text: str, line: int) -> int:
    """Where the text of the line that begins at ``line`` does, behind bullets and the like."""
    match = _LINE_START.match(text, line)
    assert match is not None  # it may be empty
    return match.end()


def _is_in(ranges: Sequence[Range], start: int, end: int) -> bool:
    """Whether one of the sorted ranges holds all of ``[start, end)``."""
    i = bisect_left(ranges, (end, 0)) - 1
    return i >= 0 and ranges[i][1] >= end


def _closes(text: str, run: re.Match[str]) -> bool:
    before, after = text[run.start() - 1 : run.start()], text[run.end() : run.end() + 1]
    return bool(before.strip()) and not (after.isalnum() or (after and after in "([{<\"'"))


def _marked(text: str, found: list[tuple[Range, float]]) -> Marked:
    found.sort()
    alphas = tuple(alpha for _, alpha in found)
    return Marked(
        text,
        tuple(place for place, _ in found),
        () if all(alpha == 1.0 for alpha in alphas) else alphas,
    )


def _alpha(opening: re.Match[str], text: str) -> float:
    if opening["alpha"] is None:
        return 1.0
    written = opening["alpha"].strip("\"'")
    try:
        return parse_alpha(float(written))
    except ValueError:
        raise EmphasisError(
            f"alpha: expected a finite number above 0 in the tag at "
            f"{_place(text, opening.start())}, got {written!r:.80}",
            field="markup",
        ) from None


def _unbalanced(text: str, match: re.Match[str], missing: str, tag: str) -> EmphasisError:
    near = _near_tag(text, tag)
    return EmphasisError(
        f"{match[0]} at {_place(text, match.start())} has no {missing}"
        + (f"; {near[0]} at character {near.start()} {_exactly(tag)}" if near else "")
        + f'; write \\{match[0]} where the tag is meant as text, or send "markup": "off" where '
        "all of it is",
        field="markup",
    )


def _place(text: str, at: int) -> str:
    return f"character {at}, {text[max(0, at - 20) : at + 30]!r}"
