"""From text to token ranges. Pure Python: a tokenizer comes in as a callable."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from difflib import SequenceMatcher

from vllm_pasta.errors import EmphasisError
from vllm_pasta.request.marks import Occurrence
from vllm_pasta.request.resolution import Span, check_count

Offsets = Sequence[tuple[int, int]]
"""Per token, the half-open range of characters that it stands for; empty for special tokens."""


@dataclass(frozen=True)
class Tokenized:
    """A prompt's text, and which of its characters each token stands for.

    Attributes:
        text: The prompt's text, special tokens included, before any truncation.
        offsets: One range of ``text`` per prompt token.
        window: Range of ``text`` that the tokens cover: all of it, unless it was truncated.
        counts: Whether it is sure which characters were cut off, if any were.
    """

    text: str
    offsets: Offsets
    window: tuple[int, int]
    counts: bool = True

    def tokens(self, start: int, end: int, field: str) -> Span:
        """Token range of all tokens that lie wholly or partly in characters ``[start, end)``.

        Raises:
            EmphasisError: no token does, or the characters were cut off by truncation.
        """
        if end > len(self.text):
            raise EmphasisError(
                f"expected an end of at most {len(self.text)}, the number of characters, "
                f"got [{start}, {end}]",
                field=field,
            )
        if start < self.window[0] or end > self.window[1]:
            raise EmphasisError(
                f"characters {start} to {end} were cut off by truncate_prompt_tokens: what is left "
                f"of the prompt are characters {self.window[0]} to {self.window[1]}",
                field=field,
            )
        if not self.text[start:end].strip():
            raise EmphasisError(
                f"nothing but white space to emphasise in {self.text[start:end]!r}", field=field
            )
        inside = [i for i, (a, b) in enumerate(self.offsets) if a < end and b > start and a < b]
        if not inside:
            raise EmphasisError("no token of the prompt stands for this text", field=field)
        return inside[0], inside[-1] + 1


def find(
    text: str,
    needle: str,
    occurrence: Occurrence = 0,
    window: tuple[int, int] | None = None,
    field: str = "emphasis.text",
) -> list[tuple[int, int]]:
    """Character ranges of ``needle`` in ``text``; occurrences do not overlap.

    Args:
        text: Where to look.
        needle: What for, letter for letter.
        occurrence: Which one, from 0; or "last", or "all".
        window: Only within this range of ``text``.
        field: For the message.

    Raises:
        EmphasisError: not there (shows where it comes closest), not as often, or too often.
    """
    begin, end = window or (0, len(text))
    count = text.count(needle, begin, end)
    if not count:
        hint = closest(text[begin:end], needle)
        raise EmphasisError(
            f"{_quote(needle)} is not in the prompt"
            + (f"; closest is {_quote(hint)}" if hint else "")
            + ". The prompt is searched as the model sees it, after the chat template, "
            "letter for letter",
            field=field,
        )
    if isinstance(occurrence, int) and occurrence >= count:
        raise EmphasisError(
            f"{_quote(needle)} occurs {count} times, so occurrence (from 0) is at most "
            f"{count - 1}, got {occurrence}",
            field=field,
        )
    if occurrence == "all":
        check_count(count)
    last = count - 1 if isinstance(occurrence, str) else occurrence
    starts = [text.find(needle, begin, end)]
    while len(starts) <= last:
        starts.append(text.find(needle, starts[-1] + len(needle), end))
    if occurrence != "all":
        starts = starts[-1:]
    return [(start, start + len(needle)) for start in starts]


def closest(prompt: str, text: str, *, limit: int = 20_000) -> str:
    """The part of ``prompt`` most like ``text``, or an empty string.

    The longest common run fixes the place; the part has the length of ``text`` around it. Only
    the first ``limit`` characters of the prompt and 200 of the text are compared.
    """
    prompt, text = prompt[:limit], text[:200]
    match = SequenceMatcher(
        None, prompt.casefold(), text.casefold(), autojunk=False
    ).find_longest_match()
    if match.size < min(3, len(text)):
        return ""
    start = max(0, match.a - match.b)
    return prompt[start : start + len(text)].strip()


def align(
    text: str, token_ids: Sequence[int], encoded_ids: Sequence[int], encoded_offsets: Offsets
) -> Tokenized | None:
    """Matches a prompt's tokens with those of its whole text.

    The prompt's may have lost some at the start or the end by truncation, but for up to two
    special tokens there.

    Returns:
        None where they do not match. Where they match in two ways, as in a text that repeats
        itself, the one cut at the start, whose positions do not count.
    """
    ids, encoded = list(token_ids), list(encoded_ids)
    n, offsets = len(ids), list(encoded_offsets)
    if ids == encoded:
        return Tokenized(text, offsets, (0, len(text)))
    if not 0 < n < len(encoded):
        return None
    found: list[Tokenized] = []
    for kept in range(min(3, n)):
        rest = n - kept
        if ids[:kept] == encoded[:kept] and ids[kept:] == encoded[-rest:]:
            left = offsets[:kept] + offsets[-rest:]
            found.append(Tokenized(text, left, (offsets[-rest][0], len(text))))
        if ids[:rest] == encoded[:rest] and ids[rest:] == (encoded[-kept:] if kept else []):
            right = offsets[:rest] + (offsets[-kept:] if kept else [])
            found.append(Tokenized(text, right, (0, offsets[rest - 1][1])))
    if not found:
        return None
    same = all(other.offsets == found[0].offsets for other in found)
    return replace(found[0], counts=same)


def decoded(token_ids: Sequence[int], decode: Callable[[list[int]], str]) -> Tokenized:
    """Text and offsets of token ids for which there is no text.

    Tokens that only together make up a character (byte-level tokenizers) share its range. Decodes
    a sliding window of tokens, as streaming detokenisers do, so that a tokenizer which strips or
    joins at a text's start does so once.

    Args:
        token_ids: The prompt, ``n`` tokens.
        decode: Token ids to text, special tokens kept.
    """
    ids = list(token_ids)
    text = ""
    offsets: list[tuple[int, int]] = []
    prefix = read = 0  # tokens [prefix, read) are already in the text and give the next context
    for i in range(len(ids)):
        before = decode(ids[prefix:read])
        after = decode(ids[prefix : i + 1])
        complete = len(after) > len(before) and not after.endswith("�")
        if complete or i == len(ids) - 1:
            chunk = after[len(before) :]
            offsets += [(len(text), len(text) + len(chunk))] * (i + 1 - len(offsets))
            text += chunk
            prefix, read = read, i + 1
    return Tokenized(text, offsets, (0, len(text)))


def _quote(text: str) -> str:
    return repr(text if len(text) <= 120 else f"{text[:117]}…")
