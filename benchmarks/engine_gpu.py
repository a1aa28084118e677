"""Times whole engines on a GPU: vLLM without the plugin, idle and steered, taking turns.

The engines have a public model's shape and random weights, so times are real and texts are not.
Both are on one card, each with a KV cache of fixed size. Results are written after each workload.

    python -m benchmarks.engine_gpu --json engine_gpu.json
"""

import argparse
import json
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from vllm_pasta.verify.models import SHAPES, save_shape
from vllm_pasta.verify.run import Machine, versions
from vllm_pasta.verify.throughput import Pair, Row, Workload

BATCH = Workload("10 % of heads, 30 % of layers", 128, 512, 128)
WORKLOADS = {
    "steered": BATCH,
    "spread": replace(BATCH, name="10 % of heads, all layers", layers=1.0),
    "all": replace(BATCH, name="all heads", heads=1.0, layers=1.0),
    "distinct": replace(BATCH, name="every request other heads, spans", is_distinct=True),
    "seka": Workload("10 prompts of 3,000 tokens", 10, 3000, 60, emphasised_tokens=200),
    "long": Workload("8 prompts of 16,000 tokens", 8, 16000, 64, emphasised_tokens=256),
    "single": replace(BATCH, name="one request", requests=1),
}
TARGETS = {
    "steered": 0.99, "spread": 0.985, "all": 0.96, "distinct": 0.985, "seka": 0.995,
    "long": 0.997, "single": 0.985,
}  # fmt: skip
"""Least plain / steered time; `IDLE_TARGET` is the least plain / idle time."""
IDLE_TARGET = 0.998


def tiny(workload: Workload) -> Workload:
    """The same with few and short requests, to try the program."""
    return replace(
        workload,
        requests=min(workload.requests, 4),
        prompt_tokens=min(workload.prompt_tokens, 64),
        new_tokens=4,
        emphasised_tokens=min(workload.emphasised_tokens, 16),
    )


def line(key: str, row: Row) -> str:
    """A row of the table."""
    workload = row.workload
    extra_ms = 1e3 * (row.median("steered") - row.median("plain"))
    return (
        f"| {workload.requests} × ({workload.prompt_tokens} + {workload.new_tokens}), "
        f"{workload.emphasised_tokens} emphasised: {workload.name} "
        f"| {row.median('plain'):.3f} s | {row.ratio('idle'):.4f} (≥ {IDLE_TARGET}) "
        f"| {row.ratio('steered'):.4f} (≥ {TARGETS[key]}) | {extra_ms:.0f} ms |"
    )


def run(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Starts both engines and runs the workloads."""
    machine = Machine.here()
    chosen = {key: WORKLOADS[key] for key in args.workloads}
    if args.tiny:
        chosen = {key: tiny(workload) for key, workload in chosen.items()}
    model = save_shape(args.shape, folder / args.shape)
    dtype = "bfloat16" if machine.has_fast_bf16 else "float32"
    options = {"dtype": dtype, "load_format": "dummy", "enforce_eager": not machine.is_gpu}
    result: dict[str, Any] = {
        "device": machine.device, "versions": versions(), "date": time.strftime("%Y-%m-%d"),
        "model": f"{args.shape}'s shape, random weights", "runs": args.runs,
    }  # fmt: skip
    began = time.perf_counter()
    logs = args.logs or folder
    logs.mkdir(parents=True, exist_ok=True)
    pair = Pair(model, logs, list(chosen.values()), options, 0.3 if machine.is_gpu else 0.05)
    try:
        result["engines"] = pair.start()
        result["start_s"] = round(time.perf_counter() - began, 1)
        result["rows"] = {}
        print("| workload | plain | plain / idle | plain / steered | extra time |", flush=True)
        print("|---|---:|---:|---:|---:|", flush=True)
        for key, workload in chosen.items():
            row = pair.run(workload, args.runs, lambda: None)
            result["rows"][key] = row.to_json()
            print(line(key, row), flush=True)
            if args.json:
                args.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    finally:
        pair.close()
    return result


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=SHAPES, default="qwen3-8b", help="(%(default)s)")
    parser.add_argument(
        "--workloads", nargs="*", choices=WORKLOADS, default=list(WORKLOADS), metavar="NAME",
        help=f"which of {', '.join(WORKLOADS)} (default: all)",
    )  # fmt: skip
    parser.add_argument("--runs", type=int, default=3, help="timed runs of each kind (%(default)s)")
    parser.add_argument("--tiny", action="store_true", help="few and short requests, for a trial")
    parser.add_argument("--logs", type=Path, metavar="FOLDER", help="keep the engines' logs there")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results there")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="engine-gpu-") as folder:
        run(args, Path(folder))


if __name__ == "__main__":
    main()
