"""Times the Triton kernels of steered attention on a GPU, against plain attention.

One layer of a model like Qwen3-8B, bf16, paged KV cache. Plain: FlashAttention, of the version
that vLLM takes on this GPU, or, where vLLM has none, its Triton kernel. "direct" and "merge" are
what steering adds to it, see kernels/gpu/launch.py; "idle" is a launch that finds nothing to steer:
what a CUDA graph replays for plain requests.

Times are of CUDA graph replays. A graph holds, `REPEATS` times over, what empties the L2 cache, as
the rest of a model's layer does, then plain attention, then steering. What steering adds is the
time of that graph less that of one without steering, so each kernel finds the caches as a step
leaves them, and the host's launches do not count.

Every case is first held to dense attention in fp32. "floor" says what the launch cannot go below:
bytes that it must move (keys and values that are wanted, once; steered heads' rows of query and
output), the operations of its products, and the time that this takes at the bandwidth and the rate
that copying and multiplying reach on this device; the launch itself, about 1 us in a graph, comes
on top.

Peers on a contiguous cache, for decoding: torch's scaled_dot_product_attention and, where it is
installed, xformers' memory_efficient_attention, both with the whole bias.

    python -m benchmarks.kernel_gpu --json kernel_gpu.json
"""

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vllm_pasta.kernels.gpu.launch import Batch, Workspace, steered_attention
from vllm_pasta.request.heads import HeadSet
from vllm_pasta.request.resolution import ResolvedEmphasis
from vllm_pasta.steering.plan import LayerAttention
from vllm_pasta.steering.slots import SteeringBuffers

REPEATS = 10
"""How often a graph holds what is timed."""
REPLAYS = 20
L2_BYTES = 2**28
"""Bytes whose writing empties the L2 cache of any GPU."""


@dataclass(frozen=True)
class Case:
    """One step of equal requests, all steered alike.

    Attributes:
        share: Of the query heads that are steered; they spread over the KV heads.
    """

    requests: int = 32
    query_len: int = 1
    context: int = 8192
    share: float = 0.1
    emphasised: int = 256
    num_heads: int = 32
    num_kv_heads: int = 8
    head_size: int = 128
    block_size: int = 16
    alpha: float = 0.01

    @property
    def kv_heads(self) -> int:
        """KV heads with a steered query head."""
        group = self.num_heads // self.num_kv_heads
        return len({head // group for head in self.heads})

    def floor(self, way: str) -> dict[str, float]:
        """Bytes and operations that a way cannot do without."""
        rows = self.requests * self.query_len
        seen = self.context - (self.query_len - 1) / 2  # keys that a row sees, on average
        keys = min(self.emphasised, self.context) if way == "merge" else self.context
        pairs = rows * len(self.heads) * (keys if way == "merge" else seen)
        cached = self.requests * keys * self.kv_heads * 2 * self.head_size * 2
        moved = rows * len(self.heads) * self.head_size * 2 * (3 if way == "merge" else 2)
        return {"bytes": cached + moved, "flop": 4 * pairs * self.head_size}

    @property
    def heads(self) -> list[int]:
        count = max(1, round(self.share * self.num_heads))
        return [i * self.num_heads // count for i in range(count)]


DECODE, PREFILL = Case(), Case(requests=1, query_len=8192, context=8192)
CONTEXTS = (1024, 8192, 32768, 131072)
CASES = [
    replace(DECODE, requests=1, context=640, emphasised=20),
    replace(DECODE, requests=128, context=576, emphasised=84, share=1.0),
    *(replace(DECODE, requests=n, context=1024) for n in (128, 256)),
    replace(DECODE, requests=128),
    replace(DECODE, alpha=5.0),
    replace(PREFILL, alpha=5.0),
    *(replace(DECODE, context=n, requests=min(32, 2**20 // n)) for n in CONTEXTS),
    *(replace(DECODE, share=s) for s in (0.05, 0.25, 0.5, 1.0)),
    *(replace(DECODE, emphasised=n) for n in (16, 64, 1024)),
    *(replace(PREFILL, query_len=n, context=n) for n in (1024, 8192, 32768)),
    replace(PREFILL, query_len=2048, context=32768),
    *(replace(PREFILL, share=s) for s in (0.05, 0.5, 1.0)),
]  # fmt: skip


class Bench:
    """A case's tensors.

    Args:
        case: What to time.
        device: "cuda", or "cpu" under Triton's interpreter, which is for tests.
    """

    def __init__(self, case: Case, device: str) -> None:
        torch.manual_seed(0)
        self.case, self.device = case, device
        dtype = torch.bfloat16 if device == "cuda" else torch.float32
        blocks = -(-case.context // case.block_size)
        shape = (case.requests * blocks, case.block_size, case.num_kv_heads, 2 * case.head_size)
        self.kv_cache = torch.randn(shape, dtype=dtype, device=device).transpose(1, 2)  # NHD
        order = torch.randperm(shape[0], device=device).to(torch.int32)
        rows = case.requests * case.query_len
        self.query = torch.randn(rows, case.num_heads, case.head_size, dtype=dtype, device=device)
        self.output = torch.zeros_like(self.query)
        starts = torch.arange(case.requests + 1, dtype=torch.int32, device=device)
        seq_lens = torch.full((case.requests,), case.context, dtype=torch.int32, device=device)
        self.batch = Batch(
            starts * case.query_len, seq_lens, order.view(case.requests, blocks), case.query_len
        )
        self.attention = LayerAttention(case.head_size**-0.5)
        self.buffers = SteeringBuffers(case.requests, case.requests, 1, case.num_heads, 0, device)
        begin = 16
        self.emphasis = ResolvedEmphasis(
            ((begin, min(begin + case.emphasised, case.context)),),
            case.alpha, HeadSet(((0, tuple(case.heads)),)), case.context,
        )  # fmt: skip
        for slot in range(case.requests):
            self.buffers.write(slot, self.emphasis)
        self.buffers.show(range(case.requests))
        self.workspace = Workspace(case.head_size, device)

    def dense(self, request: int, steer: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """One request's output and log-sum-exp in fp32: ``[query_len, heads, …]``."""
        case = self.case
        keys, values = self.contiguous(request)
        group = case.num_heads // case.num_kv_heads
        rows = slice(request * case.query_len, (request + 1) * case.query_len)
        query = self.query[rows].float().transpose(0, 1)
        outputs, sums = [], []
        position = torch.arange(case.context - case.query_len, case.context, device=self.device)
        key = torch.arange(case.context, device=self.device)
        for head in range(case.num_heads):
            logits = query[head] @ keys[head // group].float().T * self.attention.scale
            if steer and head in case.heads:
                late = (position >= self.emphasis.first)[:, None]
                logits = torch.where(late, logits + self.bias(), logits)
            logits = logits.masked_fill(key > position[:, None], float("-inf"))
            sums.append(logits.logsumexp(-1))
            outputs.append(logits.softmax(-1) @ values[head // group].float())
        return torch.stack(outputs, 1), torch.stack(sums, 1)

    def contiguous(self, request: int) -> tuple[torch.Tensor, ...]:
        """Keys and values of a request, each ``[kv_heads, context, head_size]``."""
        blocks = self.batch.block_table[request].long()
        cached = self.kv_cache[blocks].transpose(1, 2).flatten(0, 1)[: self.case.context]
        return cached.transpose(0, 1).chunk(2, dim=-1)

    def bias(self) -> torch.Tensor:
        """``[context]``: what is added to a steered head's logits."""
        bias = torch.full((self.case.context,), math.log(self.case.alpha), device=self.device)
        for start, end in self.emphasis.spans:
            bias[start:end] = 0.0
        return bias

    def steer(self, lse: torch.Tensor | None = None) -> None:
        steered_attention(
            self.query, self.kv_cache, self.output, self.buffers, 0, self.batch, self.attention,
            self.workspace, lse=lse,
        )  # fmt: skip

    def check(self) -> torch.Tensor:
        """Both ways equal dense attention, for the first and the last request; returns the lse."""
        tolerance = 1e-4 if self.query.dtype == torch.float32 else 3e-2
        lse = torch.zeros(self.query.shape[:2], dtype=torch.float32, device=self.device)
        ends = {0, self.case.requests - 1}
        rows = {r: slice(r * self.case.query_len, (r + 1) * self.case.query_len) for r in ends}
        for given in (None, lse):
            for request in ends:
                output, sums = self.dense(request, steer=False)
                self.output[rows[request]], lse[rows[request]] = output.to(self.output.dtype), sums
            self.steer(given)
            for request in ends:
                wanted = self.dense(request, steer=True)[0]
                got = self.output[rows[request]].float()
                torch.testing.assert_close(got, wanted, rtol=tolerance, atol=tolerance)
        return lse

    def plain(self) -> tuple[str, Callable[[], Any]]:
        """vLLM's own attention: FlashAttention, else Triton."""
        case, batch = self.case, self.batch
        keys, values = self.kv_cache.transpose(1, 2).chunk(2, dim=-1)
        common = {
            "q": self.query, "k": keys, "v": values, "out": self.output,
            "cu_seqlens_q": batch.query_start, "max_seqlen_q": case.query_len,
            "seqused_k": batch.seq_lens, "max_seqlen_k": case.context,
            "softmax_scale": self.attention.scale, "causal": True,
            "block_table": batch.block_table, "softcap": 0,
        }  # fmt: skip
        from vllm.v1.attention.backends.fa_utils import is_flash_attn_varlen_func_available

        if is_flash_attn_varlen_func_available():
            from vllm.v1.attention.backends.fa_utils import (
                flash_attn_varlen_func,
                get_flash_attn_version,
            )

            version = get_flash_attn_version(head_size=case.head_size)
            options = {"fa_version": version, "return_softmax_lse": True}  # as when steering asks
            return f"FlashAttention {version}", lambda: flash_attn_varlen_func(**common, **options)
        from vllm.v1.attention.ops.triton_unified_attention import unified_attention

        options = {"window_size": (-1, -1), "q_descale": None, "k_descale": None, "v_descale": None}
        return "Triton", lambda: unified_attention(**common, **options)

    def peers(self) -> dict[str, Callable[[], Any]]:
        """Attention with the whole bias over a contiguous cache."""
        case = self.case
        group = case.num_heads // case.num_kv_heads
        cached = [self.contiguous(r) for r in range(case.requests)]
        keys, values = (
            torch.stack([pair[i] for pair in cached]).repeat_interleave(group, 1) for i in (0, 1)
        )
        bias = torch.zeros(case.num_heads, 1, case.context, device=self.device)
        bias[case.heads] = self.bias()
        bias = bias.to(self.query.dtype).expand(case.requests, -1, -1, -1)
        query = self.query.view(case.requests, 1, case.num_heads, case.head_size)
        found: dict[str, Callable[[], Any]] = {
            "SDPA": lambda: torch.nn.functional.scaled_dot_product_attention(
                query.transpose(1, 2), keys, values, attn_mask=bias
            )
        }
        try:
            from xformers.ops import memory_efficient_attention
        except ImportError:
            return found
        k, v = keys.transpose(1, 2), values.transpose(1, 2)
        return {**found, "xformers": lambda: memory_efficient_attention(query, k, v, bias)}


def copy_bandwidth() -> float:
    """Bytes a second that a large copy reads on this device."""
    from triton.testing import do_bench

    source = torch.empty(2**30, dtype=torch.int8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.numel() / (do_bench(lambda: target.copy_(source), return_mode="median") / 1e3)


def packing_us(requests: int = 256, device: str = "cuda") -> dict[str, float]:
    """Host time of a step, for that many requests: all of them new, and none."""
    case = replace(DECODE, requests=1, context=64)
    emphasis = Bench(case, device).emphasis
    buffers = SteeringBuffers(requests, requests, 36, case.num_heads, 0, device)
    order, times = np.arange(requests), {"new": [], "known": []}  # type: ignore[var-annotated]
    for _ in range(50):
        for kind, taken in times.items():
            began = time.perf_counter()
            if kind == "new":
                for slot in range(requests):
                    buffers.write(slot, emphasis)
            buffers.show(order)
            taken.append((time.perf_counter() - began) * 1e6)
    return {kind: round(statistics.median(taken), 1) for kind, taken in times.items()}


def product_rate() -> float:
    """Operations a second of a large product in bf16 on this device."""
    from triton.testing import do_bench

    matrix = torch.randn(8192, 8192, dtype=torch.bfloat16, device="cuda")
    return 2 * 8192**3 / (do_bench(lambda: matrix @ matrix, return_mode="median") / 1e3)


def replay_us(*kernels: Callable[[], Any]) -> float:
    """Median time of these, one after the other with a cold L2 cache, in a graph's replay."""
    evicted = torch.empty(L2_BYTES, dtype=torch.int8, device="cuda")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # compiles
        for kernel in kernels:
            kernel()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(REPEATS):
            evicted.zero_()
            for kernel in kernels:
                kernel()
    times = []
    for _ in range(REPLAYS + 3):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(1e3 * start.elapsed_time(end) / REPEATS)
    return statistics.median(times[3:])


def measure(case: Case, bandwidth: float, rate: float) -> dict[str, Any]:
    """All kernels on one case, after the check."""
    bench = Bench(case, "cuda")
    lse = bench.check()
    base, plain = bench.plain()
    empty, alone = replay_us(), replay_us(plain)
    us = {base: alone - empty}
    for way, given in (("direct", None), ("merge", lse)):
        us[way] = replay_us(plain, lambda given=given: bench.steer(given)) - alone
    if case.query_len == 1 and case.context <= 32768:
        us |= {name: replay_us(run) - empty for name, run in bench.peers().items()}
    bench.buffers.hide()
    us["idle"] = replay_us(plain, lambda: bench.steer(lse)) - alone
    floors = {way: case.floor(way) for way in ("direct", "merge")}
    return {
        "requests": case.requests, "query_len": case.query_len, "context": case.context,
        "share": case.share, "emphasised": case.emphasised, "alpha": case.alpha, "plain": base,
        "us": {name: round(value, 1) for name, value in us.items()},
        "ratio": {n: round(1 + us[n] / us[base], 3) for n in ("direct", "merge", "idle")},
        "floor": {
            way: {
                "mb": round(floor["bytes"] / 1e6, 2), "gflop": round(floor["flop"] / 1e9, 2),
                "us": round(1e6 * max(floor["bytes"] / bandwidth, floor["flop"] / rate), 1),
                "launches": 1,
            }
            for way, floor in floors.items()
        },
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the results there")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("this benchmark needs a CUDA device, and torch finds none here")
    bandwidth, rate = copy_bandwidth(), product_rate()
    result = {
        "device": torch.cuda.get_device_name(),
        "versions": {name: version(name) for name in ("torch", "triton", "vllm", "vllm-pasta")},
        "copy_gb_per_s": round(bandwidth / 1e9),
        "product_tflop_per_s": round(rate / 1e12),
        "packing_us": packing_us(),
        "rows": [],
    }
    print({name: value for name, value in result.items() if name != "rows"}, flush=True)
    for case in CASES:
        result["rows"].append(measure(case, bandwidth, rate))
        print(result["rows"][-1], flush=True)
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
