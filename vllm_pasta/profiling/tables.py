"""Evaluations as a table: plain text, Markdown, JSON."""

from collections.abc import Sequence
from typing import Any

from vllm_pasta.profiling.estimates import Estimate
from vllm_pasta.profiling.evaluation import Row
from vllm_pasta.tasks import Task

NOT_SHARES = ("fluency",)
"""Metrics that are no proportion, so not shown in per cent."""


def cells(tasks: Sequence[Task], rows: Sequence[Row]) -> list[list[str]]:
    """A heading, and one line per method; columns are the tasks' metrics, with their intervals."""
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
        average = 100 * sum(row.score for row in of) / len(of)
        table.append([name, *shown, *([f"{average:.1f}"] if many else [])])
    return table


def text(table: Sequence[Sequence[str]]) -> str:
    """In columns that line up."""
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in table
    )


def markdown(table: Sequence[Sequence[str]]) -> str:
    """As a Markdown table."""
    rows = [[cell.replace("|", "\\|") for cell in line] for line in table]
    lines = [rows[0], ["---", *["---:"] * (len(rows[0]) - 1)], *rows[1:]]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def as_json(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """For programs: every estimate with its interval and its number of examples."""
    return [
        {
            "task": row.task,
            "method": row.method.name,
            "heads": len(row.method.heads) if row.method.heads else 0,
            "alpha": row.method.alpha,
            "score": round(row.score, 4),
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
