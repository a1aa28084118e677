"""Times the CPU kernel of steered attention against vLLM's own attention kernel.

Both work on the same query and KV cache. vLLM's kernel computes all heads; the plugin's kernel
recomputes the steered ones from its output. Every case is first checked against the reference
kernel. "ours" is the time that steering adds to one layer's attention, with the call from Python.

Decode is bound by memory. "GB/s" is what the plugin's kernel must read (the keys of the steered
heads' KV heads and the values of emphasised tokens, each once) over its time; "memory" is the rate
at which torch sums as many consecutive bytes. With --layers 30 each run finds keys and values in
memory, as in an engine; with 1, small cases find them in the caches.

"share" is the time of the plugin's kernel where every request has a share in place of alpha, over
that with alpha. With --whole both kernels compute whole layers, as in a decode step in which every
request is steered.

    python benchmarks/kernel.py --json kernel.json
"""

import argparse
import itertools
import json
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from vllm import _custom_ops as vllm_ops
from vllm.v1.attention.backends.cpu_attn import _get_attn_isa

from vllm_pasta.kernels import reference
from vllm_pasta.kernels.cpu import launch
from vllm_pasta.request.heads import HeadSet
from vllm_pasta.request.resolution import LEAST_FACTOR, ResolvedEmphasis
from vllm_pasta.steering.plan import LayerAttention, StaticPlan, StepPlan

NUM_HEADS, NUM_KV_HEADS, HEAD_SIZE, BLOCK_SIZE = 9, 3, 64, 128  # SmolLM2-135M
SCALE = HEAD_SIZE**-0.5
SHARE = 0.3
EMPHASISED = 1 / 16  # of the context
STEERED = {1: (4,), 3: (1, 4, 7), 9: tuple(range(9))}  # 3: one of each KV head, the worst case
CASES = {  # name -> (number of requests, query rows of each, context)
    "decode 32 x 512": (32, 1, 512),
    "decode 32 x 2048": (32, 1, 2048),
    "decode 32 x 8192": (32, 1, 8192),
    "decode 1 x 8192": (1, 1, 8192),
    "prefill 1 x 512": (1, 512, 512),
    "prefill 1 x 2048": (1, 2048, 2048),
}


class Bench:
    """One batch of requests on a KV cache that vLLM's own kernel filled."""

    def __init__(self, dtype: torch.dtype, num_requests: int, query_len: int, context: int) -> None:
        torch.manual_seed(0)
        self.dtype, self.query_len, self.context = dtype, query_len, context
        self.layout = _get_attn_isa(dtype, BLOCK_SIZE, HEAD_SIZE)
        blocks = -(-context // BLOCK_SIZE)
        shape = (num_requests * blocks, NUM_KV_HEADS, BLOCK_SIZE, 2 * HEAD_SIZE)
        self.kv_cache = torch.zeros(shape, dtype=dtype)
        self.block_table = torch.randperm(shape[0]).to(torch.int32).view(num_requests, blocks)
        areas = self.kv_cache.view(shape[0], NUM_KV_HEADS, 2 * BLOCK_SIZE, HEAD_SIZE)
        self.key_cache, self.value_cache = areas.chunk(2, dim=2)
        token = torch.arange(context)
        for r in range(num_requests):
            key, value = torch.randn(2, context, NUM_KV_HEADS, HEAD_SIZE).to(dtype)
            slots = self.block_table[r, token // BLOCK_SIZE].long() * BLOCK_SIZE
            vllm_ops.cpu_attn_reshape_and_cache(
                key,
                value,
                self.key_cache,
                self.value_cache,
                slots + token % BLOCK_SIZE,
                self.layout,
            )
        self.query = torch.randn(num_requests * query_len, NUM_HEADS, HEAD_SIZE).to(dtype)
        self.output = torch.zeros_like(self.query)
        self.starts = torch.arange(num_requests + 1, dtype=torch.int32) * query_len
        self.seq_lens = torch.full((num_requests,), context, dtype=torch.int32)
        self.metadata = vllm_ops.cpu_attn_get_scheduler_metadata(
            num_reqs=num_requests,
            num_heads=NUM_HEADS,
            num_kv_heads=NUM_KV_HEADS,
            head_dim=HEAD_SIZE,
            seq_lens=self.seq_lens,
            dtype=dtype,
            query_start_loc=self.starts,
            causal=True,
            sliding_window_size=-1,
            isa=self.layout,
            enable_kv_split=True,
        )

    def vllm(self) -> None:
        vllm_ops.cpu_attention_with_kv_cache(
            query=self.query,
            key_cache=self.key_cache,
            value_cache=self.value_cache,
            output=self.output,
            query_start_loc=self.starts,
            seq_lens=self.seq_lens,
            scale=SCALE,
            causal=True,
            alibi_slopes=None,
            sliding_window=-1,
            block_table=self.block_table,
            softcap=0,
            scheduler_metadata=self.metadata,
            s_aux=None,
        )

    def plan(self, heads: Sequence[int], alpha: float, share: float | None = None) -> StepPlan:
        """Steers all requests; the emphasis begins at token 16."""
        emphasis = ResolvedEmphasis(
            spans=((16, 16 + int(self.context * EMPHASISED)),),
            alpha=alpha,
            heads=HeadSet(((0, tuple(heads)),)),
            prompt_len=self.context,
            share=share,
        )
        static = StaticPlan.pack([(r, emphasis) for r in range(len(self.seq_lens))])
        plan = StepPlan.build(static, self.starts, self.seq_lens, self.block_table)
        assert plan is not None
        return plan

    def ours(
        self,
        plan: StepPlan,
        kernel: Callable[..., None] = launch.steered_attention,
        whole: bool = False,
    ) -> None:
        heads, attention = plan.static.layers[0], LayerAttention(SCALE)
        kernel(self.query, self.kv_cache, self.output, plan, heads, attention, self.layout, whole)

    def check(self, heads: Sequence[int]) -> None:
        """Checks that the kernel equals the reference, and with alpha 1 vLLM's own kernel."""
        tolerance = 1e-5 if self.dtype == torch.float32 else 2e-2
        for alpha, share in ((0.01, None), (LEAST_FACTOR, SHARE), (1.0, None)):
            plan = self.plan(heads, alpha, share)
            self.vllm()
            expected = self.output.clone()
            if alpha != 1.0:
                self.ours(plan, reference.steered_attention)
                expected, self.output = self.output, expected
            self.ours(plan)
            torch.testing.assert_close(self.output, expected, rtol=tolerance, atol=tolerance)

    def needed_bytes(self, heads: Sequence[int]) -> int:
        kv_heads = len({h // (NUM_HEADS // NUM_KV_HEADS) for h in heads})
        rows = self.context + int(self.context * EMPHASISED)  # of keys, and of values
        return len(self.seq_lens) * rows * kv_heads * HEAD_SIZE * self.dtype.itemsize


def alternate(seconds: float, layers: int, *functions: Callable[[int], object]) -> list[float]:
    """Median seconds of each function; they take turns, so that noise falls on all alike."""
    times: list[list[float]] = [[] for _ in functions]
    end = time.perf_counter() + seconds
    for i in itertools.count():
        if i > layers + 5 and time.perf_counter() > end:
            return [statistics.median(taken[1:]) for taken in times]
        for function, taken in zip(functions, times, strict=True):
            start = time.perf_counter()
            function(i % layers)
            taken.append(time.perf_counter() - start)
    raise AssertionError


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--case", default="", help="only cases whose name contains this")
    parser.add_argument("--seconds", type=float, default=2.0, help="per measurement")
    parser.add_argument("--layers", type=int, default=1, help="separate KV caches to cycle over")
    parser.add_argument("--whole", action="store_true", help="whole layers, of decode steps")
    parser.add_argument("--threads", type=int, help="default: torch's")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the results there")
    args = parser.parse_args()
    torch.cpu._init_amx()  # Linux grants AMX only on request
    if args.threads:
        torch.set_num_threads(args.threads)

    print(f"{args.dtype}, {torch.get_num_threads()} threads, {NUM_HEADS} query heads, "
          f"{NUM_KV_HEADS} KV heads, head size {HEAD_SIZE}; medians of runs in turns")  # fmt: skip
    print(f"{'case':<18} {'steered':>7} {'vLLM us':>9} {'ours us':>9} {'ours/vLLM':>9} "
          f"{'share':>6} {'GB/s':>6} {'memory':>6}")  # fmt: skip
    results = []
    for name, numbers in CASES.items():
        if args.case not in name or (args.whole and not name.startswith("decode")):
            continue
        layers = [Bench(getattr(torch, args.dtype), *numbers) for _ in range(args.layers)]
        for count, heads in STEERED.items():
            layers[0].check(heads)
            plans = [bench.plan(heads, 0.01) for bench in layers]
            shares = [bench.plan(heads, LEAST_FACTOR, SHARE) for bench in layers]
            size = layers[0].needed_bytes(heads)
            memory = [torch.ones(size // 4) for _ in layers]
            timed = alternate(
                args.seconds,
                args.layers,
                lambda i, b=layers: b[i].vllm(),
                lambda i, b=layers, p=plans: b[i].ours(p[i], whole=args.whole),
                lambda i, b=layers: b[i].vllm(),  # so that both find the caches alike
                lambda i, b=layers, p=shares: b[i].ours(p[i], whole=args.whole),
                lambda i, m=memory: m[i].sum(),
            )
            vllm, ours, _, share, plain = timed
            decode = name.startswith("decode")
            row = {
                "case": name,
                "steered_heads": count,
                "vllm_us": round(vllm * 1e6, 1),
                "ours_us": round(ours * 1e6, 1),
                "ratio": round(ours / vllm, 3),
                "share_ratio": round(share / ours, 3),
                "gb_per_s": round(size / ours / 1e9, 1) if decode else "-",
                "memory_gb_per_s": round(size / plain / 1e9, 1) if decode else "-",
            }
            results.append(row)
            print(
                "{:<18} {:>7} {:>9} {:>9} {:>9} {:>6} {:>6} {:>6}".format(*row.values()), flush=True
            )
    if args.json:
        args.json.write_text(json.dumps({"dtype": args.dtype, "results": results}, indent=1))


if __name__ == "__main__":
    main()
