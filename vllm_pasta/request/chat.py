"""Finds marks of chat messages in the prompt that the chat template made of them.

The marked parts of the messages are wrapped in characters that occur nowhere else, the template is
run again, and the characters are looked up in what comes out and taken out again. All must be
there, and what is left must be the prompt, letter for letter; so this is right for any template, or
refused.

Markup is read in each text of the messages by itself, never in what the template adds.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from types import MappingProxyType
from typing import Any

from vllm_pasta.errors import EmphasisError, show
from vllm_pasta.request.marks import Mark
from vllm_pasta.request.markup import Marked, Markup, Range
from vllm_pasta.request.resolution import check_count, union
from vllm_pasta.request.tokens import find

Place = tuple[int, int | None]
"""A text of a conversation: index of the message; of the part, or None for a plain string."""

TEXT_PARTS = ("text", "input_text", "output_text", "refusal", "thinking")
SENTINELS = [chr(code) for code in range(0xE000, 0xF8FF)]  # private use: no meaning of their own


@dataclass(frozen=True)
class Chat:
    """A conversation, and how it becomes a prompt.

    Attributes:
        messages: As the user sent them: ``{"role": …, "content": str or list of parts}``.
        render: Messages to the prompt's text; None where the template gives no text.
    """

    messages: Sequence[Mapping[str, Any]]
    render: Callable[[list[dict[str, Any]]], str | None]

    def texts(self) -> list[list[tuple[int | None, str]]]:
        """Per message, its text parts: ``(index of the part, text)``; the index of a plain string
        is None."""
        return [_text_parts(message) for message in self.messages]


def read_markup(chat: Chat, markup: Markup) -> tuple[Chat, dict[Place, list[Range]]]:
    """Reads markup in every text of a conversation.

    Returns:
        The conversation as the model shall see it, and the marked ranges of its texts.

    Raises:
        EmphasisError: malformed markup; says in which message.
    """
    read: dict[Place, Marked] = {}
    for index, texts in enumerate(chat.texts()):
        for part, text in texts:
            try:
                read[index, part] = markup.read(text)
            except EmphasisError as e:
                raise EmphasisError(f"message {index}: {e.message}", field=e.field) from None
    clean = Chat(_replaced(chat.messages, {at: m.text for at, m in read.items()}), chat.render)
    return clean, {at: list(m.ranges) for at, m in read.items() if m.ranges}


def mark_messages(
    chat: Chat,
    marks: Sequence[Mark],
    prompt: str,
    marked: Mapping[Place, list[Range]] = MappingProxyType({}),
) -> tuple[str, str, str]:
    """Renders the conversation with the marks wrapped in sentinel characters.

    Args:
        chat: The conversation.
        marks: Marks with ``message`` or ``role``.
        prompt: The prompt as it was rendered, without sentinels.
        marked: More ranges, of the messages' texts.

    Returns:
        The text with sentinels; the opening one; the closing ones, one for each range.

    Raises:
        EmphasisError: no such message; a text is not in it; the template gives no text; too many.
    """
    wanted: dict[Place, list[Range]] = {at: list(spans) for at, spans in marked.items()}
    for mark in marks:
        for at, span in _places(chat, mark):
            wanted.setdefault(at, []).append(span)
    ranges = {at: union(spans) for at, spans in wanted.items()}
    count = sum(len(spans) for spans in ranges.values())
    check_count(count)
    free = (char for char in SENTINELS if char not in prompt)
    opening, *closings = islice(free, count + 1)
    closing = iter(closings)
    texts = {
        (index, part): text for index, parts in enumerate(chat.texts()) for part, text in parts
    }
    wrapped = {at: _wrap(texts[at], spans, opening, closing) for at, spans in ranges.items()}
    rendered = chat.render(_replaced(chat.messages, wrapped))
    if rendered is None:
        raise EmphasisError(
            "this model's chat template gives no text, so messages cannot be found in it; "
            "use `text` or `spans`",
            field="emphasis",
        )
    return rendered, opening, "".join(closings)


def _replaced(
    messages: Sequence[Mapping[str, Any]], texts: Mapping[Place, str]
) -> list[dict[str, Any]]:
    """Copies of ``messages`` with other texts."""
    copies = [dict(message) for message in messages]
    for (index, part), text in texts.items():
        if part is None:
            copies[index]["content"] = text
            continue
        if copies[index]["content"] is messages[index]["content"]:
            copies[index]["content"] = list(messages[index]["content"])
        item = copies[index]["content"][part]
        copies[index]["content"][part] = (
            text if isinstance(item, str) else {**item, str(_text_key(item)): text}
        )
    return copies


def take_out(text: str, opening: str, closings: str) -> tuple[str, list[Range]]:
    """Takes sentinels out of ``text``.

    Returns:
        What is left, and what they enclosed; nothing if a closing one is missing.
    """
    parts: list[str] = []
    enclosed: list[Range] = []
    opened: list[int] = []
    length = 0
    for piece in re.split(f"([{re.escape(opening + closings)}])", text):
        if piece == opening:
            opened.append(length)
        elif len(piece) == 1 and piece in closings:
            if opened:
                enclosed.append((opened.pop(), length))
        else:
            parts.append(piece)
            length += len(piece)
    return "".join(parts), enclosed if set(closings) <= set(text) else []


def _places(chat: Chat, mark: Mark) -> list[tuple[Place, Range]]:
    """Where a mark points: a text, and a range of it."""
    texts = chat.texts()
    if mark.message is not None:
        if not -len(texts) <= mark.message < len(texts):
            raise EmphasisError(
                f"there are {len(texts)} messages (0 to {len(texts) - 1}), got {mark.message}",
                field=f"{mark.field}.message",
            )
        indices = [mark.message % len(texts)]
    else:
        roles = [message.get("role") for message in chat.messages]
        indices = [i for i, role in enumerate(roles) if role == mark.role]
        if not indices:
            raise EmphasisError(
                f"no message of role {show(mark.role)}; there are "
                f"{', '.join(sorted({show(role) for role in roles}))}",
                field=f"{mark.field}.role",
            )
    if mark.text is not None and mark.message is None:
        # Of a role's messages, those that have the text are enough; if none has, the last says so.
        having = [i for i in indices if mark.text in "".join(text for _, text in texts[i])]
        indices = having or indices[-1:]
    places: list[tuple[Place, Range]] = []
    for i in indices:
        ranges = _ranges(mark, "".join(text for _, text in texts[i]), i)
        begin = 0
        for part, text in texts[i]:
            for start, end in ranges:
                a = min(max(start - begin, 0), len(text))
                b = min(max(end - begin, a), len(text))
                if text[a:b].strip():
                    places.append(((i, part), (a, b)))
            begin += len(text)
    if not places:
        raise EmphasisError("nothing but white space to emphasise", field=mark.field)
    return places


def _ranges(mark: Mark, text: str, index: int) -> list[Range]:
    if mark.text is not None:
        return find(text, mark.text, mark.occurrence, field=mark.field)
    if mark.chars is not None:
        if mark.chars[1] > len(text):
            raise EmphasisError(
                f"message {index} has {len(text)} characters, got {list(mark.chars)}",
                field=f"{mark.field}.chars",
            )
        return [mark.chars]
    return [(0, len(text))]


def _text_parts(message: Mapping[str, Any]) -> list[tuple[int | None, str]]:
    content = message.get("content")
    if isinstance(content, str):
        return [(None, content)]
    if not isinstance(content, Sequence):
        return []
    parts: list[tuple[int | None, str]] = []
    for i, part in enumerate(content):
        if isinstance(part, str):
            parts.append((i, part))
        elif isinstance(part, Mapping) and (key := _text_key(part)):
            parts.append((i, part[key]))
    return parts


def _text_key(part: Mapping[str, Any]) -> str | None:
    if part.get("type", "text") not in TEXT_PARTS:
        return None
    keys = [key for key in ("text", "refusal", "thinking") if isinstance(part.get(key), str)]
    return keys[0] if keys else None


def _wrap(text: str, ranges: Sequence[Range], opening: str, closing: Iterator[str]) -> str:
    for a, b in reversed(ranges):
        # Templates strip messages: leave white space at the edges outside.
        a += len(text[a:b]) - len(text[a:b].lstrip())
        b = a + len(text[a:b].rstrip())
        text = f"{text[:a]}{opening}{text[a:b]}{next(closing)}{text[b:]}"
    return text
