"""What is added to a key's logit: the one place that turns spans, factors and alpha into it.

A prompt is cut into *segments*, ranges of keys with one factor each. A key's bias is the log of its
factor; generated keys have factor 1, and so no bias.

With a share, a row's factor is known once its logits are (`Share`), so no key has a bias of
its own.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from vllm_pasta.request.resolution import Span


class Segment(NamedTuple):
    """Keys up to ``end``, from the end of the segment before on (or from 0), and their factor."""

    end: int
    factor: float

    @property
    def bias(self) -> float:
        """What is added to these keys' logits."""
        return math.log(self.factor)


def segments(
    spans: Sequence[Span], alpha: float, prompt_len: int, factors: Sequence[float] = ()
) -> list[Segment]:
    """Cuts a prompt into segments.

    Args:
        spans: As in `ResolvedEmphasis`: sorted, disjoint, within ``[0, prompt_len)``.
        alpha: Factor of the prompt's other tokens.
        prompt_len: Where the last segment ends.
        factors: Of each span's tokens; empty where all are 1.

    Returns:
        At most ``2 * len(spans) + 1`` segments, none of them empty.
    """
    found: list[Segment] = []
    position = 0
    for (start, end), factor in zip(spans, factors or (1.0,) * len(spans), strict=True):
        if position < start:
            found.append(Segment(start, alpha))
        found.append(Segment(end, factor))
        position = end
    return found if position == prompt_len else [*found, Segment(prompt_len, alpha)]


def key_bias(ends: Iterable[int], biases: Iterable[float], length: int) -> torch.Tensor:
    """The bias of the first ``length`` keys.

    Args:
        ends: Where each segment ends, in order.
        biases: What is added to the logits of each segment's keys.
        length: Keys after the last segment have no bias.

    Returns:
        float32 ``[length]``.
    """
    bias = torch.zeros(length)
    start = 0
    for end, value in zip(ends, biases, strict=True):
        bias[start:end] = value
        start = end
    return bias


@dataclass(frozen=True)
class Share:
    """What the factor of each row of a request with a share follows from.

    With M the marked keys' sum of weights exp(logit) and R that of the prompt's others, the marked
    keys' share is ``M / (M + f R)``, and it is s where ``f R = (1 - s) / s M``.

    Attributes:
        marked: bool ``[keys]``; the keys that are to get the share.
        rest: bool ``[keys]``; the prompt's others, which are scaled.
        odds: ``(1 - s) / s``.
        log_least: Log of the least factor.
    """

    marked: torch.Tensor
    rest: torch.Tensor
    odds: float
    log_least: float

    def bias(self, logits: torch.Tensor) -> torch.Tensor:
        """What is to be added to logits.

        Args:
            logits: ``[..., keys]``; minus infinity where a row does not see a key.

        Returns:
            The log of each row's factor on the keys of ``rest``, 0 elsewhere; 0 everywhere in a
            row that sees no marked key, or that has the share.
        """
        marked, rest = (
            logits.masked_fill(~keys, -math.inf).logsumexp(-1, keepdim=True)
            for keys in (self.marked, self.rest)
        )
        factor = (marked - rest + math.log(self.odds)).clamp(self.log_least, 0.0)
        unseen = marked.isneginf() | rest.isneginf()
        return torch.where(self.rest & ~unseen, factor, 0.0)


def merge_base(alpha: float, factors: Sequence[float]) -> float | None:
    """What the plain output counts for in a merge, or None where a merge would not be stable.

    With weights exp(logit), Z and N their sum and the sum of weighted values over all keys, and N_i
    over the keys with factor f_i, the steered output is

        (alpha N + sum_i (f_i - alpha) N_i) / (alpha Z + sum_i (f_i - alpha) Z_i)

    where the plain output gives N = Z P, so that the values of keys whose factor is alpha need not
    be read. No difference of large numbers is in it if alpha is below 1, the factor of generated
    keys, and below every other.

    Returns:
        alpha over the largest factor: in (0, 1).
    """
    if alpha >= 1.0 or any(factor < alpha for factor in factors):
        return None
    return alpha / max((1.0, *factors))


def merge_weight(alpha: float, base: float, factor: float) -> float:
    """What is added of a key with this factor, in units of its scaled weight: 1 for the largest
    factor, 0 for alpha. (f - alpha) N_i is (1 - base) times this times N_i scaled by f."""
    return (1.0 - alpha / factor) / (1.0 - base)
