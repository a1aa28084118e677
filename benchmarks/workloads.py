"""The workloads of the throughput benchmark: requests as plain data, the same for both engines."""

import math
import random
from dataclasses import dataclass, replace
from typing import Any

from vllm_pasta.request.shape import attention_layers


@dataclass(frozen=True)
class Model:
    """The sizes of a model that workloads depend on: layers with attention, query heads in each,
    vocabulary."""

    layers: tuple[int, ...] = tuple(range(30))  # SmolLM2-135M's
    heads: int = 9
    vocabulary: int = 40_000

    @classmethod
    def of(cls, name: str) -> "Model":
        """Reads the sizes of a model by its folder or its name on the hub."""
        from transformers import AutoConfig

        config = AutoConfig.from_pretrained(name).get_text_config()
        layers = attention_layers(config, config.num_hidden_layers)
        return cls(layers, config.num_attention_heads, config.vocab_size)


@dataclass(frozen=True)
class Workload:
    """A batch of requests.

    Attributes:
        what: For the table.
        target: The least output throughput, steered / plain; for "latency", the least
            plain / steered.
        requests, prompt_tokens, output_tokens: Sizes.
        heads: Share of the query heads that each steered request steers, one at least: below 0.2
            over 0.3 of the layers, else over all.
        emphasised_tokens: Per steered request.
        steered: Share of requests that are steered.
        distinct: Whether every request has other heads, alpha and spans.
        measure: "throughput" of all requests, or "latency" of the plain ones.
        mixed: Whether lengths vary as in chats; then the sizes are upper bounds.
    """

    what: str
    target: float
    requests: int = 32
    prompt_tokens: int = 512
    output_tokens: int = 64
    heads: float = 0.1
    emphasised_tokens: int = 20
    steered: float = 1.0
    distinct: bool = False
    measure: str = "throughput"
    mixed: bool = False

    def batch(self, seed: int, model: Model) -> list[dict[str, Any]]:
        """Requests as ``{"ids": [...], "output_tokens": n, "emphasis": {...} | None}``.

        Every seed gives new prompts, of the same lengths, marks and heads unless ``distinct``.
        """
        rng = random.Random(seed)
        lengths = random.Random(0)
        batch = []
        for i in range(self.requests):
            prompt_tokens, output_tokens = self.prompt_tokens, self.output_tokens
            if self.mixed:
                prompt_tokens = _length(lengths, median=160, most=prompt_tokens)
                output_tokens = _length(lengths, median=100, most=output_tokens)
            ids = [rng.randrange(100, min(model.vocabulary, 40_000)) for _ in range(prompt_tokens)]
            emphasis = None
            if i < self.steered * self.requests:
                pick = rng if self.distinct else random.Random(0)
                start = pick.randrange(16, max(17, prompt_tokens // 2 - self.emphasised_tokens))
                emphasis = {
                    "spans": [[start, min(start + self.emphasised_tokens, prompt_tokens)]],
                    "alpha": pick.choice([0.001, 0.01, 0.1]) if self.distinct else 0.01,
                    "heads": _heads(self.heads, model, pick),
                }
            batch.append({"ids": ids, "output_tokens": output_tokens, "emphasis": emphasis})
        rng.shuffle(batch)
        return batch


def _length(rng: random.Random, median: int, most: int) -> int:
    """Draws a length from a log-normal distribution, as chats have."""
    return min(most, max(24, round(median * math.exp(rng.gauss(0, 0.9)))))


def _heads(share: float, model: Model, rng: random.Random) -> dict[str, list[int]]:
    total = len(model.layers) * model.heads
    count = max(1, round(share * total))
    if count == total:
        return {str(layer): list(range(model.heads)) for layer in model.layers}
    spread = len(model.layers) if share >= 0.2 else round(0.3 * len(model.layers))
    layers = rng.sample(model.layers, max(1, min(spread, count)))
    return {str(layer): rng.sample(range(model.heads), count // len(layers)) for layer in layers}


WORKLOADS = {
    "plain": Workload("plugin on, no request steered", 0.99, steered=0.0),
    "steered": Workload("all steered, 27 of 270 heads over 9 layers, 20 tokens", 0.97),
    "long": Workload("the same, prompts of 2,048 tokens", 0.97, requests=8, prompt_tokens=2048),
    "distinct": Workload("each with other heads, alpha and spans", 0.95, distinct=True),
    "all-heads": Workload("all 270 heads steered", 0.85, heads=1.0),
    "one-head": Workload("one head each (profiling)", 0.85, heads=0.0, distinct=True),
    "half": Workload(
        "half the requests steered: latency of the plain ones", 0.97, steered=0.5, measure="latency"
    ),
    "seka": Workload(
        "SEKA's setting: 10 prompts of 3,000 tokens, 60 new", 0.95, requests=10,
        prompt_tokens=3000, output_tokens=60, emphasised_tokens=200,
    ),
}  # fmt: skip

_POINT = Workload("sweep", 0.0, requests=16, output_tokens=24)

SWEEPS: dict[str, list[tuple[int, Workload]]] = {
    "prompt tokens": [
        (n, replace(_POINT, prompt_tokens=n, requests=max(2, min(16, 12288 // n))))
        for n in (128, 512, 1024, 2048, 3584)
    ],
    "steered heads, % of all": [
        (round(100 * share), replace(_POINT, heads=share)) for share in (9 / 270, 0.1, 60 / 270, 1)
    ],
    "emphasised tokens": [(n, replace(_POINT, emphasised_tokens=n)) for n in (1, 20, 80, 230)],
    "steered requests, %": [(n, replace(_POINT, steered=n / 100)) for n in (0, 25, 50, 100)],
}
"""The plots' points: one size varies, the others are as in the workload "steered"."""

REFERENCE = {
    "static": Workload("one batch of 32, 512 + 64 tokens", 4.5),
    "mixed": Workload(
        "chat-like mixed lengths", 8.0, prompt_tokens=1024, output_tokens=192, mixed=True
    ),
}
"""Workloads that also run on transformers; the target is vllm-pasta / reference."""
