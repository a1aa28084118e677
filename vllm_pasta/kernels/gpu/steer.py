"""What the launch of ``kernels.triton`` runs. A slot's row: see ``buffers``."""

import triton
import triton.language as tl

from vllm_pasta.steering.slots import EMPHASISED, FIRST, LOG_ALPHA, NUM_SPANS

# One compiled kernel serves all steps and layers: a graph must not be the first to need another.
_VARYING = ("num_requests", "stride_lse_row", "stride_lse_head", "heads_offset")
_END = tl.constexpr(2**31 - 1)
_FIRST, _NUM_SPANS = tl.constexpr(FIRST), tl.constexpr(NUM_SPANS)
_EMPHASISED, _LOG_ALPHA = tl.constexpr(EMPHASISED), tl.constexpr(LOG_ALPHA)


@triton.jit
def _request_of(
    query_start, block, num_requests, BLOCK_Q: tl.constexpr, MAX_REQUESTS: tl.constexpr
):  # fmt: skip
    """The request that a block of rows belongs to, where each request begins a block of its own.

    Counts those that begin no later, all at once: a search would wait for memory at each step, and
    Triton 3.7 pipelines no loop after one whose end it does not know.
    """
    request = tl.arange(0, MAX_REQUESTS)
    is_request = request < num_requests
    start = tl.load(query_start + request, mask=is_request, other=0)
    return tl.sum((is_request & (start // BLOCK_Q + request <= block)).to(tl.int32), 0) - 1


@triton.jit
def _rows_of(
    rows, slots, query_start, seq_lens, num_requests, heads_offset, stride_slot,
    GROUP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_Q: tl.constexpr,
    MAX_REQUESTS: tl.constexpr, IS_DECODE: tl.constexpr,
):  # fmt: skip
    """This program's request and (row, head) pairs, and which of them are steered."""
    block, kv_head = tl.program_id(0), tl.program_id(1)
    if IS_DECODE:
        request = block
        block_in_request = 0
    else:
        request = _request_of(query_start, block, num_requests, BLOCK_Q, MAX_REQUESTS)
        block_in_request = block - tl.load(query_start + request) // BLOCK_Q - request
    begin = tl.load(query_start + request)
    query_len = tl.load(query_start + request + 1) - begin
    seq_len = tl.load(seq_lens + request)
    slot = tl.load(slots + request)
    state = rows + slot.to(tl.int64) * stride_slot
    first = tl.load(state + _FIRST, mask=slot >= 0, other=_END)
    pair = tl.arange(0, BLOCK_M)
    row = block_in_request * BLOCK_Q + pair // GROUP
    head = kv_head * GROUP + pair % GROUP
    position = seq_len - query_len + row
    is_pair = (pair // GROUP < BLOCK_Q) & (row < query_len) & (position >= first)
    word = tl.load(state + heads_offset + head // 32, mask=is_pair, other=0)
    steered = is_pair & (((word >> (head % 32)) & 1) == 1)
    return state, request, begin + row, head, position, steered


@triton.jit
def _logits(
    q, keys, mask, positions, key_positions, slopes, scale, soft_cap, window, key_scale,
    HAS_ALIBI: tl.constexpr, HAS_SCALES: tl.constexpr, HAS_SOFT_CAP: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
):  # fmt: skip
    """Logits of a tile before the bias; minus infinity where a row does not see a key."""
    if HAS_SCALES:
        keys = keys.to(q.dtype)
    logits = tl.dot(q, keys, input_precision="ieee") * scale
    if HAS_SCALES:
        logits *= key_scale
    if HAS_SOFT_CAP:
        # tanh, from what every version of Triton has
        e = tl.exp(-2 * tl.abs(logits / soft_cap))
        logits = tl.where(logits < 0, -1.0, 1.0) * soft_cap * (1 - e) / (1 + e)
    distance = key_positions[None, :] - positions[:, None]
    if HAS_ALIBI:
        logits += slopes[:, None] * distance
    seen = (distance <= 0) & mask[None, :]
    if HAS_WINDOW:
        seen &= distance > -window
    return tl.where(seen, logits, float("-inf"))


@triton.jit
def _finite(largest):
    """What a row's logits are taken relative to. A row that has seen no key stays at minus
    infinity, whose difference is no number."""
    return tl.where(largest == float("-inf"), 0.0, largest)


@triton.jit(do_not_specialize=_VARYING)
def steer(
    query, kv_cache, output, rows, slots, query_start, seq_lens, block_table, lse,
    alibi_slopes, sinks, key_scale, value_scale, sums, states, counters,
    scale, soft_cap, window, num_requests, heads_offset, bounds_offset,
    stride_slot, stride_table, stride_q_row, stride_q_head, stride_o_row, stride_o_head,
    stride_block, stride_kv_head, stride_kv_row, stride_lse_row, stride_lse_head,
    GROUP: tl.constexpr, HEAD: tl.constexpr, HEAD_PADDED: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_N: tl.constexpr,
    MAX_REQUESTS: tl.constexpr, SHARE: tl.constexpr,
    IS_DECODE: tl.constexpr, HAS_ALIBI: tl.constexpr, HAS_SINKS: tl.constexpr,
    HAS_SCALES: tl.constexpr, HAS_SOFT_CAP: tl.constexpr, HAS_WINDOW: tl.constexpr,
    HAS_LSE: tl.constexpr,
):  # fmt: skip
    state, request, token, head, position, steered = _rows_of(
        rows, slots, query_start, seq_lens, num_requests, heads_offset, stride_slot,
        GROUP, BLOCK_M, BLOCK_Q, MAX_REQUESTS, IS_DECODE,
    )  # fmt: skip
    if tl.max(steered.to(tl.int32), 0) == 0:
        return
    kv_head, split = tl.program_id(1), tl.program_id(2)
    log_alpha = tl.load(state + _LOG_ALPHA).to(tl.float32, bitcast=True)
    last_bound = 2 * tl.load(state + _NUM_SPANS)
    bounds = state + bounds_offset
    merges = (log_alpha < 0) & HAS_LSE
    # The keys that any steered row sees. Blocks before a window may hold anything.
    end = tl.max(tl.where(steered, position, -1), 0) + 1
    begin = tl.min(tl.where(steered, 0, 0), 0)
    if HAS_WINDOW:
        begin = tl.maximum(tl.min(tl.where(steered, position, _END), 0) + 1 - window, 0)
    # Programs take turns at tiles. With few keys the first ones take them all.
    num_keys = end - begin
    if merges:
        num_keys = tl.load(state + _EMPHASISED) + tl.maximum(end - tl.load(bounds + last_bound), 0)
    parts = tl.minimum(tl.cdiv(num_keys, SHARE), tl.num_programs(2))
    if split >= parts:
        return

    dim = tl.arange(0, HEAD_PADDED)
    is_dim = dim < HEAD
    q = tl.load(
        query + token[:, None].to(tl.int64) * stride_q_row + head[:, None] * stride_q_head + dim,
        mask=steered[:, None] & is_dim[None, :],
        other=0.0,
    )
    slopes = position.to(tl.float32)
    if HAS_ALIBI:
        slopes = tl.load(alibi_slopes + head, mask=steered, other=0.0)
    k_scale, v_scale = 1.0, 1.0
    if HAS_SCALES:
        k_scale, v_scale = tl.load(key_scale), tl.load(value_scale)

    largest = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    if HAS_SINKS and split == 0:
        largest = tl.load(sinks + head, mask=steered, other=0.0).to(tl.float32)
        total += 1.0
    acc = tl.zeros([BLOCK_M, HEAD_PADDED], tl.float32)
    # Between two bounds all keys have the same bias, so the inner loop has no branch and is
    # pipelined. Scaled keys come first, then emphasised ones, and so on; a merge wants only these.
    for stretch in range(merges.to(tl.int32), last_bound + 2, 1 + merges.to(tl.int32)):
        start = tl.load(bounds + stretch - 1, mask=stretch > 0, other=0)
        stop = tl.load(bounds + stretch, mask=stretch <= last_bound, other=_END)
        start, stop = tl.maximum(start, begin), tl.minimum(stop, end)
        bias = tl.where(stretch % 2 == 0, log_alpha, 0.0)
        turn = (split + stretch // 2) % parts  # others are first where the next stretch begins
        for key in range(start + turn * BLOCK_N, stop, parts * BLOCK_N):
            keys_at = key + tl.arange(0, BLOCK_N)
            is_key = keys_at < stop
            block = tl.load(
                block_table + request * stride_table + keys_at // BLOCK_SIZE, mask=is_key, other=0
            ).to(tl.int64)
            at = (
                kv_cache
                + block * stride_block
                + kv_head * stride_kv_head
                + (keys_at % BLOCK_SIZE) * stride_kv_row
            )
            keys = tl.load(
                at[None, :] + dim[:, None], mask=is_key[None, :] & is_dim[:, None], other=0.0
            )
            logits = _logits(
                q, keys, is_key, position, keys_at, slopes, scale, soft_cap, window, k_scale,
                HAS_ALIBI, HAS_SCALES, HAS_SOFT_CAP, HAS_WINDOW,
            )  # fmt: skip
            logits += bias
            new_largest = tl.maximum(largest, tl.max(logits, 1))
            base = _finite(new_largest)
            weights = tl.exp(logits - base[:, None])
            rescale = tl.exp(largest - base)
            total = total * rescale + tl.sum(weights, 1)
            values = tl.load(
                at[:, None] + HEAD + dim[None, :], mask=is_key[:, None] & is_dim[None, :], other=0.0
            )
            if HAS_SCALES:
                values = values.to(q.dtype)
            acc = acc * rescale[:, None]
            acc += tl.dot(weights.to(q.dtype), values, input_precision="ieee")
            largest = new_largest
    if HAS_SCALES:
        acc *= v_scale

    is_last = parts == 1
    if parts > 1:
        # Each leaves its part; who comes last puts all of them together. The atomic's own
        # ordering, between the barriers, makes what the others left visible.
        pair = tl.arange(0, BLOCK_M)
        group = tl.program_id(0) * tl.num_programs(1) + kv_head
        first_part = group * tl.num_programs(2)
        own = (first_part + split) * BLOCK_M + pair
        tl.store(sums + own[:, None] * HEAD_PADDED + dim[None, :], acc)
        tl.store(states + 2 * own, largest)
        tl.store(states + 2 * own + 1, total)
        tl.debug_barrier()
        is_last = tl.atomic_add(counters + group, 1, sem="acq_rel") == parts - 1
        tl.debug_barrier()
        if is_last:
            tl.store(counters + group, 0)
            largest = tl.full([BLOCK_M], float("-inf"), tl.float32)
            total = tl.zeros([BLOCK_M], tl.float32)
            acc = tl.zeros([BLOCK_M, HEAD_PADDED], tl.float32)
            for part in range(parts):
                other = (first_part + part) * BLOCK_M + pair
                other_largest = tl.load(states + 2 * other, cache_modifier=".cg")
                other_total = tl.load(states + 2 * other + 1, cache_modifier=".cg")
                other_acc = tl.load(
                    sums + other[:, None] * HEAD_PADDED + dim[None, :], cache_modifier=".cg"
                )
                new_largest = tl.maximum(largest, other_largest)
                base = _finite(new_largest)
                rescale, weight = tl.exp(largest - base), tl.exp(other_largest - base)
                total = total * rescale + other_total * weight
                acc = acc * rescale[:, None] + other_acc * weight[:, None]
                largest = new_largest
    if is_last:
        to = (
            output
            + token[:, None].to(tl.int64) * stride_o_row
            + head[:, None] * stride_o_head
            + dim[None, :]
        )
        is_stored = steered[:, None] & is_dim[None, :]
        if merges:
            plain = tl.load(to, mask=is_stored, other=0.0).to(tl.float32)
            plain_lse = tl.load(
                lse + token.to(tl.int64) * stride_lse_row + head * stride_lse_head,
                mask=steered,
                other=0.0,
            )
            # Weights relative to the larger of the two parts, so that neither overflows.
            log_rest = tl.log(1 - tl.exp(log_alpha))
            base = tl.maximum(plain_lse + log_alpha, largest + log_rest)
            of_plain = tl.exp(plain_lse + log_alpha - base)
            of_rest = tl.exp(largest + log_rest - base)
            acc = of_plain[:, None] * plain + of_rest[:, None] * acc
            total = of_plain + of_rest * total
        tl.store(to, (acc / total[:, None]).to(output.dtype.element_ty), mask=is_stored)
