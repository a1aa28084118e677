"""Runs every benchmark: ``python -m benchmarks``. Each also runs alone, see its ``--help``."""

import argparse
import subprocess
import sys
from pathlib import Path

import torch

RESULTS = Path(__file__).parent / "results"
KERNEL = (
    ["benchmarks.kernel_gpu"]
    if torch.cuda.is_available()
    else ["benchmarks.kernel", "--layers", "30"]
)
FULL = (
    KERNEL,
    ["benchmarks.throughput", "--runs", "5", "--sweep-runs", "2", "--reference"],
    ["benchmarks.serving", "--runs", "3"],
    ["benchmarks.profiling"],
)
SHORT = (["benchmarks.throughput", "--workloads", "plain", "steered", "--runs", "2"],)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument(
        "--short", action="store_true", help="a few minutes, for development; writes no results"
    )
    short = parser.parse_args().short
    RESULTS.mkdir(exist_ok=True)
    for command in SHORT if short else FULL:
        name = command[0].split(".")[-1]
        result = [] if short else ["--json", str(RESULTS / f"{name}.json")]
        print(f"== python -m {' '.join(command)}", flush=True)
        subprocess.run([sys.executable, "-m", *command, *result], check=True)
    if not short:
        subprocess.run([sys.executable, "-m", "benchmarks.plots"], check=True)


if __name__ == "__main__":
    main()
