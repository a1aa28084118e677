"""From rankings, one per task, to head sets."""

from collections.abc import Mapping, Sequence
from typing import Literal

from vllm_pasta.errors import PastaError
from vllm_pasta.profiling.methods import Head

Selection = Literal["intersection", "union", "task"]

SIZES = (1, 2, 3, 5, 8, 12, 20, 30, 40, 50, 75, 100, 150, 200, 300, 500)
"""Values of k that ``--top-k auto`` tries."""


def select(
    rankings: Mapping[str, Sequence[Head]], k: int, selection: Selection
) -> dict[str, list[Head]]:
    """Head sets from each task's first ``k`` heads.

    Args:
        rankings: Task -> heads, best first.
        k: How many of each task's.
        selection: "intersection": heads that are among the first k of every task (the paper's);
            "union": of some task; "task": one set for each task.

    Returns:
        Head sets by the task's name; "" where there is one for all. Sets may be empty.
    """
    first = {task: list(heads[:k]) for task, heads in rankings.items()}
    if selection == "task":
        return {task: sorted(heads) for task, heads in first.items()}
    sets = [set(heads) for heads in first.values()]
    chosen = set.intersection(*sets) if selection == "intersection" else set.union(*sets)
    return {"": sorted(chosen)}


def check_not_empty(sets: Mapping[str, Sequence[Head]], k: int) -> None:
    """Checks that there is something to steer.

    Raises:
        PastaError: the tasks share none of their first k heads.
    """
    if not all(sets.values()):
        raise PastaError(
            f"no head is among the first {k} of every task: choose a larger --top-k, or "
            "--select union or task"
        )


def best_size(scores: Mapping[int, float], fluencies: Mapping[int, float]) -> int:
    """The k to take: the smallest whose held-out score is within 0.5 points of the best.

    Only those count whose fluency is at least 95 % of the plain model's, if there are any.

    Args:
        scores: k -> held-out score, 0 to 1.
        fluencies: k -> fluency as a share of the plain model's; 1 where there is none.
    """
    fluent = [k for k in scores if fluencies[k] >= 0.95] or list(scores)
    best = max(scores[k] for k in fluent)
    return min(k for k in fluent if scores[k] >= best - 0.005)
