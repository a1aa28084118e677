"""Finds what CommonMark calls strong emphasis, with its place in the text.

Parsers of Markdown keep no character positions of inline text, so the two things that decide are
read here: `blocks`, which lines are paragraphs and headings (and not code or HTML), and `inline`,
how runs of ``*`` and ``_`` pair up within those. A property test holds this against markdown-it-py.
Links are read as the text that they are written in.

Everything takes time linear in the text's length.
"""

from vllm_pasta.request.markup.markdown import inline
from vllm_pasta.request.markup.markdown.blocks import Blocks
from vllm_pasta.request.markup.markdown.document import Document


def parse(text: str) -> Document:
    """Reads ``text`` as CommonMark (0.31), but for links."""
    document = Document()
    for lines in Blocks(text, document).inline_blocks():
        document.blocks.append((lines[0][0], lines[-1][1]))
        inline.read(text, lines, document)
    document.strong.sort()
    return document
