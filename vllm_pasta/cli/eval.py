"""``vllm-pasta eval``: tasks × methods on one engine."""

import argparse
import json
from functools import partial
from pathlib import Path
from typing import Any

from vllm_pasta import tasks
from vllm_pasta.cli import options, smollm2
from vllm_pasta.cli.session import check_plugin, engine_session
from vllm_pasta.errors import PastaError
from vllm_pasta.profiling import methods, plots, tables
from vllm_pasta.profiling.asker import Asker, describe, every_head, parse_options
from vllm_pasta.profiling.evaluation import Row, evaluate
from vllm_pasta.profiling.methods import SHOTS, Head, Method
from vllm_pasta.profiling.store import Store
from vllm_pasta.tasks import Probe, Task, sample

DESCRIPTION = (
    "Asks the same examples in different ways: plain, with marks in the text, with demonstrations, "
    "with steered heads; and shows what each way scores. Every answer is kept in a file, by which "
    "an interrupted run goes on where it was."
)
DEFAULT_HEADS = "smollm2-135m-instruct"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of ``vllm-pasta eval``."""
    options.add_arguments(parser)
    parser.add_argument(
        "--methods", type=lambda text: text.split(","),
        default=["zero-shot", "starred", "quoted", "few-shot", "all", DEFAULT_HEADS],
        help=f"of {methods.KNOWN}; with commas",
    )  # fmt: skip
    parser.add_argument(
        "--alpha", type=options.alphas, default=[0.01],
        help="scale factors of methods that steer; with commas (0.01)",
    )  # fmt: skip
    parser.add_argument(
        "--head-counts", type=options.counts, default=[],
        help="beside a head set that a profile made: so many heads from the top of its rankings; "
        "with commas",
    )  # fmt: skip
    parser.add_argument(
        "--split", choices=("train", "held-out", "test"), default="test", help="(%(default)s)"
    )
    parser.add_argument(
        "--generations", type=options.count, metavar="N",
        help="for tasks that are judged by log-probability: generate for N examples only, for "
        "fluency (all)",
    )  # fmt: skip
    parser.add_argument(
        "--out", type=Path, default=Path("answers.jsonl"), help="every answer (%(default)s)"
    )
    parser.add_argument("--plots", type=Path, metavar="PNG", help="draw heads, counts and alphas")
    shown = parser.add_mutually_exclusive_group()
    shown.add_argument("--markdown", action="store_true", help="print a Markdown table")
    shown.add_argument("--json", action="store_true", help="print everything as JSON")


def run(args: argparse.Namespace) -> int:
    """Evaluates: progress on stderr, the table on stdout."""
    chosen = [tasks.load(name) for name in args.tasks]
    check_plugin()
    model = args.model or str(smollm2.model_path())
    every = every_head(model)
    ways = _methods(args, every)
    samples = {t.name: sample(t, args.split, args.examples, args.seed, args.data) for t in chosen}
    engine = parse_options(args.engine, args.eager)
    info = describe(args.model or smollm2.NAME, model, engine)
    store = Store(args.out, info)
    shots = _shots(chosen, args.data) if any(way.shots for way in ways) else {}
    rows: list[Row] = []
    with Asker(
        model, engine, store, partial(engine_session, "eval"), args.stop_after,
        lambda trial: shots[trial.task] if trial.method.shots else (),
    ) as asker:  # fmt: skip
        for task in chosen:
            found = samples[task.name].examples
            rows += evaluate(asker, task, found, ways, args.generations)
    if args.plots:
        plots.draw(args.plots, chosen, rows, info["model"])
    table = tables.cells(chosen, rows)
    if args.json:
        data = {
            name: {"source": s.source, "digest": s.digest, "examples": len(s.examples)}
            for name, s in samples.items()
        }
        results: dict[str, Any] = {**info, "split": args.split, "seed": args.seed, "data": data}
        print(json.dumps({**results, "rows": tables.as_json(rows)}, indent=1, ensure_ascii=False))
    else:
        print(tables.markdown(table) if args.markdown else tables.text(table))
    return 0


def _methods(args: argparse.Namespace, every: list[Head]) -> list[Method]:
    """All methods; those that steer once for each alpha."""
    found: dict[str, Method] = {}
    for text in args.methods:
        for alpha in args.alpha:
            method = methods.parse(text, alpha, every)
            ways = [method]
            if method.heads and args.head_counts and "profiles" in method.heads.provenance:
                ways += _by_count(method, args.head_counts)
            for way in ways:
                many = way.heads is not None and len(args.alpha) > 1
                name = f"{way.name} α={alpha:g}" if many else way.name
                found[name] = Method(name, way.mark, way.shots, way.heads, way.alpha)
    return list(found.values())


def _by_count(method: Method, counts: list[int]) -> list[Method]:
    """The first heads of a profile's ranking; of several tasks', they are taken in turns."""
    assert method.heads is not None
    rankings = [p["ranking"] for p in method.heads.provenance["profiles"].values()]
    order = list(dict.fromkeys(name for turn in zip(*rankings, strict=True) for name in turn))
    heads = [(int(layer), int(head)) for layer, _, head in (n.partition(".") for n in order)]
    if max(counts) > len(heads):
        raise PastaError(f"--head-counts: this model has {len(heads)} heads, got {max(counts)}")
    return [
        methods.steer(f"{method.name}: top {count}", heads[:count], method.alpha)
        for count in counts
    ]


def _shots(chosen: list[Task], data: Path | None) -> dict[str, list[Probe]]:
    """Demonstrations: always the same few of the train split."""
    return {task.name: _shots_of(task, data) for task in chosen}


def _shots_of(task: Task, data: Path | None) -> list[Probe]:
    probes = [
        task.ranking_probes(example)[0]
        for example in sample(task, "train", SHOTS, folder=data).examples
    ]
    # A public file without ideal answers: ours have them.
    return probes if all(probe.target for probe in probes) else _shots_of(task, None)
