"""Steered attention in Triton, after a GPU backend's plain attention, over its paged KV cache.

Two kernels, both launched over all rows of a step, whatever is steered, so that a CUDA graph may
hold them: a program that finds nothing to do for its request, KV head or rows ends at once.

- **direct**: attention over all keys of the steered (row, head) pairs with ``log(alpha)`` on the
  scaled keys. Where a step has few rows, their keys are split among programs, and a second launch
  puts the parts together.
- **merge**: where the backend gives the log-sum-exp of its plain attention, and alpha < 1. With P
  the plain output and Z its sum of weights, U the emphasised and the generated keys, Z_U and N_U
  their sums of weights and of weighted values,

      steered = (alpha * Z * P + (1 - alpha) * N_U) / (alpha * Z + (1 - alpha) * Z_U)

  so only U is read: the cost grows with the emphasised text, not with the context.

``kernels.reference`` says what both compute; ``buffers`` what a slot's row holds.
"""

import functools
from dataclasses import dataclass

import torch
import triton

from vllm_pasta.buffers import HEADER, SteeringBuffers
from vllm_pasta.kernels import triton_kernels
from vllm_pasta.plan import LayerAttention

SPLITS = 16
"""Programs that share a row's keys where a step has few rows."""
MAX_SPLIT_TOKENS = 64
"""Most rows of a step whose keys are split; more rows are programs enough."""


@dataclass(frozen=True)
class Batch:
    """A step's requests, as vLLM's attention metadata has them.

    Attributes:
        query_start: int32 ``[B + 1]``; start of each request's query rows.
        seq_lens: int32 ``[B]``; number of its keys, this step's included.
        block_table: int32 ``[B, max_blocks]``, contiguous in the last dimension.
        max_query_len: Most query rows of a request; a graph fixes it.
    """

    query_start: torch.Tensor
    seq_lens: torch.Tensor
    block_table: torch.Tensor
    max_query_len: int


class Workspace:
    """What programs that share a row's keys leave for the launch that merges them.

    Args:
        num_heads: Query heads of this rank.
        head_size: Of the values.
        device: Where kernels run.

    Attributes:
        sums: float32 ``[MAX_SPLIT_TOKENS, num_heads, SPLITS, padded head_size]``.
        states: float32 ``[MAX_SPLIT_TOKENS, num_heads, SPLITS, 2]``; largest logit, sum of weights.
    """

    def __init__(self, num_heads: int, head_size: int, device: torch.device | str) -> None:
        shape = (MAX_SPLIT_TOKENS, num_heads, SPLITS)
        width = triton.next_power_of_2(head_size)
        self.sums = torch.empty(*shape, width, dtype=torch.float32, device=device)
        self.states = torch.empty(*shape, 2, dtype=torch.float32, device=device)

    @property
    def nbytes(self) -> int:
        """Bytes on the device."""
        return sum(t.numel() * t.element_size() for t in (self.sums, self.states))


def variant(num_tokens: int, max_query_len: int) -> tuple[bool, bool]:
    """What of a step's size decides which compiled kernels a layer launches."""
    return max_query_len == 1, num_tokens <= MAX_SPLIT_TOKENS


def steered_attention(
    query: torch.Tensor,
    kv_cache: torch.Tensor,
    output: torch.Tensor,
    buffers: SteeringBuffers,
    layer: int,
    batch: Batch,
    attention: LayerAttention,
    workspace: Workspace,
    scales: tuple[torch.Tensor, torch.Tensor] | None = None,
    lse: torch.Tensor | None = None,
) -> None:
    """Overwrites the steered (row, head) pairs of ``output``; touches nothing else.

    Args:
        query: ``[num_tokens, num_heads, head_size]``; fp32, bf16 or fp16.
        kv_cache: ``[num_blocks, num_kv_heads, block_size, 2 * head_size]``, a key and then a value
            in each row, in any strides but contiguous rows; the query's dtype, or fp8 (e4m3, e5m2)
            with ``scales``.
        output: ``[num_tokens, num_heads, head_size]``; the plain attention's, written in place.
        buffers: The steered requests; `SteeringBuffers.show` was told this step's.
        layer: Counted over the whole model.
        batch: The step's requests.
        attention: What the layer computes.
        workspace: Of this size of heads; launches on one stream may share one.
        scales: float32, one element each; what fp8 keys and values are multiplied by.
        lse: float32 ``[num_tokens, num_heads]`` in any strides; natural logarithm of the plain
            attention's sum of weights. None: not known. Not used where the layer has sinks.

    Raises:
        ValueError: says what was expected and what came.
    """
    num_tokens, num_heads, head_size = query.shape
    num_kv_heads, block_size = kv_cache.shape[1:3]
    num_requests = len(batch.seq_lens)
    _check(
        *((x.dtype, x.shape[1:], x.stride(-1)) for x in (query, output, kv_cache)),
        num_requests, len(buffers.slots), scales is not None,
        (attention.scale, attention.window, attention.soft_cap),
    )  # fmt: skip
    group_size = num_heads // num_kv_heads
    is_decode, is_split = variant(num_tokens, batch.max_query_len)
    block_m = max(16, triton.next_power_of_2(group_size) * (1 if is_decode else 4))
    block_m = block_m if is_decode else max(block_m, 64)
    block_q = max(1, block_m // group_size)
    # Each request's rows begin a block of their own: at most this many blocks in all.
    blocks = num_requests if is_decode else num_tokens // block_q + num_requests
    splits = SPLITS if is_split else 1
    merges = lse is not None and attention.sinks is None
    flat = (
        query, kv_cache, output,
        buffers.rows, buffers.slots, batch.query_start, batch.seq_lens, batch.block_table,
        query if lse is None else lse,
        query if attention.alibi_slopes is None else attention.alibi_slopes,
        query if attention.sinks is None else attention.sinks,
        query if scales is None else scales[0],
        query if scales is None else scales[1],
        workspace.sums, workspace.states,
        attention.scale, attention.soft_cap or 0.0, attention.window or 0,
        num_requests, HEADER + layer * buffers.words, buffers.spans_offset,
        *buffers.rows.stride()[:1], *batch.block_table.stride()[:1],
        *query.stride()[:2], *output.stride()[:2], *kv_cache.stride()[:3],
        *((0, 0) if lse is None else lse.stride()),
    )  # fmt: skip
    constants = {
        "GROUP": group_size,
        "HEAD": head_size,
        "HEAD_PADDED": triton.next_power_of_2(head_size),
        "BLOCK_SIZE": block_size,
        "BLOCK_M": block_m,
        "BLOCK_Q": block_q,
        "BLOCK_N": 32 if head_size > 128 or query.dtype == torch.float32 else 64,
        "IS_DECODE": is_decode,
        "HAS_ALIBI": attention.alibi_slopes is not None,
        "HAS_SINKS": attention.sinks is not None,
        "HAS_SCALES": scales is not None,
        "HAS_SOFT_CAP": attention.soft_cap is not None,
        "HAS_WINDOW": attention.window is not None,
    }
    options = {"num_warps": 4 if block_m <= 64 else 8, "num_stages": 2}
    if merges:
        triton_kernels.merge[(blocks, num_kv_heads)](*flat, **constants, **options)
    triton_kernels.direct[(blocks, num_kv_heads, splits)](
        *flat, **constants, SPLITS=splits, SKIPS_MERGED=merges, **options
    )
    if splits > 1:
        triton_kernels.put_together[(num_tokens, num_heads)](
            output, buffers.rows, buffers.slots, batch.query_start, batch.seq_lens,
            workspace.sums, workspace.states, num_requests,
            HEADER + layer * buffers.words, buffers.rows.stride(0), *output.stride()[:2],
            HEAD=head_size, HEAD_PADDED=constants["HEAD_PADDED"], SPLITS=splits,
            SKIPS_MERGED=merges, num_warps=2,
        )  # fmt: skip


@functools.lru_cache(maxsize=256)
def _check(
    query: tuple[torch.dtype, tuple[int, ...], int],
    output: tuple[torch.dtype, tuple[int, ...], int],
    kv_cache: tuple[torch.dtype, tuple[int, ...], int],
    num_requests: int,
    num_slots: int,
    has_scales: bool,
    attention: tuple[float, int | None, float | None],
) -> None:
    """Checks what all calls of a kind have in common, once.

    Args:
        query, output, kv_cache: dtype, shape but for the first dimension, last stride.
        attention: Scale, window and soft cap.
    """
    (dtype, heads, _), (cache_dtype, cache, _) = query, kv_cache
    fp8 = cache_dtype in (torch.float8_e4m3fn, torch.float8_e5m2)
    expected = {
        "query and output of one shape": heads == output[1],
        "kv_cache [num_blocks, num_kv_heads, block_size, 2 * head_size]": (
            len(cache) == 3 and cache[2] == 2 * heads[1]
        ),
        "rows contiguous in the last dimension": query[2] == output[2] == kv_cache[2] == 1,
        "a KV cache in the query's dtype, or fp8 with scales": (
            fp8 if has_scales else cache_dtype == dtype
        ),
        "a number of heads that is a multiple of the KV heads": heads[0] % cache[0] == 0,
        "no more requests than buffers.slots has room for": num_requests <= num_slots,
        "scale, window and soft_cap above 0": all(x is None or x > 0 for x in attention),
    }
    if missing := [text for text, holds in expected.items() if not holds]:
        raise ValueError(
            f"steered attention: expected {'; '.join(missing)}; got query {query}, output "
            f"{output}, kv_cache {kv_cache} (dtype, shape but for the first, last stride), "
            f"{num_requests} requests for {num_slots} slots, scale, window and soft cap {attention}"
        )
