"""Head sets by name: those that come with the package, and which of them fit a model.

This folder holds those that this project measured, ``published/`` those that others published and
it did not. The file of either kind says in ``for`` which model it was made for:

    {"for": {"names": ["Qwen3-4B-Base"], "model_type": "qwen3", "layers": 36, "query_heads": 32,
             "hidden_size": 2560}, "chosen": true, …}

Models of one family and size agree in all but their names. So a set *fits* every model with that
shape, and is *for* one alone: a model that is also called so. ``chosen`` marks the one set of
several that a server takes for its model where it is told of no heads.
"""

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from vllm_pasta.errors import HeadSetError
from vllm_pasta.request.heads import HeadSet
from vllm_pasta.request.shape import ModelShape

PUBLISHED = "published"
"""The folder of head sets that others published."""

_SNAPSHOT = re.compile(r"models--[^/]+--([^/]+)/snapshots/[0-9a-f]{40}$")
"""A model's folder in the hub's cache."""


@dataclass(frozen=True)
class Model:
    """A model, as far as head sets depend on which it is.

    Attributes:
        name: As vLLM was given it: a folder, or ``owner/name``.
        model_type: The language model's, as transformers calls it (``llama``, ``qwen3``, …).
        hidden_size: Its width.
        shape: Its layers and heads.
        revision: The revision that vLLM was given, if any.
    """

    name: str
    model_type: str
    hidden_size: int
    shape: ModelShape
    revision: str | None = None

    @property
    def short_name(self) -> str:
        """The last part of ``name``, in lower case: no owner, no folder."""
        name = self.name.rstrip("/")
        if snapshot := _SNAPSHOT.search(name):  # which vLLM makes of a name where it is offline
            name = snapshot[1]
        return name.rpartition("/")[2].casefold()


def bundled() -> dict[str, HeadSet]:
    """The head sets that come with the package, by name, those of others last."""
    folder = resources.files("vllm_pasta.request") / "head_sets"
    return {
        Path(entry.name).stem: HeadSet.from_json(
            json.loads(entry.read_text(encoding="utf-8")), name=Path(entry.name).stem
        )
        for place in (folder, folder / PUBLISHED)
        for entry in sorted(place.iterdir(), key=lambda entry: entry.name)
        if entry.name.endswith(".json")
    }


def find(name: str, known: Mapping[str, HeadSet] | None = None) -> HeadSet:
    """The head set of that name, or else the one in the file of that path.

    Args:
        name: A name among ``known``, or a path.
        known: Head sets by name; None means those that come with the package.

    Raises:
        HeadSetError: neither a known name nor a readable head set file.
    """
    known = bundled() if known is None else known
    if name in known:
        return known[name]
    try:
        return HeadSet.load(name)
    except HeadSetError as e:
        raise HeadSetError(f"{e}. Head sets known by name: {', '.join(sorted(known))}") from e


def fits(heads: HeadSet, model: Model) -> bool:
    """Whether a model has every head of a set, and is of the shape that its file names, if any."""
    made_for = heads.provenance.get("for")
    if isinstance(made_for, Mapping) and _shape_of(made_for) != _shape(model):
        return False
    try:
        model.shape.check(heads)
    except HeadSetError:
        return False
    return True


def is_for(heads: HeadSet, model: Model) -> bool:
    """Whether a set was made for this very model: it fits, and the model is called so."""
    made_for = heads.provenance.get("for")
    if not isinstance(made_for, Mapping) or not fits(heads, model):
        return False
    return model.short_name in (str(name).casefold() for name in made_for.get("names", ()))


def chosen_for(model: Model, known: Mapping[str, HeadSet]) -> HeadSet | None:
    """The set that a server takes for its model where it is told of no heads, if there is one."""
    found = (
        heads
        for heads in known.values()
        if heads.provenance.get("chosen") is True and is_for(heads, model)
    )
    return next(found, None)


def describe(heads: HeadSet) -> str:
    """A set for a log line: its name, size, strength, and who answers for it."""
    parts = [f"{len(heads)} heads"]
    if heads.alpha is not None:
        parts.append(f"α {heads.alpha:g}")
    if publisher := heads.provenance.get("published_by"):
        parts.append(f"published by {publisher}, not measured by this project")
    return f"{heads.name or 'given in the configuration'} ({', '.join(parts)})"


def _shape_of(made_for: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple(
        made_for.get(key) for key in ("model_type", "hidden_size", "layers", "query_heads")
    )


def _shape(model: Model) -> tuple[Any, ...]:
    return (model.model_type, model.hidden_size, model.shape.num_layers, model.shape.num_heads)


def names(known: Mapping[str, HeadSet], model: Model | None) -> Iterator[str]:
    """The names of the sets that fit a model, sorted; of all where the model is not known."""
    return (name for name in sorted(known) if model is None or fits(known[name], model))
