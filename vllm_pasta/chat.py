"""Finds marks of chat messages in the prompt that the chat template made of them.

The marked parts of the messages are wrapped in two characters that occur nowhere else, the template
is run again, and the two characters are looked up in what comes out and taken out again. What is
left must be the prompt, letter for letter; so this is right for any template, or refused.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vllm_pasta.emphasis import union
from vllm_pasta.errors import EmphasisError, show
from vllm_pasta.marks import Mark
from vllm_pasta.spans import find

Range = tuple[int, int]
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


def mark_messages(chat: Chat, marks: Sequence[Mark], prompt: str) -> tuple[str, str, str]:
    """Renders the conversation with the marks wrapped in sentinel characters.

    Args:
        chat: The conversation.
        marks: Marks with ``message`` or ``role``.
        prompt: The prompt as it was rendered.

    Returns:
        The text with sentinels, and the two characters, opening and closing.

    Raises:
        EmphasisError: no such message; a text is not in it; the template gives no text.
    """
    wanted: dict[tuple[int, int | None], list[Range]] = {}
    for mark in marks:
        for key, span in _places(chat, mark):
            wanted.setdefault(key, []).append(span)
    opening, closing = _unused(prompt)
    messages = [dict(message) for message in chat.messages]
    for (index, part), ranges in wanted.items():
        content = messages[index]["content"]
        if part is None:
            messages[index]["content"] = _wrap(content, ranges, opening, closing)
        else:
            parts = messages[index]["content"] = [
                dict(item) if isinstance(item, Mapping) else item for item in content
            ]
            if isinstance(parts[part], str):
                parts[part] = _wrap(parts[part], ranges, opening, closing)
            else:
                name = _text_key(parts[part])
                parts[part][name] = _wrap(parts[part][name], ranges, opening, closing)
    rendered = chat.render(messages)
    if rendered is None:
        raise EmphasisError(
            "this model's chat template gives no text, so messages cannot be found in it; "
            "use `text` or `spans`",
            field="emphasis",
        )
    return rendered, opening, closing


def take_out(
    text: str, opening: str, closing: str, ranges: Sequence[Range] = ()
) -> tuple[str, list[Range], list[Range]]:
    """Takes sentinels out of ``text``.

    Returns:
        The text without them; what they enclosed; and ``ranges`` moved along.
    """
    parts, enclosed, opened = [], [], []
    shift = [0] * (len(text) + 1)  # how many sentinels stand before each position
    for i, char in enumerate(text):
        sentinel = char in (opening, closing)
        shift[i + 1] = shift[i] + sentinel
        if char == opening:
            opened.append(i - shift[i])
        elif char == closing and opened:
            enclosed.append((opened.pop(), i - shift[i]))
        elif not sentinel:
            parts.append(char)
    return "".join(parts), enclosed, [(a - shift[a], b - shift[b]) for a, b in ranges]


def _places(chat: Chat, mark: Mark) -> list[tuple[tuple[int, int | None], Range]]:
    """Where a mark points: ``((message, part), range of the part's text)``."""
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
                f"{', '.join(sorted({str(role) for role in roles}))}",
                field=f"{mark.field}.role",
            )
    places, failure = [], None
    for i in indices:
        whole = "".join(text for _, text in texts[i])
        try:
            ranges = _ranges(mark, whole, i)
        except EmphasisError as e:
            if mark.text is None or mark.message is not None:
                raise
            failure = e  # of a role's messages, one that has the text is enough
            continue
        begin = 0
        for part, text in texts[i]:
            for start, end in ranges:
                a = min(max(start - begin, 0), len(text))
                b = min(max(end - begin, a), len(text))
                # Templates strip messages: leave white space at the edges outside.
                a += len(text[a:b]) - len(text[a:b].lstrip())
                b = a + len(text[a:b].rstrip())
                if a < b:
                    places.append(((i, part), (a, b)))
            begin += len(text)
    if not places:
        raise failure or EmphasisError("nothing but white space to emphasise", field=mark.field)
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


def _wrap(text: str, ranges: Sequence[Range], opening: str, closing: str) -> str:
    for a, b in reversed(union(ranges)):
        text = f"{text[:a]}{opening}{text[a:b]}{closing}{text[b:]}"
    return text


def _unused(prompt: str) -> tuple[str, str]:
    free = (char for char in SENTINELS if char not in prompt)
    return next(free), next(free)
