"""Tasks × methods: what is asked, and the scores that come of it."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from vllm_pasta.profiling.asker import Asker
from vllm_pasta.profiling.estimates import Estimate
from vllm_pasta.profiling.methods import Method
from vllm_pasta.profiling.store import Trial
from vllm_pasta.tasks import Answer, Example, Probe, Task


@dataclass(frozen=True)
class Row:
    """One method on one task: estimates of the task's metrics, and the mean of its judged ones."""

    task: str
    method: Method
    metrics: dict[str, Estimate]
    score: float


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
        task: What to ask.
        examples: About what.
        methods: How.
        generations: For how many examples to generate where a task is judged without generation;
            None means all.
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
    return [
        _row(task, method, [task.score(e, answers[method.key, e.key]) for e in examples])
        for method in methods
    ]


def _probes(task: Task, example: Example, generate: bool) -> list[Probe]:
    probes = task.probes(example)
    short = [probe for probe in probes if probe.choices]
    return probes if generate or not short else short


def _row(task: Task, method: Method, scores: Sequence[dict[str, float]]) -> Row:
    values = {
        metric: [score[metric] for score in scores if metric in score] for metric in task.columns
    }
    metrics = {metric: Estimate.of(found) for metric, found in values.items() if found}
    return Row(task.name, method, metrics, fmean([metrics[name].mean for name in task.judged]))
