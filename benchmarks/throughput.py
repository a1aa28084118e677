"""Times offline throughput with emphasis against plain vLLM: alternating runs, medians, ratios.

Two engines run side by side, one of them stopped (SIGSTOP) while the other is timed: stock vLLM
with the plugin switched off, and the same with it on. The program first checks that plain requests
get the same tokens on both. It needs only a model; see --help. On a GPU, take any model of the hub:
``--model Qwen/Qwen3-8B --workloads plain steered seka``.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from benchmarks.contestants import Contestant
from benchmarks.workloads import REFERENCE, SWEEPS, WORKLOADS, Model, Workload
from vllm_pasta.profiling.engine import FP32_NOTICE, cpu_dtype

MEMORY_UTILIZATION = 0.42 if torch.cuda.is_available() else 0.05
"""Share of the device's memory for each of the two engines."""


class Engine(Contestant):
    """A process that runs `throughput_engine`."""

    def __init__(self, name: str, options: argparse.Namespace) -> None:
        super().__init__(
            name,
            [sys.executable, "-m", "benchmarks.throughput_engine", json.dumps(vars(options))],
            options.kv_cache_gib,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        with self.killed_on_error():
            self.info = self._read()
        self.pause()

    def ask(self, **request: Any) -> dict[str, Any]:
        assert self.process.stdin is not None
        with self.turn():
            time.sleep(0.05)
            print(json.dumps(request), file=self.process.stdin, flush=True)
            return self._read()

    def _read(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("ANSWER "):
                answer: dict[str, Any] = json.loads(line[7:])
                return answer
        raise SystemExit(f"the {self.name} engine died: its last words stand above")


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Runs all chosen workloads on both engines; returns the results."""
    engines, model = [], Model.of(options.model)
    try:
        for name in ("vllm", "pasta"):
            say(f"starting {name} …")
            engines.append(Engine(name, options))
        plain, pasta = engines
        check_equal(model, plain, pasta)
        rows = []
        for key in options.workloads:
            rows.append(
                {"workload": key, **compare(WORKLOADS[key], model, plain, pasta, options.runs)}
            )
            say(format_row(WORKLOADS[key], rows[-1]))
        sweeps = {
            name: [
                {"x": x, **compare(workload, model, plain, pasta, options.sweep_runs)}
                for x, workload in progress(name, points)
            ]
            for name, points in (SWEEPS.items() if options.sweep_runs else ())
        }
        reference = {}
        if options.reference:
            reference = compare_reference(model, pasta, options)
        return {"rows": rows, "sweeps": sweeps, "reference": reference}
    finally:
        for engine in engines:
            engine.close()


def check_equal(model: Model, plain: Engine, pasta: Engine) -> None:
    """Checks that plain requests get the same tokens on both engines, and steered ones others."""
    short = Workload("check", 0, requests=8, prompt_tokens=256, output_tokens=32, steered=0)
    answers = [engine.ask(batch=short.batch(0, model)) for engine in (plain, pasta)]
    if answers[0]["tokens"] != answers[1]["tokens"]:
        raise SystemExit("plain requests got other tokens with the plugin than without")
    steered = Workload("check", 0, requests=8, prompt_tokens=256, output_tokens=32, heads=1.0)
    batch = steered.batch(0, model)
    if pasta.ask(batch=batch)["tokens"] == answers[1]["tokens"]:
        raise SystemExit("emphasis changed no token")
    say("checked: plain requests get the same tokens with and without the plugin")


def compare(
    workload: Workload, model: Model, plain: Engine, pasta: Engine, runs: int
) -> dict[str, Any]:
    """Times both engines, alternating; plain vLLM gets the same prompts without emphasis."""
    figures: dict[str, list[float]] = {"vllm": [], "pasta": []}
    memory = {}
    for i in range(runs + 1):  # the first run warms up
        batch = workload.batch(i, model)
        without = [{**request, "emphasis": None} for request in batch]
        order = [(plain, without), (pasta, batch)]
        for engine, requests in order if i % 2 else reversed(order):
            answer = engine.ask(batch=requests)
            memory[engine.name] = answer["peak_rss_mib"]
            if i == 0:
                continue
            if workload.measure == "latency":
                ours = [
                    s for s, r in zip(answer["seconds"], batch, strict=True) if not r["emphasis"]
                ]
                figures[engine.name].append(statistics.median(ours))
            else:
                tokens = sum(request["output_tokens"] for request in batch)
                figures[engine.name].append(tokens / max(answer["seconds"]))
    medians = {name: statistics.median(values) for name, values in figures.items()}
    ratio = medians["pasta"] / medians["vllm"]
    return {
        "what": workload.what,
        "unit": "s" if workload.measure == "latency" else "output tok/s",
        **{name: round(value, 3) for name, value in medians.items()},
        "ratio": round(1 / ratio if workload.measure == "latency" else ratio, 4),
        "target": workload.target,
        "spread": {name: [round(min(v), 3), round(max(v), 3)] for name, v in figures.items()},
        "peak_rss_mib": memory,
        "memory_ratio": round(memory["pasta"] / memory["vllm"], 4),
    }


def compare_reference(model: Model, pasta: Engine, options: argparse.Namespace) -> dict[str, Any]:
    """Times transformers on the same prompts, once after a warm-up, against vllm-pasta."""
    from benchmarks.reference import Reference

    reference = Reference(options.model, options.dtype, options.reference)
    rows = {}
    for name, workload in progress("reference", REFERENCE.items()):
        reference.run([{**r, "output_tokens": 2} for r in workload.batch(0, model)])
        batch = workload.batch(1, model)
        tokens = sum(request["output_tokens"] for request in batch)
        theirs = tokens / max(reference.run(batch)["seconds"])
        ours = tokens / statistics.median(
            max(pasta.ask(batch=batch)["seconds"]) for _ in range(options.runs)
        )
        rows[name] = {
            "what": workload.what, "reference": round(theirs, 2), "pasta": round(ours, 2),
            "ratio": round(ours / theirs, 2), "target": workload.target,
        }  # fmt: skip
        say(f"{workload.what}: reference {theirs:.1f}, vllm-pasta {ours:.1f} output tok/s")
    return rows


def progress(name: str, points: Iterable[Any]) -> Iterator[Any]:
    points = list(points)
    for i, point in enumerate(points):
        say(f"{name}: {i + 1} of {len(points)} …")
        yield point


def format_row(workload: Workload, row: dict[str, Any]) -> str:
    spread = row["spread"]
    return (
        f"| {workload.what} | {row['vllm']:.1f} ({spread['vllm'][0]:.1f}–{spread['vllm'][1]:.1f}) "
        f"| {row['pasta']:.1f} ({spread['pasta'][0]:.1f}–{spread['pasta'][1]:.1f}) "
        f"| **{row['ratio']:.3f}** | ≥ {row['target']:.2f} | {row['memory_ratio']:.3f} |"
    )


def hardware() -> dict[str, str]:
    if torch.cuda.is_available():
        return {"gpu": torch.cuda.get_device_name()}
    model = "unknown"
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                model = line.partition(":")[2].strip()
                break
    return {"cpu": model, "cores": str(len(os.sched_getaffinity(0))), "os": platform.system()}


def describe(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """The conditions of a run, for its readers: command, date, hardware, versions, model."""
    return {
        "command": f"python -m benchmarks.{name} " + " ".join(sys.argv[1:]),
        "date": time.strftime("%Y-%m-%d"),
        "hardware": hardware(),
        "versions": {n: version(n) for n in ("vllm-pasta", "vllm", "torch")},
        "model": Path(options.model).name,
        "dtype": options.dtype,
        "torch_compile": not getattr(options, "eager", False),
        "runs": options.runs,
    }


def default_dtype() -> str:
    """The dtype of engines whose user asks for none; says so if this CPU decides it."""
    if dtype := cpu_dtype():
        say(FP32_NOTICE)
    return dtype or "bfloat16"


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.throughput",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", help="folder or name; default: SmolLM2-135M from its package")
    parser.add_argument(
        "--workloads", nargs="*", choices=WORKLOADS, metavar="NAME",
        default=[name for name in WORKLOADS if name != "seka"],
        help=f"which of {', '.join(WORKLOADS)} (default: all but seka, which is for GPUs)",
    )  # fmt: skip
    parser.add_argument("--runs", type=int, default=5, help="timed runs of each (default: 5)")
    parser.add_argument(
        "--sweep-runs", type=int, default=0,
        help="also the plots' sweeps, with so many timed runs of each point (default: 0)",
    )  # fmt: skip
    parser.add_argument(
        "--reference", nargs="?", const="eager", choices=("eager", "xformers"),
        help="also against transformers with eager attention (10 minutes), or with xformers', "
        "which needs a GPU",
    )  # fmt: skip
    parser.add_argument("--dtype", help="default: bfloat16, or float32 on a CPU without AVX-512")
    parser.add_argument("--eager", action="store_true", help="without torch.compile")
    parser.add_argument("--kv-cache-gib", type=int, default=2, help="on a CPU (default: 2)")
    parser.add_argument(
        "--memory-utilization", type=float, default=MEMORY_UTILIZATION,
        help="of the device, for each of the two engines (%(default)s)",
    )  # fmt: skip
    parser.add_argument("--json", metavar="FILE", help="also write the results here")
    options = parser.parse_args()
    if options.model is None:
        from vllm_pasta.cli.smollm2 import model_path

        options.model = str(model_path())
    options.dtype = options.dtype or default_dtype()
    result = {**run(options), **describe("throughput", options)}
    print("| workload | plain vLLM | vllm-pasta | ratio | target | memory |")
    print("|---|---|---|---|---|---|")
    for row in result["rows"]:
        print(format_row(WORKLOADS[row["workload"]], row))
    if options.json:
        Path(options.json).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
