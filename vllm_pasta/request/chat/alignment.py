"""Matches two renderings of one conversation that differ in a clock or an id.

What they have in common is matched line by line, then word by word, then letter by letter at the
edges; a place in one has a place in the other where the text around it is the same.
"""

import re
from bisect import bisect_right
from collections.abc import Callable
from difflib import SequenceMatcher

_WORDS = re.compile(r"\w+|\s+|[^\w\s]")
_MOST = 4_000_000
"""Most pairs of lines or words that are compared; beyond, only the edges are."""

Block = tuple[int, int, int]
"""``(start in the first text, start in the second, length)`` of text that both have."""


class Alignment:
    """Where text of ``first`` is in ``second``.

    Args:
        first, second: Two texts that are mostly the same.
    """

    def __init__(self, first: str, second: str) -> None:
        self.second = second
        self.blocks: list[Block] = []
        for a, b, length in _common(first, second, [_lines, _words]):
            if self.blocks:
                i, j, n = self.blocks[-1]
                if (i + n, j + n) == (a, b):
                    self.blocks[-1] = (i, j, n + length)
                    continue
            self.blocks.append((a, b, length))
        self._starts = [block[0] for block in self.blocks]

    def moved(self, start: int, end: int) -> tuple[int, int] | None:
        """The place in ``second`` of ``[start, end)`` in ``first``; None where it is not there."""
        at = bisect_right(self._starts, start) - 1
        if at < 0:
            return None
        a, b, length = self.blocks[at]
        return (start - a + b, end - a + b) if end <= a + length else None

    def only_in_second(self) -> list[str]:
        """The parts of ``second`` that are not in ``first``."""
        edges = [0]
        for _, b, length in self.blocks:
            edges += [b, b + length]
        edges.append(len(self.second))
        return [self.second[a:b] for a, b in zip(edges[::2], edges[1::2], strict=True) if a < b]


def _lines(text: str) -> list[str]:
    return text.splitlines(keepends=True)


def _words(text: str) -> list[str]:
    return _WORDS.findall(text)


def _common(first: str, second: str, ways: list[Callable[[str], list[str]]]) -> list[Block]:
    """What both have, in order: the edges, and what each way of splitting finds between them."""
    if first == second:
        return [(0, 0, len(first))] if first else []
    shorter = min(len(first), len(second))
    head = _same(first, second, shorter)
    tail = _same(first[::-1], second[::-1], shorter - head)
    blocks = [(0, 0, head)] if head else []
    a, b = first[head : len(first) - tail], second[head : len(second) - tail]
    if a and b and ways:
        split, *finer = ways
        ours, theirs = split(a), split(b)
        if len(ours) * len(theirs) <= _MOST:
            i, j = head, head
            matcher = SequenceMatcher(None, ours, theirs, autojunk=False)
            for _, i1, i2, j1, j2 in matcher.get_opcodes():
                x, y = "".join(ours[i1:i2]), "".join(theirs[j1:j2])
                blocks += [(i + p, j + q, n) for p, q, n in _common(x, y, finer)]
                i, j = i + len(x), j + len(y)
    if tail:
        blocks.append((len(first) - tail, len(second) - tail, tail))
    return blocks


def _same(first: str, second: str, most: int) -> int:
    """How many characters at the start are the same."""
    low, high = 0, most
    while low < high:
        middle = (low + high + 1) // 2
        if first[low:middle] == second[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low
