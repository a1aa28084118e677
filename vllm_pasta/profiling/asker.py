"""Asks a model questions: one vLLM engine, every request with its own heads, alpha and emphasis."""

import gc
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, ExitStack
from typing import Any, TextIO

from vllm_pasta.errors import PastaError
from vllm_pasta.profiling.methods import Method
from vllm_pasta.profiling.prompts import Prompt, Prompter
from vllm_pasta.profiling.store import Store, Trial
from vllm_pasta.tasks import Answer, Probe

CHUNK = 1024
"""Requests in one call of the engine: an interrupted run loses at most so many answers."""

Shots = Callable[[Trial], Sequence[Probe]]


class Asker:
    """Answers trials: from the store if it holds the answer, otherwise by the engine.

    The engine starts when it is first needed, so a run that finds every answer starts none.
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
        """Keeps the arguments; starts nothing.

        Args:
            model: A model for vLLM.
            options: Arguments of ``vllm.LLM``.
            store: Where answers are kept.
            session: Makes a context that is entered before the engine starts, and that gives the
                stream for progress.
            stop_after: Seconds after which no further requests are made.
            shots: Gives a trial's demonstrations.
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
        """Returns the answers to all trials, in their order.

        The engine is asked in that order too: neighbours share cached prefixes.

        Args:
            trials: The questions, and how to ask them.
            what: The label of the progress bar.

        Raises:
            PastaError: the time is up; the same command continues.
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
                            f"answers ({what}) are still missing. The same command continues"
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
    """Builds the answer from vLLM's ``RequestOutput``."""
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
    """The ``extra_args`` of a request, or None if the method steers no heads."""
    if method.heads is None:
        return None
    return {
        "emphasis": {
            "spans": [list(span) for span in prompt.spans],
            **({"alpha": method.alpha} if method.share is None else {"share": method.share}),
            "heads": method.heads.to_json(),
        }
    }
