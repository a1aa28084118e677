"""Which lines of a text are paragraphs and headings, and which are code or HTML."""

import re
from collections.abc import Iterator
from dataclasses import dataclass

from vllm_pasta.request.markup.markdown.document import Document
from vllm_pasta.request.markup.markdown.inline import TAG

MAX_DEPTH = 100
"""Quotes and lists within each other; deeper ones are read as text."""

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
    (re.compile(rf"<(?:{TAG})\s*$", re.ASCII), None),
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


class Blocks:
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
