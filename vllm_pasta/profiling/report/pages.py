"""What `vllm-pasta eval` and `profile` found, as a page: see `html`."""

import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from vllm_pasta.errors import PastaError
from vllm_pasta.profiling.evaluation import Row
from vllm_pasta.profiling.methods import Method
from vllm_pasta.profiling.report import html, plots
from vllm_pasta.profiling.search.ranking import Profile
from vllm_pasta.profiling.store import Store, Trial
from vllm_pasta.tasks import Answer, Example, Probe, Task

MOST_EXAMPLES = 20
"""Examples of each task whose answers a page shows."""

MOST_PROBES = 3
"""Probes of each example whose answers a page shows."""


def evaluation(
    path: Path,
    info: Mapping[str, Any],
    tasks: Sequence[Task],
    rows: Sequence[Row],
    table: Sequence[Sequence[str]],
    answered: Sequence[html.Answers],
) -> None:
    """Writes what `vllm-pasta eval` found.

    Args:
        path: The file.
        info: What the answers depend on.
        tasks: The tasks.
        rows: Their scores.
        table: The scores as `tables.cells` or `tables.both` shows them.
        answered: The answers of each task, see `answers`.

    Raises:
        PastaError: the file cannot be written.
    """
    meanings = [
        f"{task.name}, {name}: {what}" for task in tasks for name, what in task.columns.items()
    ]
    parts: list[html.Part] = [
        html.Table("Scores", table, "With 95 % confidence intervals. A heading sorts."),
        html.Lines("What the columns mean", meanings),
        *_figure("Scores by method, number of heads and α",
                 lambda at: plots.methods(at, tasks, rows, info["model"])),
        *(part for part in answered if part.asked),
    ]  # fmt: skip
    _write(path, f"How well {info['model']} follows emphasis", _versions(info), parts)


def profile(
    path: Path,
    info: Mapping[str, Any],
    profiles: Sequence[Profile],
    parts: Sequence[html.Part],
) -> None:
    """Writes what `vllm-pasta profile` found.

    Args:
        path: The file.
        info: The head set's provenance.
        profiles: Each task's ranking.
        parts: The report's tables and lines.

    Raises:
        PastaError: the file cannot be written.
    """
    heat_map = _figure("Each head steered alone", lambda at: plots.heat_map(at, profiles, info))
    intro = f"Search {info['search']}, α {info['alpha']:g}. {_versions(info)}"
    _write(path, f"Heads of {info['model']}", intro, [*heat_map, *parts])


def answers(
    store: Store, task: Task, examples: Iterable[Example], methods: Sequence[Method]
) -> html.Answers:
    """The answers of the first examples side by side, those that were asked for."""
    asked = []
    for example in list(examples)[:MOST_EXAMPLES]:
        # Answers that are text come first: a reader wants to see those.
        probes = sorted(task.probes(example), key=lambda probe: bool(probe.choices))
        for probe in probes[:MOST_PROBES]:
            trials = [Trial(task.name, example, probe, method) for method in methods]
            told = [(t.method.name, _text(probe, store[t])) for t in trials if t in store]
            pieces = [(probe.before, None), (probe.emphasis, 1.0), (probe.after, None)]
            if told:
                asked.append(html.Asked(pieces, told))
    return html.Answers(f"{task.name}: the first answers", asked)


def _figure(title: str, draw: Callable[[Path], None]) -> list[html.Part]:
    """A plot; a sentence where there is no plotting library. ``draw`` draws it into a file."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "plot.svg"
        try:
            draw(path)
        except PastaError as e:
            return [html.Lines(title, [f"No plot: {e}."])]
        svg = path.read_text(encoding="utf-8")
    return [html.Figure(title, svg[svg.index("<svg") :])]  # an XML prolog does not go into HTML


def _write(path: Path, title: str, intro: str, parts: Sequence[html.Part]) -> None:
    try:
        html.write(path, title, intro, parts)
    except OSError as e:
        raise PastaError(f"{path}: cannot be written: {e.strerror}") from e


def _versions(info: Mapping[str, Any]) -> str:
    of = ", ".join(f"{name} {version}" for name, version in info.get("versions", {}).items())
    return f"With {of}." if of else ""


def _text(probe: Probe, answer: Answer) -> str:
    if probe.choices:
        ranked = sorted(zip(answer.logprobs, probe.choices, strict=True), reverse=True)
        return "\n".join(
            f"{choice.strip()}: log-probability {value:.2f}" for value, choice in ranked
        )
    if probe.likelihood:
        return f"{probe.target.strip()}: mean log-probability {answer.logprobs[0]:.3f}"
    return answer.text
