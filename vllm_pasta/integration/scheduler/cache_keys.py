"""Prefix caching: what a KV block's hash must know of its request's emphasis.

Steering changes the hidden states, and so K and V of later layers, from the first emphasised token
on. A block is given a key if it overlaps an emphasised range, or, in a steered request, holds
tokens at or past the prompt's end, which are never scaled. Later blocks inherit through the parent
hash. So blocks before the first emphasised token are shared with plain requests, equal emphasis
shares everything, and nothing wrong is ever shared.
"""

from collections.abc import Callable
from typing import Any

from vllm_pasta.integration.patching import Patch
from vllm_pasta.request.resolution import ResolvedEmphasis

TAG = "pasta"


def block_key(emphasis: ResolvedEmphasis, start: int, end: int) -> tuple[Any, ...] | None:
    """The key of the block that holds tokens ``[start, end)``, or None where it needs none.

    Returns:
        ``(TAG, (digest, overlaps, prompt_end))``: digest of strength and heads where there is an
        overlap, else None; the overlaps relative to the block, each followed by its factor unless
        that is 1; the prompt's end relative to the block, if the block holds tokens at or past it,
        else None. In the shape of vLLM's own keys, a tag and a value. Hashable, and the same in
        every process.
    """
    overlaps = tuple(
        (max(a, start) - start, min(b, end) - start, *([] if factor == 1.0 else [factor]))
        for (a, b), factor in zip(emphasis.spans, emphasis.span_factors, strict=True)
        if a < end and b > start
    )
    prompt_end = max(emphasis.prompt_len - start, 0) if end > emphasis.prompt_len else None
    if not overlaps and prompt_end is None:
        return None
    return TAG, (emphasis.digest if overlaps else None, overlaps, prompt_end)


def request_emphasis(request: Any) -> ResolvedEmphasis | None:
    """The resolved emphasis of an engine-core request; parsed once per request."""
    try:
        return request._vllm_pasta  # type: ignore[no-any-return]
    except AttributeError:
        request._vllm_pasta = ResolvedEmphasis.carried_by(request.sampling_params)
        return request._vllm_pasta  # type: ignore[no-any-return]


def block_hash_key(request: Any, start: int, end: int) -> tuple[Any, ...] | None:
    """The key of a request's KV block of tokens ``[start, end)``, or None."""
    emphasis = request_emphasis(request)
    return None if emphasis is None else block_key(emphasis, start, end)


def _generate_block_hash_extra_keys(
    original: Callable[..., Any],
    request: Any,
    start_token_idx: int,
    end_token_idx: int,
    start_mm_idx: int,
) -> tuple[tuple[Any, ...] | None, int]:
    keys, mm_idx = original(request, start_token_idx, end_token_idx, start_mm_idx)
    key = block_hash_key(request, start_token_idx, end_token_idx)
    return keys if key is None else (*(keys or ()), key), mm_idx


PATCHES = (
    Patch(
        "vllm.v1.core.kv_cache_utils:generate_block_hash_extra_keys",
        _generate_block_hash_extra_keys,
        "fabb6e4b928a",
        "block_hash_keys",
    ),
    Patch(  # imported there by name, for KV cache events
        "vllm.v1.core.block_pool:generate_block_hash_extra_keys",
        _generate_block_hash_extra_keys,
        "fabb6e4b928a",
        "block_hash_keys",
    ),
)
HOOKS = {"block_hash_keys": block_hash_key}
