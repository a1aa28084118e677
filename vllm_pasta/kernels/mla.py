"""Steered attention over a latent KV cache (MLA), in plain torch.

Multi-head latent attention keeps one vector per token, the same for all query heads: a compressed
key and value, then a part of the key that carries the position. A query that was multiplied by its
head's up-projection of keys compares with that vector directly, and the weighted sum of the
compressed part, multiplied by the up-projection of values, is the head's output (DeepSeek-V2,
arXiv:2405.04434, section 2.1.2: "absorbed"). The bias of `kernels.reference` goes on those logits.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from vllm_pasta.steering.bias import Share, key_bias
from vllm_pasta.steering.plan import LayerHeads, StepPlan

TILE = 2**22
"""Logits that are held at once: rows times heads times keys."""


@dataclass(frozen=True)
class Part:
    """Query rows of one request that are steered in the same heads.

    Attributes:
        rows: Which of the rows that the caller has.
        heads: int64 ``[h]``; which query heads.
        position: int64 ``[rows]``; where each row stands in its request, one after the other.
        keys: float32 ``[keys, width]``; the request's, up to that of the last row.
        bias: float32 ``[keys]``; added to the logits of each.
        share: None where that is all.
    """

    rows: slice
    heads: torch.Tensor
    position: torch.Tensor
    keys: torch.Tensor
    bias: torch.Tensor
    share: Share | None


def steered_parts(
    plan: StepPlan, layer_heads: LayerHeads, start: int, count: int, kv_cache: torch.Tensor
) -> Iterator[Part]:
    """What is to be steered among a step's rows ``[start, start + count)``, in parts of at most
    `TILE` logits.

    Args:
        plan: The step's steered requests; each has all its rows within that range, or none.
        layer_heads: The layer's steered heads.
        start: The first row of the step that the caller has.
        count: How many it has.
        kv_cache: ``[num_blocks, block_size, width]``, with this step's tokens in it. Where it is,
            all tensors of a part are.
    """
    block_size, device = kv_cache.shape[1], kv_cache.device
    static = plan.static
    head_bounds = layer_heads.offsets.tolist()
    segment_bounds = static.segment_offsets.tolist()
    for r in range(len(static.batch_rows)):
        heads = layer_heads.heads[head_bounds[r] : head_bounds[r + 1]].long().to(device)
        begin = int(plan.query_start[r]) - start
        if len(heads) == 0 or not 0 <= begin < count:
            continue
        seq_len, query_len = int(plan.seq_len[r]), int(plan.query_len[r])
        first = max(int(static.first[r]), seq_len - query_len)  # rows before it are plain
        if first >= seq_len:
            continue
        cut = slice(segment_bounds[r], segment_bounds[r + 1])
        bias = key_bias(static.ends[cut].tolist(), static.biases[cut].tolist(), seq_len).to(device)
        blocks = plan.block_table[r, : -(-seq_len // block_size)].long()
        keys = kv_cache[blocks].flatten(0, 1)[:seq_len].float()
        tile = max(1, TILE // (len(heads) * seq_len))
        for position in torch.arange(first, seq_len).split(tile):
            row = begin + int(position[0]) - (seq_len - query_len)
            rows, end = slice(row, row + len(position)), int(position[-1]) + 1
            share = static.share_of(r, 0, end)
            if share is not None:
                here = {"marked": share.marked.to(device), "rest": share.rest.to(device)}
                share = replace(share, **here)
            yield Part(rows, heads, position.to(device), keys[:end], bias[:end], share)


def latent_attention(query: torch.Tensor, part: Part, scale: float, rank: int) -> torch.Tensor:
    """Attention of one part's rows and heads, with the bias.

    Args:
        query: ``[rows, h, width]``, absorbed: ``rank`` numbers that compare with the compressed
            key, then those that carry the position.
        part: Whose rows and heads these are.
        scale: Softmax scale.
        rank: Width of the compressed part, which is also the value.

    Returns:
        float32 ``[rows, h, rank]``.
    """
    logits = query.float().flatten(0, 1) @ part.keys.T
    logits = logits.view(*query.shape[:2], -1).mul_(scale).add_(part.bias)
    if len(part.position) > 1:  # the last row sees all
        future = torch.arange(len(part.keys), device=logits.device) > part.position[:, None]
        logits.masked_fill_(future[:, None], float("-inf"))
    if part.share is not None:
        logits += part.share.bias(logits)
    weights = logits.softmax(dim=-1).flatten(0, 1)
    return (weights @ part.keys[:, :rank]).view(*query.shape[:2], rank)
