"""Plots: the effect of every head, and the paper's ablations (which heads, how many, and α)."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vllm_pasta.errors import PastaError
from vllm_pasta.profiling.evaluation import Row
from vllm_pasta.profiling.methods import Head
from vllm_pasta.profiling.search.ranking import Profile
from vllm_pasta.tasks import Task


def pyplot() -> Any:
    """``matplotlib.pyplot``, set to draw into files.

    Raises:
        PastaError: matplotlib is not installed.
    """
    try:
        import matplotlib
    except ModuleNotFoundError as e:
        raise PastaError("matplotlib is not installed: pip install vllm-pasta[bench]") from e
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    return plt


def methods(path: Path, tasks: Sequence[Task], rows: Sequence[Row], model: str) -> None:
    """Draws three plots per task: every method's score, score by number of heads, score by α.

    The last two show fluency too, if the task has it.

    Raises:
        PastaError: matplotlib is not installed.
    """
    plt = pyplot()
    figure, axes = plt.subplots(len(tasks), 3, figsize=(14, 4 * len(tasks)), squeeze=False)
    for task, (bars, sizes, alphas) in zip(tasks, axes, strict=True):
        of = [row for row in rows if row.task == task.name]
        bars.barh([row.method.name for row in of], [100 * row.score for row in of])
        bars.invert_yaxis()
        bars.set_xlabel(f"{task.name}: mean of {', '.join(task.judged)} (%)")
        counted = [r for r in of if re.search(r": top \d+", r.method.name) and r.method.heads]
        _curve(sizes, "number of heads", [(len(r.method.heads or ()), r) for r in counted])
        swept = [r for r in of if "α=" in r.method.name and r not in counted]
        _curve(alphas, "α", [(r.method.alpha, r) for r in swept])
        if swept:
            alphas.set_xscale("log")
    figure.suptitle(model)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def pareto(path: Path, tasks: Sequence[Task], rows: Sequence[Row], model: str) -> None:
    """Draws one plot per task: what is retained against obedience, one point for each method.

    Methods that differ in their strength or number of heads alone are joined by a line. Tasks that
    are nothing but obedience are left out.

    Raises:
        PastaError: matplotlib is not installed; or no task has anything to retain.
    """
    plt = pyplot()
    shown = [task for task in tasks if task.retained]
    if not shown:
        raise PastaError("none of the tasks has anything to retain: nothing to draw")
    figure, axes = plt.subplots(1, len(shown), figsize=(5.5 * len(shown), 5), squeeze=False)
    for task, axis in zip(shown, axes[0], strict=True):
        families: dict[str, list[Row]] = {}
        for row in rows:
            if row.task == task.name and row.retained is not None:
                family = re.sub(r"(: top \d+)?( α=\S+)?$", "", row.method.name)
                families.setdefault(family, []).append(row)
        for family, of in families.items():
            x, y = ([100 * value for value in values] for values in _both(of))
            axis.plot(x, y, "o-" if len(of) > 1 else "s", label=Path(family).stem)
            for row, at_x, at_y in zip(of, x, y, strict=True):
                label = row.method.name.removeprefix(family).strip(": ")
                axis.annotate(label, (at_x, at_y), fontsize=7, xytext=(3, 3),
                              textcoords="offset points")  # fmt: skip
        axis.set_xlabel(f"obeys: {', '.join(task.obedience)} (%)")
        axis.set_ylabel(f"retains: {', '.join(task.retained)} (%)")
        axis.set_xlim(-3, 103)
        axis.set_ylim(-3, 103)
        axis.set_title(task.name)
        axis.legend(fontsize=8)
    figure.suptitle(model)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _both(rows: Sequence[Row]) -> tuple[list[float], list[float]]:
    return [row.obedience for row in rows], [row.retained or 0.0 for row in rows]


def _curve(axis: Any, label: str, points: list[tuple[float, Row]]) -> None:
    axis.set_xlabel(label)
    if not points:
        axis.text(0.5, 0.5, "not measured", ha="center", transform=axis.transAxes)
        return
    points = sorted(points, key=lambda point: point[0])
    at = [x for x, _ in points]
    axis.plot(at, [100 * row.score for _, row in points], "o-")
    axis.set_ylabel("score (%)", color="C0")
    if all("fluency" in row.metrics for _, row in points):
        second = axis.twinx()
        second.plot(at, [row.metrics["fluency"].mean for _, row in points], "s--", color="C1")
        second.set_ylabel("fluency", color="C1")
        second.set_ylim(bottom=0)


def by_layer(changes: Mapping[Head, float]) -> tuple[list[int], list[list[float]]]:
    """The layers that have heads, in order, and for each its heads' values."""
    layers = sorted({layer for layer, _ in changes})
    heads = sorted({head for _, head in changes})
    return layers, [[changes[layer, head] for head in heads] for layer in layers]


def heat_map(path: Path, profiles: Sequence[Profile], info: Mapping[str, Any]) -> None:
    """Draws layer × head for each task: how steering that head alone changes its objective.

    Heads that the model was not asked about show the gradient's estimate.

    Raises:
        PastaError: matplotlib is not installed.
    """
    plt = pyplot()
    figure, axes = plt.subplots(
        1, len(profiles), figsize=(1 + 3.2 * len(profiles), 6), squeeze=False
    )
    for axis, profile in zip(axes[0], profiles, strict=True):
        changes = {
            r.head: (r.estimate or 0.0) if r.score is None else r.score - profile.plain
            for r in profile.ranking
        }
        layers, grid = by_layer(changes)
        limit = max(abs(value) for value in changes.values()) or 1.0
        image = axis.imshow(grid, cmap="RdBu_r", vmin=-limit, vmax=limit, aspect="auto")
        axis.set_title(f"{profile.task.name}: change of {profile.objective}", fontsize=9)
        axis.set_xlabel("query head")
        axis.set_xticks(range(len(grid[0])))
        axis.set_ylabel("layer")
        if len(layers) <= layers[-1]:  # a hybrid model: others have no heads
            axis.set_yticks(range(len(layers)), list(map(str, layers)))
        figure.colorbar(image, ax=axis, shrink=0.8)
    figure.suptitle(f"{info['model']}, one head steered at a time, α {info['alpha']:g}", fontsize=9)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)
