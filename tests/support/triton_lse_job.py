"""vLLM's Triton attention, interpreted, with the plugin's store of its log-sum-exp put in.

Prints ``REPORT`` and JSON: the digests of vLLM's kernels; for prefill and for a decode step in
segments, the largest difference of output and log-sum-exp from dense attention's, and of the output
from that which vLLM's own kernel gives.
"""

import json
from functools import partial

import gpu_ground as gpu_ground
import torch
from vllm.v1.attention.ops import triton_unified_attention as upstream

from vllm_pasta.integration.worker import lse, triton_lse

HEADS, KV_HEADS, SIZE, BLOCK = 4, 2, 32, 16


class TritonAttentionImpl:
    """As far as `lse` looks at one."""

    sinks, kv_cache_dtype = None, "auto"


def step(query_lens, seq_lens, window):
    """Keyword arguments of a call, and dense attention's output and log-sum-exp."""
    torch.manual_seed(0)
    blocks = [-(-n // BLOCK) for n in seq_lens]
    cache = torch.randn(sum(blocks), BLOCK, KV_HEADS, 2 * SIZE)
    table = torch.zeros(len(blocks), max(blocks), dtype=torch.int32)
    taken = 0
    for r, count in enumerate(blocks):
        table[r, :count] = torch.arange(taken, taken + count)
        taken += count
    keys, values = cache.split(SIZE, dim=-1)
    query = torch.randn(sum(query_lens), HEADS, SIZE)
    output, sums, begin = torch.zeros_like(query), torch.zeros(query.shape[:2]), 0
    for r, (rows, n) in enumerate(zip(query_lens, seq_lens, strict=True)):
        k, v = (
            x[table[r].long()].flatten(0, 1)[:n].repeat_interleave(2, 1) for x in (keys, values)
        )
        logits = torch.einsum("qhd,khd->qhk", query[begin : begin + rows], k) * SIZE**-0.5
        distance = torch.arange(n - rows, n)[:, None] - torch.arange(n)
        hidden = (distance < 0) | (distance >= (window or n))
        logits.masked_fill_(hidden[:, None], float("-inf"))
        output[begin : begin + rows] = torch.einsum("qhk,khd->qhd", logits.softmax(-1), v)
        sums[begin : begin + rows] = logits.logsumexp(-1)
        begin += rows
    starts = torch.tensor([0, *torch.tensor(query_lens).cumsum(0)], dtype=torch.int32)
    segments = 4
    arguments = {
        "q": query, "k": keys, "v": values, "out": torch.zeros_like(query),
        "cu_seqlens_q": starts, "max_seqlen_q": max(query_lens),
        "seqused_k": torch.tensor(seq_lens, dtype=torch.int32), "max_seqlen_k": max(seq_lens),
        "softmax_scale": SIZE**-0.5, "causal": True, "window_size": (window - 1, 0) if window
        else (-1, -1), "block_table": table, "softcap": 0, "q_descale": None, "k_descale": None,
        "v_descale": None, "seq_threshold_3D": 8, "num_par_softmax_segments": segments,
        "softmax_segm_output": torch.zeros(len(query), HEADS, segments, SIZE),
        "softmax_segm_max": torch.zeros(len(query), HEADS, segments),
        "softmax_segm_expsum": torch.zeros(len(query), HEADS, segments),
    }  # fmt: skip
    return arguments, output, sums


def main():
    report = {
        "digests": {n: triton_lse.source_digest(getattr(upstream, n)) for n in triton_lse.DIGESTS}
    }
    attention = partial(triton_lse._unified_attention, upstream.unified_attention)
    for name, query_lens, seq_lens in (
        ("prefill", [5, 40, 1], [5, 70, 33]), ("decode", [1, 1, 1], [5, 70, 33])
    ):  # fmt: skip
        for window in (None, 24):
            arguments, output, sums = step(query_lens, seq_lens, window)
            attention(**arguments)
            plain = arguments["out"].clone()
            arguments["out"].zero_()
            with lse.asking(TritonAttentionImpl(), None, arguments["q"]) as answer:
                attention(**arguments)
                given = answer.of(arguments["q"])
            report[f"{name} {window}"] = {
                "as dense": float((arguments["out"] - output).abs().max()),
                "as plain": float((arguments["out"] - plain).abs().max()),
                "log-sum-exp": float((given.values - sums).abs().max()),
                "is base 2": given.is_base_2,
            }
    print("REPORT", json.dumps(report))


if __name__ == "__main__":
    main()
