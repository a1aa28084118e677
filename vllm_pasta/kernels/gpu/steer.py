"""The Triton kernel that ``launch`` launches. A request's record: see ``steering.slots``.

What a program must read before its first product is a chain of loads, each of which waits for the
one before, and on a GPU each waits about as long as this kernel computes. The chain is three long:

1. the request's record (what it is steered by, this layer's heads, its first segments), its rows
   and its length, all at once;
2. the block table, for the keys that a tile of the list of wanted keys names; beside it the
   query, the plain output and its log-sum-exp;
3. keys and values.

Bytes and products are few: a decode step of 128 requests that merges 84 keys for all heads of
Qwen3-8B moves 44 MB, which takes 10 us of an H200's memory; with 10 % of the heads, 17 MB. The
launch is about 1 us of a graph, and each link of the chain 0.5 to 0.8. So a link less is worth
more than a byte less. The first link is one read of 32 bytes for each of three parts of a record,
and one of this layer's heads; what else of a record is wanted later is in the first-level cache by
then.

The wanted keys are one list, which one loop walks: a merge's are the tokens of the segments, in
order, and then the generated ones; the direct way's are all. The list is never stored. An entry's
key follows from at most `GROUP` segments, which stand in registers; where a request has more, an
outer loop goes over groups of them.
"""

import triton
import triton.language as tl

from vllm_pasta.steering import slots

# One compiled kernel serves all steps and layers: a graph must not be the first to need another.
# So no integer is specialised, and alignment is told by a constant that `launch` has checked.
_INTEGERS = (
    "num_requests", "heads_at", "stride_record", "stride_slot", "stride_table", "stride_q",
    "stride_o", "stride_block", "stride_kv_head", "stride_kv_row", "stride_lse_row",
    "stride_lse_head",
)  # fmt: skip
_POINTERS = ("query_start", "seq_lens", "block_table", "lse", "alibi_slopes", "sinks",
             "key_scale", "value_scale")  # fmt: skip
_FIRST, _PROMPT_LEN = tl.constexpr(slots.FIRST), tl.constexpr(slots.PROMPT_LEN)
_SLOT, _EMPHASISED = tl.constexpr(slots.SLOT), tl.constexpr(slots.EMPHASISED)
_NUM_GROUPS, _WAY = tl.constexpr(slots.NUM_GROUPS), tl.constexpr(slots.WAY)
_LOG_ALPHA, _LOG_REST = tl.constexpr(slots.LOG_ALPHA), tl.constexpr(slots.LOG_REST)
_SEGMENTS, _SEGMENT = tl.constexpr(slots.SEGMENTS), tl.constexpr(slots.SEGMENT)
_START, _END = tl.constexpr(slots.START), tl.constexpr(slots.END)
_LOG_FACTOR, _GROUP = tl.constexpr(slots.LOG_FACTOR), tl.constexpr(slots.GROUP)
_ADDS, _SUBTRACTS = tl.constexpr(slots.ADDS), tl.constexpr(slots.SUBTRACTS)
_SHARES = tl.constexpr(slots.SHARES)
_LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _request_of(
    query_start, block, num_requests, ROWS: tl.constexpr, MAX_REQUESTS: tl.constexpr
):  # fmt: skip
    """The request that a block of rows belongs to, where each request begins a block of its own.

    Counts those that begin no later, all at once: a search would wait for memory at each step, and
    Triton 3.7 pipelines no loop after one whose end it does not know.
    """
    request = tl.arange(0, MAX_REQUESTS)
    is_request = request < num_requests
    start = tl.load(query_start + request, mask=is_request, other=0)
    return tl.sum((is_request & (start // ROWS + request <= block)).to(tl.int32), 0) - 1


@triton.jit
def _float(at):
    return tl.load(at).to(tl.float32, bitcast=True)


@triton.jit
def _segment(at, end, merges):
    """Start and end of a segment, cut at ``end``, and its bias (base 2)."""
    start = tl.load(at + _START)
    stop = tl.load(at + _END)
    bias = _float(at + _LOG_FACTOR + merges.to(tl.int32))
    return start, tl.maximum(tl.minimum(stop, end), start), bias * _LOG2E


@triton.jit
def _before(key, start, stop):
    """How many of a stretch's keys come before ``key``."""
    return tl.minimum(tl.maximum(key - start, 0), stop - start)


@triton.jit
def _wanted(
    at_group, slot_groups, group, num_groups, merges, prompt_len, begin_key, end_key,
    BLOCK_N: tl.constexpr, WINDOW: tl.constexpr,
):  # fmt: skip
    """A group's part of the list of wanted keys.

    Returns:
        For each segment its start, end and bias; where the generated keys' stretch ends; the
        entries at which the next stretch begins, and at which the list ends; what is added to an
        entry of the first stretch; the entry of the first tile.
    """
    s0, e0, b0 = _segment(at_group, end_key, merges)
    s1, e1, b1 = _segment(at_group + _SEGMENT, end_key, merges)
    s2, e2, b2 = _segment(at_group + 2 * _SEGMENT, end_key, merges)
    s3, e3, b3 = _segment(at_group + 3 * _SEGMENT, end_key, merges)
    is_last = group == num_groups - 1
    e4 = tl.where(is_last, tl.maximum(end_key, prompt_len), prompt_len)
    c0 = e0 - s0
    c1 = c0 + e1 - s1
    c2 = c1 + e2 - s2
    c3 = c2 + e3 - s3
    stop = c3 + e4 - prompt_len
    base = s0
    start = 0
    if WINDOW is not None:
        start = (
            _before(begin_key, s0, e0) + _before(begin_key, s1, e1) + _before(begin_key, s2, e2)
            + _before(begin_key, s3, e3) + _before(begin_key, prompt_len, e4)
        )  # fmt: skip
    if not merges:
        # All keys, from this group's first segment to the next one's.
        base = tl.where(group == 0, 0, s0)
        stop = end_key - base
        if not is_last:
            following = tl.load(slot_groups + group * (_GROUP * _SEGMENT) + _START)
            stop = tl.minimum(following, end_key) - base
        start = tl.maximum(begin_key - base, 0)
        c0, c1, c2, c3 = stop, stop, stop, stop
    # Tiles begin where they would without a window, so that a row's result does not depend on the
    # rows beside it.
    start = start // BLOCK_N * BLOCK_N
    return s0, e0, b0, s1, e1, b1, s2, e2, b2, s3, e3, b3, c0, c1, c2, c3, stop, base, start


@triton.jit
def _key(u, s1, e0, s2, e1, s3, e2, prompt_len, e3, c0, c1, c2, c3, base):
    """The key that an entry of the list is."""
    key = base + u
    key += tl.where(u >= c0, s1 - e0, 0) + tl.where(u >= c1, s2 - e1, 0)
    return key + tl.where(u >= c2, s3 - e2, 0) + tl.where(u >= c3, prompt_len - e3, 0)


@triton.jit
def _logits(
    q, keys, seen, positions, key_positions, slopes, key_scale,
    SCALE: tl.constexpr, SOFT_CAP: tl.constexpr, HAS_ALIBI: tl.constexpr,
    HAS_SCALES: tl.constexpr,
):  # fmt: skip
    """Logits of a tile in base 2, before the bias; minus infinity where a row does not see a
    key."""
    if HAS_SCALES:
        keys = keys.to(q.dtype)
    logits = tl.dot(q, tl.trans(keys), input_precision="ieee")
    if HAS_SCALES:
        logits *= key_scale
    if SOFT_CAP is not None:
        # tanh, from what every version of Triton has
        logits *= SCALE
        e = tl.exp(-2 * tl.abs(logits / SOFT_CAP))
        logits = tl.where(logits < 0, -1.0, 1.0) * (SOFT_CAP * _LOG2E) * (1 - e) / (1 + e)
    else:
        logits *= SCALE * _LOG2E
    if HAS_ALIBI:
        logits += slopes[:, None] * (key_positions[None, :] - positions[:, None]) * _LOG2E
    return tl.where(seen, logits, float("-inf"))


@triton.jit
def _finite(largest):
    """What a row's logits are taken relative to. A row that has seen no key stays at minus
    infinity, whose difference is no number."""
    return tl.where(largest == float("-inf"), 0.0, largest)


@triton.jit
def _attend(
    q_at, is_loaded, cached, table, record, slot_groups, sinks, key_scale, value_scale,
    head, position, slopes, merges, part, parts, num_groups, prompt_len, log_alpha,
    begin_key, end_key, stride_block, stride_kv_row,
    SCALE: tl.constexpr, SOFT_CAP: tl.constexpr, WINDOW: tl.constexpr, HEAD: tl.constexpr,
    WIDTH: tl.constexpr, VALUE: tl.constexpr, VALUE_WIDTH: tl.constexpr, VALUE_AT: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    HAS_ALIBI: tl.constexpr, SHARES: tl.constexpr,
):  # fmt: skip
    """Attention of a tile's pairs to a part of the wanted keys.

    Returns:
        For each pair its largest logit (base 2), sum of weights, and sum of weighted values; and
        with ``SHARES``, where no key has a bias and those sums are over the emphasised and the
        generated keys alone, the sums of weights of the emphasised keys, and of the prompt's
        others as far as they are wanted.
    """
    HAS_SCALES: tl.constexpr = key_scale is not None
    dim, value_dim = tl.arange(0, WIDTH), tl.arange(0, VALUE_WIDTH)
    is_dim = dim < HEAD
    # Second in the chain: the first tile's blocks; query, plain output and log-sum-exp.
    entries = tl.arange(0, BLOCK_N)
    s0, e0, b0, s1, e1, b1, s2, e2, b2, s3, e3, b3, c0, c1, c2, c3, stop, base, start = (
        _wanted(
            record + _SEGMENTS, slot_groups, 0, num_groups, merges, prompt_len,
            begin_key, end_key, BLOCK_N, WINDOW,
        )
    )  # fmt: skip
    u = start + part * BLOCK_N + entries
    key = _key(u, s1, e0, s2, e1, s3, e2, prompt_len, e3, c0, c1, c2, c3, base)
    is_key = (u < stop) & (key >= begin_key)
    page = tl.load(table + key // BLOCK_SIZE, mask=is_key, other=0)

    q = tl.load(q_at, mask=is_loaded, other=0.0)
    k_scale = 1.0
    if HAS_SCALES:
        k_scale = tl.load(key_scale)
    largest = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    if sinks is not None and part == 0:
        largest = tl.load(sinks + head).to(tl.float32) * _LOG2E
        total += 1.0
    marked = tl.zeros([BLOCK_M], tl.float32)
    rest = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, VALUE_WIDTH], tl.float32)
    for group in range(0, num_groups):
        turn = (part + group) % parts  # others are first where the next group begins
        for entry in range(start + turn * BLOCK_N, stop, parts * BLOCK_N):
            # Third: keys and values. The next tile's blocks are read beside them.
            u = entry + entries
            key = _key(u, s1, e0, s2, e1, s3, e2, prompt_len, e3, c0, c1, c2, c3, base)
            is_key = (u < stop) & (key >= begin_key)
            at_key = page.to(tl.int64) * stride_block + (key % BLOCK_SIZE) * stride_kv_row
            rows = cached + at_key[:, None]
            is_cell = is_key[:, None] & is_dim[None, :]
            keys = tl.load(rows + dim[None, :], mask=is_cell, other=0.0)
            is_cell = is_key[:, None] & (value_dim < VALUE)[None, :]
            values = tl.load(rows + VALUE_AT + value_dim[None, :], mask=is_cell, other=0.0)
            v = u + parts * BLOCK_N
            next_key = _key(v, s1, e0, s2, e1, s3, e2, prompt_len, e3, c0, c1, c2, c3, base)
            page = tl.load(table + next_key // BLOCK_SIZE, mask=v < stop, other=0)

            if SHARES:
                is_marked = ((key >= s0) & (key < e0)) | ((key >= s1) & (key < e1))
                is_marked |= ((key >= s2) & (key < e2)) | ((key >= s3) & (key < e3))
                is_kept = is_marked | (key >= prompt_len)
            else:
                bias = tl.where(key < prompt_len, log_alpha, 0.0)
                bias = tl.where((key >= s0) & (key < e0), b0, bias)
                bias = tl.where((key >= s1) & (key < e1), b1, bias)
                bias = tl.where((key >= s2) & (key < e2), b2, bias)
                bias = tl.where((key >= s3) & (key < e3), b3, bias)
            seen = (key[None, :] <= position[:, None]) & is_key[None, :]
            if WINDOW is not None:
                seen &= key[None, :] > position[:, None] - WINDOW
            logits = _logits(
                q, keys, seen, position, key, slopes, k_scale,
                SCALE, SOFT_CAP, HAS_ALIBI, HAS_SCALES,
            )  # fmt: skip
            if not SHARES:
                logits += bias[None, :]
            new_largest = tl.maximum(largest, tl.max(logits, 1))
            relative = _finite(new_largest)
            weights = tl.exp2(logits - relative[:, None])
            rescale = tl.exp2(largest - relative)
            if SHARES:
                of_marked = tl.where(is_marked[None, :], weights, 0.0)
                of_rest = tl.where(is_kept[None, :], 0.0, weights)
                marked = marked * rescale + tl.sum(of_marked, 1)
                rest = rest * rescale + tl.sum(of_rest, 1)
                # As the product below has them: where one key has nearly all of a row's weight,
                # what rounding does to it then cancels.
                weights = tl.where(is_kept[None, :], weights, 0.0).to(q.dtype).to(tl.float32)
            total = total * rescale + tl.sum(weights, 1)
            if HAS_SCALES:
                values = values.to(q.dtype)
            acc = acc * rescale[:, None]
            acc += tl.dot(weights.to(q.dtype), values, input_precision="ieee")
            largest = new_largest
        if group + 1 < num_groups:
            at_group = slot_groups + group * (_GROUP * _SEGMENT)
            (
                s0, e0, b0, s1, e1, b1, s2, e2, b2, s3, e3, b3, c0, c1, c2, c3,
                stop, base, start,
            ) = _wanted(
                at_group, slot_groups, group + 1, num_groups, merges, prompt_len,
                begin_key, end_key, BLOCK_N, WINDOW,
            )  # fmt: skip
            u = start + (part + group + 1) % parts * BLOCK_N + entries
            key = _key(u, s1, e0, s2, e1, s3, e2, prompt_len, e3, c0, c1, c2, c3, base)
            is_key = (u < stop) & (key >= begin_key)
            page = tl.load(table + key // BLOCK_SIZE, mask=is_key, other=0)
    if HAS_SCALES:
        acc *= tl.load(value_scale)
    return largest, total, acc, marked, rest


@triton.jit(do_not_specialize=_INTEGERS, do_not_specialize_on_alignment=_POINTERS)
def steer(
    query, kv_cache, output, records, groups, query_start, seq_lens, block_table, lse,
    alibi_slopes, sinks, key_scale, value_scale, sums, counters,
    num_requests, heads_at, stride_record, stride_slot, stride_table, stride_q, stride_o,
    stride_block, stride_kv_head, stride_kv_row, stride_lse_row, stride_lse_head,
    SCALE: tl.constexpr, LSE_SCALE: tl.constexpr, SOFT_CAP: tl.constexpr, WINDOW: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr, GROUP: tl.constexpr, HEAD: tl.constexpr, VALUE: tl.constexpr,
    VALUE_AT: tl.constexpr, BLOCK_SIZE: tl.constexpr, ALIGN: tl.constexpr,
    MAX_REQUESTS: tl.constexpr, ROWS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    SHARE: tl.constexpr, PART_ROWS: tl.constexpr, ALONE: tl.constexpr, MAX_GAIN: tl.constexpr,
    IS_DECODE: tl.constexpr,
):  # fmt: skip
    """Steers one KV head's query heads in a block of rows of one request.

    Grid: (blocks of ``ROWS`` rows, KV heads, programs that share a block). Those share the keys
    where each request has one row (``IS_DECODE``), and else its tiles of (row, head) pairs. Only
    steered pairs are in tiles, so with few steered heads a tile has as many more rows.
    """
    HAS_LSE: tl.constexpr = lse is not None
    HAS_ALIBI: tl.constexpr = alibi_slopes is not None
    WIDTH: tl.constexpr = triton.next_power_of_2(HEAD)
    VALUE_WIDTH: tl.constexpr = triton.next_power_of_2(VALUE)
    # Told in units of ALIGN, so that the compiler knows what they are multiples of.
    stride_q, stride_o, stride_block = stride_q * ALIGN, stride_o * ALIGN, stride_block * ALIGN
    stride_kv_head, stride_kv_row = stride_kv_head * ALIGN, stride_kv_row * ALIGN

    # First in the chain: the record, the rows and the length.
    block, kv_head, share = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    if IS_DECODE:
        request = block
    else:
        request = _request_of(query_start, block, num_requests, ROWS, MAX_REQUESTS)
    record = records + request * stride_record
    member = tl.arange(0, BLOCK_M if IS_DECODE else triton.next_power_of_2(GROUP))
    member_head = kv_head * GROUP + member
    words = tl.load(record + heads_at + member_head // 32, mask=member < GROUP, other=0)
    begin_row = tl.load(query_start + request)
    query_len = tl.load(query_start + request + 1) - begin_row
    seq_len = tl.load(seq_lens + request)
    first = tl.load(record + _FIRST)
    # What else stands in the record is wanted later, and comes with a word of the same 32 bytes.
    # Positions are never negative: this only keeps the compiler from reading them later.
    touched = tl.load(record + _SEGMENTS) | tl.load(record + _SEGMENTS + 2 * _SEGMENT)

    steered = (words >> (member_head % 32)) & 1
    num_heads = tl.sum(steered, 0)
    computed = seq_len - query_len  # the position of the request's first row
    begin = tl.maximum(first - computed, 0)
    end = query_len
    if not IS_DECODE:
        block_row = (block - (begin_row // ROWS + request)) * ROWS
        begin = tl.maximum(begin, block_row)
        end = tl.minimum(end, block_row + ROWS)
        rank = tl.cumsum(steered, 0) - steered
    num_pairs = (end - begin) * num_heads
    if (num_pairs <= 0) | (touched < 0):
        return
    way = tl.load(record + _WAY)
    prompt_len = tl.load(record + _PROMPT_LEN)
    num_groups = tl.load(record + _NUM_GROUPS)
    log_alpha = _float(record + _LOG_ALPHA) * _LOG2E

    table = block_table + request.to(tl.int64) * stride_table
    slot_groups = groups + tl.load(record + _SLOT).to(tl.int64) * stride_slot
    cached = kv_cache + kv_head.to(tl.int64) * stride_kv_head
    dim, value_dim = tl.arange(0, WIDTH), tl.arange(0, VALUE_WIDTH)
    is_dim, is_value = dim < HEAD, value_dim < VALUE

    first_tile, num_tiles, step = 0, 1, 1
    if not IS_DECODE:
        first_tile, num_tiles, step = share, tl.cdiv(num_pairs, BLOCK_M), tl.num_programs(2)
    for tile in range(first_tile, num_tiles, step):
        # The keys that the tile's rows see. Blocks before a window may hold anything.
        first_row, last_row = begin, begin
        if not IS_DECODE:
            last = tl.minimum((tile + 1) * BLOCK_M, num_pairs) - 1
            first_row, last_row = begin + (tile * BLOCK_M) // num_heads, begin + last // num_heads
        end_key = computed + last_row + 1
        begin_key = 0
        if WINDOW is not None:
            begin_key = tl.maximum(computed + first_row + 1 - WINDOW, 0)
        subtracts = (way == _SUBTRACTS) & (end_key <= ALONE) & HAS_LSE
        shares = way == _SHARES
        merges = subtracts | (((way == _ADDS) | shares) & HAS_LSE)
        parts, part = 1, 0
        if IS_DECODE:
            num_keys = end_key - begin_key
            if merges:
                num_keys = tl.load(record + _EMPHASISED) + tl.maximum(end_key - prompt_len, 0)
            parts = tl.maximum(tl.minimum(tl.cdiv(num_keys, SHARE), tl.num_programs(2)), 1)
            part = share
        if part < parts:
            if IS_DECODE:
                is_pair = steered == 1
                head = member_head
                row = begin + member * 0
            else:
                at = tile * BLOCK_M + tl.arange(0, BLOCK_M)
                is_pair = at < num_pairs
                row = begin + at // num_heads
                chosen = ((at % num_heads)[:, None] == rank[None, :]) & (steered == 1)[None, :]
                head = kv_head * GROUP + tl.sum(tl.where(chosen, member[None, :], 0), 1)
            position = computed + row
            token = (begin_row + row).to(tl.int64)
            is_loaded = is_pair[:, None] & is_dim[None, :]
            q_at = query + token[:, None] * stride_q + head[:, None] * HEAD + dim[None, :]
            is_stored = is_pair[:, None] & is_value[None, :]
            to = output + token[:, None] * stride_o + head[:, None] * VALUE + value_dim[None, :]
            if HAS_LSE:
                at_lse = lse + token * stride_lse_row + head * stride_lse_head
                if IS_DECODE:  # in good time
                    plain = tl.load(to, mask=is_stored, other=0.0)
                    plain_lse = tl.load(at_lse, mask=is_pair, other=0.0)
            slopes = position.to(tl.float32)
            if HAS_ALIBI:
                slopes = tl.load(alibi_slopes + head, mask=is_pair, other=0.0)

            # Two loops, so that a request without a share goes through one that knows of none.
            if shares:
                largest, total, acc, marked, rest = _attend(
                    q_at, is_loaded, cached, table, record, slot_groups, sinks, key_scale,
                    value_scale, head, position, slopes, merges, part, parts, num_groups,
                    prompt_len, log_alpha, begin_key, end_key, stride_block, stride_kv_row,
                    SCALE, SOFT_CAP, WINDOW, HEAD, WIDTH, VALUE, VALUE_WIDTH, VALUE_AT, BLOCK_SIZE,
                    BLOCK_M, BLOCK_N, HAS_ALIBI, SHARES=True,
                )  # fmt: skip
            else:
                largest, total, acc, marked, rest = _attend(
                    q_at, is_loaded, cached, table, record, slot_groups, sinks, key_scale,
                    value_scale, head, position, slopes, merges, part, parts, num_groups,
                    prompt_len, log_alpha, begin_key, end_key, stride_block, stride_kv_row,
                    SCALE, SOFT_CAP, WINDOW, HEAD, WIDTH, VALUE, VALUE_WIDTH, VALUE_AT, BLOCK_SIZE,
                    BLOCK_M, BLOCK_N, HAS_ALIBI, SHARES=False,
                )  # fmt: skip
            is_done = parts == 1
            if parts > 1:
                # Each leaves its part; who comes last puts all of them together. The atomic's own
                # ordering, between the barriers, makes what the others left visible.
                states = sums + PART_ROWS * VALUE_WIDTH
                shared = states + 2 * PART_ROWS
                pair = tl.arange(0, BLOCK_M)
                unit = block * NUM_KV_HEADS + kv_head
                first_part = unit * tl.num_programs(2)
                own = (first_part + part) * BLOCK_M + pair
                tl.store(sums + own[:, None] * VALUE_WIDTH + value_dim[None, :], acc)
                tl.store(states + 2 * own, largest)
                tl.store(states + 2 * own + 1, total)
                tl.store(shared + 2 * own, marked, mask=is_pair & shares)
                tl.store(shared + 2 * own + 1, rest, mask=is_pair & shares)
                tl.debug_barrier()
                is_done = tl.atomic_add(counters + unit, 1, sem="acq_rel") == parts - 1
                tl.debug_barrier()
                if is_done:
                    tl.store(counters + unit, 0)
                    largest = tl.full([BLOCK_M], float("-inf"), tl.float32)
                    total = tl.zeros([BLOCK_M], tl.float32)
                    marked = tl.zeros([BLOCK_M], tl.float32)
                    rest = tl.zeros([BLOCK_M], tl.float32)
                    acc = tl.zeros([BLOCK_M, VALUE_WIDTH], tl.float32)
                    for other_part in range(parts):
                        other = (first_part + other_part) * BLOCK_M + pair
                        other_largest = tl.load(states + 2 * other, cache_modifier=".cg")
                        other_total = tl.load(states + 2 * other + 1, cache_modifier=".cg")
                        other_acc = tl.load(
                            sums + other[:, None] * VALUE_WIDTH + value_dim[None, :],
                            cache_modifier=".cg",
                        )
                        new_largest = tl.maximum(largest, other_largest)
                        relative = _finite(new_largest)
                        rescale = tl.exp2(largest - relative)
                        weight = tl.exp2(other_largest - relative)
                        total = total * rescale + other_total * weight
                        acc = acc * rescale[:, None] + other_acc * weight[:, None]
                        marked = marked * rescale + weight * tl.load(
                            shared + 2 * other, mask=is_pair & shares, other=0.0,
                            cache_modifier=".cg",
                        )  # fmt: skip
                        rest = rest * rescale + weight * tl.load(
                            shared + 2 * other + 1, mask=is_pair & shares, other=0.0,
                            cache_modifier=".cg",
                        )  # fmt: skip
                        largest = new_largest
            if is_done:
                if shares:
                    # In units of the larger of two weights: the largest of those that were gone
                    # over, and the sum of all.
                    if not (HAS_LSE and IS_DECODE):
                        plain = tl.load(to, mask=is_stored, other=0.0)
                    if HAS_LSE:
                        if not IS_DECODE:
                            plain_lse = tl.load(at_lse, mask=is_pair, other=0.0)
                        log_all = plain_lse * LSE_SCALE
                    else:
                        log_all = largest + tl.log2(total + rest)
                    relative = _finite(tl.maximum(log_all, largest))
                    of_all = tl.exp2(log_all - relative)
                    of_kept = tl.exp2(largest - relative)
                    total *= of_kept
                    marked *= of_kept
                    rest *= of_kept
                    if HAS_LSE:
                        rest = tl.maximum(of_all - total, 0.0)
                    wanted = marked * _float(record + _LOG_REST)
                    factor = wanted / tl.maximum(tl.maximum(rest, wanted), 1e-30)
                    factor = tl.maximum(factor, tl.exp2(log_alpha))
                    if WINDOW is not None:
                        factor = tl.where(marked > 0, factor, 1.0)  # else no mark is seen
                    acc = (factor * of_all)[:, None] * plain.to(tl.float32) + (
                        (1 - factor) * of_kept
                    )[:, None] * acc
                    total = factor * of_all + (1 - factor) * total
                elif HAS_LSE and merges:
                    if not IS_DECODE:
                        plain = tl.load(to, mask=is_stored, other=0.0)
                        plain_lse = tl.load(at_lse, mask=is_pair, other=0.0)
                    # Relative to the larger of the two parts, so that neither overflows.
                    log_rest = _float(record + _LOG_REST) * _LOG2E
                    plain_log = plain_lse * LSE_SCALE + log_alpha
                    rest_log = largest + log_rest
                    relative = tl.maximum(plain_log, rest_log)
                    of_plain = tl.exp2(plain_log - relative)
                    of_rest = tl.exp2(rest_log - relative)
                    if subtracts:
                        of_rest = -of_rest
                    acc = of_plain[:, None] * plain.to(tl.float32) + of_rest[:, None] * acc
                    total = of_plain + of_rest * total
                    # The plain output's rounding error grows as its share does. Where that is too
                    # much, all keys of these rows are gone over.
                    if subtracts:
                        is_lost = is_pair & (total * MAX_GAIN < of_plain)
                        if tl.max(is_lost.to(tl.int32), 0) > 0:
                            largest, total, acc, marked, rest = _attend(
                                q_at, is_loaded, cached, table, record, slot_groups, sinks,
                                key_scale, value_scale, head, position, slopes,
                                way < 0, 0, 1, num_groups, prompt_len, log_alpha,
                                begin_key, end_key, stride_block, stride_kv_row,
                                SCALE, SOFT_CAP, WINDOW, HEAD, WIDTH, VALUE, VALUE_WIDTH,
                                VALUE_AT, BLOCK_SIZE, BLOCK_M, BLOCK_N, HAS_ALIBI, SHARES=False,
                            )  # fmt: skip
                result = acc / total[:, None]
                tl.store(to, result.to(output.dtype.element_ty), mask=is_stored)
