"""Asks a model questions: by one vLLM engine, or by several over a Ray cluster."""

import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, ExitStack
from typing import Any, TextIO

from vllm_pasta.errors import PastaError
from vllm_pasta.profiling.asker.cluster import Cluster, Ray
from vllm_pasta.profiling.asker.engine import Engine, Question
from vllm_pasta.profiling.store import Store, Trial
from vllm_pasta.tasks import Answer, Probe

Shots = Callable[[Trial], Sequence[Probe]]


class Asker:
    """Answers trials: from the store if it holds the answer, otherwise by the engine.

    The engine starts when it is first needed, so a run that finds every answer starts none. The
    store is closed with the asker.
    """

    def __init__(
        self,
        model: str,
        options: dict[str, Any],
        store: Store,
        session: Callable[[], AbstractContextManager[TextIO]],
        stop_after: float | None = None,
        shots: Shots = lambda trial: (),
        ray: Ray | None = None,
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
            ray: Where engines run instead of one here.
        """
        self._model, self._options, self._store = model, options, store
        self._session, self._shots = session, shots
        self._deadline = None if stop_after is None else time.monotonic() + stop_after
        self._stack = ExitStack()
        self._ray = ray
        self._engine: Engine | Cluster | None = None
        self._terminal: TextIO | None = None

    def __enter__(self) -> "Asker":
        return self

    def __exit__(self, *error: Any) -> None:
        if self._engine is not None:
            self._engine.close()  # while its last words still go to the log
        self._engine = None
        self._store.close()
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
            engine = self._start()
            from tqdm import tqdm

            left = len(missing)
            with tqdm(total=len(missing), desc=what, file=self._terminal, unit="req") as bar:
                self._check_time(left, len(trials), what)
                questions = [Question(trial, self._shots(trial)) for trial in missing]
                for answered in engine.answer_all(questions):
                    asked = [question.trial for question in answered.questions]
                    self._store.add(zip(asked, answered.answers, strict=True), answered.seconds)
                    bar.update(len(asked))
                    left -= len(asked)
                    self._check_time(left, len(trials), what)
        return [self._store[trial] for trial in trials]

    def _check_time(self, left: int, count: int, what: str) -> None:
        if left and self._deadline is not None and time.monotonic() > self._deadline:
            raise PastaError(
                f"stopped after the time given: {left} of {count} answers ({what}) are still "
                "missing. The same command continues"
            )

    def _start(self) -> Engine | Cluster:
        if self._engine is None:
            self._terminal = self._stack.enter_context(self._session())
            if self._ray is None:
                self._engine = Engine(self._model, self._options)
            else:
                self._engine = Cluster(self._model, self._options, self._ray)
        return self._engine
