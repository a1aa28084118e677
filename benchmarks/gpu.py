"""Everything that a GPU is needed for, in ten minutes: checks, tests, benchmarks.

    python -m benchmarks.gpu OUT            # on a machine with a GPU, in the project's root
    python -m benchmarks.gpu OUT --dry-run  # on any machine, with a tiny model: the kernel
                                            # benchmark fails without a GPU, and the rest goes on

First `vllm-pasta verify` and `pytest -m cuda` run side by side (so that verify's throughput is no
measurement), then the kernel benchmark and the engine benchmark, one after the other. A step that
fails, or that takes longer than it may, does not stop the others. OUT gets a log of each step, its
results as JSON, and summary.json with exit statuses and times. The exit status is 0 if all steps
passed.

The interpreter needs vLLM with its compiled kernels, this project and pytest. Where FlashInfer,
numba or vLLM's MoE kernels are missing, the tests that need them are skipped and say so. Nothing is
downloaded, and all models are random ones, so a machine that reaches no package registry will do.

To send back: OUT as a whole. The figures of kernel_gpu.json and engine_gpu.json belong into
benchmarks/results/ and docs/performance.md, what ran into the table of docs/gpu.md.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

GRACE_S = 15
"""From the interrupt to the kill of a step that takes too long."""


@dataclass(frozen=True)
class Step:
    """A command.

    Attributes:
        name: Of its log.
        command: Arguments after the interpreter.
        limit_s: So long it may take.
        stdout: Where its results go, if it prints them.
    """

    name: str
    command: list[str]
    limit_s: float
    stdout: str | None = None


def phases(out: Path, dry: bool) -> list[list[Step]]:
    """Steps that run side by side, phase by phase."""
    verify = ["-m", "vllm_pasta.cli", "verify", "--json", "--logs", str(out / "verify-logs")]
    # addopts: pytest-timeout's marker may be unknown there, which is no reason to stop.
    tests = ["-m", "pytest", "-v", "-rs", "-p", "no:cacheprovider", "-o", "addopts=",
             "--continue-on-collection-errors", "tests/gpu", "--durations=10",
             f"--junitxml={out / 'tests.xml'}", "-m", "cuda"]  # fmt: skip
    engine = ["-m", "benchmarks.engine_gpu", "--json", str(out / "engine_gpu.json"), "--logs",
              str(out / "engine-logs")]  # fmt: skip
    kernel = ["-m", "benchmarks.kernel_gpu", "--json", str(out / "kernel_gpu.json")]
    if dry:
        return [
            [
                Step("verify", [*verify, "--shape", "tiny", "--runs", "1"], 600, "verify.json"),
                Step("tests", [*tests, "-k", "no and graphs"], 300),
            ],
            [Step("kernel", kernel, 60)],
            [Step("engine", [*engine, "--tiny", "--shape", "tiny", "--runs", "1"], 600)],
        ]
    return [
        [
            Step("verify", verify, 270, "verify.json"),
            Step("tests", [*tests, "-k", "not sanitizer"], 280),
        ],
        [Step("kernel", kernel, 100)],
        [Step("engine", [*engine, "--runs", "2"], 250)],
    ]


class Running:
    """A step under way, in a process group of its own.

    Args:
        step: What to run.
        out: Where its log goes.
        limit_s: So long it may take.
    """

    def __init__(self, step: Step, out: Path, limit_s: float) -> None:
        self.step, self._began = step, time.monotonic()
        self._deadline = self._began + limit_s
        with (
            (out / f"{step.name}.log").open("wb") as log,
            (out / step.stdout).open("wb") if step.stdout else log as stdout,
        ):
            self._process = subprocess.Popen(
                [sys.executable, *step.command], stdout=stdout, stderr=log, start_new_session=True
            )

    def result(self) -> dict[str, Any] | None:
        """Its exit status (None if it took too long) and seconds; None while it may go on."""
        status = self._process.poll()
        if status is None:
            if time.monotonic() < self._deadline:
                return None
            self.end()
        return {"status": status, "seconds": round(time.monotonic() - self._began, 1)}

    def end(self) -> None:
        """Interrupts it, so that it ends its engines; kills it where that does not help."""
        if self._process.poll() is not None:
            return
        self._process.send_signal(signal.SIGINT)
        try:
            self._process.wait(timeout=GRACE_S)
        except subprocess.TimeoutExpired:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()


def run(running: list[Running]) -> dict[str, dict[str, Any]]:
    """Waits for steps that run side by side; returns their results by name."""
    results: dict[str, dict[str, Any]] = {}
    try:
        while len(results) < len(running):
            time.sleep(0.2)
            for one in running:
                if one.step.name not in results and (result := one.result()) is not None:
                    results[one.step.name] = result
                    print(one.step.name, result, flush=True)
    finally:  # also where this program is interrupted
        for one in running:
            one.end()
    return results


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("out", type=Path, metavar="OUT", help="folder for results and logs")
    parser.add_argument(
        "--minutes", type=float, default=10, help="for everything (%(default)s; a dry run: 30)"
    )
    parser.add_argument("--dry-run", action="store_true", help="try the program without a GPU")
    args = parser.parse_args()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
    out = args.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + 60 * (30 if args.dry_run else args.minutes)
    summary: dict[str, Any] = {"date": time.strftime("%Y-%m-%d %H:%M:%S")}
    steps: dict[str, dict[str, Any]] = {}
    for phase in phases(out, args.dry_run):
        left = end - time.monotonic() - GRACE_S
        if left < 20:
            steps |= {step.name: {"status": None, "seconds": 0} for step in phase}
        else:
            steps |= run([Running(step, out, min(step.limit_s, left)) for step in phase])
        summary["steps"] = steps
        (out / "summary.json").write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
    return 0 if all(s["status"] == 0 for s in steps.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
