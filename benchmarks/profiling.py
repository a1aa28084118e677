"""Times the profiling of a generated task against the reference, on the same heads and examples.

The reference steers one head at a time: for each head, all examples are one batch on transformers
with eager attention, until the longest answer is done. vllm-pasta asks for all heads in one engine
run. Both generate greedily; times do not include loading the model. The share of equal answers
shows that both see the same prompts: in fp32 (`--dtype float32`) all agree, in bf16 most do.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from benchmarks.throughput import default_dtype, describe, say
from vllm_pasta.cli import smollm2
from vllm_pasta.profiling.asker import Asker, emphasis
from vllm_pasta.profiling.engine import engine_options, every_head
from vllm_pasta.profiling.methods import PLAIN, Head, Method, steer
from vllm_pasta.profiling.prompts import Prompter
from vllm_pasta.profiling.store import Store, Trial
from vllm_pasta.tasks import load, sample


def trials(options: argparse.Namespace, heads: list[Head]) -> dict[Head, list[Trial]]:
    """The questions about each head, in the order of the examples."""
    task = load(options.task)
    examples = sample(task, "train", options.examples).examples
    methods: dict[Head, Method] = {head: steer(str(head), [head], 0.01) for head in heads}
    return {
        head: [
            Trial(task.name, example, probe, method)
            for example in examples
            for probe in task.ranking_probes(example)
        ]
        for head, method in methods.items()
    }


def ours(options: argparse.Namespace, of: dict[Head, list[Trial]]) -> tuple[float, list[str]]:
    """Asks vllm-pasta: the seconds for all trials, and the answers to the first head's."""

    @contextmanager
    def session() -> Iterator[TextIO]:
        import sys

        yield sys.stderr

    engine = engine_options({"dtype": options.dtype}, eager=False)
    with (
        tempfile.TemporaryDirectory() as folder,
        Asker(options.model, engine, store := Store(Path(folder) / "a", {}), session) as asker,
    ):
        warm_up = [Trial("warm-up", t.example, t.probe, PLAIN) for t in next(iter(of.values()))[:8]]
        asker.ask(warm_up, "warm-up")
        before = store.seconds
        together = [trial for of_example in zip(*of.values(), strict=True) for trial in of_example]
        asker.ask(together, "ours")
        answers = asker.ask(next(iter(of.values())), "first head")
        return store.seconds - before, [answer.text for answer in answers]


def reference(options: argparse.Namespace, of: dict[Head, list[Trial]]) -> tuple[float, list[str]]:
    """Asks transformers: as `ours`."""
    from transformers import AutoTokenizer

    from benchmarks.reference import Reference

    tokenizer = AutoTokenizer.from_pretrained(options.model)
    prompter = Prompter(tokenizer)
    model = Reference(options.model, options.dtype)
    seconds, answers = 0.0, list[str]()
    for head, asked in of.items():
        began = time.perf_counter()
        batch = []
        for trial in asked:
            prompt = prompter.build(trial.probe, trial.method)
            fields = emphasis(prompt, trial.method)
            assert fields is not None
            batch.append(
                {"ids": prompt.ids, "output_tokens": trial.probe.max_tokens, **fields}
            )  # fmt: skip
        tokens = model.run(batch)["tokens"]
        seconds += time.perf_counter() - began
        say(f"reference, head {head}: {time.perf_counter() - began:.1f} s")
        if not answers:
            answers = [_until_end(tokenizer, row) for row in tokens]
    return seconds, answers


def _until_end(tokenizer: Any, tokens: list[int]) -> str:
    end = tokens.index(tokenizer.eos_token_id) if tokenizer.eos_token_id in tokens else len(tokens)
    return str(tokenizer.decode(tokens[:end], skip_special_tokens=True))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.profiling", description=__doc__)
    parser.add_argument("--model", default=None, help="default: SmolLM2-135M-Instruct")
    parser.add_argument("--task", default="json", help="(%(default)s)")
    parser.add_argument("--examples", type=int, default=100, help="(%(default)s)")
    parser.add_argument("--heads", type=int, default=12, help="timed by vllm-pasta (%(default)s)")
    parser.add_argument(
        "--reference-heads",
        type=int,
        default=2,
        help="heads to time the reference with (%(default)s)",
    )
    parser.add_argument("--dtype", help="default: bfloat16, or float32 on a CPU without AVX-512")
    parser.add_argument("--json", type=Path, help="write the result here")
    options = parser.parse_args()
    options.model = options.model or str(smollm2.model_path())
    options.dtype = options.dtype or default_dtype()
    options.runs = 1
    every = every_head(options.model)
    step = len(every) // options.heads
    of = trials(options, every[::step][: options.heads])
    few = dict(list(of.items())[: options.reference_heads])
    their_seconds, theirs = reference(options, few)
    our_seconds, mine = ours(options, of)
    same = sum(a == b for a, b in zip(mine, theirs, strict=True)) / len(mine)
    each, their_each = our_seconds / len(of), their_seconds / len(few)
    result = describe("profiling", options) | {
        "task": options.task,
        "examples": options.examples,
        "seconds_per_head": {"ours": round(each, 2), "reference": round(their_each, 2)},
        "heads_timed": {"ours": len(of), "reference": len(few)},
        "ratio": round(their_each / each, 2),
        "all_heads_minutes": {
            "ours": round(each * len(every) / 60, 1),
            "reference": round(their_each * len(every) / 60, 1),
        },
        "same_answers": round(same, 3),
    }
    print(json.dumps(result, indent=1))
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
