"""Evaluations as tables: cells of text, Markdown, JSON."""

from collections.abc import Sequence
from statistics import fmean
from typing import Any

from vllm_pasta.profiling.estimates import Estimate
from vllm_pasta.profiling.evaluation import Row
from vllm_pasta.profiling.search.sizes import front
from vllm_pasta.tasks import Task

NOT_SHARES = ("fluency",)
"""Metrics that are no proportion: tables do not show them in per cent."""


def cells(tasks: Sequence[Task], rows: Sequence[Row]) -> list[list[str]]:
    """A heading and a line for each method; the columns are the tasks' metrics with intervals."""
    by = {(row.task, row.method.name): row for row in rows}
    names = list(dict.fromkeys(row.method.name for row in rows))
    many = len(tasks) > 1
    heading = ["", *([f"{task.name} {metric}" for task in tasks for metric in task.columns])]
    table = [heading + (["average"] if many else [])]
    for name in names:
        of = [by[task.name, name] for task in tasks]
        shown = [
            _cell(metric, row.metrics.get(metric))
            for task, row in zip(tasks, of, strict=True)
            for metric in task.columns
        ]
        average = 100 * fmean(row.score for row in of)
        table.append([name, *shown, *([f"{average:.1f}"] if many else [])])
    return table


def both(tasks: Sequence[Task], rows: Sequence[Row]) -> list[list[str]]:
    """A heading and a line for each method: obedience, what is retained, and both together.

    A star marks the methods of a task that no other beats in both respects.
    """
    fronts = {task.name: pareto_front(task, rows) for task in tasks}
    by = {(row.task, row.method.name): row for row in rows}
    table = [["", *(f"{task.name} {what}" for task in tasks for what in ("obeys", "retains"))]]
    for name in dict.fromkeys(row.method.name for row in rows):
        line = [name]
        for task in tasks:
            row = by[task.name, name]
            star = " *" if name in fronts[task.name] else ""
            retained = "–" if row.retained is None else f"{100 * row.retained:.1f}"
            line += [f"{100 * row.obedience:.1f}{star}", retained]
        table.append(line)
    return table


def pareto_front(task: Task, rows: Sequence[Row]) -> list[str]:
    """The names of a task's methods that no other beats in both respects, by obedience."""
    return front(
        {
            row.method.name: (row.obedience, row.retained)
            for row in rows
            if row.task == task.name and row.retained is not None
        }
    )


def markdown(table: Sequence[Sequence[str]]) -> str:
    """The table in Markdown; its first line is the heading."""
    rows = [[cell.replace("|", "\\|") for cell in line] for line in table]
    lines = [rows[0], ["---", *["---:"] * (len(rows[0]) - 1)], *rows[1:]]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def to_json(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Every estimate with its interval and its number of examples, as JSON values."""
    return [
        {
            "task": row.task,
            "method": row.method.name,
            "heads": len(row.method.heads) if row.method.heads else 0,
            "alpha": row.method.alpha if row.method.share is None else None,
            "share": row.method.share,
            "score": round(row.score, 4),
            "obedience": round(row.obedience, 4),
            "retained": None if row.retained is None else round(row.retained, 4),
            "metrics": {
                name: {
                    "mean": round(e.mean, 4),
                    "interval": [round(e.low, 4), round(e.high, 4)],
                    "examples": e.count,
                }
                for name, e in row.metrics.items()
            },
        }
        for row in rows
    ]


def _cell(metric: str, estimate: Estimate | None) -> str:
    if estimate is None:
        return "–"
    scale = 1 if metric in NOT_SHARES else 100
    digits = 2 if metric in NOT_SHARES else 1
    half = (estimate.high - estimate.low) / 2 * scale
    return f"{estimate.mean * scale:.{digits}f} ±{half:.{digits}f}"
