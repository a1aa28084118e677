"""One vLLM engine that answers trials; every request has its own heads, alpha and emphasis."""

import gc
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from vllm_pasta.profiling.methods import Method
from vllm_pasta.profiling.prompts import Prompt, Prompter
from vllm_pasta.profiling.store import Trial
from vllm_pasta.tasks import Answer, Probe

CHUNK = 1024
"""Requests in one call of the engine: an interrupted run loses at most so many answers."""


@dataclass(frozen=True)
class Question:
    """A trial, and the demonstrations that its prompt shows first."""

    trial: Trial
    shots: Sequence[Probe]


@dataclass(frozen=True)
class Answered:
    """Questions with their answers, in order, and the seconds that they took together."""

    questions: Sequence[Question]
    answers: Sequence[Answer]
    seconds: float


class Engine:
    """vLLM in this process.

    Args:
        model: A model for vLLM.
        options: Arguments of ``vllm.LLM``.
    """

    def __init__(self, model: str, options: dict[str, Any]) -> None:
        from vllm import LLM

        self._llm: Any = LLM(model, **options)
        self._prompter = Prompter(self._llm.get_tokenizer())

    def close(self) -> None:
        """Stops the engine."""
        self._llm = None
        gc.collect()

    def answer_all(self, questions: Sequence[Question]) -> Iterator[Answered]:
        """Answers questions in their order, `CHUNK` at a time."""
        for at in range(0, len(questions), CHUNK):
            yield self.answer(questions[at : at + CHUNK])

    def answer(self, questions: Sequence[Question]) -> Answered:
        """Answers questions in one call of the engine."""
        from vllm import SamplingParams

        began = time.perf_counter()
        prompts = list(self._prompts(questions))
        params = [
            SamplingParams(
                temperature=0,
                max_tokens=trial.probe.max_tokens if _is_generated(trial.probe) else 1,
                logprob_token_ids=prompt.choices or None,
                prompt_logprobs=0 if trial.probe.likelihood else None,
                detokenize=_is_generated(trial.probe),
                extra_args=emphasis(prompt, trial.method),
            )
            for trial, prompt in ((q.trial, p) for q, p in zip(questions, prompts, strict=True))
        ]
        outputs = self._llm.generate(
            [{"prompt_token_ids": prompt.ids} for prompt in prompts], params, use_tqdm=False
        )
        answers = [
            _answer(question.trial.probe, prompt, output)
            for question, prompt, output in zip(questions, prompts, outputs, strict=True)
        ]
        return Answered(questions, answers, time.perf_counter() - began)

    def _prompts(self, questions: Iterable[Question]) -> Iterator[Prompt]:
        built: dict[tuple[Any, ...], Prompt] = {}
        for question in questions:
            probe, method = question.trial.probe, question.trial.method
            of = probe.text, probe.name, probe.likelihood, method.mark, method.shots
            if of not in built:
                built[of] = self._prompter.build(probe, method, question.shots)
            yield built[of]


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
