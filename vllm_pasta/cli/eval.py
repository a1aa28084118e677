"""``vllm-pasta eval``: evaluates tasks × methods on one engine."""

import argparse
import json
from functools import partial
from pathlib import Path
from typing import Any

from vllm_pasta import tasks
from vllm_pasta.cli import options, smollm2, terminal
from vllm_pasta.cli.session import check_plugin, engine_session
from vllm_pasta.profiling import methods
from vllm_pasta.profiling.asker import Asker
from vllm_pasta.profiling.engine import describe, engine_options, every_head
from vllm_pasta.profiling.evaluation import Row, evaluate
from vllm_pasta.profiling.prompts import demonstrations
from vllm_pasta.profiling.report import pages, plots, tables
from vllm_pasta.profiling.store import Store
from vllm_pasta.tasks import sample

HELP = "how well a model follows emphasis: tasks × ways to emphasise"
DESCRIPTION = (
    "Asks the same examples in different ways: plain, with marks in the text, with demonstrations, "
    "with steered heads; and shows the scores of each way. Every answer is kept in a file, with "
    "which an interrupted run continues where it stopped."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of ``vllm-pasta eval``."""
    options.add_arguments(parser)
    parser.add_argument(
        "--methods", type=lambda text: text.split(","),
        default=["zero-shot", "starred", "quoted", "few-shot", "all", options.DEFAULT_HEADS],
        help=f"comma-separated: {methods.KNOWN}",
    )  # fmt: skip
    parser.add_argument(
        "--alpha", type=options.alphas,
        help="scale factors of methods that steer; comma-separated (a head set's own, else 0.01; "
        "none with --share)",
    )  # fmt: skip
    parser.add_argument(
        "--share", type=options.shares, default=[],
        help="evaluate methods that steer with these shares, too: what the emphasised part gets at "
        "least of a steered head's attention to the prompt; comma-separated",
    )  # fmt: skip
    parser.add_argument(
        "--head-counts", type=options.counts, default=[],
        help="beside a head set that a profile made, evaluate that many heads from the top of its "
        "rankings; comma-separated",
    )  # fmt: skip
    parser.add_argument(
        "--split", choices=("train", "held-out", "test"), default="test",
        help="which examples (%(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--generations", type=options.count, metavar="N",
        help="for tasks that are judged by log-probability: generate answers to N examples only, "
        "for their fluency (all)",
    )  # fmt: skip
    parser.add_argument(
        "--out", type=Path, default=Path("answers.jsonl"),
        help="file that keeps every answer (%(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--plots", type=Path, metavar="PNG", help="plot the scores by method, head count and alpha"
    )
    parser.add_argument(
        "--pareto", type=Path, metavar="PNG",
        help="plot how far the model obeys against how far it still does the rest of each task; "
        "the table then has both, and marks what no other method beats in both",
    )  # fmt: skip
    parser.add_argument(
        "--html", type=Path, metavar="FILE",
        help="write a page that needs no other file: the table, plots, and answers side by side",
    )  # fmt: skip
    shown = parser.add_mutually_exclusive_group()
    shown.add_argument("--markdown", action="store_true", help="print a Markdown table")
    shown.add_argument("--json", action="store_true", help="print everything as JSON")


def run(args: argparse.Namespace) -> int:
    """Evaluates: progress on stderr, the table on stdout."""
    chosen = [tasks.load(name) for name in args.tasks]
    cluster = options.ray(args)
    check_plugin()
    for option, file in (("--plots", args.plots), ("--pareto", args.pareto)):
        with options.named(option):
            if file:
                plots.pyplot()  # now, not after hours of answers
    model = args.model or str(smollm2.model_path())
    with options.named("--methods"):
        alphas = args.alpha or ([] if args.share else [None])
        asked = methods.parse_all(
            args.methods, alphas, args.head_counts, every_head(model), args.share
        )
    samples = {t.name: sample(t, args.split, args.examples, args.seed, args.data) for t in chosen}
    engine = engine_options(args.engine, args.eager)
    info = describe(args.model or smollm2.NAME, model, engine)
    store = Store(args.out, info)
    few_shot = any(method.shots for method in asked)
    shots = {task.name: demonstrations(task, args.data) for task in chosen if few_shot}
    rows: list[Row] = []
    with Asker(
        model, engine, store, partial(engine_session, "eval"), args.stop_after,
        lambda trial: shots[trial.task] if trial.method.shots else (), cluster,
    ) as asker:  # fmt: skip
        for task in chosen:
            found = samples[task.name].examples
            rows += evaluate(asker, task, found, asked, args.generations)
    if args.plots:
        plots.methods(args.plots, chosen, rows, info["model"])
    table = tables.cells(chosen, rows)
    if args.pareto:
        plots.pareto(args.pareto, chosen, rows, info["model"])
        table = tables.both(chosen, rows)
    if args.html:
        with options.named("--html"):
            pages.evaluation(args.html, info, chosen, rows, table, [
                pages.answers(store, task, samples[task.name].examples, asked) for task in chosen
            ])  # fmt: skip
    if args.json:
        data = {
            name: {"source": s.source, "digest": s.digest, "examples": len(s.examples)}
            for name, s in samples.items()
        }
        results: dict[str, Any] = {**info, "split": args.split, "seed": args.seed, "data": data}
        print(json.dumps({**results, "rows": tables.to_json(rows)}, indent=1, ensure_ascii=False))
    elif args.markdown:
        print(tables.markdown(table))
    else:
        terminal.print_table(table)
    return 0
