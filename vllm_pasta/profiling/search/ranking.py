"""Ranks a model's heads for one task: what each alone does to the task's objective."""

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import islice
from statistics import fmean
from typing import Literal

from vllm_pasta.errors import PastaError
from vllm_pasta.profiling.asker import Asker
from vllm_pasta.profiling.methods import PLAIN, Head, Method, head_name, steer
from vllm_pasta.profiling.search import strategies
from vllm_pasta.profiling.search.strategies import Pair, Ranked
from vllm_pasta.profiling.store import Store, Trial
from vllm_pasta.tasks import Probe, Sample, Task

Search = Literal["full", "halving", "gradient"]

LIKELIHOOD = "log P(ideal answer)"


@dataclass(frozen=True)
class Profile:
    """One task's part of a profile.

    Attributes:
        task: The task.
        objective: The metric that heads are ranked by.
        train: The examples that heads are ranked on.
        plain: Mean objective without steering.
        ranking: All heads, best first.
        requests: Number of answers that the ranking needed, those of earlier runs included.
        gradient_seconds: Time that the estimates took, in seconds, loading the model included.
    """

    task: Task
    objective: str
    train: Sample
    plain: float
    ranking: list[Ranked]
    requests: int
    gradient_seconds: float


def rankings(profiles: Sequence[Profile]) -> dict[str, list[Head]]:
    """Task -> heads, best first."""
    return {p.task.name: [ranked.head for ranked in p.ranking] for p in profiles}


class Ranker:
    """Ranks heads for one task."""

    def __init__(
        self, asker: Asker, store: Store, task: Task, train: Sample, alpha: float, likelihood: bool
    ) -> None:
        """Keeps the arguments; asks nothing.

        Args:
            asker: Asks the model.
            store: Keeps gradient estimates.
            task: The task to rank heads for.
            train: The examples to rank heads on.
            alpha: Scale factor.
            likelihood: For a task whose answers are generated: rank by the ideal answer's
                log-probability instead.

        Raises:
            PastaError: ``likelihood``, and the examples have no ideal answers.
        """
        self._asker, self._store = asker, store
        self._task, self._train, self.alpha = task, train, alpha
        probes = [task.ranking_probes(example) for example in train.examples]
        self._targets = all(probe.target for of in probes for probe in of)
        if likelihood:
            self._check_targets("ranking by likelihood")
        generated = not any(probe.choices for of in probes for probe in of)
        self._likelihood = likelihood and generated
        self._probes = [[replace(p, likelihood=self._likelihood) for p in of] for of in probes]
        self._asked = 0

    def profile(self, heads: Sequence[Head], kind: Search, model: str) -> Profile:
        """Ranks all heads.

        Args:
            heads: All heads of the model.
            kind: The search to use.
            model: The model's name or folder, for gradients on transformers.

        Raises:
            PastaError: a gradient search, and the examples have no ideal answers.
        """
        if kind == "gradient":
            self._check_targets("the gradient search")  # before anything is asked
        examples = len(self._train.examples)
        plain = fmean(self._scores([(PLAIN, i) for i in range(examples)]))
        seconds = 0.0
        if kind == "gradient":
            estimates, seconds = self._estimates(model)
            ranking = strategies.gradient(heads, examples, self.score, estimates)
        else:
            find = strategies.full if kind == "full" else strategies.halving
            ranking = find(heads, examples, self.score)
        objective = LIKELIHOOD if self._likelihood else self._task.objective
        return Profile(self._task, objective, self._train, plain, ranking, self._asked, seconds)

    def _check_targets(self, what: str) -> None:
        if not self._targets:
            raise PastaError(
                f"{what} needs ideal answers, and {self._train.source} has none for "
                f"{self._task.name}: rank by other means, or on the built-in examples, which have "
                "them (unset VLLM_PASTA_DATA)"
            )

    def score(self, pairs: list[Pair]) -> list[float]:
        """The objective where one head alone is steered, for each pair of a head and an example."""
        self._asked += len(pairs)
        heads = {head for head, _ in pairs}
        methods = {head: steer(f"head:{head_name(head)}", [head], self.alpha) for head in heads}
        return self._scores([(methods[head], i) for head, i in pairs])

    def _scores(self, pairs: Sequence[tuple[Method, int]]) -> list[float]:
        task, examples = self._task, self._train.examples
        trials = [
            Trial(task.name, examples[i], probe, method)
            for method, i in pairs
            for probe in self._probes[i]
        ]
        answers = iter(self._asker.ask(trials, task.name))
        scores = []
        for _, i in pairs:
            of = {probe.name: next(answers) for probe in self._probes[i]}
            if self._likelihood:
                scores.append(fmean([answer.logprobs[0] for answer in of.values()]))
            else:
                scores.append(task.score(examples[i], of)[task.objective])
        return scores

    def _estimates(self, model: str) -> tuple[dict[Head, float], float]:
        """The gradients' estimates, and the seconds they took, in this run or an earlier one."""
        if self.note not in self._store.notes:
            estimate_together([self], model)
        kept = self._store.notes[self.note]
        return {(layer, head): value for layer, head, value in kept["estimates"]}, kept["seconds"]

    @property
    def note(self) -> str:
        """The name under which the store keeps the gradients' estimates."""
        return f"gradient|{self._task.name}|{self._train.digest}|{self.alpha:g}"

    @property
    def is_estimated(self) -> bool:
        """Whether the store has the gradients' estimates."""
        return self.note in self._store.notes

    def gradient_probes(self) -> list[Probe]:
        """The probes whose gradients estimate what each head does.

        Raises:
            PastaError: the examples have no ideal answers.
        """
        self._check_targets("the gradient search")
        return [probe for e in self._train.examples for probe in self._task.ranking_probes(e)]

    def keep(self, each: Sequence[dict[Head, float]], seconds: float) -> None:
        """Keeps the estimates of `gradient_probes`, and the seconds that they took."""
        estimates = [[*head, fmean(of[head] for of in each)] for head in each[0]]
        self._store.note(self.note, {"seconds": seconds, "estimates": estimates})


def estimate_together(rankers: Sequence[Ranker], model: str) -> None:
    """Estimates what each head does to several tasks by passes that the tasks share.

    The model is loaded once. Tasks whose estimates are kept are left out.

    Args:
        rankers: One for each task, all with the same alpha.
        model: The model's name or folder.

    Raises:
        PastaError: as `Ranker.profile`.
    """
    probes = {ranker: ranker.gradient_probes() for ranker in rankers if not ranker.is_estimated}
    if not probes:
        return
    from transformers import AutoTokenizer

    from vllm_pasta.profiling.prompts import Prompter
    from vllm_pasta.profiling.search.gradients import GradientModel

    prompter = Prompter(AutoTokenizer.from_pretrained(model))
    prompts = [prompter.build(probe, PLAIN) for of in probes.values() for probe in of]
    began = time.perf_counter()
    print(f"Gradients on transformers: {len(prompts)} examples", file=sys.stderr)
    each = iter(GradientModel(model).estimate_each(prompts, rankers[0].alpha))
    seconds = time.perf_counter() - began
    for ranker, of in probes.items():
        ranker.keep(list(islice(each, len(of))), seconds * len(of) / len(prompts))
