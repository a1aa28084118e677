"""The requests that are checked, as plain data: random prompts, each with its own emphasis."""

import random
from dataclasses import dataclass
from typing import Any

from vllm_pasta.verify.models import Size
from vllm_pasta.verify.oracle import Steering


@dataclass(frozen=True)
class Request:
    """One request.

    Attributes:
        prompt: Token ids.
        max_tokens: So many are generated.
        emphasis: As ``extra_args["emphasis"]`` has it, with ``spans`` (of which some may have an
            alpha of their own), ``heads`` and ``alpha`` or ``share``; None for a plain request.
    """

    prompt: list[int]
    max_tokens: int
    emphasis: dict[str, Any] | None = None

    @property
    def steering(self) -> Steering | None:
        """The same for the oracle."""
        if self.emphasis is None:
            return None
        marks = [
            span if isinstance(span, dict) else {"tokens": span, "alpha": 1.0}
            for span in self.emphasis["spans"]
        ]
        return Steering(
            [tuple(mark["tokens"]) for mark in marks],
            {int(layer): heads for layer, heads in self.emphasis["heads"].items()},
            self.emphasis.get("alpha", 1.0),
            len(self.prompt),
            [mark["alpha"] for mark in marks],
            self.emphasis.get("share"),
        )

    def to_json(self, **options: Any) -> dict[str, Any]:
        """As `worker` reads it; ``options`` are further fields."""
        return {
            "prompt": self.prompt,
            "max_tokens": self.max_tokens,
            "emphasis": self.emphasis,
            **options,
        }


def mixed(
    size: Size, count: int = 24, longest: int = 400, max_tokens: int = 40, seed: int = 0
) -> list[Request]:
    """Requests of many kinds: three of four are steered, each in another way.

    They have one to four spans anywhere in the prompt, one to eight heads over some of the layers
    or every head, and an alpha from 1e-4 to 5, in some beside one for each span, or a share. Every
    plain prompt also comes with an emphasis, so steered and plain requests meet in the prefix
    cache.

    Args:
        size: The model's.
        count: How many.
        longest: Tokens of the longest prompt.
        max_tokens: Tokens that each generates.
        seed: Another one gives other requests.
    """
    rng = random.Random(seed)
    requests: list[Request] = []
    for i in range(count):
        if i % 4 == 1:
            prompt = requests[-1].prompt
        else:
            length = rng.choice(
                [rng.randint(8, longest // 4), rng.randint(longest // 4, longest), longest]
            )
            prompt = [rng.randrange(10, min(size.vocab, 40_000)) for _ in range(length)]
        emphasis = _emphasis(rng, size, len(prompt)) if i % 4 else None
        requests.append(Request(prompt, max_tokens, emphasis))
    return requests


_STRENGTHS: list[dict[str, Any]] = [
    *({"alpha": alpha} for alpha in (1e-4, 1e-3, 0.01, 5.0)),
    *({"share": share} for share in (0.5, 0.9)),
    # Added to what is plain, taken from it, or computed without it: see docs/how-it-works.md.
    {"alpha": 0.01, "of spans": (0.05, 0.3, 1.0, 3.0)},
    {"alpha": 2.0, "of spans": (0.03, 0.3, 1.0)},
    {"alpha": 0.1, "of spans": (0.01, 1.0, 3.0)},
]


def _emphasis(rng: random.Random, size: Size, length: int) -> dict[str, Any]:
    spans: list[Any] = []
    for _ in range(rng.randint(1, 4)):
        start = rng.randrange(length)
        spans.append([start, min(length, start + rng.randint(1, 24))])
    if rng.random() < 0.25:
        heads = {str(layer): list(range(size.heads)) for layer in size.attention_layers}
    else:
        layers = rng.sample(size.attention_layers, rng.randint(1, len(size.attention_layers)))
        most = min(8, size.heads)
        heads = {
            str(layer): sorted(rng.sample(range(size.heads), rng.randint(1, most)))
            for layer in sorted(layers)
        }
    strength = rng.choice(_STRENGTHS)
    if "of spans" in strength:
        own = strength["of spans"]
        spans = [{"tokens": span, "alpha": rng.choice(own)} for span in spans]
        strength = {"alpha": strength["alpha"]}
    return {"spans": spans, "heads": heads, **strength}
