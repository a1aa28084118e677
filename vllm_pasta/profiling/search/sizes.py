"""How many heads to steer, and how strongly: each choice is tried on held-out examples.

What is best depends on two things at once: how far the model follows what is emphasised, and how
far it still does the rest of its task. `choose` says how they are weighed.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean

from vllm_pasta.profiling.asker import Asker
from vllm_pasta.profiling.evaluation import Row, evaluate
from vllm_pasta.profiling.methods import PLAIN, Head, Method, steer
from vllm_pasta.profiling.search.ranking import Profile, rankings
from vllm_pasta.profiling.search.selection import Selection, select
from vllm_pasta.tasks import Example, Task, sample

SIZES = (1, 2, 3, 5, 8, 12, 20, 30, 40, 50, 75, 100, 150, 200, 300, 500)
"""The values of k that are tried."""

TOLERANCE = 0.005
"""A score that is this much below the best is as good; scores are from 0 to 1."""

MIN_FLUENCY = 0.95
"""The least fluency of a choice, as a share of the plain model's."""

MIN_GAIN = 0.5
"""The least gain in obedience of a choice, as a share of the largest."""

Choice = tuple[int, float]
"""k, the number of heads from the top of each ranking; and the scale factor."""

PLAIN_CHOICE: Choice = (0, 1.0)

HeldOut = Mapping[Choice, Sequence[Row]]
"""One row per task for each choice; `PLAIN_CHOICE` stands for the plain model."""


def held_out(
    asker: Asker,
    profiles: Sequence[Profile],
    selection: Selection,
    alphas: Sequence[float],
    examples: int,
    seed: int,
    data: Path | None,
) -> dict[Choice, list[Row]]:
    """Scores the head sets of every k in `SIZES`, at every strength, on held-out examples.

    Args:
        asker: Asks the model.
        profiles: Each task's ranking.
        selection: How sets are made of the rankings, see `select`. Sizes at which a set is empty
            are left out.
        alphas: Scale factors.
        examples: Number of examples of each task.
        seed: Chooses the examples, see `sample`.
        data: Folder with public files, see `sample`.
    """
    total = len(profiles[0].ranking)
    chosen: dict[Choice, dict[str, Sequence[Head]]] = {}
    for k in (size for size in SIZES if size <= total):
        sets = select(rankings(profiles), k, selection)
        if all(sets.values()):
            of: dict[str, Sequence[Head]]
            of = {p.task.name: sets.get(p.task.name) or sets[""] for p in profiles}
            chosen |= {(k, alpha): of for alpha in alphas}
    samples = {p.task: sample(p.task, "held-out", examples, seed, data).examples for p in profiles}
    return score(asker, samples, chosen)


def score(
    asker: Asker,
    samples: Mapping[Task, Sequence[Example]],
    chosen: Mapping[Choice, Mapping[str, Sequence[Head]]],
    generations: int | None = None,
) -> dict[Choice, list[Row]]:
    """Scores head sets, and the plain model.

    Args:
        asker: Asks the model.
        samples: Each task's examples.
        chosen: The heads of each choice, by the task's name.
        generations: As `evaluate` takes it.

    Returns:
        One row per task for each choice, and for `PLAIN_CHOICE`.
    """
    rows: dict[Choice, list[Row]] = {PLAIN_CHOICE: [], **{choice: [] for choice in chosen}}
    for task, examples in samples.items():
        methods: dict[Choice, Method] = {PLAIN_CHOICE: PLAIN}
        for (k, alpha), heads in chosen.items():
            methods[k, alpha] = steer(f"top {k} α={alpha:g}", heads[task.name], alpha)
        # Different k may select the same heads.
        distinct = {method.key: method for method in methods.values()}
        found = evaluate(asker, task, examples, list(distinct.values()), generations)
        by_key = {row.method.key: row for row in found}
        for choice, method in methods.items():
            rows[choice].append(by_key[method.key])
    return rows


def mean_obedience(rows: Sequence[Row]) -> float:
    """The mean of the tasks' obedience, 0 to 1."""
    return fmean(row.obedience for row in rows)


def mean_retained(rows: Sequence[Row]) -> float | None:
    """The mean of what the tasks retain, 0 to 1; None if none of them can lose anything."""
    values = [row.retained for row in rows if row.retained is not None]
    return fmean(values) if values else None


def summary(rows: Sequence[Row]) -> dict[str, float]:
    """One choice's means and every task's metrics, for a head set's provenance."""
    retained = mean_retained(rows)
    return {
        "score": round(fmean(row.score for row in rows), 4),
        "obedience": round(mean_obedience(rows), 4),
        **({} if retained is None else {"retained": round(retained, 4)}),
        **{
            f"{row.task} {metric}": round(estimate.mean, 4)
            for row in rows
            for metric, estimate in row.metrics.items()
        },
    }


def choose(rows: HeldOut) -> Choice:
    """The best choice of `held_out`, by `best`."""
    plain = {row.task: row for row in rows[PLAIN_CHOICE]}

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

    choices = [choice for choice in rows if choice != PLAIN_CHOICE]
    return best(
        {c: mean_obedience(rows[c]) for c in rows},
        {c: mean_retained(rows[c]) for c in rows},
        {c: fluency(rows[c]) for c in choices},
    )


def best(
    obedience: Mapping[Choice, float],
    retained: Mapping[Choice, float | None],
    fluency: Mapping[Choice, float],
) -> Choice:
    """The choice that obeys and still does the task: the largest sum of both.

    Of choices whose sum is within `TOLERANCE` of the largest it is the one with the fewest heads,
    and of these the mildest. Considered are those that keep `MIN_FLUENCY` of the plain model's
    fluency, if any do; and of them those that have `MIN_GAIN` of the largest gain in obedience:
    whoever marks a part of a prompt wants it to matter.

    Args:
        obedience: Choice -> mean obedience, 0 to 1, that of `PLAIN_CHOICE` among them.
        retained: The same of what is retained; None where the tasks are nothing but obedience.
        fluency: Choice -> fluency as a share of the plain model's; 1 for tasks without fluency.
    """
    fluent = [c for c in fluency if fluency[c] >= MIN_FLUENCY] or list(fluency)
    plain = obedience[PLAIN_CHOICE]
    gain = max(obedience[c] for c in fluent) - plain
    obeying = [c for c in fluent if obedience[c] - plain >= MIN_GAIN * gain] or fluent
    sums = {c: obedience[c] + (retained[c] or 0.0) for c in obeying}
    largest = max(sums.values())
    return min((c for c in obeying if sums[c] >= largest - TOLERANCE), key=lambda c: (c[0], -c[1]))


def front(points: Mapping[str, tuple[float, float]]) -> list[str]:
    """The points that no other beats in one respect without losing in the other, by the first.

    Args:
        points: Name -> obedience and what is retained; more is better.
    """
    return sorted(
        (
            name
            for name, (x, y) in points.items()
            if not any((a >= x and b > y) or (a > x and b >= y) for a, b in points.values())
        ),
        key=lambda name: points[name],
    )
