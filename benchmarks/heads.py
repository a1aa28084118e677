"""Plots score and fluency by number of heads, on held-out examples.

The figures are in the head sets that ``vllm-pasta profile --top-k auto`` writes.
"""

import argparse
from pathlib import Path

from vllm_pasta import HeadSet, tasks
from vllm_pasta.profiling.report.plots import pyplot


def draw(files: list[Path], out: Path) -> None:
    """Draws one plot per task: the metrics that it is judged by, and its fluency if it has one."""
    plt = pyplot()
    curves = []
    for file in files:
        provenance = HeadSet.load(file).provenance
        held_out = provenance.get("held_out")
        if not held_out:
            raise SystemExit(f"{file}: has no held-out scores: profile with --top-k auto")
        curves += [(tasks.load(name), held_out) for name in provenance["profiles"]]
    figure, axes = plt.subplots(1, len(curves), figsize=(3.8 * len(curves), 3.4), squeeze=False)
    for axis, (task, held_out) in zip(axes[0], curves, strict=True):
        at = [max(int(k), 0.7) for k in held_out]  # the plain model's stands at the left
        for metric in task.judged:
            scores = [100 * values[f"{task.name} {metric}"] for values in held_out.values()]
            axis.plot(at, scores, "o-", markersize=4, label=metric)
        axis.set_xscale("log")
        axis.set_xlabel("heads (leftmost: plain)")
        axis.set_ylabel("per cent")
        axis.set_ylim(-3, 103)
        axis.set_title(task.name)
        axis.legend(fontsize=8)
        if "fluency" in task.columns:
            fluency = [values[f"{task.name} fluency"] for values in held_out.values()]
            right = axis.twinx()
            right.plot(at, fluency, "^:", color="grey", markersize=4)
            right.set_ylabel("fluency", color="grey")
            right.set_ylim(0, 6)
    figure.tight_layout()
    figure.savefig(out, dpi=90)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.heads", description=__doc__)
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--out", type=Path, default=Path("heads-by-number.png"))
    options = parser.parse_args()
    draw(options.files, options.out)


if __name__ == "__main__":
    main()
