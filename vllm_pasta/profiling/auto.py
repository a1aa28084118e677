"""Finds heads for a model that nobody profiled: what ``"heads": "auto"`` serves.

One set for all uses, found in minutes. Gradients rank the heads on the built-in examples of several
tasks at once, and vLLM tries some numbers of heads and strengths on others. `vllm-pasta profile`
asks much more about a task of one's own.
"""

import gc
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from statistics import fmean
from typing import Any, TextIO

from vllm_pasta.profiling.asker import Asker
from vllm_pasta.profiling.engine import describe, engine_options, every_head
from vllm_pasta.profiling.evaluation import Row
from vllm_pasta.profiling.methods import PLAIN, Head, head_name, head_set
from vllm_pasta.profiling.prompts import Prompter
from vllm_pasta.profiling.search import sizes
from vllm_pasta.profiling.store import Store
from vllm_pasta.request.heads import HeadSet
from vllm_pasta.tasks import Example, Task, load, sample

TASKS = ("json", "pronouns", "counterfact", "arithmetic")
"""An instruction on the form, one on the text, a fact, and a form with something to lose."""

TRAIN_EXAMPLES = 16
HELD_OUT_EXAMPLES = 16
"""Of each task."""

SHARES = (0.02, 0.08, 0.16)
"""The numbers of heads that are tried, as shares of all; the paper takes 25 to 86 of 1,024."""

ALPHA = 0.1
"""The strength with which heads are ranked."""

ALPHAS = (0.1, 0.3)
"""The strengths that are tried with each number of heads. The paper's 0.01 retains next to nothing:
see docs/results.md, "Obedience against the task"."""

_OF_MODEL = ("revision", "trust_remote_code")
_KV_CACHE_BYTES = 2**30
_MODEL_LEN = 1024
"""Tokens; the longest prompt of the built-in examples and its answer are shorter."""


def find(
    name: str,
    model: str,
    options: Mapping[str, Any],
    session: Callable[[], AbstractContextManager[TextIO]],
    progress: TextIO,
) -> HeadSet:
    """Finds heads, and says in their provenance how well they do.

    Args:
        name: What to call the model.
        model: Its folder or name.
        options: Arguments of ``vllm.LLM`` that the model needs.
        session: As `Asker` wants it.
        progress: Where progress is shown.

    Raises:
        PastaError: transformers cannot run the model with plain attention, or vLLM fails.
    """
    began = time.perf_counter()
    tasks = [load(task) for task in TASKS]
    ranking, estimates = _ranking(tasks, model, options, progress)
    ranked_seconds = time.perf_counter() - began
    samples = {t: sample(t, "held-out", HELD_OUT_EXAMPLES).examples for t in tasks}
    engine = engine_options({**_engine(model), **options}, eager=True)
    info = describe(name, model, engine)
    with (
        tempfile.TemporaryDirectory() as scratch,
        Asker(model, engine, Store(Path(scratch) / "answers.jsonl", info), session) as asker,
    ):
        rows, (k, alpha) = _try(asker, samples, ranking)
    return HeadSet(
        head_set(sorted(ranking[:k])).layers,
        provenance={
            **info,
            "note": "Found by `vllm-pasta profile --auto`, for no task in particular.",
            "alpha": alpha,
            "search": "auto",
            "top_k": k,
            "ranked_with_alpha": ALPHA,
            "tasks": {task.name: TRAIN_EXAMPLES for task in tasks},
            "held_out_examples": HELD_OUT_EXAMPLES,
            "held_out": {
                f"{size} α={factor:g}" if size else "0": sizes.summary(of)
                for (size, factor), of in rows.items()
            },
            "profiles": {
                "all": {
                    "ranking": [head_name(head) for head in ranking],
                    "estimates": [round(estimates[head], 4) for head in ranking],
                }
            },
            "gradient_seconds": round(ranked_seconds, 1),
            "seconds": round(time.perf_counter() - began, 1),
        },
    )


def combined(estimates: Mapping[str, Mapping[Head, float]]) -> dict[Head, float]:
    """One estimate for all tasks: the mean of each task's, in units of its largest.

    A head that hurts a task counts against those that it helps, which neither the intersection nor
    the union of the tasks' best heads sees.

    Args:
        estimates: Task -> head -> estimated change of the task's objective.
    """
    scales = {task: max(map(abs, of.values())) or 1.0 for task, of in estimates.items()}
    heads = next(iter(estimates.values()))
    return {
        head: fmean(of[head] / scales[task] for task, of in estimates.items()) for head in heads
    }


def _ranking(
    tasks: Sequence[Task], model: str, options: Mapping[str, Any], progress: TextIO
) -> tuple[list[Head], dict[Head, float]]:
    """All heads, best first, and their estimates; the model is gone again afterwards."""
    from tqdm import tqdm
    from transformers import AutoTokenizer

    from vllm_pasta.profiling.search.gradients import GradientModel

    given = {key: options[key] for key in _OF_MODEL if key in options}
    prompter = Prompter(AutoTokenizer.from_pretrained(options.get("tokenizer", model), **given))
    prompts = [
        (task.name, prompter.build(probe, PLAIN))
        for task in tasks
        for example in sample(task, "train", TRAIN_EXAMPLES).examples
        for probe in task.ranking_probes(example)
    ]
    gradients = GradientModel(model, **given)
    with tqdm(total=len(prompts), desc="gradients", file=progress, unit="example") as bar:
        each = gradients.estimate_each([prompt for _, prompt in prompts], ALPHA, bar.update)
    del gradients
    gc.collect()
    _empty_cache()
    of_task = {
        task.name: [
            found for (name, _), found in zip(prompts, each, strict=True) if name == task.name
        ]
        for task in tasks
    }
    estimates = combined(
        {
            task: {head: fmean(found[head] for found in of) for head in of[0]}
            for task, of in of_task.items()
        }
    )
    every = every_head(model)
    return sorted(every, key=lambda head: (-estimates[head], head)), estimates


def _empty_cache() -> None:
    import torch

    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _try(
    asker: Asker, samples: Mapping[Task, Sequence[Example]], ranking: Sequence[Head]
) -> tuple[dict[sizes.Choice, list[Row]], sizes.Choice]:
    """Tries every number of heads at every strength, and chooses."""
    counts = sorted({max(1, round(share * len(ranking))) for share in SHARES})
    chosen = {
        (k, alpha): {task.name: sorted(ranking[:k]) for task in samples}
        for alpha in ALPHAS
        for k in counts
    }
    rows = sizes.score(asker, samples, chosen, generations=0)
    return rows, sizes.choose(rows)


def _engine(model: str) -> dict[str, Any]:
    """Arguments of ``vllm.LLM`` with which the engine takes little memory beside the weights."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(model).get_text_config()
    longest = getattr(config, "max_position_embeddings", None) or _MODEL_LEN
    return {"kv_cache_memory_bytes": _KV_CACHE_BYTES, "max_model_len": min(_MODEL_LEN, longest)}
