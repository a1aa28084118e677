"""Steps of random numbers for the CPU's kernels, and what they come to: dense attention in fp64,
which shares no code with the kernels.

A case packs the KV cache itself and fills its unused slots with NaN.
"""

import random
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

import torch

from vllm_pasta.request.heads import HeadSet
from vllm_pasta.request.resolution import LEAST_FACTOR, ResolvedEmphasis
from vllm_pasta.steering.plan import LayerAttention, StaticPlan, StepPlan

LAYER = 3


@dataclass
class Request:
    """One request of a batch; plain where it has no spans."""

    seq_len: int
    query_len: int
    spans: tuple[tuple[int, int], ...] = ()
    prompt_len: int | None = None
    alpha: float = 0.01
    heads: tuple[int, ...] = (0,)
    factors: tuple[float, ...] = ()  # of the spans; all 1 where there are none
    share: float | None = None  # instead of alpha

    def emphasis(self) -> ResolvedEmphasis:
        heads = HeadSet(((LAYER, self.heads),))
        prompt_len = self.prompt_len or self.seq_len
        alpha = self.alpha if self.share is None else LEAST_FACTOR
        return ResolvedEmphasis(self.spans, alpha, heads, prompt_len, self.factors, self.share)


@dataclass
class Case:
    """A batch, and the tensors that vLLM would hold for it."""

    requests: list[Request]
    dtype: torch.dtype = torch.float32
    layout: str = "vec"
    num_heads: int = 4
    num_kv_heads: int = 2
    head_size: int = 64
    block_size: int = 128
    kind: dict[str, Any] = field(default_factory=dict)  # of LayerAttention, but for the scale
    seed: int = 0
    keys: list[torch.Tensor] = field(init=False)
    values: list[torch.Tensor] = field(init=False)
    _dense: dict[Any, torch.Tensor] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        torch.manual_seed(self.seed)
        self._dense = {}
        lengths = [r.seq_len for r in self.requests]

        def random(n: int, heads: int) -> torch.Tensor:
            return torch.randn(n, heads, self.head_size).to(self.dtype)

        self.keys = [random(n, self.num_kv_heads) * 2 for n in lengths]
        self.values = [random(n, self.num_kv_heads) for n in lengths]
        self.query = random(sum(r.query_len for r in self.requests), self.num_heads) * 2
        self.attention = LayerAttention(self.head_size**-0.5, **self.kind)
        self.starts = [0]
        for r in self.requests:
            self.starts.append(self.starts[-1] + r.query_len)
        self._pack()

    def _pack(self) -> None:
        """Blocks in random order; every slot without a token is NaN.

        What is missing in the block table, at its end or before the window, is -1.
        """
        d, size = self.head_size, self.block_size
        counts = [-(-r.seq_len // size) for r in self.requests]
        order = torch.randperm(sum(counts) + 2)
        self.block_table = torch.full((len(counts), max(counts)), -1, dtype=torch.int32)
        self.kv_cache = torch.full(
            (len(order), self.num_kv_heads, size, 2 * d), float("nan"), dtype=self.dtype
        )
        taken = 0
        for r, (keys, values) in enumerate(zip(self.keys, self.values, strict=True)):
            first = self.requests[r].seq_len - self.requests[r].query_len + 1
            first -= self.kind.get("window", first)  # vLLM gives away the blocks before its block
            for b in range(max(0, first) // size, counts[r]):
                block = int(order[taken])
                taken += 1
                self.block_table[r, b] = block
                for head in range(self.num_kv_heads):
                    k, v = self.kv_cache[block, head].flatten().chunk(2)
                    tokens = slice(b * size, min((b + 1) * size, len(keys)))
                    n = tokens.stop - tokens.start
                    if self.layout == "amx":
                        t, c = torch.arange(n)[:, None], torch.arange(d)[None]
                        k[(t // 16) * (d * 16) + (c // 2) * 32 + (t % 16) * 2 + c % 2] = keys[
                            tokens, head
                        ]
                        v[(c // 16) * (size * 16) + (t // 2) * 32 + (c % 16) * 2 + t % 2] = values[
                            tokens, head
                        ]
                    else:
                        k.view(d, size)[:, :n] = keys[tokens, head].T
                        v.view(size, d)[:n] = values[tokens, head]

    def plan(self) -> StepPlan:
        static = StaticPlan.pack(
            [(i, r.emphasis()) for i, r in enumerate(self.requests) if r.spans]
        )
        plan = StepPlan.build(
            static,
            torch.tensor(self.starts, dtype=torch.int32),
            torch.tensor([r.seq_len for r in self.requests], dtype=torch.int32),
            self.block_table,
        )
        assert plan is not None
        return plan

    def run(self, kernel, output: torch.Tensor | None = None) -> torch.Tensor:
        """The output, made from the plain one; NaN where nothing is to be written."""
        if output is None:
            output = torch.empty_like(self.query)
        output.copy_(self.dense(torch.float64, steered=False))
        plan = self.plan()
        heads = plan.static.layers[LAYER]
        kernel(self.query, self.kv_cache, output, plan, heads, self.attention, self.layout)
        return output

    def dense(self, dtype: torch.dtype, steered: bool = True) -> torch.Tensor:
        """The steered pairs, or their plain attention, by the textbook and all in ``dtype``.

        Computed once: to be read alone.
        """
        if (key := (dtype, steered)) not in self._dense:
            self._dense[key] = self._computed(dtype, steered)
        return self._dense[key]

    def _computed(self, dtype: torch.dtype, steered: bool) -> torch.Tensor:
        output = torch.full_like(self.query, float("nan"), dtype=dtype)
        group = self.num_heads // self.num_kv_heads
        for i, r in enumerate(self.requests):
            if not r.spans:
                continue
            q_pos = torch.arange(r.seq_len - r.query_len, r.seq_len)[:, None]
            k_pos = torch.arange(r.seq_len)[None]
            hidden = (k_pos > q_pos) | (q_pos - k_pos >= self.kind.get("window", r.seq_len))
            factor = torch.full_like(k_pos, r.alpha, dtype=torch.float64)
            for (a, b), own in zip(r.spans, r.factors or [1.0] * len(r.spans), strict=True):
                factor[(k_pos >= a) & (k_pos < b)] = own
            factor[k_pos >= (r.prompt_len or r.seq_len)] = 1.0
            bias = factor.log() if steered else torch.zeros_like(factor)
            bias = bias.masked_fill(hidden, float("-inf")).to(dtype)  # [T, S]
            before = q_pos < r.spans[0][0]
            rows = slice(self.starts[i], self.starts[i + 1])
            for h in r.heads:
                k, v = (x[i][:, h // group].to(dtype) for x in (self.keys, self.values))
                logits = self.query[rows, h].to(dtype) @ k.T * self.attention.scale
                if cap := self.kind.get("soft_cap"):
                    logits = (logits / cap).tanh() * cap
                if (slopes := self.kind.get("alibi_slopes")) is not None:
                    logits = logits + (slopes[h] * (k_pos - q_pos)).to(dtype)
                if steered and r.share is not None:
                    bias = share_bias(r, logits.double(), hidden, k_pos).to(dtype)
                logits = logits + bias
                if (sinks := self.kind.get("sinks")) is not None:
                    sink = sinks[h].to(dtype).expand(len(logits), 1)
                    logits, v = torch.cat([logits, sink], 1), torch.cat([v, v[:1] * 0])
                result = logits.softmax(-1) @ v
                output[rows, h] = result.masked_fill(before, float("nan"))
        return output


def share_bias(r: Request, logits: torch.Tensor, hidden: torch.Tensor, k_pos: torch.Tensor):
    """The same for a share: each row has a factor of its own, found in the weights themselves."""
    weights = (logits - logits.masked_fill(hidden, -1e9).amax(-1, keepdim=True)).exp()
    weights = weights.masked_fill(hidden, 0.0)
    prompt = k_pos < (r.prompt_len or r.seq_len)
    marked = sum((k_pos >= a) & (k_pos < b) for a, b in r.spans).bool()
    of_marked = weights.masked_fill(~marked, 0.0).sum(-1)
    of_rest = weights.masked_fill(marked | ~prompt, 0.0).sum(-1)
    is_short = (of_marked > 0) & (of_marked / (of_marked + of_rest) < r.share)
    factor = torch.where(is_short, (of_marked / r.share - of_marked) / of_rest, 1.0).clamp(1e-4)
    reached = of_marked / (of_marked + factor * of_rest)
    assert (reached[is_short & (factor > 1e-4)] - r.share).abs().lt(1e-9).all()
    factors = torch.where(marked | ~prompt, 1.0, factor[:, None])
    return factors.log().masked_fill(hidden, float("-inf"))


def decode(seq_len: int, **options) -> Request:
    options = {"spans": ((seq_len // 3, seq_len // 3 + max(1, seq_len // 5)),), **options}
    return Request(seq_len, 1, **options)


def prefill(seq_len: int, **options) -> Request:
    return replace(decode(seq_len, **options), query_len=seq_len)


def error(got: torch.Tensor, truth: torch.Tensor) -> float:
    assert torch.equal(got.isnan(), truth.isnan()), "wrote other pairs than the steered ones"
    return (got.double() - truth).nan_to_num().abs().max().item()


def check(case: Case, kernel, fp32_slack: float = 1e-6) -> None:
    """The steered pairs are dense attention's, and no other is written. Their error is at most
    twice that of plain torch in the same dtype, and ``fp32_slack`` or 16 bits' last digit."""
    truth = case.dense(torch.float64)
    plain = error(case.dense(case.dtype), truth)
    assert error(case.run(kernel), truth) <= 2 * plain + _slack(case.dtype, truth, fp32_slack)


def check_whole(case: Case, kernel, fp32_slack: float = 1e-6) -> None:
    """All heads, those that are steered and the others; nothing is read of the output. A step of
    one row for each request, all of them steered."""
    everywhere = replace(
        case, requests=[replace(r, heads=tuple(range(case.num_heads))) for r in case.requests]
    )
    assert torch.equal(everywhere.query, case.query)

    def dense(dtype):
        steered = case.dense(dtype)
        return torch.where(steered.isnan(), everywhere.dense(dtype, steered=False), steered)

    truth = dense(torch.float64)
    output = torch.full_like(case.query, float("nan"))
    plan = case.plan()
    assert plan.is_whole_decode
    kernel(
        case.query, case.kv_cache, output, plan, plan.static.layers[LAYER], case.attention,
        case.layout, True,
    )  # fmt: skip
    plain = error(dense(case.dtype), truth)
    assert error(output, truth) <= 2 * plain + _slack(case.dtype, truth, fp32_slack)


def _slack(dtype: torch.dtype, truth: torch.Tensor, fp32_slack: float) -> float:
    if dtype == torch.float32:
        return fp32_slack
    return torch.finfo(dtype).eps * truth.nan_to_num().abs().max().item()


FORMATS = (
    (torch.float32, "vec"),
    (torch.bfloat16, "vec"),
    (torch.bfloat16, "amx"),
    (torch.float16, "vec"),
)
FACTORS = (1e-4, 0.01, 0.1, 0.3, 0.5, 0.99, 1.0, 1.3, 4.0)


def check_random(seed: int, kernel) -> None:
    """One step of any kind that vLLM can ask for, small; the same for the same seed."""
    case, whole = random_case(random.Random(seed))
    (check_whole if whole else check)(case, kernel, 1e-5)


def random_case(rng: random.Random) -> tuple[Case, bool]:
    """A step, and whether the whole layer is to be computed."""
    dtype, layout = rng.choice(FORMATS)
    block_size = rng.choice((32, 64, 128) if layout == "amx" else (16, 32, 48, 64, 128))
    num_kv_heads = rng.choice((1, 2, 3))
    num_heads = num_kv_heads * rng.choice((1, 2, 3, 4, 7, 25 if num_kv_heads == 1 else 1))
    whole = rng.random() < 0.2
    requests = [_random_request(rng, num_heads, whole) for _ in range(rng.choice((1, 1, 2, 3, 5)))]
    if not any(r.spans for r in requests):  # the steered one may stand anywhere in the batch
        requests.insert(rng.randrange(len(requests) + 1), decode(rng.randint(1, 99)))
    case = Case(
        requests,
        dtype,
        "vec16" if layout == "vec" and block_size % 32 else layout,
        num_heads,
        num_kv_heads,
        rng.choice((32, 64, 96, 128, 256) if layout == "amx" else (16, 32, 48, 64, 80, 128, 256)),
        block_size,
        _random_kind(rng, num_heads),
        rng.randrange(2**31),
    )
    return case, whole


def _random_kind(rng: random.Random, num_heads: int) -> dict[str, Any]:
    kind: dict[str, Any] = {}
    if rng.random() < 0.3:
        kind["window"] = rng.choice((1, 2, 31, 32, 33, rng.randrange(1, 300)))
    if rng.random() < 0.15:
        kind["soft_cap"] = rng.choice((0.5, 5.0, 50.0))
    if rng.random() < 0.15:
        kind["alibi_slopes"] = torch.tensor(
            [rng.choice((0.0, 0.01, 0.3)) for _ in range(num_heads)]
        )
    if rng.random() < 0.2:
        kind["sinks"] = torch.tensor([rng.uniform(-20, 20) for _ in range(num_heads)])
    return kind


def _random_request(rng: random.Random, num_heads: int, whole: bool) -> Request:
    seq_len = int(2 ** rng.uniform(0, 8.2))
    if rng.random() < 0.03:
        seq_len += 1500  # enough for the keys to be split among threads
    prompt_len = rng.choice((seq_len, rng.randint(1, seq_len)))
    cuts = sorted(rng.sample(range(prompt_len + 1), min(prompt_len + 1, rng.choice((2, 3, 6, 20)))))
    spans = tuple(span for span in pairwise(cuts) if rng.random() < 0.7) or (tuple(cuts[:2]),)
    query_len = rng.choice((1, 1, seq_len, rng.randint(1, seq_len)))
    query_len = 1 if whole else min(query_len, max(1, 50_000 // (seq_len * num_heads)))
    if not whole and rng.random() < 0.15:
        return Request(seq_len, query_len)
    strength: dict[str, Any] = {"alpha": rng.choice((*FACTORS, 1e-30, 100.0))}
    if rng.random() < 0.3:
        strength = {"share": rng.choice((0.05, 0.3, 0.7, 0.95, 0.9999))}
    elif rng.random() < 0.4:
        strength = {
            "alpha": rng.choice(FACTORS), "factors": tuple(rng.choice(FACTORS) for _ in spans)
        }  # fmt: skip
    heads = tuple(sorted(rng.sample(range(num_heads), rng.randint(1, num_heads))))
    return Request(seq_len, query_len, spans, prompt_len, heads=heads, **strength)
