"""Reports as one HTML file that needs no other: tables that sort, plots, marked prompts."""

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

Piece = tuple[str, float | None]
"""A piece of a prompt, and its factor if it is emphasised; 1 is full strength."""


@dataclass(frozen=True)
class Table:
    """A table.

    Attributes:
        title: Its heading.
        cells: A heading and lines; the first column holds the lines' names.
        note: A sentence below it; may be empty.
    """

    title: str
    cells: Sequence[Sequence[str]]
    note: str = ""
    kind: str = "table"


@dataclass(frozen=True)
class Figure:
    """A plot, as SVG that a plotting library made."""

    title: str
    svg: str
    kind: str = "figure"


@dataclass(frozen=True)
class Prompt:
    """A prompt in pieces (tokens, say), the emphasised ones coloured."""

    title: str
    pieces: Sequence[Piece]
    kind: str = "prompt"


@dataclass(frozen=True)
class Heat:
    """A prompt in pieces, each with a number, and how dark it is drawn: from 0 to 1."""

    title: str
    pieces: Sequence[tuple[str, float, float]]
    kind: str = "heat"


@dataclass(frozen=True)
class Asked:
    """One prompt with its mark, and the answer of each method by the method's name."""

    pieces: Sequence[Piece]
    answers: Sequence[tuple[str, str]]


@dataclass(frozen=True)
class Answers:
    """Answers side by side."""

    title: str
    asked: Sequence[Asked]
    kind: str = "answers"


@dataclass(frozen=True)
class Lines:
    """Lines of text."""

    title: str
    lines: Sequence[str]
    kind: str = "lines"


Part = Table | Figure | Prompt | Heat | Answers | Lines


def write(path: Path, title: str, intro: str, parts: Sequence[Part]) -> None:
    """Writes a report.

    Args:
        path: The file.
        title: The heading.
        intro: What was done, in a sentence or two.
        parts: What follows, in order.
    """
    path.write_text(render(title, intro, parts), encoding="utf-8")


def render(title: str, intro: str, parts: Sequence[Part]) -> str:
    """The text of a report: see `write`. What is text stays text, whatever a model answered."""
    from jinja2 import Environment

    template = (files(__package__) / "report.html.j2").read_text(encoding="utf-8")
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(template).render(title=title, intro=intro, parts=parts)
