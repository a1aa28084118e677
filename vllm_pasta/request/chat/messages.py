"""A conversation, and the markup in its messages.

Markup is read in each text of the messages by itself, and only in those of roles that the operator
trusts; never in what the chat template adds.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from vllm_pasta.errors import EmphasisError, show
from vllm_pasta.request.marks import Mark
from vllm_pasta.request.markup import Markup, Range

Place = tuple[int, int | None]
"""A text of a conversation: index of the message; of the part, or None for a plain string."""

WHOLE: Place = (-1, None)
"""The text of a prompt that is no conversation."""

Placed = tuple[Range, float]
"""A marked character range with its factor."""

TEXT_PARTS = ("text", "input_text", "output_text", "refusal", "thinking")


@dataclass(frozen=True)
class Chat:
    """A conversation, and how it becomes a prompt.

    Attributes:
        messages: As the user sent them: ``{"role": …, "content": str or list of parts}``.
        render: Messages to the prompt's text; None where the template gives no text.
    """

    messages: Sequence[Mapping[str, Any]]
    render: Callable[[list[dict[str, Any]]], str | None]

    @cached_property
    def texts(self) -> list[list[tuple[int | None, str]]]:
        """Per message, its text parts: ``(index of the part, text)``; the index of a plain string
        is None."""
        return [_text_parts(message) for message in self.messages]

    def chosen(self, mark: Mark) -> list[int]:
        """Indices of the messages that a mark's ``message`` or ``role`` names.

        Raises:
            EmphasisError: there is none.
        """
        if mark.message is not None:
            count = len(self.messages)
            if not -count <= mark.message < count:
                raise EmphasisError(
                    f"there are {count} messages (0 to {count - 1}), got {mark.message}",
                    field=f"{mark.field}.message",
                )
            return [mark.message % count]
        roles = [message.get("role") for message in self.messages]
        indices = [i for i, role in enumerate(roles) if role == mark.role]
        if not indices:
            raise EmphasisError(
                f"no message of role {show(mark.role)}; there are "
                f"{', '.join(sorted({show(role) for role in roles}))}",
                field=f"{mark.field}.role",
            )
        return indices


@dataclass(frozen=True)
class Reading:
    """Markup that was read in a prompt.

    Attributes:
        marks: What it marks, by the text that it stands in; ranges of the text without tags.
        changed: Whether tags, stars or backslashes were taken out.
        text: The prompt without them; None where it is a conversation.
    """

    marks: Mapping[Place, list[Placed]] = field(default_factory=dict)
    changed: bool = False
    text: str | None = None


def read_text(text: str, markup: Markup) -> tuple[str, Reading]:
    """Reads markup in a prompt that is no conversation.

    Returns:
        The text as the model shall see it, and what was read.

    Raises:
        EmphasisError: malformed markup.
    """
    if not markup.may_be_in(text):
        return text, Reading(text=text)
    marked = markup.read(text)
    marks = {WHOLE: marked.marks} if marked.ranges else {}
    return marked.text, Reading(marks, marked.text != text, marked.text)


def read_messages(
    messages: Sequence[Mapping[str, Any]], markup: Markup
) -> tuple[list[dict[str, Any]], Reading]:
    """Reads markup in every text of a conversation whose role the operator trusts.

    Returns:
        The messages as the model shall see them, and what was read.

    Raises:
        EmphasisError: malformed markup; says in which message.
    """
    clean: dict[Place, str] = {}
    marks: dict[Place, list[Placed]] = {}
    for index, message in enumerate(messages):
        if message.get("role") not in markup.roles:
            continue
        for part, text in _text_parts(message):
            if not markup.may_be_in(text):
                continue
            try:
                marked = markup.read(text)
            except EmphasisError as e:
                raise EmphasisError(f"message {index}: {e.message}", field=e.field) from None
            if marked.text != text:
                clean[index, part] = marked.text
            if marked.ranges:
                marks[index, part] = marked.marks
    return replaced(messages, clean), Reading(marks, bool(clean))


def missed(messages: Sequence[Mapping[str, Any]], markup: Markup) -> str | None:
    """`Markup.missed` for the first message that has some; says which it is."""
    for index, message in enumerate(messages):
        if message.get("role") in markup.roles:
            for _, text in _text_parts(message):
                if why := markup.missed(text):
                    return f"message {index}: {why}"
    return None


def replaced(
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
