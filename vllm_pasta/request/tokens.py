"""From text to token ranges. Pure Python: a tokenizer comes in as a callable."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from vllm_pasta.errors import EmphasisError
from vllm_pasta.request.resolution import Span

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


_PLACEHOLDER = re.compile(r"(<[^<>\s]*>|\[[^\[\]\s]*\])?")
"""What stands for an image in a prompt's text: one word in brackets, or nothing. If anything else
were left over, the prompt would be cut there."""

MOST_TOKENS = 64
"""Tokens of such a word, at most."""


def spliced(
    text: str,
    token_ids: Sequence[int],
    held: Sequence[Span],
    encoded_ids: Sequence[int],
    encoded_offsets: Offsets,
) -> Tokenized | None:
    """Matches a prompt's tokens with those of its text, where some of them stand for images.

    vLLM tokenises the text, and puts an image's tokens in the place of what stands for it there,
    or between two tokens. What is left must be the text's tokens, in order.

    Args:
        text: The prompt's text, with a placeholder for each image, or none.
        token_ids: The prompt's tokens, images in their full length.
        held: Ranges of ``token_ids`` that stand for images: sorted, disjoint.
        encoded_ids, encoded_offsets: The text's tokens.

    Returns:
        None where they do not match. Every token of an image has the characters of its placeholder,
        or none.
    """
    ids, encoded = list(token_ids), list(encoded_ids)
    ends = [0, *(end for _, end in held)]
    starts = [*(start for start, _ in held), len(ids)]
    offsets: list[tuple[int, int]] = []
    at = 0  # in ``encoded``
    for i, (start, end) in enumerate(zip(ends, starts, strict=True)):
        gap, is_between = ids[start:end], 0 < i < len(held)
        if is_between and not gap:
            return None  # two images side by side: which text is whose?
        skipped = _skipped(encoded[at:], gap, is_first=i == 0, is_last=i == len(held))
        if skipped is None:
            return None
        if i > 0:
            place = (0, 0)
            if skipped:
                place = encoded_offsets[at][0], encoded_offsets[at + skipped - 1][1]
            if not _PLACEHOLDER.fullmatch(text[slice(*place)]):
                return None
            offsets += [place] * (held[i - 1][1] - held[i - 1][0])
        at += skipped
        offsets += encoded_offsets[at : at + len(gap)]
        at += len(gap)
    return Tokenized(text, offsets, (0, len(text)))


def _skipped(rest: list[int], gap: list[int], *, is_first: bool, is_last: bool) -> int | None:
    """How many tokens at the start of ``rest`` are an image's placeholder, before ``gap``."""
    if is_last:
        count = len(rest) - len(gap)
        return count if count >= 0 and rest[count:] == gap else None
    most = 0 if is_first else min(len(rest) - len(gap), MOST_TOKENS)
    return next((n for n in range(most + 1) if rest[n : n + len(gap)] == gap), None)


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
