"""The results of a profile: provenance for the head set, and a report in Markdown."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from vllm_pasta.errors import PastaError
from vllm_pasta.profiling.estimates import overlap, rank_correlation
from vllm_pasta.profiling.evaluation import Row
from vllm_pasta.profiling.methods import Head, head_name
from vllm_pasta.profiling.report import html, pages, plots, tables
from vllm_pasta.profiling.search.ranking import Profile, rankings
from vllm_pasta.profiling.search.sizes import HeldOut
from vllm_pasta.request.heads import HeadSet

SHOWN = 20
"""Heads of each task's ranking that the report shows."""


def to_json(profile: Profile) -> dict[str, Any]:
    """One task's part of a head set's provenance."""
    train = profile.train
    return {
        "objective": profile.objective,
        "data": {
            "source": train.source,
            "digest": train.digest,
            "examples": len(train.examples),
        },
        "plain": round(profile.plain, 4),
        "requests": profile.requests,
        "ranking": [head_name(ranked.head) for ranked in profile.ranking],
        "scores": [
            None if ranked.score is None else round(ranked.score, 4) for ranked in profile.ranking
        ],
        "estimates": [
            round(ranked.estimate, 4) for ranked in profile.ranking if ranked.estimate is not None
        ],
    }


def describe(heads: HeadSet, path: Path) -> str:
    """What ``vllm-pasta profile --auto`` found: the heads, and how each choice did."""
    info = heads.provenance
    k, alpha = info["top_k"], heads.alpha
    every = info["profiles"]["all"]["ranking"]
    metrics = list(info["held_out"]["0"])
    rows = [["held-out examples", *metrics]]
    for name, values in info["held_out"].items():
        chosen = " (chosen)" if name == f"{k} α={alpha:g}" else ""
        label = "plain" if name == "0" else f"top {name}{chosen}"
        rows.append([label, *(f"{values.get(metric, 0.0):.3f}" for metric in metrics)])
    lines = [f"- layer {layer}: {', '.join(map(str, of))}" for layer, of in heads.layers]
    tasks = ", ".join(info["tasks"])
    return "\n\n".join(
        [
            f"# Heads of {info['model']}, for any use",
            f"{len(heads)} of {len(every)} heads, α {alpha:g}, found on {tasks} in "
            f"{info['seconds']:.0f} s, of which gradients {info['gradient_seconds']:.0f} s. Kept "
            f"in {path}; remove that file to find them anew.",
            "\n".join(lines),
            tables.markdown(rows),
        ]
    )


def compare(profiles: Sequence[Profile], other: HeadSet, k: int) -> str:
    """How much of another profile's rankings these keep: one line for each task.

    Raises:
        PastaError: the other profile has no ranking for one of the tasks.
    """
    ranked = other.provenance.get("profiles", {})
    lines = []
    for name, heads in rankings(profiles).items():
        if name not in ranked:
            raise PastaError(f"head set {other.name!r} has no ranking for the task {name}")
        ours, theirs = [head_name(head) for head in heads], ranked[name]["ranking"]
        lines.append(
            f"{name}: rank correlation {rank_correlation(ours, theirs):.2f}; of the "
            f"other's first {k} heads, {overlap(ours, theirs, k):.0%} are among the first {k} here"
        )
    return "\n".join(lines)


def write(
    out: Path,
    info: Mapping[str, Any],
    profiles: Sequence[Profile],
    sets: Mapping[str, Sequence[Head]],
    held_out: HeldOut,
    compared: str,
) -> str:
    """Writes the report ``OUT.md``, the heat maps ``OUT.png``, and both as a page, ``OUT.html``,
    beside the head set.

    Args:
        out: The head set's file.
        info: The head set's provenance.
        profiles: Each task's ranking.
        sets: The selected heads, by task or under "".
        held_out: Rows by number of heads and strength, see `sizes.held_out`; may be empty.
        compared: The text of `compare`; may be empty.

    Returns:
        The report's text.
    """
    tasks = ", ".join(f"{p.task.name} ({len(p.train.examples)})" for p in profiles)
    parts = [
        f"# Heads of {info['model']}",
        f"Search {info['search']}, α {info['alpha']:g}, examples: {tasks}; {info['requests']} "
        f"requests rank the heads. The {info['answers']} answers behind this report took "
        f"{info['engine_seconds'] / 60:.1f} minutes, gradients {info['gradient_seconds']:.0f} s; "
        "engine starts are not counted.",
    ]
    page: list[html.Part] = []
    for task, heads in sets.items():
        of = f"for {task}" if task else f"({info['select']})"
        layers: dict[int, list[int]] = {}
        for layer, head in heads:
            layers.setdefault(layer, []).append(head)
        lines = [f"layer {layer}: {', '.join(map(str, of))}" for layer, of in layers.items()]
        title = f"{len(heads)} heads {of}"
        listed = "\n".join(f"- {line}" for line in lines)
        parts.append(f"## {title}\n\nTop {info['top_k']}.\n\n{listed}")
        page.append(html.Lines(title, lines))
    for profile in profiles:
        rows = _best(profile)
        title, plain = f"{profile.task.name}: the first {len(rows) - 1} heads", profile.plain
        parts.append(f"## {title}\n\nWithout steering {plain:.3f}.\n\n{tables.markdown(rows)}")
        page.append(html.Table(title, rows, f"Without steering {plain:.3f}."))
    if held_out:
        title, rows = "Held-out examples, by number of heads", _sizes(profiles, held_out)
        parts.append(f"## {title}\n\n{tables.markdown(rows)}")
        page.append(html.Table(title, rows))
    if compared:
        parts.append(f"## Compared\n\n{compared}")
        page.append(html.Lines("Compared", compared.splitlines()))
    try:
        plots.heat_map(out.with_suffix(".png"), profiles, info)
        parts.append(f"![Heads by task]({out.with_suffix('.png').name})")
    except PastaError as e:
        parts.append(f"No heat map: {e}.")
    text = "\n\n".join(parts)
    out.with_suffix(".md").write_text(text + "\n", encoding="utf-8")
    pages.profile(out.with_suffix(".html"), info, profiles, page)
    return text


def _best(profile: Profile) -> list[list[str]]:
    """The first heads of a ranking, as a table."""
    rows = [["head", profile.objective, "change", "examples"]]
    for ranked in profile.ranking[:SHOWN]:
        known = ranked.score is not None
        rows.append(
            [
                head_name(ranked.head),
                f"{ranked.score:.3f}" if known else "–",
                f"{ranked.score - profile.plain:+.3f}" if ranked.score is not None else "–",
                str(ranked.examples),
            ]
        )
    return rows


def _sizes(profiles: Sequence[Profile], held_out: HeldOut) -> list[list[str]]:
    """The scores by number of heads, as a table."""
    chosen = [p.task for p in profiles]
    heading: list[str] = []
    lines = []
    for (k, alpha), rows in held_out.items():
        heading, line = tables.cells(chosen, [_renamed(row) for row in rows])
        size = max(len(row.method.heads) if row.method.heads else 0 for row in rows)
        lines.append(["plain" if k == 0 else f"top {k}: {size} heads, α {alpha:g}", *line[1:]])
    return [heading, *lines]


def _renamed(row: Row) -> Row:
    """The row under a common name: tasks may have different sets, but share a line."""
    return replace(row, method=replace(row.method, name="size"))
