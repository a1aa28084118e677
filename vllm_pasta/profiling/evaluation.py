"""Asks the probes of a task in different ways, and scores the answers."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from vllm_pasta.profiling.asker import Asker
from vllm_pasta.profiling.estimates import Estimate
from vllm_pasta.profiling.methods import PLAIN, Method
from vllm_pasta.profiling.store import Trial
from vllm_pasta.tasks import Answer, Example, Probe, Task


@dataclass(frozen=True)
class Row:
    """The scores of one method on one task.

    Attributes:
        task: The task's name.
        method: The method.
        metrics: Each metric's estimate.
        score: The mean of the metrics that the task is judged by, 0 to 1.
        obedience: How far the model follows what is emphasised, 0 to 1, see `Task.obedience`.
        retained: How far it still does the rest of the task, 0 to 1, see `Task.retained`; None for
            a task that is nothing but obedience.
    """

    task: str
    method: Method
    metrics: dict[str, Estimate]
    score: float
    obedience: float
    retained: float | None


def evaluate(
    asker: Asker,
    task: Task,
    examples: Sequence[Example],
    methods: Sequence[Method],
    generations: int | None = None,
) -> list[Row]:
    """Scores every method on the same examples.

    Args:
        asker: Asks the model.
        task: The task.
        examples: The examples.
        methods: The methods.
        generations: For a task that is judged without generated answers: the number of examples
            for which answers are generated all the same. None means all.
    """
    wanted = [
        (example, probe)
        for number, example in enumerate(examples)
        for probe in _probes(task, example, generations is None or number < generations)
    ]
    trials = [Trial(task.name, example, probe, m) for m in methods for example, probe in wanted]
    # Short requests first, so that they do not wait for a batch of long ones.
    trials.sort(key=lambda trial: not trial.probe.choices)
    answers: dict[tuple[str, str], dict[str, Answer]] = defaultdict(dict)
    for trial, answer in zip(trials, asker.ask(trials, task.name), strict=True):
        answers[trial.method.key, trial.example.key][trial.probe.name] = answer
    plain_asked = any(method.key == PLAIN.key for method in methods)

    def scores(method: Method, example: Example) -> dict[str, float]:
        of = answers[method.key, example.key]
        found = task.score(example, of)
        if plain_asked:
            found |= task.beside_plain(example, of, answers[PLAIN.key, example.key])
        return found

    return [_row(task, method, [scores(method, e) for e in examples]) for method in methods]


def _probes(task: Task, example: Example, generate: bool) -> list[Probe]:
    probes = task.probes(example)
    short = [probe for probe in probes if probe.choices]
    return probes if generate or not short else short


def _row(task: Task, method: Method, scores: Sequence[dict[str, float]]) -> Row:
    values = {
        metric: [score[metric] for score in scores if metric in score] for metric in task.columns
    }
    metrics = {metric: Estimate.of(found) for metric, found in values.items() if found}

    def mean(names: Sequence[str]) -> float | None:
        means = [metrics[name].mean for name in names if name in metrics]
        return fmean(means) if means else None

    score, obedience = mean(task.judged), mean(task.obedience)
    assert score is not None
    assert obedience is not None
    return Row(task.name, method, metrics, score, obedience, mean(task.retained))
