"""A rendered prompt, and where in it a request's marks are."""

import copy
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vllm_pasta.errors import EmphasisError
from vllm_pasta.request.chat import Chat, Place, mark_messages, read_markup, take_out
from vllm_pasta.request.emphasis import Emphasis
from vllm_pasta.request.marks import Mark
from vllm_pasta.request.markup import Markup
from vllm_pasta.request.resolution import Span, check_count, union
from vllm_pasta.request.tokens import Tokenized, align, decoded, find

CHAT_KEY = "_vllm_pasta_chat"
"""Key in a rendered prompt of the `Chat` that it was made from."""


@dataclass(frozen=True)
class Located:
    """Token ranges of an emphasis.

    Attributes:
        spans: Sorted, disjoint.
        token_ids: The prompt's; others than before if markup was taken out.
        tokenized: The prompt's text and offsets; None where only `spans` were given.
    """

    spans: tuple[Span, ...]
    token_ids: list[int]
    tokenized: Tokenized | None


class Locator:
    """Turns marks into token ranges, with a copy of the engine's tokenizer.

    Args:
        get_tokenizer: Gives the engine's tokenizer, or None; called when first needed.
    """

    def __init__(self, get_tokenizer: Callable[[], Any]) -> None:
        self._get_tokenizer = get_tokenizer
        self._tokenizer: Any = None
        self._lock = threading.Lock()  # fast tokenizers cannot be shared between threads

    def locate(
        self,
        emphasis: Emphasis,
        markup: Markup,
        token_ids: Sequence[int],
        text: str | None,
        chat: Chat | None,
    ) -> Located:
        """Finds every mark.

        Args:
            emphasis: What to find.
            markup: What markup to read.
            token_ids: The prompt's.
            text: The prompt's text, if known; need not be what was tokenised.
            chat: The conversation the prompt was made from, if any.

        Raises:
            EmphasisError: a mark cannot be found, or means nothing.
        """
        for i, (start, end) in enumerate(emphasis.spans):
            if end > len(token_ids):
                raise EmphasisError(
                    f"expected an end of at most {len(token_ids)}, the prompt's number of "
                    f"tokens, got [{start}, {end}]",
                    field=f"emphasis.spans[{i}]",
                )
        ids = list(token_ids)
        if not emphasis.marks and (
            markup.kind == "off" or (text is not None and not markup.may_be_in(text))
        ):
            return Located(union(emphasis.spans), ids, None)
        with self._lock:
            if self._load() is None:
                raise EmphasisError(
                    "the engine runs without a tokenizer, so text cannot be found; give `spans`",
                    field="emphasis",
                )
            return self._locate(emphasis, markup, ids, text, chat)

    def _locate(
        self,
        emphasis: Emphasis,
        markup: Markup,
        ids: list[int],
        text: str | None,
        chat: Chat | None,
    ) -> Located:
        if markup.kind != "off" and text is None:
            raise EmphasisError(
                "markup is read in text, but the prompt came as token ids; give `text` or `spans`",
                field="emphasis.markup",
            )
        clean = text
        places: list[tuple[int, int, str]] = []  # in the clean text; the field that says so
        marked: dict[Place, list[tuple[int, int]]] = {}
        if text is not None and markup.may_be_in(text):
            if chat is None:
                read = markup.read(text)
                clean = read.text
                places = [(a, b, "emphasis.markup") for a, b in read.ranges]
            else:
                before = chat.texts()
                chat, marked = read_markup(chat, markup)
                if chat.texts() != before:
                    clean = chat.render([dict(message) for message in chat.messages])
        if clean is None or clean == text:
            tokenized = self._tokenize(ids, text)
        elif emphasis.spans:
            raise EmphasisError(
                "token positions mean nothing while markup is taken out of the prompt; give `text`",
                field="emphasis.spans",
            )
        else:
            assert text is not None
            tokenized, ids = self._retokenize(ids, text, clean)
        in_chat = [mark for mark in emphasis.marks if mark.in_chat]
        if in_chat or marked:
            field = in_chat[0].field if in_chat else "emphasis.markup"
            ranges = self._in_chat(in_chat, marked, tokenized.text, chat if clean else None, field)
            places += [(a, b, field) for a, b in ranges]
        for mark in emphasis.marks:
            if mark.in_chat:
                continue
            if mark.chars is None:
                found = find(
                    tokenized.text, mark.text or "", mark.occurrence, tokenized.window, mark.field
                )
            else:
                self._check_counts(tokenized, text, clean, ids, mark.field)
                found = [mark.chars]
            places += [(a, b, mark.field) for a, b in found]
        check_count(len(emphasis.spans) + len(places))
        spans = [tokenized.tokens(*place) for place in places]
        self._check_not_special(ids, spans)
        return Located(union((*emphasis.spans, *spans)), ids, tokenized)

    def _in_chat(
        self,
        marks: Sequence[Mark],
        marked: Mapping[Place, list[tuple[int, int]]],
        prompt: str,
        chat: Chat | None,
        field: str,
    ) -> list[tuple[int, int]]:
        """Character ranges of chat marks, and of markup in messages, in ``prompt``."""
        if chat is None:
            raise EmphasisError(
                "`message` and `role` are for chats; this prompt was not made from messages here",
                field=field,
            )
        text, enclosed = take_out(*mark_messages(chat, marks, prompt, marked))
        if text != prompt or not enclosed:
            raise EmphasisError(
                "the chat template does not put this message into the prompt as it is, so it "
                "cannot be found there; use `text`",
                field=field,
            )
        return enclosed

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

    def _load(self) -> Any:
        if self._tokenizer is None:
            self._tokenizer = copy.deepcopy(self._get_tokenizer())
        return self._tokenizer

    def _encode(self, text: str, special: bool) -> tuple[list[int], list[tuple[int, int]]]:
        encoded = self._tokenizer(text, add_special_tokens=special, return_offsets_mapping=True)
        return encoded["input_ids"], encoded["offset_mapping"]

    def _decode(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=False))

    def _tokenize(self, ids: list[int], text: str | None) -> Tokenized:
        """The prompt's text as the model sees it, and each token's characters in it."""
        if getattr(self._tokenizer, "is_fast", False):
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

    def _check_not_special(self, ids: Sequence[int], spans: Sequence[Span]) -> None:
        special = set(getattr(self._tokenizer, "all_special_ids", ()))
        for start, end in spans:
            if special.issuperset(ids[start:end]):
                text = self._decode(list(ids[start:end]))
                raise EmphasisError(
                    f"nothing but special tokens to emphasise in {text!r}", field="emphasis"
                )
