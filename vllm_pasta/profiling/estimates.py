"""Means with confidence intervals, and how alike two rankings are."""

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

Z = 1.96  # 95 %


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
        mean = sum(values) / n
        if all(value in (0.0, 1.0) for value in values):
            centre = (mean + Z * Z / (2 * n)) / (1 + Z * Z / n)
            half = Z / (1 + Z * Z / n) * math.sqrt(mean * (1 - mean) / n + Z * Z / (4 * n * n))
            return cls(mean, centre - half, centre + half, n)
        variance = sum((value - mean) ** 2 for value in values) / max(1, n - 1)
        half = Z * math.sqrt(variance / n)
        return cls(mean, mean - half, mean + half, n)


def overlap(ours: Sequence[Hashable], theirs: Sequence[Hashable], k: int) -> float:
    """Share of their first ``k`` that is among our first ``k``."""
    return len({*ours[:k]} & {*theirs[:k]}) / min(k, len(theirs))


def rank_correlation(ours: Sequence[Hashable], theirs: Sequence[Hashable]) -> float:
    """Spearman's, of two orders of the same things."""
    at = {item: rank for rank, item in enumerate(theirs)}
    n = len(ours)
    return 1 - 6 * sum((rank - at[item]) ** 2 for rank, item in enumerate(ours)) / (n**3 - n)
