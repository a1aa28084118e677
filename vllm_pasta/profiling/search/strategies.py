"""Searches for the heads that help: every head on every example, or cheaper and nearly as good.

A search asks for the scores of (head, example) pairs and ranks all heads, best first. It knows
nothing about models: a callable gives the scores.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from vllm_pasta.profiling.methods import Head

Pair = tuple[Head, int]
"""A head and the index of an example."""

Scorer = Callable[[list[Pair]], list[float]]
"""Gives the objective of each pair: the example's score with that head alone steered."""

SAVING = 8
"""The cheap searches ask for at most 1/SAVING of the full search's pairs."""

ROUNDS = 3


@dataclass(frozen=True)
class Ranked:
    """A head in a ranking.

    Attributes:
        head: Layer and query head.
        score: The mean objective over the examples that were asked; None if none was.
        examples: The number of these examples.
        estimate: The gradient's estimate; None in the other searches.
    """

    head: Head
    score: float | None
    examples: int
    estimate: float | None = None


def full(heads: Sequence[Head], examples: int, scorer: Scorer) -> list[Ranked]:
    """Asks about every head on every example; pairs of one example are neighbours."""
    scores = _scores(heads, range(examples), scorer)
    return _by_score([Ranked(head, fmean(scores[head]), examples) for head in heads])


def halving(heads: Sequence[Head], examples: int, scorer: Scorer) -> list[Ranked]:
    """Successive halving: few examples for all heads, twice as many for the better half, and so on.

    Every round costs the same. A head that drops out ranks below all that stay longer.
    """
    per_round = len(heads) * examples / SAVING / ROUNDS
    scores: dict[Head, list[float]] = {head: [] for head in heads}
    left, dropped, done = list(heads), list[Ranked](), 0
    for number in range(ROUNDS):
        end = min(examples, done + max(1, int(per_round / len(left))))
        for head, new in _scores(left, range(done, end), scorer).items():
            scores[head] += new
        done = end
        order = _by_score([Ranked(head, fmean(scores[head]), len(scores[head])) for head in left])
        keep = len(order) if number == ROUNDS - 1 else -(-len(order) // 2)
        dropped = order[keep:] + dropped
        left = [ranked.head for ranked in order[:keep]]
    return order[:keep] + dropped


def gradient(
    heads: Sequence[Head], examples: int, scorer: Scorer, estimates: Mapping[Head, float]
) -> list[Ranked]:
    """Verifies the heads that a first-order estimate puts first; the others keep its order.

    It asks for half of what a cheap search may ask for: the estimates take time too.
    """
    order = sorted(heads, key=lambda head: -estimates[head])
    chosen = order[: max(1, len(heads) // (2 * SAVING))]
    scores = _scores(chosen, range(examples), scorer)
    verified = [Ranked(h, fmean(scores[h]), examples, estimates[h]) for h in chosen]
    rest = [Ranked(head, None, 0, estimates[head]) for head in order[len(chosen) :]]
    return _by_score(verified) + rest


def _scores(heads: Sequence[Head], examples: range, scorer: Scorer) -> dict[Head, list[float]]:
    pairs = [(head, example) for example in examples for head in heads]
    scores: dict[Head, list[float]] = {head: [] for head in heads}
    for (head, _), score in zip(pairs, scorer(pairs), strict=True):
        scores[head].append(score)
    return scores


def _by_score(ranked: list[Ranked]) -> list[Ranked]:
    """Sorts, best first; equal scores keep the model's order, which makes rankings repeatable."""
    return sorted(ranked, key=lambda r: (-(r.score or 0.0), r.head))
