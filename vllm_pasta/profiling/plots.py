"""The paper's ablations as plots: which heads, how many, and α."""

import re
from collections.abc import Sequence
from pathlib import Path

from vllm_pasta.errors import PastaError
from vllm_pasta.profiling.evaluation import Row
from vllm_pasta.tasks import Task


def draw(path: Path, tasks: Sequence[Task], rows: Sequence[Row], model: str) -> None:
    """One line of plots per task: every method's score; score and fluency by heads, and by α.

    Raises:
        PastaError: matplotlib is not installed.
    """
    try:
        import matplotlib
    except ModuleNotFoundError as e:
        raise PastaError("--plots: needs matplotlib: pip install vllm-pasta[bench]") from e
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

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


def _curve(axis: object, label: str, points: list[tuple[float, Row]]) -> None:
    from matplotlib.axes import Axes

    assert isinstance(axis, Axes)
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
