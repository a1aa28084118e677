"""What a profile found: provenance for the head set, a Markdown report, heat maps."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from vllm_pasta.profiling import tables
from vllm_pasta.profiling.estimates import overlap, rank_correlation
from vllm_pasta.profiling.evaluation import Row
from vllm_pasta.profiling.methods import Head
from vllm_pasta.profiling.ranking import Profile

SHOWN = 20


def name(head: Head) -> str:
    """``17.3`` is head 3 of layer 17."""
    return f"{head[0]}.{head[1]}"


def as_json(profile: Profile) -> dict[str, Any]:
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
        "ranking": [name(ranked.head) for ranked in profile.ranking],
        "scores": [
            None if ranked.score is None else round(ranked.score, 4) for ranked in profile.ranking
        ],
        "estimates": [
            round(ranked.estimate, 4) for ranked in profile.ranking if ranked.estimate is not None
        ],
    }


def comparison(profile: Profile, theirs: Sequence[str], k: int) -> str:
    """How much of another ranking this one keeps."""
    ours = [name(ranked.head) for ranked in profile.ranking]
    return (
        f"{profile.task.name}: rank correlation {rank_correlation(ours, theirs):.2f}; of the "
        f"other's first {k} heads, {overlap(ours, theirs, k):.0%} are among the first {k} here"
    )


def write(
    out: Path,
    info: Mapping[str, Any],
    profiles: Sequence[Profile],
    sets: Mapping[str, Sequence[Head]],
    held_out: Mapping[int, Sequence[Row]],
    compared: str,
) -> str:
    """Writes ``OUT.md`` and ``OUT.png`` beside the head set; gives the report's text."""
    tasks = ", ".join(f"{p.task.name} ({len(p.train.examples)})" for p in profiles)
    parts = [
        f"# Heads of {info['model']}",
        f"Search {info['search']}, α {info['alpha']:g}, examples: {tasks}; {info['requests']} "
        f"requests rank the heads. The {info['answers']} answers behind this report took "
        f"{info['engine_seconds'] / 60:.1f} minutes, gradients {info['gradient_seconds']:.0f} s; "
        "engine starts are not counted.",
    ]
    for task, heads in sets.items():
        of = f"for {task}" if task else f"({info['select']})"
        layers: dict[int, list[int]] = {}
        for layer, head in heads:
            layers.setdefault(layer, []).append(head)
        lines = [f"- layer {layer}: {', '.join(map(str, of))}" for layer, of in layers.items()]
        parts.append(f"## {len(heads)} heads {of}\n\nTop {info['top_k']}.\n\n" + "\n".join(lines))
    for profile in profiles:
        parts.append(_best(profile))
    if held_out:
        parts.append(_sizes(profiles, held_out))
    if compared:
        parts.append(f"## Compared\n\n{compared}")
    if heat_map(out.with_suffix(".png"), profiles, info):
        parts.append(f"![Heads by task]({out.with_suffix('.png').name})")
    else:
        parts.append("No heat map: matplotlib is not installed (`pip install vllm-pasta[bench]`).")
    text = "\n\n".join(parts)
    out.with_suffix(".md").write_text(text + "\n", encoding="utf-8")
    return text


def _best(profile: Profile) -> str:
    rows = [["head", profile.objective, "change", "examples"]]
    for ranked in profile.ranking[:SHOWN]:
        known = ranked.score is not None
        rows.append(
            [
                name(ranked.head),
                f"{ranked.score:.3f}" if known else "–",
                f"{ranked.score - profile.plain:+.3f}" if ranked.score is not None else "–",
                str(ranked.examples),
            ]
        )
    return (
        f"## {profile.task.name}: the first {len(rows) - 1} heads\n\n"
        f"Without steering {profile.plain:.3f}.\n\n{tables.markdown(rows)}"
    )


def _sizes(profiles: Sequence[Profile], held_out: Mapping[int, Sequence[Row]]) -> str:
    chosen = [p.task for p in profiles]
    heading: list[str] = []
    lines = []
    for k, rows in held_out.items():
        heading, line = tables.cells(chosen, [_renamed(row) for row in rows])
        size = max(len(row.method.heads) if row.method.heads else 0 for row in rows)
        lines.append(["plain" if k == 0 else f"top {k}: {size} heads", *line[1:]])
    return "## Held-out examples, by number of heads\n\n" + tables.markdown([heading, *lines])


def _renamed(row: Row) -> Row:
    """Tasks may have sets of their own, but stand in one line."""
    return replace(row, method=replace(row.method, name="size"))


def heat_map(path: Path, profiles: Sequence[Profile], info: Mapping[str, Any]) -> bool:
    """Draws layer × head for each task: the change of its objective by steering that head alone.

    Heads that were not asked about show the gradient's estimate.

    Returns:
        False where matplotlib is not installed.
    """
    try:
        import matplotlib
    except ModuleNotFoundError:
        return False
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(
        1, len(profiles), figsize=(1 + 3.2 * len(profiles), 6), squeeze=False
    )
    for axis, profile in zip(axes[0], profiles, strict=True):
        changes = {
            r.head: (r.estimate or 0.0) if r.score is None else r.score - profile.plain
            for r in profile.ranking
        }
        layers, heads = (1 + max(head[i] for head in changes) for i in (0, 1))
        grid = [[changes[layer, head] for head in range(heads)] for layer in range(layers)]
        limit = max(abs(value) for value in changes.values()) or 1.0
        image = axis.imshow(grid, cmap="RdBu_r", vmin=-limit, vmax=limit, aspect="auto")
        axis.set_title(f"{profile.task.name}: change of {profile.objective}", fontsize=9)
        axis.set_xlabel("query head")
        axis.set_xticks(range(heads))
        axis.set_ylabel("layer")
        figure.colorbar(image, ax=axis, shrink=0.8)
    figure.suptitle(f"{info['model']}, one head steered at a time, α {info['alpha']:g}", fontsize=9)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return True
