"""``vllm-pasta verify``: is emphasis exact on this machine, and how fast?"""

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from vllm_pasta.cli import terminal
from vllm_pasta.cli.options import count
from vllm_pasta.cli.session import check_plugin

HELP = "check this machine: exactness against an independent implementation, and throughput"
DESCRIPTION = (
    "Starts vLLM engines, holds steered and plain requests against an independent implementation "
    "of PASTA on transformers, and times plain vLLM against vLLM with emphasis. Without a MODEL a "
    "small random one is made. Exits with 0 if everything holds, else with 1."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of ``vllm-pasta verify``."""
    parser.add_argument("model", nargs="?", help="a model for vLLM (default: a small random one)")
    parser.add_argument(
        "--shape", metavar="NAME",
        help="measure the throughput of this shape with random weights: qwen3-8b, llama-3.1-8b, "
        "qwen3-0.6b, smollm2-135m, tiny (default: MODEL's, else qwen3-0.6b on a GPU and "
        "smollm2-135m on a CPU)",
    )  # fmt: skip
    parser.add_argument(
        "--only", choices=("exactness", "throughput"), help="check this alone (default: both)"
    )
    parser.add_argument(
        "--runs", type=count, default=3, help="timed runs of each kind (%(default)s)"
    )
    parser.add_argument(
        "--logs", type=Path, metavar="FOLDER", help="keep the engines' logs here (default: removed)"
    )
    parser.add_argument("--json", action="store_true", help="print the results as JSON")


def run(args: argparse.Namespace) -> int:
    """Checks: progress on stderr, results on stdout."""
    check_plugin()
    from vllm_pasta.verify.models import SHAPES
    from vllm_pasta.verify.run import Options, verify

    if args.shape is not None and args.shape not in SHAPES:
        print(f"vllm-pasta: --shape: expected one of {', '.join(SHAPES)}", file=sys.stderr)
        return 2
    options = Options(
        args.model, args.shape, args.only != "throughput", args.only != "exactness", args.runs
    )
    with tempfile.TemporaryDirectory(prefix="vllm-pasta-verify-") as made:
        folder = args.logs or Path(made)
        folder.mkdir(parents=True, exist_ok=True)
        console = terminal.console(sys.stderr)
        with Progress(
            BarColumn(20),
            TimeElapsedColumn(),
            TextColumn("{task.description}", markup=False),
            console=console,
        ) as bar:
            task = bar.add_task("starting", total=1.0)

            def progress(what: str, share: float) -> None:
                bar.update(task, description=what, completed=share)
                if not console.is_terminal:
                    console.print(what, soft_wrap=True)

            report = verify(options, folder, progress)
    if args.json:
        print(json.dumps(report.to_json(), indent=1, ensure_ascii=False))
    else:
        show(report.to_json())
    return 0 if report.is_ok else 1


def show(report: dict[str, Any]) -> None:
    """Prints a report, as `verify.run.Report.to_json` has it, for people."""
    out = terminal.console(sys.stdout)
    out.print(report["device"])
    out.print(", ".join(f"{name} {number}" for name, number in report["versions"].items()))
    for note in report["notes"]:
        out.print(note)
    engines = [("engine", "runner", "backend", "dtype", "graphs", "torch.compile", "start")]
    for name, about in report["engines"].items():
        backends, start = ", ".join(about["backends"]) or "-", f"{about['start_s']:.0f} s"
        engines.append(
            (name, about["runner"], backends, about["dtype"], about["graphs"], about["compile"],
             start)
        )  # fmt: skip
    out.print()
    out.print(terminal.table(engines))
    out.print()
    checks = Table(box=None, pad_edge=False, show_header=False)
    checks.add_column()
    checks.add_column(no_wrap=True)
    checks.add_column(overflow="fold")
    for check in report["checks"]:
        checks.add_row("✓" if check["is_ok"] else "✗", check["name"], check["detail"])
    out.print(checks)
    for row in report["throughput"]:
        workload = row["workload"]
        out.print(
            f"\n{workload['requests']} requests of {workload['prompt_tokens']} + "
            f"{workload['new_tokens']} tokens, {workload['emphasised_tokens']} emphasised, "
            f"{workload['name']}; medians of {len(row['seconds']['plain'])} runs"
        )
        times = [("", "output tok/s", "seconds", "plain / this")]
        tokens = workload["requests"] * workload["new_tokens"]
        for kind, seconds in row["seconds"].items():
            median = statistics.median(seconds)
            ratio = "" if kind == "plain" else f"{row[f'ratio_{kind}']:.3f}"
            times.append((kind, f"{tokens / median:.1f}", f"{median:.3f}", ratio))
        out.print(terminal.table(times))
    out.print(f"\n{'everything holds' if report['ok'] else 'NOT everything holds'}")
