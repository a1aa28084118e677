"""Text in a terminal, drawn by rich: emphasis, tables, progress; and vLLM's output in a file."""

import os
import shutil
import sys
import time
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import TextIO

from rich import box
from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

NARROW_COLUMNS = 60
"""Below this width two columns are hard to read: the texts stand one below the other."""

EMPHASIS = "bold yellow"
GAP = 3
"""Spaces between the columns of a table."""


def coloured(stream: TextIO) -> bool:
    """Whether to use colour: on a terminal, unless NO_COLOR holds anything (https://no-color.org)."""
    return stream.isatty() and not os.environ.get("NO_COLOR")


def console(stream: TextIO) -> Console:
    """A console that prints text as it is: rich's own markup and highlighting are off."""
    return Console(
        file=stream,
        width=shutil.get_terminal_size((100, 24)).columns,
        force_terminal=stream.isatty(),
        color_system="auto" if coloured(stream) else None,
        highlight=False,
        markup=False,
        emoji=False,
    )


def printable(text: str) -> str:
    """``text`` without control characters but line ends, so that it cannot steer the terminal."""
    return "".join(
        "·" if unicodedata.category(c) == "Cc" and c != "\n" else c for c in text.expandtabs(4)
    )


def marked(parts: Iterable[tuple[str, bool]], colour: bool) -> Text:
    """Joins the parts of a text; the emphasised ones are coloured, or stand between « and ».

    Args:
        parts: Pieces of the text, each with whether it is emphasised.
        colour: Whether to use colour.
    """
    text = Text()
    for part, emphasised in parts:
        if emphasised and not colour:
            text.append(f"«{printable(part)}»")
        else:
            text.append(printable(part), style=EMPHASIS if emphasised else None)
    return text


def side_by_side(titles: tuple[str, str], texts: tuple[str, str], width: int) -> RenderableType:
    """Two titled texts in two columns, or one below the other where ``width`` is narrow.

    Args:
        titles: A title of one line for each text.
        texts: The texts; control characters are not shown.
        width: Columns of the terminal.
    """
    if width < NARROW_COLUMNS:
        return Group(
            *(
                part
                for title, text in zip(titles, texts, strict=True)
                for part in (Text(title), Padding(Text(printable(text)), (0, 0, 0, 2)))
            )
        )
    table = Table(box=box.MINIMAL, show_header=False, show_edge=False, pad_edge=False)
    for _ in titles:
        table.add_column(width=(width - 3) // 2, overflow="fold")
    table.add_row(*map(Text, titles))
    table.add_row(*(Text(printable(text)) for text in texts))
    return table


def table(cells: Sequence[Sequence[str]]) -> Table:
    """A table: the first line is the heading, the first column holds the rows' names."""
    heading, *lines = cells
    drawn = Table(box=None, padding=(0, GAP, 0, 0), pad_edge=False, header_style="")
    for number, title in enumerate(heading):
        drawn.add_column(Text(title), justify="right" if number else "left", no_wrap=True)
    for line in lines:
        drawn.add_row(*map(Text, line))
    return drawn


def print_table(cells: Sequence[Sequence[str]]) -> None:
    """Prints `table` to stdout; a line that is wider than the terminal is not cut."""
    drawn, out = table(cells), console(sys.stdout)
    unbounded = out.options.update(max_width=10_000)
    out.width = max(out.width, out.measure(drawn, options=unbounded).maximum)
    out.print(drawn)


class Phase:
    """Shows that something is under way, and times it.

    On a terminal a spinner turns meanwhile; elsewhere a line says what begins.

    Attributes:
        seconds: Wall time, once the phase has ended.
    """

    def __init__(self, what: str, stream: TextIO) -> None:
        self._what = what
        self._console = console(stream)
        self._progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}", markup=False),
            TimeElapsedColumn(),
            console=self._console,
            transient=True,
            # What other code prints meanwhile goes where it did before: see `output_to_file`.
            redirect_stdout=False,
            redirect_stderr=False,
            disable=not self._console.is_terminal,
        )
        self.seconds = 0.0

    def __enter__(self) -> "Phase":
        self._start = time.perf_counter()
        if self._progress.disable:
            self._console.print(f"{self._what} …", soft_wrap=True)
        self._progress.add_task(self._what, total=None)
        self._progress.start()
        return self

    def __exit__(
        self,
        error: type[BaseException] | None,
        _value: BaseException | None,
        _traceback: TracebackType | None,
    ) -> None:
        self.seconds = time.perf_counter() - self._start
        self._progress.stop()
        failed = "failed after " if error else ""
        self._console.print(f"{self._what}: {failed}{self.seconds:.1f} s", soft_wrap=True)


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
