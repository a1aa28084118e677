"""Steered attention in Triton, after a GPU backend's plain attention, over its paged KV cache.

One launch over all rows of a step, whatever is steered, so that a CUDA graph may hold it: a program
that finds nothing to do for its request, KV head or rows ends at once. For each request it goes one
of two ways:

- **direct**: attention over all keys of the steered (row, head) pairs with ``log(alpha)`` on the
  scaled keys.
- **merge**: where the backend gives the log-sum-exp of its plain attention, and alpha < 1. With P
  the plain output and Z its sum of weights, U the emphasised and the generated keys, Z_U and N_U
  their sums of weights and of weighted values,

      steered = (alpha * Z * P + (1 - alpha) * N_U) / (alpha * Z + (1 - alpha) * Z_U)

  so only U is read: the cost grows with the emphasised text, not with the context.

Where a step has few rows, programs share a row's keys, and the last to end puts their parts
together (split-KV, as FlashDecoding's).

``kernels.reference`` says what both compute; ``buffers`` what a slot's row holds.
"""

import functools
from dataclasses import dataclass

import torch
import triton

from vllm_pasta.kernels.gpu import steer
from vllm_pasta.steering.plan import LayerAttention
from vllm_pasta.steering.slots import HEADER, SteeringBuffers

MAX_PARTS = 16
"""Most programs that share a row's keys."""
SHARE = 256
"""Keys that are worth a program of their own."""
MAX_PART_ROWS = 8192
"""Rows that all the parts of a launch may have; 512 programs of a decode step, four for each of an
H100's multiprocessors. More blocks of rows are programs enough."""
MIN_BLOCK_M = 16
"""Least rows of a tile that tensor cores take."""


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
    """What programs that share a row's keys leave for the last of them.

    Args:
        head_size: Of the values.
        device: Where kernels run.

    Attributes:
        sums: float32 ``[MAX_PART_ROWS, padded head_size]``; weighted values.
        states: float32 ``[MAX_PART_ROWS, 2]``; largest logit, sum of weights.
        counters: int32 ``[MAX_PART_ROWS // MIN_BLOCK_M]``; parts that are done, 0 between launches.
    """

    def __init__(self, head_size: int, device: torch.device | str) -> None:
        width = triton.next_power_of_2(head_size)
        self.sums = torch.empty(MAX_PART_ROWS, width, dtype=torch.float32, device=device)
        self.states = torch.empty(MAX_PART_ROWS, 2, dtype=torch.float32, device=device)
        self.counters = torch.zeros(MAX_PART_ROWS // MIN_BLOCK_M, dtype=torch.int32, device=device)

    @property
    def nbytes(self) -> int:
        """Bytes on the device."""
        tensors = (self.sums, self.states, self.counters)
        return sum(t.numel() * t.element_size() for t in tensors)


def is_decode(max_query_len: int) -> bool:
    """What of a step decides which of its two compiled kernels a layer launches."""
    return max_query_len == 1


def tile(group_size: int, head_size: int, element_size: int, decodes: bool) -> tuple[int, int]:
    """Rows and keys of a tile, whose keys and values, twice, and weights fit shared memory.

    Args:
        group_size: Query heads of a KV head.
        head_size: Of the keys and values.
        element_size: Bytes of one of the query's numbers.
        decodes: Whether each request has one row.
    """
    rows = MIN_BLOCK_M if decodes else 128 // element_size
    keys = 16384 // (triton.next_power_of_2(head_size) * element_size)
    return max(rows, triton.next_power_of_2(group_size)), max(16, min(keys, 64))


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
        workspace: Of this head size; launches on one stream may share one.
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
    decodes = is_decode(batch.max_query_len)
    block_m, block_n = tile(group_size, head_size, query.element_size(), decodes)
    block_q = max(1, block_m // group_size)
    # Each request's rows begin a block of their own: at most this many blocks in all.
    blocks = num_requests if decodes else num_tokens // block_q + num_requests
    parts = max(1, min(MAX_PARTS, MAX_PART_ROWS // (blocks * num_kv_heads * block_m)))
    steer.steer[(blocks, num_kv_heads, parts)](
        query, kv_cache, output,
        buffers.rows, buffers.slots, batch.query_start, batch.seq_lens, batch.block_table,
        query if lse is None else lse,
        query if attention.alibi_slopes is None else attention.alibi_slopes,
        query if attention.sinks is None else attention.sinks,
        query if scales is None else scales[0],
        query if scales is None else scales[1],
        workspace.sums, workspace.states, workspace.counters,
        attention.scale, attention.soft_cap or 0.0, attention.window or 0,
        num_requests, HEADER + layer * buffers.words, buffers.bounds_offset,
        *buffers.rows.stride()[:1], *batch.block_table.stride()[:1],
        *query.stride()[:2], *output.stride()[:2], *kv_cache.stride()[:3],
        *((0, 0) if lse is None else lse.stride()),
        GROUP=group_size,
        HEAD=head_size,
        HEAD_PADDED=triton.next_power_of_2(head_size),
        BLOCK_SIZE=block_size,
        BLOCK_M=block_m,
        BLOCK_Q=block_q,
        BLOCK_N=block_n,
        MAX_REQUESTS=triton.next_power_of_2(len(buffers.slots)),
        SHARE=SHARE,
        IS_DECODE=decodes,
        HAS_ALIBI=attention.alibi_slopes is not None,
        HAS_SINKS=attention.sinks is not None,
        HAS_SCALES=scales is not None,
        HAS_SOFT_CAP=attention.soft_cap is not None,
        HAS_WINDOW=attention.window is not None,
        HAS_LSE=lse is not None and attention.sinks is None,
        num_warps=4 if block_m <= 64 else 8,
        num_stages=3,  # block table, keys and values, and arithmetic
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
