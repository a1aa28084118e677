"""Images in a prompt: which tokens stand for them, and which a mark points at."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vllm_pasta.errors import EmphasisError, show
from vllm_pasta.request.chat.messages import Chat
from vllm_pasta.request.marks import Mark
from vllm_pasta.request.resolution import Span

IMAGE_PARTS = ("image_url", "input_image", "image_pil", "image_embeds", "image")
"""Types of a message's parts that are images; parts without a type have a field of that name."""

Strong = tuple[Span, float]


@dataclass(frozen=True)
class Images:
    """Where a prompt holds images, in the order in which the request gives them.

    Attributes:
        held: For each image, the range of tokens that stands for it in the prompt, with what the
            model's processor puts around and between its rows.
        features: For each image, the ranges of tokens that carry its features.
        both_ways: Whether the tokens of one of these ranges attend to those after them, too.
    """

    held: tuple[Span, ...] = ()
    features: tuple[tuple[Span, ...], ...] = ()
    both_ways: bool = False

    def __len__(self) -> int:
        return len(self.held)

    def whole(self, index: int) -> Span:
        """From an image's first token that carries features to its last."""
        return self.features[index][0][0], self.features[index][-1][1]

    def located(self, marks: Iterable[Mark], chat: Chat | None) -> list[Strong]:
        """The tokens of the images that marks point at, with their factors.

        Args:
            marks: Marks with an ``image``.
            chat: The conversation that the prompt was made from, if any.

        Raises:
            EmphasisError: there is no such image, or message.
        """
        return [
            (self.whole(index), mark.alpha) for mark in marks for index in self._chosen(mark, chat)
        ]

    def _chosen(self, mark: Mark, chat: Chat | None) -> list[int]:
        among, where = list(range(len(self))), "the prompt"
        if mark.in_chat:
            among, where = self._of_messages(mark, chat)
        if mark.image == "all" and among:
            return among
        if mark.image == "all" or not -len(among) <= (mark.image or 0) < len(among):
            count = f"0 to {len(among) - 1}" if among else "none"
            raise EmphasisError(
                f"{where} holds {len(among)} images ({count}), got {show(mark.image)}",
                field=f"{mark.field}.image",
            )
        return [among[mark.image or 0]]

    def _of_messages(self, mark: Mark, chat: Chat | None) -> tuple[list[int], str]:
        """The images of the messages that a mark names, and what to call those."""
        if chat is None:
            raise EmphasisError(
                "`message` and `role` are for chats; this prompt was not made from messages here",
                field=mark.field,
            )
        counts = [_count(message) for message in chat.messages]
        if sum(counts) != len(self):
            raise EmphasisError(
                f"the messages hold {sum(counts)} images and the prompt {len(self)}, so the images "
                "of a message cannot be told; give `image` alone, which counts over the prompt",
                field=mark.field,
            )
        messages = chat.chosen(mark)
        first = [sum(counts[:i]) for i in range(len(counts))]
        what = f"message {messages[0]}" if mark.role is None else f"role {mark.role!r}"
        return [first[i] + j for i in messages for j in range(counts[i])], what

    def widened(self, marks: Iterable[Strong]) -> list[Strong]:
        """Marks that touch an image whose tokens attend both ways, drawn out over all of it.

        A token there sees those after it. So if only a later one were marked, the row of an earlier
        one would be steered, and its KV kept under a key that does not know.
        """
        ranges = [span for spans in self.features for span in spans] if self.both_ways else []
        result = []
        for (start, end), alpha in marks:
            touched = [(a, b) for a, b in ranges if a < end and b > start]
            start = min([start, *(a for a, _ in touched)])
            end = max([end, *(b for _, b in touched)])
            result.append(((start, end), alpha))
        return result


def _count(message: Mapping[str, Any]) -> int:
    content = message.get("content")
    if isinstance(content, str) or not isinstance(content, Sequence):
        return 0
    return sum(is_image(part) for part in content)


def is_image(part: Any) -> bool:
    """Whether a part of a message is an image."""
    if not isinstance(part, Mapping):
        return False
    kind = part.get("type")
    return kind in IMAGE_PARTS if kind is not None else any(name in part for name in IMAGE_PARTS)
