"""Within one paragraph or heading: how runs of ``*`` and ``_`` pair up beside code spans, escapes,
autolinks and raw HTML."""

import re
import unicodedata
from bisect import bisect_left, bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

from vllm_pasta.request.markup.markdown.document import Document, Strong

TAG = (
    r"[A-Za-z][A-Za-z0-9-]{0,100}"
    r"(?:\s{1,100}[A-Za-z_:][\w.:-]{0,100}(?:\s{0,100}=\s{0,100}"
    r"(?:[^\s\"'=<>`]{1,1000}|'[^']{0,1000}'|\"[^\"]{0,1000}\"))?){0,100}\s{0,100}/?>"
    r"|/[A-Za-z][A-Za-z0-9-]{0,100}\s{0,100}>"
)
"""After ``<``. No part is unbounded, so that no text makes this search far, again and again."""

_ANGLE = re.compile(
    rf"<(?:[A-Za-z][A-Za-z0-9+.-]{{1,31}}:[^\s<>]{{0,2000}}>"
    r"|[a-zA-Z0-9.!#$%&'*+/=?^_`{|}~-]{1,200}@[a-zA-Z0-9.-]{1,200}>"
    rf"|(?:{TAG})|(?P<open>!---?>|!--|\?|!\[CDATA\[|![A-Za-z]))",
    re.ASCII,
)
_CLOSED_BY = {"!--": "-->", "?": "?>", "![CDATA[": "]]>"}
_SPECIAL = re.compile(r"\\.|`+|<|\*+|_+", re.DOTALL)
_TICKS = re.compile("`+")


@lru_cache(maxsize=4096)
def _kind(char: str) -> str:
    """ "space", "punctuation" or "word", as flanking runs see a character; "" is an edge."""
    category = unicodedata.category(char) if char else "Zs"
    if category == "Zs" or char in "\t\n\f\r":
        return "space"
    return "punctuation" if category[0] in "PS" else "word"


@dataclass
class _Run:
    """A run of one delimiter, of which ``[start, end)`` is not used yet."""

    char: str
    start: int
    end: int
    opens: bool
    closes: bool
    length: int


def read(text: str, lines: list[tuple[int, int]], document: Document) -> None:
    """Adds to ``document`` what stands in one paragraph or heading.

    Args:
        text: The whole text.
        lines: Ranges of it: the block's lines, without what marks them as such.
        document: What was found.
    """
    content = "\n".join(text[a:b] for a, b in lines)
    begins, length = [], 0  # where each line begins in the content
    for a, b in lines:
        begins.append(length)
        length += b - a + 1

    def place(position: int) -> int:
        line = bisect_right(begins, position) - 1
        return lines[line][0] + position - begins[line]

    def place_end(position: int) -> int:
        return place(position - 1) + 1

    runs = []
    for token in _tokens(content):
        start, end = token.start, token.end
        if token.kind == "run":
            runs.append(_run(content, start, end))
        elif token.kind == "escape":
            if content[start + 1] in "*_":
                document.escapes.append(place(start))
        else:
            ranges = document.code if token.kind == "code" else document.html
            ranges.append((place(start), place_end(end)))
    for opened, start, end, closed in _pairs(runs):
        document.strong.append(
            Strong(place(opened), place_end(start), place(end), place_end(closed))
        )


class _Token(NamedTuple):
    kind: str  # "run", "escape", "code" or "html"
    start: int
    end: int


def _tokens(content: str) -> Iterator[_Token]:
    ticks: dict[int, list[int]] = {}  # where runs of so many backticks start
    for run in _TICKS.finditer(content):
        ticks.setdefault(len(run[0]), []).append(run.start())
    missing: set[str] = set()  # what does not come any more, so that it is looked for once
    position = 0
    while match := _SPECIAL.search(content, position):
        start, position = match.span()
        char = match[0][0]
        if char == "\\":
            if match[0] == "\\`":  # the tick stays text; what follows it is another run
                position = start + 2
            yield _Token("escape", start, position)
        elif char == "`":
            same = ticks.get(position - start, [])
            after = bisect_left(same, position)
            if after < len(same):
                position = same[after] + position - start
                yield _Token("code", start, position)
        elif char != "<":
            yield _Token("run", start, position)
        elif angle := _ANGLE.match(content, start):
            opened, end = angle["open"], angle.end()
            if opened and opened not in ("!-->", "!--->"):
                closing = _CLOSED_BY.get(opened, ">")
                found = -1 if closing in missing else content.find(closing, end)
                if found < 0:
                    missing.add(closing)
                    continue
                end = found + len(closing)
            position = end
            yield _Token("html", start, end)


def _run(content: str, start: int, end: int) -> _Run:
    char = content[start]
    before = _kind(content[start - 1 : start])
    after = _kind(content[end : end + 1])
    left = after == "word" or (after == "punctuation" and before != "word")
    right = before == "word" or (before == "punctuation" and after != "word")
    if char == "*":
        return _Run(char, start, end, left, right, end - start)
    opens = left and (not right or before == "punctuation")
    closes = right and (not left or after == "punctuation")
    return _Run(char, start, end, opens, closes, end - start)


def _pairs(runs: list[_Run]) -> Iterator[Strong]:
    """How runs pair up: the specification's "process emphasis", strong emphasis alone."""
    count = len(runs)
    previous, following = list(range(-1, count - 1)), list(range(1, count + 1))

    def remove(i: int) -> None:
        if previous[i] >= 0:
            following[previous[i]] = following[i]
        if following[i] < count:
            previous[following[i]] = previous[i]

    bottom: dict[tuple[str, bool, int], int] = {}
    current = 0
    while current < count:
        closer = runs[current]
        if not closer.closes:
            current = following[current]
            continue
        key = (closer.char, closer.opens, closer.length % 3)
        lowest, i = bottom.get(key, -1), previous[current]
        while i > lowest and not _match(runs[i], closer):
            i = previous[i]
        if i <= lowest:
            bottom[key] = previous[current]
            if not closer.opens:
                remove(current)
            current = following[current]
            continue
        opener = runs[i]
        used = 2 if min(opener.end - opener.start, closer.end - closer.start) >= 2 else 1
        if used == 2:
            yield Strong(opener.end - 2, opener.end, closer.start, closer.start + 2)
        opener.end -= used
        closer.start += used
        following[i], previous[current] = current, i  # those between are text
        if opener.start == opener.end:
            remove(i)
        if closer.start == closer.end:
            remove(current)
            current = following[current]


def _match(opener: _Run, closer: _Run) -> bool:
    if opener.char != closer.char or not opener.opens:
        return False
    both = opener.closes or closer.opens
    return not (
        both
        and (opener.length + closer.length) % 3 == 0
        and (opener.length % 3 != 0 or closer.length % 3 != 0)
    )
