"""What is found in a text of Markdown, and where."""

from dataclasses import dataclass, field
from typing import NamedTuple


class Strong(NamedTuple):
    """Strong emphasis: the marks are ``[open, start)`` and ``[end, close)``."""

    open: int
    start: int
    end: int
    close: int


@dataclass
class Document:
    """What was found in a text, in its characters' positions.

    Attributes:
        strong: In the order of their starts.
        escapes: Positions of backslashes that make a star or underscore text.
        code: Ranges of code: blocks and spans.
        html: Ranges of HTML: blocks and tags.
        blocks: Ranges of paragraphs and headings.
    """

    strong: list[Strong] = field(default_factory=list)
    escapes: list[int] = field(default_factory=list)
    code: list[tuple[int, int]] = field(default_factory=list)
    html: list[tuple[int, int]] = field(default_factory=list)
    blocks: list[tuple[int, int]] = field(default_factory=list)
