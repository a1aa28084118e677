"""Holds sampled answers against the oracle, in a thread of its own while the server is loaded."""

import queue
import random
import threading
from collections.abc import Mapping

import torch

from benchmarks.soak.client import Answer
from vllm_pasta.verify.oracle import Oracle, Steering

TOLERANCE = 5e-3
"""Nats by which a log-probability may differ, and a greedy token's may lie below the best one's.

Both are fp32. A step's rounding depends on the batch; what a leak or a missed mark changes is far
larger: the median is in the report."""

WAITING = 100


class Judge:
    """Judges a sample of the answers that it is given.

    Args:
        oracles: By the name that requests give: of the model, and of each adapter's merged weights.
        share: Which part of the answers is judged; fewer where the oracle does not keep up.
        seed: Of the sample.
    """

    def __init__(self, oracles: Mapping[str, Oracle], share: float, seed: int) -> None:
        torch.set_num_threads(1)  # two would wait for each other beside the server's
        self._oracles = oracles
        self._share, self._rng = share, random.Random(seed)
        self._queue: queue.Queue[Answer | None] = queue.Queue(WAITING)
        self.judged = self.judged_steered = self.tokens = self.too_many = 0
        self.wrong: list[str] = []
        self.largest = 0.0
        self.effects: list[float] = []
        self._thread = threading.Thread(target=self._run, name="judge")
        self._thread.start()

    def put(self, answer: Answer) -> None:
        """Takes an answer, or not: by the sample, and if there is room."""
        if self._rng.random() >= self._share:
            return
        try:
            self._queue.put_nowait(answer)
        except queue.Full:
            self.too_many += 1

    def close(self) -> None:
        """Returns once all that was taken is judged."""
        self._queue.put(None)
        self._thread.join()

    def _run(self) -> None:
        while (answer := self._queue.get()) is not None:
            try:
                problem = self._problem(answer)
            except Exception as e:  # else the thread would end, and the run with it hang
                problem = f"the oracle failed: {type(e).__name__}: {e}"
            if problem:
                self.wrong.append(f"{answer.ask.kind}: {problem}; {answer.ask.body}"[:2000])

    def _problem(self, answer: Answer) -> str | None:
        """What is wrong with an answer; None if nothing is."""
        ask = answer.ask
        self.judged += 1
        self.judged_steered += ask.steering is not None
        self.tokens += len(answer.tokens)
        if ask.choices is not None:
            if answer.text not in ask.choices and len(answer.tokens) < ask.body["max_tokens"]:
                return f"{answer.text!r} is none of {ask.choices}"
            return None
        count = len(answer.tokens)
        if count != ask.body["max_tokens"] or len(answer.logprobs) != count:
            return f"{count} tokens and {len(answer.logprobs)} log-probabilities"
        rows = self._rows(answer, ask.steering)
        said = rows.gather(1, torch.tensor(answer.tokens)[:, None])[:, 0]
        error = float((said - torch.tensor(answer.logprobs)).abs().max())
        self.largest = max(self.largest, error)
        if ask.steering is not None:
            plain = self._rows(answer, None).gather(1, torch.tensor(answer.tokens)[:, None])[:, 0]
            self.effects.append(float((plain - torch.tensor(answer.logprobs)).abs().max()))
        if error > TOLERANCE:
            return f"a log-probability differs by {error:.3g}"
        if ask.body["temperature"] == 0:
            below = float((rows.amax(-1) - said).max())
            if below > TOLERANCE:
                return f"a greedy token lies {below:.3g} below the best one"
        return None

    def _rows(self, answer: Answer, steering: Steering | None) -> torch.Tensor:
        """The oracle's log-probabilities for each token of the answer: float32 [tokens, vocab]."""
        ids = answer.ask.ids + answer.tokens[:-1]
        oracle = self._oracles[answer.ask.body["model"]]
        return oracle.prompt_logprobs(ids, steering)[len(answer.ask.ids) - 1 :]
