"""``vllm-pasta profile``: finds the heads that make a model follow emphasis."""

import argparse
import re
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from vllm_pasta import tasks
from vllm_pasta.cli import options, smollm2
from vllm_pasta.cli.session import check_plugin, engine_session
from vllm_pasta.errors import PastaError
from vllm_pasta.profiling import report, search
from vllm_pasta.profiling.asker import Asker, describe, every_head, parse_options
from vllm_pasta.profiling.evaluation import Row, evaluate
from vllm_pasta.profiling.methods import PLAIN, Head, Method, head_set, steer
from vllm_pasta.profiling.ranking import Profile, Ranker
from vllm_pasta.profiling.selection import SIZES, best_size, check_not_empty, select
from vllm_pasta.profiling.store import Store
from vllm_pasta.request.heads import HeadSet
from vllm_pasta.tasks import sample

DESCRIPTION = (
    "Steers every head of a model by itself, all in one vLLM engine, ranks them by what they do "
    "for the tasks, and writes the best as a head set. Answers are kept beside it while they come: "
    "an interrupted run goes on where it was. Shards write their answers only; the same command "
    "without --shard puts them together."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of ``vllm-pasta profile``."""
    options.add_arguments(parser)
    parser.add_argument(
        "--alpha", type=options.alpha, default=0.01, help="scale factor (%(default)s)"
    )
    parser.add_argument(
        "--top-k", type=_top_k, default=50, metavar="K",
        help='heads of each task to select from, or "auto": by score on held-out examples '
        "(%(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--select", choices=("intersection", "union", "task"), default="intersection",
        help="heads among the first K of every task, of some task, or one set for each task "
        "(%(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--search", choices=("full", "halving", "gradient"), default="full",
        help=f"every head on every example, or cheaper: at most 1/{search.SAVING} of the requests "
        "(%(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--likelihood", action="store_true",
        help="rank by the log-probability of the ideal answer where a task's answers are generated:"
        " one forward pass instead of an answer",
    )  # fmt: skip
    parser.add_argument("--out", type=Path, default=Path("heads.json"), help="(%(default)s)")
    parser.add_argument(
        "--shard", type=_shard, metavar="I/N", help="ask about part I of N only, I from 0 on"
    )
    parser.add_argument(
        "--compare", type=Path, metavar="HEADS",
        help="another profile's head set: say how much of its ranking this one keeps",
    )  # fmt: skip


def run(args: argparse.Namespace) -> int:
    """Profiles: progress on stderr, the report on stdout."""
    chosen = [tasks.load(name) for name in args.tasks]
    if args.shard and args.search != "full":
        raise PastaError("--shard: only --search full can be split; the others are quick")
    check_plugin()
    samples = {t.name: sample(t, "train", args.examples, args.seed, args.data) for t in chosen}
    model = args.model or str(smollm2.model_path())
    engine = parse_options(args.engine, args.eager)
    run_info = describe(args.model or smollm2.NAME, model, engine)
    path, others = _answer_files(args.out, args.shard)
    store = Store(path, run_info, others)
    heads = every_head(model)
    with Asker(model, engine, store, partial(engine_session, "profile"), args.stop_after) as asker:
        rankers = {
            task.name: Ranker(asker, store, task, samples[task.name], args.alpha, args.likelihood)
            for task in chosen
        }
        if args.shard:
            part, parts = args.shard
            mine = [(head, i) for i in range(args.examples) if i % parts == part for head in heads]
            for ranker in rankers.values():
                ranker.score(mine)
            print(f"Shard {part}/{parts} is done: {path}")
            return 0
        profiles = [ranker.profile(heads, args.search, model) for ranker in rankers.values()]
        held_out = _held_out(asker, profiles, args) if args.top_k == "auto" else {}
    k = _chosen_size(held_out) if held_out else args.top_k
    sets = select(_rankings(profiles), k, args.select)
    check_not_empty(sets, k)
    info = {
        **run_info,
        "alpha": args.alpha,
        "search": args.search,
        "select": args.select,
        "top_k": k,
        "requests": sum(profile.requests for profile in profiles),
        "answers": len(store),
        "engine_seconds": round(store.seconds, 1),
        "gradient_seconds": round(sum(p.gradient_seconds for p in profiles), 1),
        "seed": args.seed,
        "split": "train",
        "profiles": {profile.task.name: report.as_json(profile) for profile in profiles},
        "held_out": {str(size): _summary(rows) for size, rows in held_out.items()},
    }
    for name, found in sets.items():
        out = args.out.with_stem(f"{args.out.stem}-{name}") if name else args.out
        HeadSet(head_set(found).layers, provenance=info).save(out)
    compared = _compare(args.compare, profiles, k) if args.compare else ""
    text = report.write(args.out, info, profiles, sets, held_out, compared)
    print(text)
    return 0


def _rankings(profiles: Sequence[Profile]) -> dict[str, list[Head]]:
    return {p.task.name: [ranked.head for ranked in p.ranking] for p in profiles}


def _held_out(asker: Asker, profiles: Sequence[Profile], args: Any) -> dict[int, list[Row]]:
    """Rows of every size on held-out examples, by k; 0 is the plain model's."""
    total = len(profiles[0].ranking)
    methods: dict[int, dict[str, Method]] = {0: {p.task.name: PLAIN for p in profiles}}
    for k in (size for size in SIZES if size <= total):
        sets = select(_rankings(profiles), k, args.select)
        if all(sets.values()):
            methods[k] = {
                p.task.name: steer(f"top {k}", sets.get(p.task.name) or sets[""], args.alpha)
                for p in profiles
            }
    rows: dict[int, list[Row]] = {k: [] for k in methods}
    for profile in profiles:
        task = profile.task
        examples = sample(task, "held-out", args.examples, args.seed, args.data).examples
        # Different k may select the same heads.
        of_task = {method[task.name].key: method[task.name] for method in methods.values()}
        found = evaluate(asker, task, examples, list(of_task.values()))
        by_key = {row.method.key: row for row in found}
        for k, method in methods.items():
            rows[k].append(by_key[method[task.name].key])
    return rows


def _summary(rows: Sequence[Row]) -> dict[str, Any]:
    return {
        "score": round(_mean_score(rows), 4),
        **{
            f"{row.task} {metric}": round(estimate.mean, 4)
            for row in rows
            for metric, estimate in row.metrics.items()
        },
    }


def _mean_score(rows: Sequence[Row]) -> float:
    return sum(row.score for row in rows) / len(rows)


def _chosen_size(held_out: Mapping[int, Sequence[Row]]) -> int:
    plain = {row.task: row for row in held_out[0]}

    def share(rows: Sequence[Row]) -> float:
        """The least fluency of all tasks, as a share of the plain model's."""
        return min(
            (
                row.metrics["fluency"].mean / plain[row.task].metrics["fluency"].mean
                for row in rows
                if "fluency" in row.metrics and plain[row.task].metrics["fluency"].mean
            ),
            default=1.0,
        )

    sizes = [k for k in held_out if k]
    return best_size(
        {k: _mean_score(held_out[k]) for k in sizes}, {k: share(held_out[k]) for k in sizes}
    )


def _compare(path: Path, profiles: Sequence[Profile], k: int) -> str:
    other = HeadSet.load(path).provenance.get("profiles", {})
    lines = []
    for profile in profiles:
        if profile.task.name not in other:
            raise PastaError(f"--compare: {path} has no ranking of {profile.task.name}")
        theirs = other[profile.task.name]["ranking"]
        lines.append(report.comparison(profile, theirs, k))
    return "\n".join(lines)


def _answer_files(out: Path, shard: tuple[int, int] | None) -> tuple[Path, list[Path]]:
    """This run's file of answers, and those of shards, which a run without --shard reads too."""
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
