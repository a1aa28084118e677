"""Steered attention in plain torch: readable, any device, exact. Every other kernel is held to it.

For a steered query head, the logits of the prompt's tokens get the log of their factor added before
the softmax (``log(alpha)`` outside the emphasised spans, nothing within those of full strength),
which scales their attention by that factor and renormalises (PASTA, equation 2). Generated tokens
are never scaled. With a share, the factor outside the spans is each row's own (`Share`).
"""

import torch

from vllm_pasta.steering.bias import key_bias
from vllm_pasta.steering.plan import LayerAttention, LayerHeads, StepPlan


def steered_attention(
    query: torch.Tensor,
    kv_cache: torch.Tensor,
    output: torch.Tensor,
    plan: StepPlan,
    layer_heads: LayerHeads,
    attention: LayerAttention,
    layout: str,
    whole: bool = False,
) -> None:
    """Overwrites the steered (row, head) pairs of ``output``; touches nothing else.

    Args:
        query: ``[num_tokens, num_heads, head_size]``; fp32, bf16 or fp16.
        kv_cache: ``[num_blocks, num_kv_heads, block_size, 2 * head_size]``, same dtype, with
            this step's keys and values already in it.
        output: ``[num_tokens, num_heads, head_size]``, the plain attention's; written in place.
        plan: The step's steered requests.
        layer_heads: This layer's steered heads.
        attention: What the layer computes.
        layout: How a block holds keys and values: see `gather_kv`.
        whole: Instead overwrite all heads and rows of the plan's requests, the steered heads with
            the bias and the others without. No row may stand before its request's first
            emphasised token. What ``output`` held does not matter then.
    """
    static = plan.static
    group_size = query.shape[1] // kv_cache.shape[1]
    head_bounds = layer_heads.offsets.tolist()
    segment_bounds = static.segment_offsets.tolist()
    for r in range(len(static.batch_rows)):
        heads = layer_heads.heads[head_bounds[r] : head_bounds[r + 1]].long()
        seq_len, query_len = int(plan.seq_len[r]), int(plan.query_len[r])
        computed = seq_len - query_len  # keys of earlier steps
        skip = max(0, int(static.first[r]) - computed)  # rows before the first emphasised token
        steered = torch.isin(torch.arange(query.shape[1]), heads)
        if whole:
            heads, skip = torch.arange(query.shape[1]), 0
        if len(heads) == 0 or skip >= query_len:
            continue

        cut = slice(segment_bounds[r], segment_bounds[r + 1])
        bias = key_bias(static.ends[cut].tolist(), static.biases[cut].tolist(), seq_len)
        begin = int(plan.query_start[r])
        rows = slice(begin + skip, begin + query_len)
        position = torch.arange(computed + skip, seq_len)[:, None]
        window = attention.window or seq_len
        start = max(0, computed + skip + 1 - window)  # the first row's first key
        key = torch.arange(start, seq_len)
        kv_heads, kv_index = torch.unique(heads // group_size, return_inverse=True)
        keys, values = gather_kv(kv_cache, plan.block_table[r], start, seq_len, kv_heads, layout)
        q = query[rows][:, heads].transpose(0, 1).float()
        logits = q @ keys[kv_index].transpose(1, 2) * attention.scale
        if attention.soft_cap is not None:
            logits = (logits / attention.soft_cap).tanh() * attention.soft_cap
        if attention.alibi_slopes is not None:
            logits += attention.alibi_slopes[heads, None, None] * (key - position)
        logits += torch.where(steered[heads, None, None], bias[start:], 0.0)
        logits.masked_fill_((key > position) | (key <= position - window), float("-inf"))
        if (share := static.share_of(r, start, seq_len)) is not None:
            logits += torch.where(steered[heads, None, None], share.bias(logits), 0.0)
        if attention.sinks is not None:
            sink = attention.sinks[heads, None, None].float().expand(-1, len(position), 1)
            logits = torch.cat([logits, sink], dim=-1)
        weights = logits.softmax(dim=-1)[..., : len(key)]
        output[rows, heads] = (weights @ values[kv_index]).transpose(0, 1).to(output.dtype)


def gather_kv(
    kv_cache: torch.Tensor,
    block_table: torch.Tensor,
    start: int,
    end: int,
    kv_heads: torch.Tensor,
    layout: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Reads one request's keys and values out of the paged cache.

    vLLM's CPU cache keeps a block's keys in its first half and the values in its second, each
    packed for the instruction set (vLLM 0.32, csrc/cpu/cpu_attn_*.hpp):

    - ``vec``, ``vec16``: K as ``[head_size, block_size]``, V as ``[block_size, head_size]``
    - ``amx``: K as ``[block_size/16, head_size/2, 16 tokens, 2 dims]``,
      V as ``[head_size/16, block_size/2, 16 dims, 2 tokens]``

    Args:
        kv_cache: ``[num_blocks, num_kv_heads, block_size, 2 * head_size]``.
        block_table: int32 ``[max_blocks]``.
        start: First token to read; blocks before its own are not touched.
        end: Where to stop reading.
        kv_heads: int64 ``[n]``; which KV heads.
        layout: One of the names above.

    Returns:
        Keys and values, each float32 ``[n, end - start, head_size]``.
    """
    block_size, head_size = kv_cache.shape[2], kv_cache.shape[3] // 2
    first = start // block_size
    blocks = block_table[first : -(-end // block_size)].long()
    packed = kv_cache[blocks[:, None], kv_heads].float().flatten(2)  # [blocks, n, 2 * half]
    k, v = packed.chunk(2, dim=2)
    b, n = k.shape[:2]
    if layout in ("vec", "vec16"):
        k = k.view(b, n, head_size, block_size).transpose(2, 3)
        v = v.view(b, n, block_size, head_size)
    elif layout == "amx":
        k = k.view(b, n, block_size // 16, head_size // 2, 16, 2).permute(0, 1, 2, 4, 3, 5)
        v = v.view(b, n, head_size // 16, block_size // 2, 16, 2).permute(0, 1, 3, 5, 2, 4)
    else:
        raise ValueError(f"unknown KV cache layout {layout!r}; known are vec, vec16, amx")
    k, v = (x.reshape(b, n, block_size, head_size).transpose(0, 1).flatten(1, 2) for x in (k, v))
    tokens = slice(start - first * block_size, end - first * block_size)
    return k[:, tokens], v[:, tokens]


def gather_keys(
    cache: torch.Tensor, block_table: torch.Tensor, start: int, end: int
) -> torch.Tensor:
    """Reads one request's keys out of a paged cache whose blocks hold a row for each token.

    Args:
        cache: ``[num_blocks, num_kv_heads, block_size, size]``, in any strides.
        block_table: int32 ``[max_blocks]``, on the same device.
        start: First token to read; blocks before its own are not touched.
        end: Where to stop reading.

    Returns:
        float32 ``[num_kv_heads, end - start, size]``.
    """
    block_size = cache.shape[2]
    first = start // block_size
    blocks = cache[block_table[first : -(-end // block_size)].long()].float()
    rows = blocks.transpose(0, 1).flatten(1, 2)
    return rows[:, start - first * block_size : end - first * block_size]


def row_weights(
    query: torch.Tensor, keys: torch.Tensor, start: int, attention: LayerAttention
) -> torch.Tensor:
    """What one query row attends to, in every head, without steering.

    Args:
        query: ``[num_heads, size]``: of the last token.
        keys: float32 ``[num_kv_heads, n, size]``: of that token and those before it.
        start: How many tokens before those the row does not see: their weights are 0.
        attention: What the layer computes.

    Returns:
        float32 ``[num_heads, start + n]``, whose rows add up to 1. With attention sinks
        ``[num_heads, start + n + 1]``: the sink's weight comes last.
    """
    grouped = query.float().view(len(keys), -1, query.shape[1])
    logits = (grouped @ keys.transpose(1, 2) * attention.scale).flatten(0, 1)
    if attention.soft_cap is not None:
        logits = (logits / attention.soft_cap).tanh() * attention.soft_cap
    if attention.alibi_slopes is not None:
        distance = torch.arange(1 - keys.shape[1], 1, device=keys.device)
        logits += attention.alibi_slopes[:, None] * distance
    if attention.sinks is not None:
        logits = torch.cat([logits, attention.sinks[:, None].float()], dim=-1)
    return torch.nn.functional.pad(logits.softmax(dim=-1), (start, 0))
