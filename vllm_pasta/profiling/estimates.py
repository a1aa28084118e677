"""Means with confidence intervals, and how alike two rankings are."""

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from statistics import NormalDist, correlation, fmean, variance

CONFIDENCE = 0.95
Z = NormalDist().inv_cdf((1 + CONFIDENCE) / 2)


@dataclass(frozen=True)
class Estimate:
    """A mean, and its 95 % confidence interval ``[low, high]``, of ``count`` values."""

    mean: float
    low: float
    high: float
    count: int

    @classmethod
    def of(cls, values: Sequence[float]) -> "Estimate":
        """Wilson's interval where all values are 0 or 1, else the normal approximation."""
        n = len(values)
        mean = fmean(values)
        if all(value in (0.0, 1.0) for value in values):
            centre = (mean + Z * Z / (2 * n)) / (1 + Z * Z / n)
            half = Z / (1 + Z * Z / n) * math.sqrt(mean * (1 - mean) / n + Z * Z / (4 * n * n))
            return cls(mean, centre - half, centre + half, n)
        half = Z * math.sqrt(variance(values) / n) if n > 1 else 0.0
        return cls(mean, mean - half, mean + half, n)


def overlap(ranking: Sequence[Hashable], other: Sequence[Hashable], k: int) -> float:
    """Share of ``other``'s first ``k`` items that are among ``ranking``'s first ``k``."""
    return len({*ranking[:k]} & {*other[:k]}) / min(k, len(other))


def rank_correlation(ranking: Sequence[Hashable], other: Sequence[Hashable]) -> float:
    """Spearman's correlation of two orders of the same things, from -1 to 1."""
    at = {item: rank for rank, item in enumerate(other)}
    return correlation(range(len(ranking)), [at[item] for item in ranking])
