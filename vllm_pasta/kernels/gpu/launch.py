"""Steered attention in Triton, after a GPU backend's plain attention, over its paged KV cache.

One launch over all rows of a step, whatever is steered, so that a CUDA graph may hold it: a program
that finds nothing to do for its request, KV head or rows ends at once. For each request it goes one
of two ways:

- **direct**: attention over all keys of the steered (row, head) pairs, with ``log(factor)`` of each
  key's factor.
- **merge**: where the backend gives the log-sum-exp of its plain attention. With P the plain output
  and Z its sum of weights, U the emphasised and the generated keys, f_u their factors,

      steered = (alpha * Z * P + sum over U of (f_u - alpha) * w_u * v_u)
              / (alpha * Z     + sum over U of (f_u - alpha) * w_u)

  so only U is read: the cost grows with the emphasised text, not with the context.

With a share, alpha is each row's own, and follows from the sums of weights of the emphasised and of
all keys. Both ways then end in the merge's formula: the direct one goes over all keys for their
weights, and over the values of U alone.

Where a step has few rows, programs share a row's keys, and the last to end puts their parts
together (split-KV, as FlashDecoding's).

``kernels.reference`` says what both compute; ``steering.slots`` what a request's record holds.
"""

import functools
import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton

from vllm_pasta.kernels.gpu import steer
from vllm_pasta.steering.plan import LayerAttention
from vllm_pasta.steering.slots import SteeringBuffers

MAX_PARTS = 16
"""Most programs that share a row's keys."""
SHARE = 256
"""Keys that are worth a program of their own."""
MAX_PART_ROWS = 16384
"""Rows that all the parts of a launch may have; 1,024 programs of a decode step, eight for each of
an H100's multiprocessors. More requests are programs enough."""
MIN_BLOCK_M = 16
"""Least rows of a tile that tensor cores take."""
ALONE = 16384
"""Keys that one program may have to go over alone where a merge comes to nothing."""
MAX_GAIN = 2.0
"""Most by which a merge that subtracts may multiply the plain output's rounding error."""
NUM_PROGRAMS = 264
"""Programs that fill a GPU in prefill, two for each of an H100's multiprocessors."""
LOG2E = 1.4426950408889634


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
        is_invariant: Whether a row's result must be the same to the bit whatever else is in its
            step. Then no keys are shared, and one kernel serves rows of all steps.

    Attributes:
        sums: float32 ``[MAX_PART_ROWS * (padded head_size + 4)]``; for each row its weighted
            values; behind all of them for each row its largest logit and sum of weights; and
            behind these, where there is a share, the sums over the emphasised keys and over the
            prompt's others.
        counters: int32 ``[MAX_PART_ROWS // MIN_BLOCK_M]``; parts that are done, 0 between launches.
        warm: Kinds of layers whose kernels are compiled; see `warm_up`.
    """

    def __init__(
        self, head_size: int, device: torch.device | str, is_invariant: bool = False
    ) -> None:
        self.is_invariant = is_invariant
        self.warm: set[tuple[object, ...]] = set()
        width = triton.next_power_of_2(head_size) + 4
        self.sums = torch.empty(MAX_PART_ROWS * width, dtype=torch.float32, device=device)
        self.counters = torch.zeros(MAX_PART_ROWS // MIN_BLOCK_M, dtype=torch.int32, device=device)

    @property
    def nbytes(self) -> int:
        """Bytes on the device."""
        return sum(t.numel() * t.element_size() for t in (self.sums, self.counters))


def is_decode(max_query_len: int) -> bool:
    """What of a step decides which of its two compiled kernels a layer launches."""
    return max_query_len == 1


class Tile(NamedTuple):
    """How a launch cuts its work.

    Attributes:
        block_m: (row, head) pairs of a tile.
        block_n: Keys of a tile.
        num_warps: Of a program.
        num_stages: Of the loop over keys: tiles that are copied or computed at a time.
        max_registers: Of a thread; None means as many as there are.
    """

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    max_registers: int | None


def tile(
    group_size: int, head_size: int, element_size: int, decodes: bool, crowded: bool, merges: bool
) -> Tile:
    """The tile of a launch.

    A short list of keys is over before a deep pipeline is full, and what hides its latency is
    other programs. So where there are many (``crowded``), or prefill merges, tiles are small and
    registers few, that more programs fit a multiprocessor: eight and two of an H100's. A lone
    program has the next tile copied while it computes one.

    Args:
        group_size: Query heads of a KV head.
        head_size: Of the keys.
        element_size: Bytes of one of the query's numbers.
        decodes: Whether each request has one row.
        crowded: Whether there are more than `NUM_PROGRAMS` pairs of requests and KV heads.
        merges: Whether the plain attention's log-sum-exp is given.
    """
    width = triton.next_power_of_2(head_size)
    keys = max(16, min(16384 // (width * element_size), 64))
    small = max(16, min(8192 // (width * element_size), 32))
    if width > 256:  # a tile of 16 keys fills what others have for 64
        pairs = max(MIN_BLOCK_M, triton.next_power_of_2(group_size)) if decodes else 16
        return Tile(pairs, keys, 4, 2, None)
    if decodes:
        pairs = max(MIN_BLOCK_M, triton.next_power_of_2(group_size))
        return Tile(pairs, small, 4, 2, 64) if crowded else Tile(pairs, keys, 4, 3, None)
    if element_size > 2:
        return Tile(32, keys, 4, 2, None)
    pairs = 128 if width <= 128 else 64
    return Tile(pairs, small, 8, 2, 128) if merges else Tile(pairs, keys, 8, 2, None)


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
    lse_in_base_2: bool = False,
    value_at: int | None = None,
) -> None:
    """Overwrites the steered (row, head) pairs of ``output``; touches nothing else.

    Args:
        query: ``[num_tokens, num_heads, head_size]``; fp32, bf16 or fp16.
        kv_cache: ``[num_blocks, num_kv_heads, block_size, head_size + value_size]``, a key and then
            a value in each row (but see ``value_at``), in any strides but contiguous rows; the
            query's dtype, or fp8 (e4m3, e5m2) with ``scales``.
        output: ``[num_tokens, num_heads, value_size]``; the plain attention's, written in place.
        buffers: The steered requests; `SteeringBuffers.show` was told this step's.
        layer: Counted over the whole model.
        batch: The step's requests.
        attention: What the layer computes.
        workspace: Of this value size; launches on one stream may share one.
        scales: float32, one element each; what fp8 keys and values are multiplied by.
        lse: float32 ``[num_tokens, num_heads]`` in any strides; logarithm of the plain attention's
            sum of weights. None: not known. Not used where the layer has sinks.
        lse_in_base_2: Whether that is the logarithm in base 2, and not the natural one.
        value_at: Where in a row of the cache the value begins. None: behind the key. In a latent
            cache a value is the first part of its key, so 0, and all KV heads are the same rows.

    Raises:
        ValueError: says what was expected and what came.
    """
    num_tokens, num_heads, head_size = query.shape
    num_kv_heads, block_size = kv_cache.shape[1:3]
    num_requests = len(batch.seq_lens)
    value_at = head_size if value_at is None else value_at
    align = _check(
        *((x.dtype, x.shape[1:], x.stride()) for x in (query, output, kv_cache)),
        value_at, num_requests, len(buffers.records), scales is not None,
        (attention.scale, attention.window, attention.soft_cap),
    )  # fmt: skip
    if attention.sinks is not None:
        lse = None
    group_size = num_heads // num_kv_heads
    decodes = is_decode(batch.max_query_len) and not workspace.is_invariant
    block_m, block_n, num_warps, num_stages, max_registers = tile(
        group_size, head_size, query.element_size(), decodes,
        num_requests * num_kv_heads > NUM_PROGRAMS, lse is not None,
    )  # fmt: skip
    if decodes:
        blocks = num_requests
        sharing = min(MAX_PARTS, MAX_PART_ROWS // (blocks * num_kv_heads * block_m))
    else:
        # Each request's rows begin a block of their own: at most this many blocks in all.
        blocks = num_tokens // block_m + num_requests
        sharing = min(group_size, NUM_PROGRAMS // (blocks * num_kv_heads))
    k_scale, v_scale = (None, None) if scales is None else scales
    steer.steer[(blocks, num_kv_heads, max(1, sharing))](
        query, kv_cache, output, buffers.records, buffers.groups,
        batch.query_start, batch.seq_lens, batch.block_table, lse,
        attention.alibi_slopes, attention.sinks, k_scale, v_scale,
        workspace.sums, workspace.counters,
        num_requests, buffers.heads_at(layer), buffers.records.stride(0), buffers.groups.stride(0),
        batch.block_table.stride(0),
        *(x // align for x in (query.stride(0), output.stride(0), *kv_cache.stride()[:3])),
        *((0, 0) if lse is None else lse.stride()),
        SCALE=attention.scale,
        LSE_SCALE=1.0 if lse_in_base_2 else LOG2E,
        SOFT_CAP=attention.soft_cap,
        WINDOW=attention.window,
        NUM_KV_HEADS=num_kv_heads,
        GROUP=group_size,
        HEAD=head_size,
        VALUE=output.shape[2],
        VALUE_AT=value_at,
        BLOCK_SIZE=block_size,
        ALIGN=align,
        MAX_REQUESTS=triton.next_power_of_2(len(buffers.records)),
        ROWS=block_m,
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        SHARE=SHARE,
        PART_ROWS=MAX_PART_ROWS,
        ALONE=ALONE,
        MAX_GAIN=MAX_GAIN,
        IS_DECODE=decodes,
        num_warps=num_warps,
        num_stages=num_stages,
        maxnreg=max_registers,
    )  # fmt: skip


def warm_up(
    buffers: SteeringBuffers,
    workspace: Workspace,
    attention: LayerAttention,
    heads: tuple[int, int, int],
    block_size: int,
    dtype: torch.dtype,
    fp8: torch.dtype | None = None,
    lse_in_base_2: bool | None = None,
    value: tuple[int, int] | None = None,
) -> None:
    """Compiles and loads all kernels that layers of a kind may launch, unless that is done.

    By launches that find nothing to steer. What decides which kernel is compiled is a tensor's
    dtype and the constants that `steered_attention` makes of its arguments; of integers nothing
    is, and of pointers and strides no more than that they are multiples of 16 bytes, as those here
    are. So these are the kernels of real steps.

    Args:
        buffers: The engine's; nothing of them is shown.
        workspace: Of this value size; keeps which kinds are done.
        attention: What the layers compute.
        heads: Query heads and KV heads of this rank, and head size.
        block_size: Rows of a block of the KV cache.
        dtype: Of query and output.
        fp8: Of keys and values, where they are not of ``dtype``.
        lse_in_base_2: As for `steered_attention`; None: the log-sum-exp is not given.
        value: Size of a value, and where it begins in a row of the cache; None: as a key, behind
            it.
    """
    num_heads, num_kv_heads, head_size = heads
    value_size, value_at = value or (head_size, head_size)
    kind = (
        attention.scale, attention.window, attention.soft_cap, attention.alibi_slopes is None,
        attention.sinks is None, heads, block_size, dtype, fp8, lse_in_base_2,
        value,
    )  # fmt: skip
    if kind in workspace.warm:
        return
    workspace.warm.add(kind)
    buffers.hide()
    device = buffers.device
    cache = torch.zeros(
        (1, num_kv_heads, block_size, max(head_size, value_at + value_size)),
        dtype=fp8 or dtype, device=device,
    )  # fmt: skip
    one = torch.ones(1, device=device)
    crowd = min(len(buffers.records), NUM_PROGRAMS // num_kv_heads + 1)
    for count, max_query_len in ((1, 1), (crowd, 1), (1, 2)):
        query = torch.zeros(count, num_heads, head_size, dtype=dtype, device=device)
        zeros = torch.zeros(count + 1, dtype=torch.int32, device=device)
        steered_attention(
            query, cache, query.new_zeros(count, num_heads, value_size), buffers, 0,
            Batch(zeros, zeros[:count], zeros[:count, None], max_query_len), attention, workspace,
            None if fp8 is None else (one, one),
            None if lse_in_base_2 is None else query[..., 0].float(), bool(lse_in_base_2),
            value_at,
        )  # fmt: skip


@functools.lru_cache(maxsize=256)
def _check(
    query: tuple[torch.dtype, tuple[int, ...], tuple[int, ...]],
    output: tuple[torch.dtype, tuple[int, ...], tuple[int, ...]],
    kv_cache: tuple[torch.dtype, tuple[int, ...], tuple[int, ...]],
    value_at: int,
    num_requests: int,
    num_slots: int,
    has_scales: bool,
    attention: tuple[float, int | None, float | None],
) -> int:
    """Checks what all calls of a kind have in common, once.

    Args:
        query, output, kv_cache: dtype, shape but for the first dimension, strides.
        attention: Scale, window and soft cap.

    Returns:
        What all strides of rows are multiples of, and the kernel may count on: 16, 8 or 1 numbers.
    """
    (dtype, heads, q_stride), (cache_dtype, cache, kv_stride) = query, kv_cache
    value, o_stride = output[1][1], output[2]
    fp8 = cache_dtype in (torch.float8_e4m3fn, torch.float8_e5m2)
    expected = {
        "query and output of one dtype and number of heads": (
            dtype == output[0] and heads[0] == output[1][0]
        ),
        "kv_cache [num_blocks, num_kv_heads, block_size, head_size + value_size]": (
            len(cache) == 3 and cache[2] == max(heads[1], value_at + value)
        ),
        "rows contiguous in the last dimension": q_stride[-1] == o_stride[-1] == kv_stride[-1] == 1,
        "heads of a query and an output row beside each other": (
            q_stride[1] == heads[1] and o_stride[1] == value
        ),
        "a KV cache in the query's dtype, or fp8 with scales": (
            fp8 if has_scales else cache_dtype == dtype
        ),
        "a number of heads that is a multiple of the KV heads": heads[0] % cache[0] == 0,
        "no more requests than buffers.records has room for": num_requests <= num_slots,
        "scale, window and soft_cap above 0": all(x is None or x > 0 for x in attention),
    }
    if missing := [text for text, holds in expected.items() if not holds]:
        raise ValueError(
            f"steered attention: expected {'; '.join(missing)}; got query {query}, output "
            f"{output}, kv_cache {kv_cache} (dtype, shape but for the first, strides), "
            f"{num_requests} requests for {num_slots} records, scale, window and soft cap "
            f"{attention}"
        )
    return math.gcd(16, q_stride[0], o_stride[0], *kv_stride[:3])
