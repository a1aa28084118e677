"""Finds what CommonMark calls strong emphasis, with its place in the text.

Parsers of Markdown keep no character positions of inline text, so the two things that decide are
read here: which lines are paragraphs and headings (and not code or HTML), and, within those, how
runs of ``*`` and ``_`` pair up beside code spans, escapes, autolinks and raw HTML. A property test
holds this against markdown-it-py. Links are read as the text that they are written in.

Everything takes time linear in the text's length.
"""

import re
import unicodedata
from bisect import bisect_left, bisect_right
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from typing import NamedTuple

MAX_DEPTH = 100
"""Quotes and lists within each other; deeper ones are read as text."""


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


def parse(text: str) -> Document:
    """Reads ``text`` as CommonMark (0.31), but for links."""
    document = Document()
    for lines in _Blocks(text, document).inline_blocks():
        document.blocks.append((lines[0][0], lines[-1][1]))
        _read_inline(text, lines, document)
    document.strong.sort()
    return document


# Inline: within one paragraph or heading

_TAG = (
    r"[A-Za-z][A-Za-z0-9-]{0,100}"
    r"(?:\s{1,100}[A-Za-z_:][\w.:-]{0,100}(?:\s{0,100}=\s{0,100}"
    r"(?:[^\s\"'=<>`]{1,1000}|'[^']{0,1000}'|\"[^\"]{0,1000}\"))?){0,100}\s{0,100}/?>"
    r"|/[A-Za-z][A-Za-z0-9-]{0,100}\s{0,100}>"
)
"""After ``<``. No part is unbounded, so that no text makes this search far, again and again."""

_ANGLE = re.compile(
    rf"<(?:[A-Za-z][A-Za-z0-9+.-]{{1,31}}:[^\s<>]{{0,2000}}>"
    r"|[a-zA-Z0-9.!#$%&'*+/=?^_`{|}~-]{1,200}@[a-zA-Z0-9.-]{1,200}>"
    rf"|(?:{_TAG})|(?P<open>!---?>|!--|\?|!\[CDATA\[|![A-Za-z]))",
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


def _read_inline(text: str, lines: list[tuple[int, int]], document: Document) -> None:
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


# Blocks: which lines are paragraphs and headings

_HTML_NAMES = (
    "address|article|aside|base|basefont|blockquote|body|caption|center|col|colgroup|dd|details"
    "|dialog|dir|div|dl|dt|fieldset|figcaption|figure|footer|form|frame|frameset|h[1-6]|head"
    "|header|hr|html|iframe|legend|li|link|main|menu|menuitem|nav|noframes|ol|optgroup|option|p"
    "|param|search|section|summary|table|tbody|td|tfoot|th|thead|title|tr|track|ul"
)
_HTML_STARTS = (  # how a block of HTML begins, and which line ends it; None: a blank one
    (re.compile(r"<(?:script|pre|style|textarea)(?=\s|>|$)", re.I),
     re.compile(r"</(?:script|pre|style|textarea)>", re.I)),
    (re.compile(r"<!--"), re.compile(r"-->")),
    (re.compile(r"<\?"), re.compile(r"\?>")),
    (re.compile(r"<![A-Za-z]"), re.compile(r">")),
    (re.compile(r"<!\[CDATA\["), re.compile(r"\]\]>")),
    (re.compile(rf"</?(?:{_HTML_NAMES})(?=\s|/?>|$)", re.I), None),
    (re.compile(rf"<(?:{_TAG})\s*$", re.ASCII), None),
)  # fmt: skip
_LINE = re.compile(r"[^\r\n]*(?:\r\n?|\n|\Z)")
_HEADING = re.compile(r"(#{1,6})(?:[ \t]+|$)")
_HEADING_END = re.compile(r"(?:(?<=[ \t])|^)#+[ \t]*$")
_FENCE = re.compile(r"(`{3,})[^`]*$|(~{3,})")
_UNDERLINE = re.compile(r"(?:=+|-+)[ \t]*$")
_BREAK = re.compile(r"(?:(?:\*[ \t]*){3,}|(?:-[ \t]*){3,}|(?:_[ \t]*){3,})$")
_ITEM = re.compile(r"([-+*]|\d{1,9}[.)])(?=[ \t]|$)", re.ASCII)


@dataclass
class _Container:
    """A block quote, or a list's item, whose content begins in column ``indent``."""

    indent: int = 0
    empty: bool = False  # an item that began with an empty line

    @property
    def is_item(self) -> bool:
        return self.indent > 0


@dataclass
class _Cursor:
    """A place in a line, by character and by column: a tab reaches to the next fourth one."""

    text: str
    position: int
    end: int
    column: int = 0
    owed: int = 0  # columns of a tab that was taken in part

    def indent(self) -> int:
        """Columns of white space that follow."""
        columns, column = self.owed, self.column + self.owed
        for i in range(self.position, self.end):
            if self.text[i] == " ":
                step = 1
            elif self.text[i] == "\t":
                step = 4 - column % 4
            else:
                break
            columns += step
            column += step
        return columns

    def skip(self, columns: int) -> None:
        """Takes so many columns of white space."""
        while columns > 0:
            if not self.owed:
                self.owed = 1 if self.text[self.position] == " " else 4 - self.column % 4
                self.position += 1
            step = min(columns, self.owed)
            self.owed -= step
            self.column += step
            columns -= step

    def take(self, characters: int) -> None:
        """Takes so many characters that are no white space."""
        self.position += characters
        self.column += characters

    @property
    def rest(self) -> str:
        """What follows, without white space in front."""
        return self.text[self.position : self.end].lstrip(" \t")


class _Blocks:
    """Splits a text into blocks, line by line."""

    def __init__(self, text: str, document: Document) -> None:
        self.text = text
        self.document = document
        self.containers: list[_Container] = []
        self.paragraph: list[tuple[int, int]] = []
        self.fence = ""  # the open fenced block's marks
        self.html: re.Pattern[str] | bool | None = False  # the open block of HTML's end
        self.ready: list[list[tuple[int, int]]] = []

    def inline_blocks(self) -> Iterator[list[tuple[int, int]]]:
        """Each paragraph's and heading's lines, as ranges of the text."""
        for match in _LINE.finditer(self.text):
            start, end = match.start(), match.start() + len(match[0].rstrip("\r\n"))
            if start == len(self.text):
                break
            self._line(_Cursor(self.text, start, end))
            yield from self.ready
            self.ready = []
        self._close_paragraph()
        yield from self.ready

    def _close_paragraph(self) -> None:
        if self.paragraph:
            start, end = self.paragraph[-1]
            self.paragraph[-1] = (start, start + len(self.text[start:end].rstrip(" \t")))
            self.ready.append(self.paragraph)
            self.paragraph = []

    def _close(self, containers: int) -> None:
        """Leaves all but so many containers, and the block in the innermost."""
        self._close_paragraph()
        self.fence, self.html = "", False
        del self.containers[containers:]

    def _line(self, line: _Cursor) -> None:
        start = line.position
        matched = self._continued(line)
        inside = matched == len(self.containers)
        if inside and (self.fence or self.html is not False):
            self._literal(line, start)
            return
        lazy = not inside and bool(self.paragraph)
        while True:  # blocks that begin here
            rest, indent = line.rest, line.indent()
            if not rest:
                break
            if indent >= 4:
                if not self.paragraph:
                    self._close(matched)
                    self.document.code.append((start, line.end))
                    return
                break
            if inside and self.paragraph and _UNDERLINE.match(rest):
                self._close_paragraph()
                return
            if self._leaf(line, rest, matched, start):
                return
            interrupts = inside and bool(self.paragraph)
            container = self._container(line, rest, indent, interrupts)
            if container is None:
                break
            self._close(matched)
            self.containers.append(container)
            matched += 1
            inside, lazy = True, False
        if not rest:
            self._blank(matched, inside)
            return
        if not inside and not lazy:
            self._close(matched)
        for container in self.containers[:matched]:
            container.empty = False
        begin = line.end - len(rest)
        self.paragraph.append((begin, line.end))

    def _continued(self, line: _Cursor) -> int:
        """How many containers this line continues."""
        indent, rest, column = line.indent(), line.rest, line.column
        if not rest:  # often, and there may be many containers
            stops = (i for i, c in enumerate(self.containers) if c.empty or not c.indent)
            return next(stops, len(self.containers))
        for matched, container in enumerate(self.containers):
            if line.column > column:  # something was taken
                indent, rest, column = line.indent(), line.rest, line.column
            if container.is_item:
                if not rest:
                    if container.empty:
                        return matched
                    continue
                if indent < container.indent:
                    return matched
                line.skip(container.indent)
                container.empty = False
            elif indent <= 3 and rest.startswith(">"):
                line.skip(indent)
                line.take(1)
                if line.indent():
                    line.skip(1)
            else:
                return matched
        return len(self.containers)

    def _literal(self, line: _Cursor, start: int) -> None:
        """A line of a fenced block or of HTML that is open."""
        rest = line.rest
        if self.fence:
            self.document.code.append((start, line.end))
            marks = rest.rstrip(" \t")
            if (
                line.indent() <= 3
                and marks.startswith(self.fence)
                and not marks.strip(self.fence[0])
            ):
                self.fence = ""
            return
        if isinstance(self.html, re.Pattern):
            self.document.html.append((start, line.end))
            if self.html.search(rest):
                self.html = False
        elif rest:
            self.document.html.append((start, line.end))
        else:
            self.html = False
            self._blank(len(self.containers), True)

    def _leaf(self, line: _Cursor, rest: str, matched: int, start: int) -> bool:
        """Whether a heading, fenced code, HTML or a break begins here; takes it."""
        if heading := _HEADING.match(rest):
            self._close(matched)
            begin = line.end - len(rest) + heading.end()
            title = _HEADING_END.sub("", self.text[begin : line.end]).rstrip(" \t")
            if title:
                self.ready.append([(begin, begin + len(title))])
            return True
        if fence := _FENCE.match(rest):
            self._close(matched)
            self.fence = fence[1] or fence[2]
            self.document.code.append((start, line.end))
            return True
        if rest[0] == "<":
            for i, (begins, ends) in enumerate(_HTML_STARTS):
                if not begins.match(rest) or (i == 6 and self.paragraph):
                    continue
                self._close(matched)
                self.document.html.append((start, line.end))
                self.html = False if ends is not None and ends.search(rest) else ends
                return True
        if _BREAK.match(rest):
            self._close(matched)
            return True
        return False

    def _container(
        self, line: _Cursor, rest: str, indent: int, interrupts: bool
    ) -> _Container | None:
        """The block quote or list item that begins here, if one does; takes its mark."""
        if len(self.containers) >= MAX_DEPTH:
            return None
        if rest[0] == ">":
            line.skip(indent)
            line.take(1)
            if line.indent():
                line.skip(1)
            return _Container()
        item = _ITEM.match(rest)
        if item is None:
            return None
        mark, after = item[1], rest[item.end() :].strip(" \t")
        if interrupts and (not after or (len(mark) > 1 and int(mark[:-1]) != 1)):
            return None
        line.skip(indent)
        line.take(len(mark))
        spaces = line.indent()
        if not after:
            return _Container(indent + len(mark) + 1, empty=True)
        spaces = 1 if spaces > 4 else spaces
        line.skip(spaces)
        return _Container(indent + len(mark) + spaces)

    def _blank(self, matched: int, inside: bool) -> None:
        if not inside:
            self._close(matched)
        self._close_paragraph()
