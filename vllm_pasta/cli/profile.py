"""``vllm-pasta profile``: finds the heads that make a model follow emphasis."""

import argparse
import re
import sys
from functools import partial
from pathlib import Path

from vllm_pasta import tasks
from vllm_pasta.cli import options, smollm2
from vllm_pasta.cli.session import check_plugin, engine_session
from vllm_pasta.errors import PastaError
from vllm_pasta.profiling import auto as auto_search
from vllm_pasta.profiling.asker import Asker
from vllm_pasta.profiling.engine import describe, engine_options, every_head
from vllm_pasta.profiling.methods import head_set
from vllm_pasta.profiling.report import markdown
from vllm_pasta.profiling.search import sizes, strategies
from vllm_pasta.profiling.search.ranking import Ranker, estimate_together, rankings
from vllm_pasta.profiling.search.selection import check_not_empty, select
from vllm_pasta.profiling.store import Store
from vllm_pasta.request.head_sets import auto
from vllm_pasta.request.heads import HeadSet
from vllm_pasta.tasks import sample

HELP = "find the heads to steer"
DESCRIPTION = (
    "Steers every head of a model by itself, all in one vLLM engine, ranks the heads by how much "
    "they help the tasks, and writes the best as a head set. Answers are kept beside it as they "
    "come: an interrupted run continues where it stopped. Shards only write their answers; the "
    "same command without --shard puts them together."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of ``vllm-pasta profile``."""
    options.add_arguments(parser)
    parser.add_argument(
        "--auto", action="store_true",
        help="find what a server with --pasta-heads auto serves, and keep it in the cache folder "
        "for that server; or show it, if it was found before. No other option but --engine counts",
    )  # fmt: skip
    parser.add_argument(
        "--alpha", type=options.alphas, default=[0.01],
        help="scale factor (0.01); with --top-k auto several, comma-separated: heads are ranked "
        "with the first, and the best is chosen",
    )  # fmt: skip
    parser.add_argument(
        "--top-k", type=_top_k, default=50, metavar="K",
        help="number of heads to select from the top of each task's ranking, or \"auto\": the "
        "number that obeys most and still does the task, on held-out examples (%(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--select", choices=("intersection", "union", "task"), default="intersection",
        help="take the heads among the first K of every task, or of at least one task, or make one "
        "set for each task (%(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--search", choices=("full", "halving", "gradient"), default="full",
        help=f"full asks about every head on every example; the others make at most "
        f"1/{strategies.SAVING} of its requests (%(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--likelihood", action="store_true",
        help="for tasks whose answers are generated: rank by the ideal answer's log-probability, "
        "which takes one forward pass instead of an answer",
    )  # fmt: skip
    parser.add_argument(
        "--out", type=Path, default=Path("heads.json"),
        help="the head set; the report and the answers are written beside it (%(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--shard", type=_shard, metavar="I/N", help="ask about part I of N only; I counts from 0"
    )
    parser.add_argument(
        "--compare", type=Path, metavar="HEADS",
        help="another profile's head set: report how much of its ranking this one keeps",
    )  # fmt: skip


def run(args: argparse.Namespace) -> int:
    """Profiles: progress on stderr, the report on stdout."""
    if args.auto:
        return _auto(args)
    chosen = [tasks.load(name) for name in args.tasks]
    if len(args.alpha) > 1 and args.top_k != "auto":
        raise PastaError("--alpha: several are for --top-k auto, which chooses one")
    if args.shard and args.search != "full":
        raise PastaError("--shard: only --search full can be split; the others are quick")
    cluster = options.ray(args)
    check_plugin()
    samples = {t.name: sample(t, "train", args.examples, args.seed, args.data) for t in chosen}
    model = args.model or str(smollm2.model_path())
    engine = engine_options(args.engine, args.eager)
    run_info = describe(args.model or smollm2.NAME, model, engine)
    path, others = _answer_files(args.out, args.shard)
    store = Store(path, run_info, others)
    heads = every_head(model)
    ranked_with = args.alpha[0]
    with Asker(
        model, engine, store, partial(engine_session, "profile"), args.stop_after,
        ray=cluster,
    ) as asker:  # fmt: skip
        rankers = {
            task.name: Ranker(asker, store, task, samples[task.name], ranked_with, args.likelihood)
            for task in chosen
        }
        if args.shard:
            part, parts = args.shard
            mine = [(head, i) for i in range(args.examples) if i % parts == part for head in heads]
            for ranker in rankers.values():
                ranker.score(mine)
            print(f"Shard {part}/{parts} is done: {path}")
            return 0
        if args.search == "gradient":
            estimate_together(list(rankers.values()), model)
        profiles = [ranker.profile(heads, args.search, model) for ranker in rankers.values()]
        held_out: sizes.HeldOut = {}
        if args.top_k == "auto":
            held_out = sizes.held_out(
                asker, profiles, args.select, args.alpha, args.examples, args.seed, args.data
            )
    k, alpha = sizes.choose(held_out) if held_out else (args.top_k, ranked_with)
    sets = select(rankings(profiles), k, args.select)
    with options.named("--top-k, --select"):
        check_not_empty(sets, k)
    info = {
        **run_info,
        "alpha": alpha,
        **({"ranked_with_alpha": ranked_with} if alpha != ranked_with else {}),
        "search": args.search,
        "select": args.select,
        "top_k": k,
        "requests": sum(profile.requests for profile in profiles),
        "answers": len(store),
        "engine_seconds": round(store.seconds, 1),
        "gradient_seconds": round(sum(p.gradient_seconds for p in profiles), 1),
        "seed": args.seed,
        "split": "train",
        "profiles": {profile.task.name: markdown.to_json(profile) for profile in profiles},
        "held_out": {
            f"{size} α={factor:g}" if size and len(args.alpha) > 1 else str(size): sizes.summary(
                rows
            )
            for (size, factor), rows in held_out.items()
        },
    }
    for name, found in sets.items():
        out = args.out.with_stem(f"{args.out.stem}-{name}") if name else args.out
        HeadSet(head_set(found).layers, provenance=info).save(out)
    compared = ""
    if args.compare:
        with options.named("--compare"):
            compared = markdown.compare(profiles, HeadSet.load(args.compare), k)
    print(markdown.write(args.out, info, profiles, sets, held_out, compared))
    return 0


def _auto(args: argparse.Namespace) -> int:
    """Finds heads for any use, unless they are kept already, and shows them."""
    check_plugin()
    model = args.model or str(smollm2.model_path())
    revision = args.engine.get("revision")
    if auto.digest(model, revision) is None:
        from transformers import AutoConfig

        try:  # loads the configuration, by which the model is known
            AutoConfig.from_pretrained(model, revision=revision)
        except (OSError, ValueError) as e:
            raise PastaError(f"{model}: no model there: {str(e).splitlines()[0]}") from e
    path = auto.path(model, revision)
    if path is None:
        raise PastaError(f"{model}: expected a folder, or the name of a model of the hub")

    def say(text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    found = auto.load(model, revision)
    if found is None:
        with auto.alone(path, lambda: say("Another process finds heads for this model: waiting.")):
            found = auto.load(model, revision)  # whoever had the lock may have found them
            if found is None:
                say(f"Finding heads for {model}. This is done once; they are kept in {path}")
                found = auto_search.find(
                    args.model or smollm2.NAME, model, args.engine,
                    partial(engine_session, "profile"), sys.stderr,
                )  # fmt: skip
                found.save(path)
    print(markdown.describe(found, path))
    return 0


def _answer_files(out: Path, shard: tuple[int, int] | None) -> tuple[Path, list[Path]]:
    """This run's file of answers, and the shards' files, which a run without --shard reads too."""
    if shard:
        return out.with_suffix(f".answers.{shard[0]}-of-{shard[1]}.jsonl"), []
    return out.with_suffix(".answers.jsonl"), sorted(
        out.parent.glob(f"{out.stem}.answers.*-of-*.jsonl")
    )


def _top_k(text: str) -> int | str:
    return text if text == "auto" else options.count(text)


def _shard(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if not match or int(match[1]) >= int(match[2]):
        raise argparse.ArgumentTypeError(f"expected I/N with I from 0 to N - 1, got {text!r}")
    return int(match[1]), int(match[2])
