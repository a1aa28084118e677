"""Asks a model: one vLLM engine, every request with its own heads, alpha and emphasis."""

import gc
import json
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, ExitStack
from hashlib import sha256
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TextIO

from vllm_pasta._version import __version__
from vllm_pasta.errors import PastaError
from vllm_pasta.profiling.methods import Head, Method
from vllm_pasta.profiling.prompts import Prompt, Prompter
from vllm_pasta.profiling.store import Store, Trial
from vllm_pasta.request.shape import attention_layers
from vllm_pasta.tasks import Answer, Probe

CHUNK = 1024
"""Requests in one call: an interrupted run loses at most so many answers."""

Shots = Callable[[Trial], Sequence[Probe]]


def every_head(model: str) -> list[Head]:
    """All heads of a model by its configuration, in order; layers without attention have none."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(model).get_text_config()
    layers = attention_layers(config, config.num_hidden_layers)
    return [(layer, head) for layer in layers for head in range(config.num_attention_heads)]


def versions() -> dict[str, str]:
    """Versions of what the answers depend on."""
    found = {"vllm-pasta": __version__}
    for package in ("vllm", "torch", "transformers"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "unknown"
    return found


def describe(name: str, model: str, options: dict[str, Any]) -> dict[str, Any]:
    """What all answers of a run depend on: see `Store`."""
    config = Path(model) / "config.json"
    revision = sha256(config.read_bytes()).hexdigest()[:12] if config.is_file() else "hub"
    kept = {k: v for k, v in options.items() if k in ("dtype", "quantization", "revision")}
    return {"model": name, "config": revision, "options": kept, "versions": versions()}


class Asker:
    """Answers trials, from the store where it has them, else by the engine.

    The engine is started when it is first needed: a run that only reads needs none.
    """

    def __init__(
        self,
        model: str,
        options: dict[str, Any],
        store: Store,
        session: Callable[[], AbstractContextManager[TextIO]],
        stop_after: float | None = None,
        shots: Shots = lambda trial: (),
    ) -> None:
        """Prepares.

        Args:
            model: A model for vLLM.
            options: Arguments of ``vllm.LLM``.
            store: Where answers are kept.
            session: Made and entered before the engine starts: gives the stream for progress.
            stop_after: Seconds after which to stop asking.
            shots: Demonstrations of a trial.
        """
        self._model, self._options, self._store = model, options, store
        self._session, self._shots = session, shots
        self._deadline = None if stop_after is None else time.monotonic() + stop_after
        self._stack = ExitStack()
        self._llm: Any = None
        self._terminal: TextIO | None = None

    def __enter__(self) -> "Asker":
        return self

    def __exit__(self, *error: Any) -> None:
        self._llm = None
        gc.collect()  # stops the engine while its last words still go to the log
        self._stack.__exit__(*error)

    def ask(self, trials: Iterable[Trial], what: str) -> list[Answer]:
        """Answers of all trials, whose order it keeps: neighbours share cached prefixes.

        Args:
            trials: What to ask.
            what: For the progress bar.

        Raises:
            PastaError: the time is up; the same command goes on.
        """
        trials = list(trials)
        missing = list({trial.key: trial for trial in trials if trial not in self._store}.values())
        if missing:
            self._start()
            from tqdm import tqdm

            with tqdm(total=len(missing), desc=what, file=self._terminal, unit="req") as bar:
                for at in range(0, len(missing), CHUNK):
                    if self._deadline is not None and time.monotonic() > self._deadline:
                        raise PastaError(
                            f"stopped after the time given: {len(missing) - at} of {len(trials)} "
                            f"answers ({what}) are still to come. The same command goes on"
                        )
                    chunk = missing[at : at + CHUNK]
                    began = time.perf_counter()
                    answers = self._generate(chunk)
                    self._store.add(zip(chunk, answers, strict=True), time.perf_counter() - began)
                    bar.update(len(chunk))
        return [self._store[trial] for trial in trials]

    def _start(self) -> None:
        if self._llm is not None:
            return
        self._terminal = self._stack.enter_context(self._session())
        from vllm import LLM

        self._llm = LLM(self._model, **self._options)
        self._prompter = Prompter(self._llm.get_tokenizer())

    def _generate(self, trials: Sequence[Trial]) -> list[Answer]:
        from vllm import SamplingParams

        built: dict[tuple[Any, ...], Prompt] = {}
        prompts = []
        for trial in trials:
            probe, method = trial.probe, trial.method
            of = probe.text, probe.name, probe.likelihood, method.mark, method.shots
            if of not in built:
                built[of] = self._prompter.build(probe, method, self._shots(trial))
            prompts.append(built[of])
        params = [
            SamplingParams(
                temperature=0,
                max_tokens=trial.probe.max_tokens if _is_generated(trial.probe) else 1,
                logprob_token_ids=prompt.choices or None,
                prompt_logprobs=0 if trial.probe.likelihood else None,
                detokenize=_is_generated(trial.probe),
                extra_args=emphasis(prompt, trial.method),
            )
            for trial, prompt in zip(trials, prompts, strict=True)
        ]
        outputs = self._llm.generate(
            [{"prompt_token_ids": prompt.ids} for prompt in prompts], params, use_tqdm=False
        )
        return [
            _answer(trial.probe, prompt, output)
            for trial, prompt, output in zip(trials, prompts, outputs, strict=True)
        ]


def _is_generated(probe: Probe) -> bool:
    return not probe.choices and not probe.likelihood


def _answer(probe: Probe, prompt: Prompt, output: Any) -> Answer:
    """From vLLM's ``RequestOutput``."""
    if probe.likelihood:
        rows = output.prompt_logprobs[-len(prompt.target) :]
        values = [rows[at][prompt.target[at]].logprob for at in prompt.judged]
        return Answer(logprobs=(sum(values) / len(values),))
    (completion,) = output.outputs
    if prompt.choices:
        (row,) = completion.logprobs
        return Answer(logprobs=tuple(row[i].logprob for i in prompt.choices))
    return Answer(text=completion.text)


def emphasis(prompt: Prompt, method: Method) -> dict[str, Any] | None:
    """``extra_args`` of a request; None where the method does not steer."""
    if method.heads is None:
        return None
    return {
        "emphasis": {
            "spans": [list(span) for span in prompt.spans],
            "alpha": method.alpha,
            "heads": {str(layer): list(heads) for layer, heads in method.heads.layers},
        }
    }


def parse_options(text: str | None, eager: bool) -> dict[str, Any]:
    """Arguments of ``vllm.LLM``: ours, which suit many short prompts, and the user's over them.

    Raises:
        PastaError: not a JSON object.
    """
    try:
        given = json.loads(text or "{}")
    except ValueError as e:
        raise PastaError(f"--engine: expected a JSON object: {e}") from None
    if not isinstance(given, dict):
        raise PastaError(f"--engine: expected a JSON object, got {text!r:.80}")
    ours = {
        "max_num_batched_tokens": 4096,
        "max_num_seqs": 256,
        "gpu_memory_utilization": 0.1,  # must be free at the start; short prompts need little
        "disable_log_stats": True,
        "enforce_eager": eager,
        "additional_config": {"pasta": {}},
    }
    return {**ours, **given}
