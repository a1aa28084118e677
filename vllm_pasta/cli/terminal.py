"""Text in a terminal: display width, wrapping, two columns, highlighting, progress."""

import os
import re
import sys
import threading
import time
import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import zip_longest
from pathlib import Path
from types import TracebackType
from typing import TextIO

NARROW_COLUMNS = 60
"""Below this width two columns are no longer readable: the texts stand one below the other."""

# Mark highlighted text. Control characters, so they have no width and `printable` removes any
# that come from outside.
START, END = "\x01", "\x02"


def printable(text: str) -> str:
    """``text`` without control characters but line ends, so that it cannot steer the terminal."""
    return "".join(
        "·" if unicodedata.category(c) == "Cc" and c != "\n" else c for c in text.expandtabs(4)
    )


def display_width(text: str) -> int:
    """Columns that ``text`` takes: two for wide East Asian characters, none for combining ones."""
    return sum(
        0
        if unicodedata.category(c) in ("Cc", "Cf", "Me", "Mn")
        else 2
        if unicodedata.east_asian_width(c) in "WF"
        else 1
        for c in text
    )


def wrap(text: str, width: int) -> list[str]:
    """Breaks ``text`` into lines of at most ``width`` columns; keeps line ends and indentation."""
    lines = []
    for line in text.split("\n"):
        current = ""
        for word in re.findall(r"\s*\S+", line):
            if current and display_width(current + word) > width:
                lines.append(current)
                word = word.lstrip()
                current = ""
            current += word
            while display_width(current) > width:
                head = _head(current, width)
                lines.append(head)
                current = current[len(head) :]
        lines.append(current)
    return lines


def _head(text: str, width: int) -> str:
    """The longest beginning of at most ``width`` columns, but at least one character."""
    end = 1
    while end < len(text) and display_width(text[: end + 1]) <= width:
        end += 1
    return text[:end]


def side_by_side(titles: tuple[str, str], texts: tuple[str, str], width: int) -> list[str]:
    """Two titled texts in two columns, or one below the other where ``width`` is narrow."""
    if width < NARROW_COLUMNS:
        return [
            line
            for title, text in zip(titles, texts, strict=True)
            for line in (title, *(f"  {line}" for line in wrap(text, max(width - 2, 1))))
        ]
    column = (width - 3) // 2
    left, right = ([title, *wrap(text, column)] for title, text in zip(titles, texts, strict=True))
    return [
        f"{a}{' ' * (column - display_width(a))} │ {b}".rstrip()
        for a, b in zip_longest(left, right, fillvalue="")
    ]


def highlight(lines: list[str], on: str, off: str) -> Iterator[str]:
    """Puts ``on`` and ``off`` around what stands between ``START`` and ``END``, line by line."""
    inside = False
    for line in lines:
        shown = (on if inside else "") + line.replace(START, on).replace(END, off)
        inside = line.rfind(START) > line.rfind(END) or (
            inside and START not in line and END not in line
        )
        yield shown + (off if inside else "")


class Phase:
    """Shows that something is under way, with a dot every two seconds, and times it.

    Attributes:
        seconds: Wall time, once the phase has ended.
    """

    def __init__(self, what: str, stream: TextIO) -> None:
        self._what = what
        self._stream = stream
        self._ended = threading.Event()
        self._dots = threading.Thread(target=self._show_dots, daemon=True)
        self.seconds = 0.0

    def __enter__(self) -> "Phase":
        self._write(f"{self._what} ")
        self._start = time.perf_counter()
        self._dots.start()
        return self

    def __exit__(
        self,
        error: type[BaseException] | None,
        _value: BaseException | None,
        _traceback: TracebackType | None,
    ) -> None:
        self.seconds = time.perf_counter() - self._start
        self._ended.set()
        self._dots.join()
        self._write(f" {'failed after ' if error else ''}{self.seconds:.1f} s\n")

    def _show_dots(self) -> None:
        while not self._ended.wait(2):
            self._write(".")

    def _write(self, text: str) -> None:
        self._stream.write(text)
        self._stream.flush()


@contextmanager
def output_to_file(path: Path) -> Iterator[TextIO]:
    """Sends what this process and its children write to a file; gives the terminal's stderr.

    File descriptors are moved, not ``sys.stdout``: child processes and C++ code write too.
    """
    streams = (sys.stdout, sys.stderr)
    kept = [os.dup(stream.fileno()) for stream in streams]
    with open(path, "wb") as log, os.fdopen(os.dup(kept[1]), "w", errors="replace") as terminal:
        for stream in streams:
            stream.flush()
            os.dup2(log.fileno(), stream.fileno())
        try:
            yield terminal
        finally:
            for stream, fd in zip(streams, kept, strict=True):
                stream.flush()
                os.dup2(fd, stream.fileno())
                os.close(fd)
