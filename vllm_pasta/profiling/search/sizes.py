"""How many heads to steer: every k is evaluated on held-out examples, and the best is taken."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean

from vllm_pasta.profiling.asker import Asker
from vllm_pasta.profiling.evaluation import Row, evaluate
from vllm_pasta.profiling.methods import PLAIN, Method, steer
from vllm_pasta.profiling.search.ranking import Profile, rankings
from vllm_pasta.profiling.search.selection import Selection, select
from vllm_pasta.tasks import sample

SIZES = (1, 2, 3, 5, 8, 12, 20, 30, 40, 50, 75, 100, 150, 200, 300, 500)
"""The values of k that are evaluated."""

TOLERANCE = 0.005
"""A score that is this much below the best is as good; scores are from 0 to 1."""

MIN_FLUENCY = 0.95
"""The least fluency of a size to choose, as a share of the plain model's."""

HeldOut = Mapping[int, Sequence[Row]]
"""k -> one row per task; 0 stands for the plain model."""


def held_out(
    asker: Asker,
    profiles: Sequence[Profile],
    selection: Selection,
    alpha: float,
    examples: int,
    seed: int,
    data: Path | None,
) -> dict[int, list[Row]]:
    """Scores the head sets of every k in `SIZES` on held-out examples.

    Args:
        asker: Asks the model.
        profiles: Each task's ranking.
        selection: How sets are made of the rankings, see `select`. Sizes at which a set is empty
            are left out.
        alpha: Scale factor.
        examples: Number of examples of each task.
        seed: Chooses the examples, see `sample`.
        data: Folder with public files, see `sample`.

    Returns:
        One row per task for each k; k = 0 is the plain model.
    """
    total = len(profiles[0].ranking)
    methods: dict[int, dict[str, Method]] = {0: {p.task.name: PLAIN for p in profiles}}
    for k in (size for size in SIZES if size <= total):
        sets = select(rankings(profiles), k, selection)
        if all(sets.values()):
            methods[k] = {
                p.task.name: steer(f"top {k}", sets.get(p.task.name) or sets[""], alpha)
                for p in profiles
            }
    rows: dict[int, list[Row]] = {k: [] for k in methods}
    for profile in profiles:
        task = profile.task
        chosen = sample(task, "held-out", examples, seed, data).examples
        # Different k may select the same heads.
        distinct = {method[task.name].key: method[task.name] for method in methods.values()}
        found = evaluate(asker, task, chosen, list(distinct.values()))
        by_key = {row.method.key: row for row in found}
        for k, method in methods.items():
            rows[k].append(by_key[method[task.name].key])
    return rows


def mean_score(rows: Sequence[Row]) -> float:
    """The mean of the tasks' scores, 0 to 1."""
    return fmean(row.score for row in rows)


def summary(rows: Sequence[Row]) -> dict[str, float]:
    """One size's mean score and every task's metrics, for a head set's provenance."""
    return {
        "score": round(mean_score(rows), 4),
        **{
            f"{row.task} {metric}": round(estimate.mean, 4)
            for row in rows
            for metric, estimate in row.metrics.items()
        },
    }


def choose(rows: HeldOut) -> int:
    """The best k of `held_out`, by `best_size`."""
    plain = {row.task: row for row in rows[0]}

    def fluency(of: Sequence[Row]) -> float:
        """The lowest fluency among the tasks, as a share of the plain model's."""
        return min(
            (
                row.metrics["fluency"].mean / plain[row.task].metrics["fluency"].mean
                for row in of
                if "fluency" in row.metrics and plain[row.task].metrics["fluency"].mean
            ),
            default=1.0,
        )

    sizes = [k for k in rows if k]
    return best_size({k: mean_score(rows[k]) for k in sizes}, {k: fluency(rows[k]) for k in sizes})


def best_size(scores: Mapping[int, float], fluencies: Mapping[int, float]) -> int:
    """The smallest k whose held-out score is within `TOLERANCE` of the best.

    If some k keep `MIN_FLUENCY` of the plain model's fluency, only these are considered.

    Args:
        scores: k -> held-out score, 0 to 1.
        fluencies: k -> fluency as a share of the plain model's; 1 for tasks without fluency.
    """
    fluent = [k for k in scores if fluencies[k] >= MIN_FLUENCY] or list(scores)
    best = max(scores[k] for k in fluent)
    return min(k for k in fluent if scores[k] >= best - TOLERANCE)
