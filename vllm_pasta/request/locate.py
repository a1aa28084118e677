"""A rendered prompt, and where in it a request's marks are."""

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from vllm_pasta.errors import EmphasisError
from vllm_pasta.request.chat import (
    WHOLE,
    Chat,
    Images,
    Reading,
    locate_messages,
    missed,
    read_messages,
    read_text,
)
from vllm_pasta.request.emphasis import Emphasis
from vllm_pasta.request.markup import Markup
from vllm_pasta.request.resolution import Span, check_count, strongest
from vllm_pasta.request.search import find
from vllm_pasta.request.tokens import Tokenized, align, decoded, spliced

CHAT_KEY = "_vllm_pasta_chat"
"""Key in a rendered prompt of the `Chat` that it was made from."""


INDEX_KEY = "_vllm_pasta_index"
"""Key in a rendered prompt of its place in the request's list of prompts, and their number."""

READING_KEY = "_vllm_pasta_reading"
"""Key in a rendered prompt of the `Reading` of its markup, which was taken out before the prompt
became tokens."""


@dataclass(frozen=True)
class Located:
    """Token ranges of an emphasis.

    Attributes:
        marks: Token ranges, each with its factor, in any order; they may overlap.
        token_ids: The prompt's; others than before if markup was taken out.
        tokenized: The prompt's text and offsets; None where only `spans` were given.
    """

    marks: tuple[tuple[Span, float], ...]
    token_ids: list[int]
    tokenized: Tokenized | None

    @cached_property
    def _strongest(self) -> tuple[tuple[Span, ...], tuple[float, ...]]:
        return strongest(self.marks, 0.0)  # which is no mark's: all are kept

    @property
    def spans(self) -> tuple[Span, ...]:
        """The marked ranges: sorted, disjoint, those that touch of different factors."""
        return self._strongest[0]

    @property
    def factors(self) -> tuple[float, ...]:
        """A factor for each of `spans`; empty where all are 1, full strength."""
        return self._strongest[1]

    @property
    def strengths(self) -> list[tuple[Span, float]]:
        """Each of `spans` with its factor."""
        return list(zip(self.spans, self.factors or (1.0,) * len(self.spans), strict=True))


class Locator:
    """Turns marks into token ranges. Threads may share it.

    Args:
        get_tokenizer: Gives a tokenizer that several threads can use, or that nobody else uses; or
            None. Called when first needed.
    """

    def __init__(self, get_tokenizer: Callable[[], Any]) -> None:
        self._get_tokenizer = get_tokenizer
        self._tokenizer: Any = None
        self._lock = threading.Lock()  # around the tokenizer

    def locate(
        self,
        emphasis: Emphasis,
        markup: Markup,
        token_ids: Sequence[int],
        text: str | None,
        chat: Chat | None,
        reading: Reading | None = None,
        images: Images = Images(),  # noqa: B008 (frozen)
    ) -> Located:
        """Finds every mark.

        Args:
            emphasis: What to find.
            markup: What markup to read.
            token_ids: The prompt's.
            text: The prompt's text, if known; need not be what was tokenised.
            chat: The conversation the prompt was made from, if any.
            reading: What markup was read before the prompt became tokens, and taken out of ``text``
                and ``chat``; None where it was not read.
            images: Where the prompt holds images.

        Raises:
            EmphasisError: a mark cannot be found, or means nothing; or markup was asked for by the
                request, and what looks like it does not count.
        """
        for i, (start, end) in enumerate(emphasis.spans):
            if end > len(token_ids):
                raise EmphasisError(
                    f"expected an end of at most {len(token_ids)}, the prompt's number of "
                    f"tokens, got [{start}, {end}]",
                    field=f"emphasis.spans[{i}]",
                )
        ids = list(token_ids)
        pictured = images.located([m for m in emphasis.marks if m.image is not None], chat)
        in_text = tuple(mark for mark in emphasis.marks if mark.image is None)
        emphasis = replace(emphasis, marks=in_text)
        if reading is not None:
            unread = False
        else:
            unread = markup.kind != "off" and (text is None or markup.may_be_in(text))
        if not emphasis.marks and not unread and not (reading and reading.marks):
            located = Located(_given(emphasis), ids, None)
        else:
            with self._lock:
                if self._load() is None:
                    raise EmphasisError(
                        "the engine runs without a tokenizer, so text cannot be found; give "
                        "`spans`",
                        field="emphasis",
                    )
                located = self._locate(emphasis, markup, ids, text, chat, reading, images)
        marked = located.marks or pictured
        if not marked and emphasis.markup is not None and text is not None:
            why = missed(chat.messages, markup) if chat is not None else markup.missed(text)
            if why:
                raise EmphasisError(f"nothing is emphasised: {why}", field="emphasis.markup")
        marks = images.widened([*located.marks, *pictured])
        check_count(len(marks))
        return replace(located, marks=tuple(marks))

    def _locate(
        self,
        emphasis: Emphasis,
        markup: Markup,
        ids: list[int],
        text: str | None,
        chat: Chat | None,
        reading: Reading | None,
        images: Images,
    ) -> Located:
        clean = text
        if reading is None:
            reading, clean, chat = self._read(markup, text, chat)
        if reading.changed and emphasis.spans:
            raise EmphasisError(
                "token positions mean nothing while markup is taken out of the prompt; give `text`",
                field="emphasis.spans",
            )
        if clean is None or clean == text:
            tokenized = self._tokenize(ids, text, images)
        elif images:
            raise EmphasisError(
                "markup cannot be taken out of a prompt that holds its images; give `text`",
                field="emphasis.markup",
            )
        else:
            assert text is not None
            tokenized, ids = self._retokenize(ids, text, clean)
        places = _in_text(reading, clean)
        in_chat = [mark for mark in emphasis.marks if mark.in_chat]
        marked = {at: marks for at, marks in reading.marks.items() if at != WHOLE}
        if in_chat or marked:
            if chat is None:
                raise EmphasisError(
                    "`message` and `role` are for chats; this prompt was not made from messages "
                    "here",
                    field=in_chat[0].field if in_chat else "emphasis.markup",
                )
            field = in_chat[0].field if in_chat else "emphasis.markup"
            found = locate_messages(chat, in_chat, tokenized.text, marked)
            places += [(a, b, field, alpha) for (a, b), alpha in found]
        for mark in emphasis.marks:
            if mark.in_chat:
                continue
            if mark.chars is None:
                ranges = find(
                    tokenized.text, mark.text or "", mark.occurrence, tokenized.window, mark.field
                )
            else:
                self._check_counts(tokenized, text, clean, ids, mark.field)
                ranges = [mark.chars]
            places += [(a, b, mark.field, mark.alpha) for a, b in ranges]
        check_count(len(emphasis.spans) + len(places))
        spans = [(tokenized.tokens(a, b, field), alpha) for a, b, field, alpha in places]
        self._check_not_special(ids, [span for span, _ in spans], images)
        return Located((*_given(emphasis), *spans), ids, tokenized)

    def _read(
        self, markup: Markup, text: str | None, chat: Chat | None
    ) -> tuple[Reading, str | None, Chat | None]:
        """Reads markup in a prompt that is tokens already; gives it without."""
        if markup.kind == "off":
            return Reading(), text, chat
        if text is None:
            raise EmphasisError(
                "markup is read in text, but the prompt came as token ids; give `text` or `spans`",
                field="emphasis.markup",
            )
        if chat is None:
            clean, reading = read_text(text, markup)
            return reading, clean, None
        messages, reading = read_messages(chat.messages, markup)
        chat = Chat(messages, chat.render)
        return reading, chat.render(messages) if reading.changed else text, chat

    def _check_counts(
        self, tokenized: Tokenized, text: str | None, clean: str | None, ids: list[int], field: str
    ) -> None:
        """Checks that positions in the user's text are positions in ``tokenized``."""
        # vLLM cuts very long text before it tokenises, and keeps no word of how much.
        most = getattr(self._tokenizer, "max_chars_per_token", 0)
        cut = most and text and len(text) % most == 0 and len(text) >= len(ids) * most
        if text is not None and (tokenized.text != clean or not tokenized.counts or cut):
            raise EmphasisError(
                "positions in this prompt cannot be told: it was truncated, or its tokens are not "
                "those of its text; give `text`",
                field=field,
            )

    def decode(self, token_ids: list[int]) -> str:
        """Token ids to text, special tokens kept; empty without a tokenizer."""
        with self._lock:
            return "" if self._load() is None else self._decode(token_ids)

    def pieces(self, token_ids: list[int], text: str | None) -> list[str]:
        """The text of each token; together they are the prompt as the model sees it.

        Of tokens that only together make up a character, the first has it and the others are empty.

        Args:
            token_ids: The prompt's.
            text: The prompt's text, if known.

        Returns:
            As many texts as tokens; none without a tokenizer.
        """
        with self._lock:
            if self._load() is None:
                return []
            tokenized = self._tokenize(token_ids, text, Images())
            found, position = [], tokenized.window[0]
            for token, (start, end) in zip(token_ids, tokenized.offsets, strict=True):
                if start == end:  # special, and not in the text
                    found.append(self._decode([token]))
                    continue
                end = max(end, position)
                found.append(tokenized.text[position:end])
                position = end
            return found

    def _load(self) -> Any:
        if self._tokenizer is None:
            self._tokenizer = self._get_tokenizer()
        return self._tokenizer

    def _encode(self, text: str, special: bool) -> tuple[list[int], list[tuple[int, int]]]:
        encoded = self._tokenizer(text, add_special_tokens=special, return_offsets_mapping=True)
        return encoded["input_ids"], encoded["offset_mapping"]

    def _decode(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=False))

    def _tokenize(self, ids: list[int], text: str | None, images: Images) -> Tokenized:
        """The prompt's text as the model sees it, and each token's characters in it."""
        if getattr(self._tokenizer, "is_fast", False):
            if images and text is not None:
                for special in (True, False):
                    encoded = self._encode(text, special)
                    if tokenized := spliced(text, ids, sorted(images.held), *encoded):
                        return tokenized
            for candidate in [self._decode(ids)] if text is None else [text, self._decode(ids)]:
                for special in (True, False):
                    tokenized = align(candidate, ids, *self._encode(candidate, special))
                    if tokenized is not None:
                        return tokenized
        return decoded(ids, self._decode)

    def _retokenize(self, ids: list[int], text: str, clean: str) -> tuple[Tokenized, list[int]]:
        """The same for ``clean``, which replaces ``text``; with its token ids."""
        for special in (True, False):
            if getattr(self._tokenizer, "is_fast", False) and self._encode(text, special)[0] == ids:
                new_ids, offsets = self._encode(clean, special)
                return Tokenized(clean, offsets, (0, len(clean))), new_ids
        raise EmphasisError(
            "markup cannot be taken out of this prompt: its tokens are not those of its text "
            "(was it truncated?); give `text`",
            field="emphasis.markup",
        )

    def _check_not_special(self, ids: Sequence[int], spans: Sequence[Span], images: Images) -> None:
        special = set(getattr(self._tokenizer, "all_special_ids", ()))
        seen = [span for ranges in images.features for span in ranges]  # whatever their tokens are
        for start, end in spans:
            if any(a < end and b > start for a, b in seen):
                continue
            if special.issuperset(ids[start:end]):
                text = self._decode(list(ids[start:end]))
                raise EmphasisError(
                    f"nothing but special tokens to emphasise in {text!r}", field="emphasis"
                )


def _given(emphasis: Emphasis) -> tuple[tuple[Span, float], ...]:
    """Token ranges that the request gives as such."""
    alphas = emphasis.alphas or (1.0,) * len(emphasis.spans)
    return tuple(zip(emphasis.spans, alphas, strict=True))


def _in_text(reading: Reading, clean: str | None) -> list[tuple[int, int, str, float]]:
    """Marks that were read in a prompt that is no conversation, in ``clean``, which may be a part
    of what was read: vLLM cuts very long text before it tokenises."""
    marks = reading.marks.get(WHOLE, ())
    if not marks or reading.text is None or clean is None:
        return []
    gone = 0 if reading.text.startswith(clean) else len(reading.text) - len(clean)
    field = "emphasis.markup"
    if any(a < gone or b > gone + len(clean) for (a, b), _ in marks):
        raise EmphasisError("the prompt was truncated where it is marked", field=field)
    return [(a - gone, b - gone, field, alpha) for (a, b), alpha in marks]
