"""Tables in the documents that the code knows better: ``python -m tools.generated`` writes them.

Each stands between ``<!-- generated: NAME -->`` and ``<!-- end -->``. A test fails where the code
and a table differ.
"""

import re
from collections.abc import Callable, Iterable
from pathlib import Path

from tools import recipes, registry
from vllm_pasta.integration.attach import PATCHES
from vllm_pasta.integration.patching import Patch
from vllm_pasta.integration.refusals import (
    BACKEND,
    ENGINE,
    LAYER,
    LAYERS,
    MLA_LAYER,
    RECURRENCE,
    Refusal,
)

ROOT = Path(__file__).parent.parent


def _table(header: str, rows: Iterable[Iterable[str]]) -> str:
    lines = [header, re.sub(r"[^|]+", "---", header)]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])


def refusals() -> str:
    """Every reason for which an engine does not start."""

    def row(refusal: Refusal, before: str) -> Iterable[str]:
        where = {"cpu": "CPU", "gpu": "GPU", None: "CPU, GPU"}[refusal.device]
        return (
            f"{before}{refusal.summary}",
            "engine does not start",
            where,
            f"`{refusal.test}`",
        )

    rows = [row(refusal, "") for refusal in (*ENGINE, *LAYERS)]
    rows += [row(refusal, "a layer ") for refusal in (*BACKEND, *LAYER, *RECURRENCE)]
    rows += [row(refusal, "an MLA layer ") for refusal in MLA_LAYER]
    return _table("| feature | with emphasis | on | test |", rows)


def targets() -> str:
    """Every function of vLLM that is wrapped."""

    def when(patch: Patch) -> str:
        if patch.part is not None:
            return f"with the steered {patch.part}"
        return "in front ends" if patch.frontend else "in every process"

    def row(patch: Patch) -> Iterable[str]:
        file = f"{patch.wrapper.__module__.replace('.', '/')}.py"
        return f"`{patch.target}`", f"[{Path(file).stem}](../{file})", when(patch)

    return _table("| function of vLLM | wrapped by | when |", map(row, PATCHES))


TABLES: dict[tuple[str, str], Callable[[], str]] = {
    ("docs/models.md", "architectures"): registry.table,
    ("docs/models.md", "reach"): recipes.reach,
    ("docs/features.md", "refusals"): refusals,
    ("patches/README.md", "targets"): targets,
}


def differing(*, write: bool = False) -> list[str]:
    """The documents whose tables are not what the code says.

    Args:
        write: Whether to correct them.

    Raises:
        ValueError: a document has no place for its table.
    """
    found = []
    for (name, table), make in TABLES.items():
        path = ROOT / name
        text = path.read_text(encoding="utf-8")
        start = f"<!-- generated: {table} -->\n"
        pattern = re.compile(rf"({re.escape(start)}).*?(<!-- end -->\n)", re.DOTALL)
        if not pattern.search(text):
            raise ValueError(f"{name}: expected a line {start.strip()!r}, and <!-- end -->")
        made = make()
        wanted = pattern.sub(lambda match, made=made: f"{match[1]}\n{made}\n\n{match[2]}", text)
        if wanted != text:
            found.append(name)
            if write:
                path.write_text(wanted, encoding="utf-8")
    return found


if __name__ == "__main__":
    print("\n".join(f"{name}: written" for name in differing(write=True)) or "nothing to do")
