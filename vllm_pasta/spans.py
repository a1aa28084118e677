"""From text to token ranges. Pure Python: a tokenizer comes in as a callable."""

from collections.abc import Callable, Sequence
from difflib import SequenceMatcher

from vllm_pasta.emphasis import Span
from vllm_pasta.errors import EmphasisError

Offsets = Sequence[tuple[int, int]]
"""Per token, the half-open range of characters that it stands for; empty for special tokens."""


def find_text(prompt: str, text: str, field: str = "emphasis.text") -> Span:
    """Character range of the first occurrence of ``text`` in ``prompt``.

    Raises:
        EmphasisError: not in the prompt; shows where it comes closest.
    """
    start = prompt.find(text)
    if start < 0:
        hint = closest(prompt, text)
        raise EmphasisError(
            f"{_quote(text)} is not in the prompt"
            + (f"; closest is {_quote(hint)}" if hint else "")
            + ". The prompt is searched as the model sees it, after the chat template, "
            "letter for letter",
            field=field,
        )
    return start, start + len(text)


def closest(prompt: str, text: str, *, limit: int = 100_000) -> str:
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


def to_tokens(offsets: Offsets, start: int, end: int, field: str = "emphasis.text") -> Span:
    """Token range of all tokens that lie wholly or partly in characters ``[start, end)``.

    Raises:
        EmphasisError: no token does.
    """
    inside = [i for i, (a, b) in enumerate(offsets) if a < end and b > start and a < b]
    if not inside:
        raise EmphasisError("no token of the prompt stands for this text", field=field)
    return inside[0], inside[-1] + 1


def decoded_offsets(
    token_ids: Sequence[int], decode: Callable[[list[int]], str]
) -> tuple[str, list[tuple[int, int]]]:
    """Text and offsets of token ids for which there is no text.

    Tokens that only together make up a character (byte-level tokenizers) share its range. Decodes
    a sliding window of tokens, as streaming detokenisers do, so that a tokenizer which strips or
    joins at a text's start does so once.

    Args:
        token_ids: The prompt, ``n`` tokens.
        decode: Token ids to text, special tokens kept.

    Returns:
        The text, and ``n`` character ranges in it.
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
    return text, offsets


def _quote(text: str) -> str:
    return repr(text if len(text) <= 120 else f"{text[:117]}…")
