"""From rankings, one per task, to head sets."""

from collections.abc import Mapping, Sequence
from typing import Literal

from vllm_pasta.errors import PastaError
from vllm_pasta.profiling.methods import Head

Selection = Literal["intersection", "union", "task"]


def select(
    rankings: Mapping[str, Sequence[Head]], k: int, selection: Selection
) -> dict[str, list[Head]]:
    """Head sets from each task's first ``k`` heads.

    Args:
        rankings: Task -> heads, best first.
        k: Number of heads to take from the top of each ranking.
        selection: "intersection": the heads that are among the first k of every task, as in the
            paper; "union": of at least one task; "task": one set for each task.

    Returns:
        Task -> heads; the key "" if there is one set for all tasks. A set may be empty.
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
            f"no head is among the first {k} of every task: choose a larger k, or the union of the "
            "tasks' heads, or a set for each task"
        )
