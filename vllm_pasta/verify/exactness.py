"""What an engine answered, held against the oracle, token by token.

The oracle is given the engine's own tokens (teacher forcing), so one pass judges an answer, and an
early difference does not make all that follows incomparable. Greedy tokens equal the oracle's own
if and only if each is the oracle's first choice after those before it.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from vllm_pasta.verify.oracle import Oracle, Steering
from vllm_pasta.verify.requests import Request

LOGPROBS = 20
"""Log-probabilities that are compared for each generated token: the engine's highest ones."""

TIMES_TORCH, TIMES_PLAIN = 2.0, 1.5
"""A steered request's mean error may be so many times that of plain PyTorch at the same dtype, or
that of the engine's own plain requests: with an fp8 KV cache those have the larger one."""

FP32_TOLERANCE = 2e-3
"""Largest difference of a log-probability in fp32."""

MEANINGFUL = 2.0
"""The oracle without steering must differ so many times the allowed error, or nothing is proved."""


@dataclass
class Errors:
    """Differences of log-probabilities from the fp32 oracle's, in nats.

    Attributes:
        engine: The engine's.
        torch: Plain PyTorch's at the engine's dtype, on the same tokens; empty in fp32.
        unsteered: The engine's from the oracle's *without* steering.
        equal_tokens, tokens: How many tokens are the oracle's first choice, and of how many.
    """

    engine: list[float] = field(default_factory=list)
    torch: list[float] = field(default_factory=list)
    unsteered: list[float] = field(default_factory=list)
    equal_tokens: int = 0
    tokens: int = 0

    @property
    def mean(self) -> float:
        return _mean(self.engine)

    def to_json(self) -> dict[str, Any]:
        """Means and the largest, rounded."""
        return {
            "mean": round(self.mean, 6),
            "max": round(max(self.engine, default=0.0), 6),
            "torch_mean": round(_mean(self.torch), 6) if self.torch else None,
            "unsteered_mean": round(_mean(self.unsteered), 4) if self.unsteered else None,
            "equal_tokens": self.equal_tokens,
            "tokens": self.tokens,
        }


@dataclass
class Comparison:
    """An engine's answers against the oracle: steered requests, and plain ones.

    Attributes:
        is_fp32: Whether no rounding excuses a difference.
        is_greedy: Whether, then, every token must be the oracle's first choice.
    """

    is_fp32: bool
    is_greedy: bool = True
    steered: Errors = field(default_factory=Errors)
    plain: Errors = field(default_factory=Errors)

    @property
    def allowed(self) -> float:
        """Mean error that steered requests may have."""
        if self.is_fp32:
            return FP32_TOLERANCE
        return max(TIMES_TORCH * _mean(self.steered.torch), TIMES_PLAIN * self.plain.mean)

    def problems(self) -> list[str]:
        """What is wrong; empty if the engine is exact."""
        found = []
        for kind, errors in (("steered", self.steered), ("plain", self.plain)):
            if not self.is_fp32 or not errors.tokens:
                continue
            if self.is_greedy and errors.equal_tokens < errors.tokens:
                found.append(f"{kind}: {errors.equal_tokens} of {errors.tokens} tokens are equal")
            if max(errors.engine) > FP32_TOLERANCE:
                found.append(f"{kind}: a log-probability is off by {max(errors.engine):.2g}")
        if self.steered.tokens:
            if self.steered.mean > self.allowed:
                found.append(
                    f"steered: mean error {self.steered.mean:.4g}, allowed {self.allowed:.4g}"
                )
            effect = _mean(self.steered.unsteered)
            if effect < MEANINGFUL * self.allowed:
                found.append(
                    f"emphasis changes log-probabilities by {effect:.3g} only, which an error of "
                    f"{self.allowed:.3g} would hide"
                )
        return found


class Judge:
    """Holds answers against the oracle of one model.

    Args:
        path: The model's folder.
        dtype: The engine's: where it is not float32, plain PyTorch is asked in it too.
        device: Where the oracle runs.
    """

    def __init__(self, path: Any, dtype: str, device: str = "cpu") -> None:
        self.is_fp32 = dtype == "float32"
        self._oracle = Oracle(path, torch.float32, device)
        self._low = None if self.is_fp32 else Oracle(path, getattr(torch, dtype), device)
        self._known: dict[Any, tuple[torch.Tensor | None, ...]] = {}

    def compare(
        self,
        requests: Sequence[Request],
        outputs: Iterable[dict[str, Any] | None],
        is_greedy: bool = True,
    ) -> Comparison:
        """All samples of all answers; requests that left early are passed over.

        Args:
            requests: What was asked.
            outputs: As `worker.generate` gives them.
            is_greedy: Whether tokens were chosen greedily.
        """
        comparison = Comparison(self.is_fp32, is_greedy)
        for request, output in zip(requests, outputs, strict=True):
            if output is None:
                continue
            errors = comparison.plain if request.steering is None else comparison.steered
            for tokens, rows in zip(output["tokens"], output["logprobs"], strict=True):
                self._judge(request, tokens, rows, errors)
        return comparison

    def _judge(
        self, request: Request, tokens: list[int], rows: list[dict[str, float]], errors: Errors
    ) -> None:
        truth, low, unsteered = self._rows(request, tokens)
        assert truth is not None
        errors.tokens += len(tokens)
        errors.equal_tokens += int((truth.argmax(-1) == torch.tensor(tokens)).sum())
        for at, row in enumerate(rows):
            ids = torch.tensor([int(token) for token in row])
            got = torch.tensor(list(row.values()))
            errors.engine += (got - truth[at, ids]).abs().tolist()
            if low is not None:
                errors.torch += (low[at, ids] - truth[at, ids]).abs().tolist()
            if unsteered is not None:
                errors.unsteered += (got - unsteered[at, ids]).abs().tolist()

    def _rows(self, request: Request, tokens: list[int]) -> tuple[torch.Tensor | None, ...]:
        """Log-probabilities of each generated position: the oracle's, in the engine's dtype, and
        without steering."""
        key = (tuple(request.prompt), tuple(tokens), repr(request.emphasis))
        if key not in self._known:
            ids, start = request.prompt + tokens[:-1], len(request.prompt) - 1

            def ask(oracle: Oracle | None, steering: Steering | None) -> torch.Tensor | None:
                return oracle and oracle.prompt_logprobs(ids, steering)[start:]

            self._known[key] = (
                ask(self._oracle, request.steering),
                ask(self._low, request.steering),
                ask(self._oracle, None) if request.steering is not None else None,
            )
        return self._known[key]


def _mean(values: list[float]) -> float:
    return sum(values) / len(values) if values else 0.0
