"""Draws the plots of the results in benchmarks/results: ``python -m benchmarks.plots``."""

import json
from pathlib import Path
from typing import Any

from vllm_pasta.profiling.report.plots import pyplot

RESULTS = Path(__file__).parent / "results"


def main() -> None:
    result = json.loads((RESULTS / "throughput.json").read_text(encoding="utf-8"))
    draw_sweeps(result["sweeps"], subtitle(result))
    if result["reference"]:
        draw_reference(result, subtitle(result))


def subtitle(result: dict[str, Any]) -> str:
    device = result["hardware"].get("gpu") or f"{result['hardware']['cores']} cores"
    return (
        f"{result['model']}, {result['dtype']}, {device}, "
        f"vLLM {result['versions']['vllm']}, {result['date']}"
    )


def draw_sweeps(sweeps: dict[str, list[dict[str, Any]]], note: str) -> None:
    """Draws the throughput with emphasis as a share of plain vLLM's, against each size."""
    plt = pyplot()

    figure, axes = plt.subplots(1, len(sweeps), figsize=(3.2 * len(sweeps), 3.2), sharey=True)
    for axis, (name, points) in zip(axes, sweeps.items(), strict=True):
        axis.plot([p["x"] for p in points], [p["ratio"] for p in points], "o-", color="C0")
        axis.axhline(1.0, color="grey", linewidth=0.8)
        axis.set_xlabel(name)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("output throughput,\nemphasised / plain")
    axes[0].set_ylim(0.5, 1.1)
    figure.suptitle(f"Cost of emphasis on vLLM ({note})", fontsize=10)
    figure.tight_layout()
    figure.savefig(RESULTS / "overhead.png", dpi=120)


def draw_reference(result: dict[str, Any], note: str) -> None:
    """Draws the output tokens per second of vllm-pasta and of the reference implementation."""
    plt = pyplot()

    rows = list(result["reference"].values())
    figure, axis = plt.subplots(figsize=(6, 3))
    for shift, key, label in (
        (-0.2, "reference", "transformers, eager"),
        (0.2, "pasta", "vllm-pasta"),
    ):
        bars = axis.barh(
            [i + shift for i in range(len(rows))], [r[key] for r in rows], 0.38, label=label
        )
        axis.bar_label(bars, fmt="%.0f", padding=3, fontsize=8)
    axis.set_yticks(range(len(rows)), [row["what"] for row in rows])
    axis.set_xlabel("output tokens per second, all requests steered")
    axis.legend(loc="lower right", fontsize=8)
    figure.suptitle(note, fontsize=9)
    figure.tight_layout()
    figure.savefig(RESULTS / "reference.png", dpi=120)


if __name__ == "__main__":
    main()
