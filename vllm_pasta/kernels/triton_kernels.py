"""What the launches of ``kernels.triton`` run. A slot's row: see ``buffers``."""

import triton
import triton.language as tl

from vllm_pasta.buffers import FIRST, LOG_ALPHA, NUM_SPANS, PROMPT_LEN

# One compiled kernel serves all steps and layers: a graph must not be the first to need another.
_VARYING = ("num_requests", "stride_lse_row", "stride_lse_head", "heads_offset")
_END = tl.constexpr(2**31 - 1)
_FIRST, _PROMPT_LEN = tl.constexpr(FIRST), tl.constexpr(PROMPT_LEN)
_NUM_SPANS, _LOG_ALPHA = tl.constexpr(NUM_SPANS), tl.constexpr(LOG_ALPHA)


@triton.jit
def _request_of(query_start, block, num_requests, BLOCK_Q: tl.constexpr):
    """The request that a block of rows belongs to, where each request begins a block of its own."""
    low, high = 0, num_requests
    while low < high:
        middle = (low + high) // 2
        if tl.load(query_start + middle) // BLOCK_Q + middle <= block:
            low = middle + 1
        else:
            high = middle
    return low - 1


@triton.jit
def _is_emphasised(spans, num_spans, span, key, positions, BLOCK_N: tl.constexpr):
    """Which of a tile's positions are emphasised. ``span``: the first that ends after ``key``."""
    inside = positions < 0
    start = tl.load(spans + 2 * span, mask=span < num_spans, other=_END)
    while start < key + BLOCK_N:
        inside |= (positions >= start) & (positions < tl.load(spans + 2 * span + 1))
        span += 1
        start = tl.load(spans + 2 * span, mask=span < num_spans, other=_END)
    return inside


@triton.jit
def _span_after(spans, num_spans, span, key):
    """The first span from ``span`` on that ends after ``key``."""
    end = tl.load(spans + 2 * span + 1, mask=span < num_spans, other=_END)
    while end <= key:
        span += 1
        end = tl.load(spans + 2 * span + 1, mask=span < num_spans, other=_END)
    return span


@triton.jit
def _first_key(position, steered, window, HAS_WINDOW: tl.constexpr):
    """The first key that any steered row sees; blocks before its own may hold anything."""
    if HAS_WINDOW:
        first = tl.maximum(tl.min(tl.where(steered, position, _END), 0) + 1 - window, 0)
    else:
        first = tl.min(tl.where(steered, 0, 0), 0)
    return first


@triton.jit
def _rows_of(
    rows, slots, query_start, seq_lens, num_requests, heads_offset, stride_slot,
    GROUP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_Q: tl.constexpr, IS_DECODE: tl.constexpr,
):  # fmt: skip
    """This program's request and (row, head) pairs, and which of them are steered."""
    block, kv_head = tl.program_id(0), tl.program_id(1)
    if IS_DECODE:
        request = block
        block_in_request = 0
    else:
        request = _request_of(query_start, block, num_requests, BLOCK_Q)
        block_in_request = block - tl.load(query_start + request) // BLOCK_Q - request
    begin = tl.load(query_start + request)
    query_len = tl.load(query_start + request + 1) - begin
    seq_len = tl.load(seq_lens + request)
    slot = tl.load(slots + request)
    state = rows + slot.to(tl.int64) * stride_slot
    is_steered = slot >= 0
    first = tl.load(state + _FIRST, mask=is_steered, other=_END)
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


@triton.jit(do_not_specialize=_VARYING)
def direct(
    query, kv_cache, output, rows, slots, query_start, seq_lens, block_table, lse,
    alibi_slopes, sinks, key_scale, value_scale, sums, states,
    scale, soft_cap, window, num_requests, heads_offset, spans_offset,
    stride_slot, stride_table, stride_q_row, stride_q_head, stride_o_row, stride_o_head,
    stride_block, stride_kv_head, stride_kv_row, stride_lse_row, stride_lse_head,
    GROUP: tl.constexpr, HEAD: tl.constexpr, HEAD_PADDED: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_N: tl.constexpr,
    IS_DECODE: tl.constexpr, HAS_ALIBI: tl.constexpr, HAS_SINKS: tl.constexpr,
    HAS_SCALES: tl.constexpr, HAS_SOFT_CAP: tl.constexpr, HAS_WINDOW: tl.constexpr,
    SPLITS: tl.constexpr, SKIPS_MERGED: tl.constexpr,
):  # fmt: skip
    state, request, token, head, position, steered = _rows_of(
        rows, slots, query_start, seq_lens, num_requests, heads_offset, stride_slot,
        GROUP, BLOCK_M, BLOCK_Q, IS_DECODE,
    )  # fmt: skip
    if tl.max(steered.to(tl.int32), 0) == 0:
        return
    log_alpha = tl.load(state + _LOG_ALPHA).to(tl.float32, bitcast=True)
    if SKIPS_MERGED and log_alpha < 0:
        return
    kv_head, split = tl.program_id(1), tl.program_id(2)
    prompt_len, num_spans = tl.load(state + _PROMPT_LEN), tl.load(state + _NUM_SPANS)
    spans = state + spans_offset
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

    last = tl.max(tl.where(steered, position, -1), 0)
    begin, end = _first_key(position, steered, window, HAS_WINDOW), last + 1
    if SPLITS > 1:
        share = tl.cdiv(tl.cdiv(end - begin, BLOCK_N), SPLITS) * BLOCK_N
        begin += split * share
        end = tl.minimum(begin + share, end)

    largest = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    if HAS_SINKS and split == 0:
        largest = tl.load(sinks + head, mask=steered, other=0.0).to(tl.float32)
        total += 1.0
    acc = tl.zeros([BLOCK_M, HEAD_PADDED], tl.float32)
    span = _span_after(spans, num_spans, num_spans * 0, begin)
    for key in range(begin, end, BLOCK_N):
        keys_at = key + tl.arange(0, BLOCK_N)
        is_key = keys_at < end
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
        span = _span_after(spans, num_spans, span, key)
        inside = _is_emphasised(spans, num_spans, span, key, keys_at, BLOCK_N)
        bias = tl.where((keys_at < prompt_len) & (inside == 0), log_alpha, 0.0)
        logits += bias[None, :]
        new_largest = tl.maximum(largest, tl.max(logits, 1))
        # A row that has seen no key yet stays at minus infinity, whose difference is no number.
        base = tl.where(new_largest == float("-inf"), 0.0, new_largest)
        weights = tl.exp(logits - base[:, None])
        rescale = tl.exp(largest - base)
        total = total * rescale + tl.sum(weights, 1)
        values = tl.load(
            at[:, None] + HEAD + dim[None, :], mask=is_key[:, None] & is_dim[None, :], other=0.0
        )
        if HAS_SCALES:
            values = values.to(q.dtype)
        acc = acc * rescale[:, None] + tl.dot(weights.to(q.dtype), values, input_precision="ieee")
        largest = new_largest
    if HAS_SCALES:
        acc *= v_scale

    if SPLITS > 1:
        part = (token * tl.num_programs(1) * GROUP + head) * SPLITS + split
        tl.store(
            sums + part[:, None].to(tl.int64) * HEAD_PADDED + dim[None, :],
            acc,
            mask=steered[:, None],
        )
        tl.store(states + 2 * part, largest, mask=steered)
        tl.store(states + 2 * part + 1, total, mask=steered)
    else:
        tl.store(
            output
            + token[:, None].to(tl.int64) * stride_o_row
            + head[:, None] * stride_o_head
            + dim[None, :],
            (acc / total[:, None]).to(output.dtype.element_ty),
            mask=steered[:, None] & is_dim[None, :],
        )


@triton.jit(do_not_specialize=_VARYING)
def put_together(
    output, rows, slots, query_start, seq_lens, sums, states, num_requests,
    heads_offset, stride_slot, stride_o_row, stride_o_head,
    HEAD: tl.constexpr, HEAD_PADDED: tl.constexpr, SPLITS: tl.constexpr,
    SKIPS_MERGED: tl.constexpr,
):  # fmt: skip
    """The parts of each steered pair."""
    token, head = tl.program_id(0), tl.program_id(1)
    low, high = 0, num_requests
    while low < high:
        middle = (low + high) // 2
        if tl.load(query_start + middle) <= token:
            low = middle + 1
        else:
            high = middle
    request = low - 1
    end = tl.load(query_start + request + 1)
    slot = tl.load(slots + request)
    if slot < 0 or token >= end:
        return
    state = rows + slot.to(tl.int64) * stride_slot
    if tl.load(seq_lens + request) - end + token < tl.load(state + _FIRST):
        return
    word = tl.load(state + heads_offset + head // 32)
    if ((word >> (head % 32)) & 1) == 0:
        return
    if SKIPS_MERGED and tl.load(state + _LOG_ALPHA).to(tl.float32, bitcast=True) < 0:
        return
    split = tl.arange(0, SPLITS)
    dim = tl.arange(0, HEAD_PADDED)
    part = (token * tl.num_programs(1) + head) * SPLITS + split
    largest = tl.load(states + 2 * part)
    weight = tl.exp(largest - tl.max(largest, 0))
    total = tl.sum(weight * tl.load(states + 2 * part + 1), 0)
    acc = tl.load(sums + part[:, None].to(tl.int64) * HEAD_PADDED + dim[None, :])
    result = tl.sum(acc * weight[:, None], 0) / total
    tl.store(
        output + token.to(tl.int64) * stride_o_row + head * stride_o_head + dim,
        result.to(output.dtype.element_ty),
        mask=dim < HEAD,
    )


@triton.jit(do_not_specialize=_VARYING)
def merge(
    query, kv_cache, output, rows, slots, query_start, seq_lens, block_table, lse,
    alibi_slopes, sinks, key_scale, value_scale, sums, states,
    scale, soft_cap, window, num_requests, heads_offset, spans_offset,
    stride_slot, stride_table, stride_q_row, stride_q_head, stride_o_row, stride_o_head,
    stride_block, stride_kv_head, stride_kv_row, stride_lse_row, stride_lse_head,
    GROUP: tl.constexpr, HEAD: tl.constexpr, HEAD_PADDED: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_N: tl.constexpr,
    IS_DECODE: tl.constexpr, HAS_ALIBI: tl.constexpr, HAS_SINKS: tl.constexpr,
    HAS_SCALES: tl.constexpr, HAS_SOFT_CAP: tl.constexpr, HAS_WINDOW: tl.constexpr,
):  # fmt: skip
    state, request, token, head, position, steered = _rows_of(
        rows, slots, query_start, seq_lens, num_requests, heads_offset, stride_slot,
        GROUP, BLOCK_M, BLOCK_Q, IS_DECODE,
    )  # fmt: skip
    if tl.max(steered.to(tl.int32), 0) == 0:
        return
    log_alpha = tl.load(state + _LOG_ALPHA).to(tl.float32, bitcast=True)
    if log_alpha >= 0:
        return
    kv_head = tl.program_id(1)
    prompt_len, num_spans = tl.load(state + _PROMPT_LEN), tl.load(state + _NUM_SPANS)
    spans = state + spans_offset
    dim = tl.arange(0, HEAD_PADDED)
    is_dim = dim < HEAD
    pair_mask = steered[:, None] & is_dim[None, :]
    q = tl.load(
        query + token[:, None].to(tl.int64) * stride_q_row + head[:, None] * stride_q_head + dim,
        mask=pair_mask,
        other=0.0,
    )
    slopes = position.to(tl.float32)
    if HAS_ALIBI:
        slopes = tl.load(alibi_slopes + head, mask=steered, other=0.0)
    k_scale, v_scale = 1.0, 1.0
    if HAS_SCALES:
        k_scale, v_scale = tl.load(key_scale), tl.load(value_scale)
    last = tl.max(tl.where(steered, position, -1), 0)
    key = _first_key(position, steered, window, HAS_WINDOW)

    largest = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, HEAD_PADDED], tl.float32)
    span = _span_after(spans, num_spans, num_spans * 0, key)
    start = tl.load(spans + 2 * span, mask=span < num_spans, other=_END)
    key = tl.maximum(key, tl.minimum(start, prompt_len))
    while key <= last:
        keys_at = key + tl.arange(0, BLOCK_N)
        inside = _is_emphasised(spans, num_spans, span, key, keys_at, BLOCK_N)
        is_key = (keys_at <= last) & (inside | (keys_at >= prompt_len))
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
        new_largest = tl.maximum(largest, tl.max(logits, 1))
        base = tl.where(new_largest == float("-inf"), 0.0, new_largest)
        weights = tl.exp(logits - base[:, None])
        rescale = tl.exp(largest - base)
        total = total * rescale + tl.sum(weights, 1)
        values = tl.load(
            at[:, None] + HEAD + dim[None, :], mask=is_key[:, None] & is_dim[None, :], other=0.0
        )
        if HAS_SCALES:
            values = values.to(q.dtype)
        acc = acc * rescale[:, None] + tl.dot(weights.to(q.dtype), values, input_precision="ieee")
        largest = new_largest
        key += BLOCK_N
        span = _span_after(spans, num_spans, span, key)
        start = tl.load(spans + 2 * span, mask=span < num_spans, other=_END)
        key = tl.maximum(key, tl.minimum(start, prompt_len))
    if HAS_SCALES:
        acc *= v_scale

    plain_lse = tl.load(
        lse + token.to(tl.int64) * stride_lse_row + head * stride_lse_head, mask=steered, other=0.0
    )
    at_output = (
        output
        + token[:, None].to(tl.int64) * stride_o_row
        + head[:, None] * stride_o_head
        + dim[None, :]
    )
    plain = tl.load(at_output, mask=pair_mask, other=0.0).to(tl.float32)
    # Weights relative to the larger of the two parts, so that neither overflows.
    log_rest = tl.log(1 - tl.exp(log_alpha))
    base = tl.maximum(plain_lse + log_alpha, largest + log_rest)
    of_plain = tl.exp(plain_lse + log_alpha - base)
    of_rest = tl.exp(largest + log_rest - base)
    result = (of_plain[:, None] * plain + of_rest[:, None] * acc) / (of_plain + of_rest * total)[
        :, None
    ]
    tl.store(at_output, result.to(output.dtype.element_ty), mask=pair_mask)
