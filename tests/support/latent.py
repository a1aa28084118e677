"""Steps of random numbers over a latent KV cache, with what steered attention comes to in them."""

from dataclasses import dataclass

import torch

from vllm_pasta.request.heads import HeadSet
from vllm_pasta.request.resolution import ResolvedEmphasis
from vllm_pasta.steering.plan import StaticPlan, StepPlan

LAYER, NUM_HEADS, RANK, ROPE, NOPE, VALUE, BLOCK = 3, 5, 64, 16, 24, 12, 16
SCALE = (NOPE + ROPE) ** -0.5


@dataclass
class Request:
    """One request of a batch; plain where it has no spans."""

    seq_len: int
    query_len: int
    spans: tuple[tuple[int, int], ...] = ()
    heads: tuple[int, ...] = (0,)
    prompt_len: int | None = None
    alpha: float = 0.01
    share: float | None = None
    factors: tuple[float, ...] = ()  # of the spans, where they are not all 1


REQUESTS = [
    Request(88, 1, ((4, 40), (40, 50)), (0, 3), prompt_len=80, factors=(0.1, 1.4)),
    Request(17, 1, ((3, 9),), (0, 4), prompt_len=12),
    Request(97, 1),
    Request(120, 1, ((20, 30),), (2, 3), prompt_len=100, alpha=1e-4, share=0.7),
    Request(1, 1, ((0, 1),), (1, 2)),
    Request(1025, 1, ((500, 600), (1000, 1001)), (3,), alpha=5.0),
    # From here on prompts. A later chunk of a long one:
    Request(300, 77, ((5, 9), (230, 290)), (1, 3), prompt_len=400),
    # It begins before the first emphasised token and ends after it.
    Request(200, 90, ((150, 200),), (0, 1, 2, 3, 4)),
    Request(33, 33),
    Request(50, 20, ((60, 70),), (1,), prompt_len=80),  # nothing emphasised yet
    Request(131, 131, ((40, 45),), (2, 0)),
    Request(90, 60, ((5, 9), (50, 60)), (0, 1), prompt_len=90, alpha=1e-4, share=0.5),
    Request(70, 50, ((3, 30), (30, 44)), (1, 4), alpha=0.05, factors=(0.001, 0.4)),
]
DECODES = 6


class Batch:
    """Tensors as vLLM has them. Blocks are in random order; every slot without a token is NaN."""

    def __init__(self, dtype):
        torch.manual_seed(0)
        random = torch.randn
        self.w_k, self.w_v = random(NUM_HEADS, NOPE, RANK) / 8, random(NUM_HEADS, RANK, VALUE) / 8
        self.latents = [random(r.seq_len, RANK + ROPE).to(dtype) for r in REQUESTS]
        self.query = (random(sum(r.query_len for r in REQUESTS), NUM_HEADS, NOPE + ROPE) * 2).to(
            dtype
        )
        self.starts = [0]
        for r in REQUESTS:
            self.starts.append(self.starts[-1] + r.query_len)
        counts = [-(-r.seq_len // BLOCK) for r in REQUESTS]
        order = iter(torch.randperm(sum(counts) + 2).tolist())
        self.cache = torch.full((sum(counts) + 2, BLOCK, RANK + ROPE), float("nan"), dtype=dtype)
        self.table = torch.full((len(REQUESTS), max(counts)), -1, dtype=torch.int32)
        for r, latent in enumerate(self.latents):
            for b, tokens in enumerate(latent.split(BLOCK)):
                self.table[r, b] = block = next(order)
                self.cache[block, : len(tokens)] = tokens
        self.emphases = [
            (
                i,
                ResolvedEmphasis(
                    r.spans, r.alpha, HeadSet(((LAYER, tuple(sorted(r.heads))),)),
                    r.prompt_len or r.seq_len, r.factors, r.share,
                ),
            )
            for i, r in enumerate(REQUESTS)
            if r.spans
        ]  # fmt: skip
        self.plan = StepPlan.build(
            StaticPlan.pack(self.emphases),
            torch.tensor(self.starts, dtype=torch.int32),
            torch.tensor([r.seq_len for r in REQUESTS], dtype=torch.int32),
            self.table,
        )

    def dense(self):
        """By keys and values of each head, projected from the latents, in fp64: ``[rows, NUM_HEADS,
        VALUE]``, NaN where nothing is steered."""
        output = torch.full((len(self.query), NUM_HEADS, VALUE), float("nan"), dtype=torch.float64)
        for i, r in enumerate(REQUESTS):
            q_pos, k_pos = torch.arange(r.seq_len - r.query_len, r.seq_len), torch.arange(r.seq_len)
            factor = torch.full((r.seq_len,), r.alpha, dtype=torch.float64)
            ones = (1,) * len(r.spans)
            for (start, end), own in zip(r.spans, r.factors or ones, strict=True):
                factor[start:end] = own
            factor[r.prompt_len or r.seq_len :] = 1
            for h in r.heads if r.spans else ():
                latent = self.latents[i].double()
                key = torch.cat([latent[:, :RANK] @ self.w_k[h].double().T, latent[:, RANK:]], 1)
                rows = slice(self.starts[i], self.starts[i + 1])
                logits, own = self.query[rows, h].double() @ key.T * SCALE, factor
                if r.share is not None:
                    seen = k_pos <= q_pos[:, None]
                    weights, is_rest = logits.exp() * seen, factor != 1
                    is_marked = ~is_rest & (k_pos < (r.prompt_len or r.seq_len))
                    marked, rest = weights[:, is_marked].sum(1), weights[:, is_rest].sum(1)
                    least = (marked * (1 - r.share) / r.share / rest).clamp(r.alpha, 1)
                    own = torch.where(is_rest, least[:, None], 1.0)
                logits = logits + own.log()
                logits[k_pos > q_pos[:, None]] = float("-inf")
                result = logits.softmax(1) @ (latent[:, :RANK] @ self.w_v[h].double())
                result[q_pos < r.spans[0][0]] = float("nan")  # nothing emphasised there to see
                output[rows, h] = result
        return output
