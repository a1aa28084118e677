"""Head sets: which query heads are steered, with where the choice comes from.

A head set file is JSON in either of two forms:

    {"20": [0, 1, 2], "21": [4]}                  as in the PASTA reference: layer -> query heads
    {"heads": {"20": [0, 1, 2]}, "model": …, …}   the same, with provenance beside it

Layers and query heads are numbered over the whole model. Of what stands beside the heads, ``alpha``
is the strength that the set was chosen with: it holds where neither request nor server gives one.
"""

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vllm_pasta.errors import HeadSetError, show
from vllm_pasta.request.marks import parse_alpha

DEFAULT_ALPHA = 0.01
"""The paper's, for a head set that says none of its own."""


@dataclass(frozen=True)
class HeadSet:
    """A choice of query heads.

    Attributes:
        layers: ``((layer, (head, …)), …)``, both sorted, no layer without heads.
        name: What to call it in messages; not part of its identity.
        provenance: The file's other fields (model, tasks, scores, …); not part of its identity.
        alpha: The set's own scale factor, which holds where neither request nor server gives one;
            None where its file says none. Not part of its identity.
    """

    layers: tuple[tuple[int, tuple[int, ...]], ...]
    name: str = field(default="", compare=False)
    provenance: Mapping[str, Any] = field(default_factory=dict, compare=False, hash=False)

    @property
    def alpha(self) -> float | None:
        alpha = self.provenance.get("alpha")
        return None if alpha is None else float(alpha)

    def __len__(self) -> int:
        return sum(len(heads) for _, heads in self.layers)

    @classmethod
    def from_json(cls, value: Any, name: str = "") -> "HeadSet":
        """Builds a head set from either JSON form.

        Raises:
            HeadSetError: not a known form; a negative or repeated head; no head at all; an
                ``alpha`` that is no finite number above 0.
        """
        if not isinstance(value, Mapping):
            raise HeadSetError(
                'expected {"layer": [heads]} or {"heads": {"layer": [heads]}, …}, '
                f"got {type(value).__name__}"
            )
        provenance: dict[str, Any] = {}
        if "heads" in value:
            provenance = {k: v for k, v in value.items() if k != "heads"}
            value = value["heads"]
            try:
                if provenance.get("alpha") is not None:
                    parse_alpha(provenance["alpha"])
            except ValueError as e:
                raise HeadSetError(f"alpha of the head set: {e}") from None
            if not isinstance(value, Mapping):
                raise HeadSetError(
                    f'expected "heads": {{"layer": [heads]}}, got {type(value).__name__}'
                )
        layers: dict[int, tuple[int, ...]] = {}
        for key, heads in value.items():
            layer = _index(key, "layer")
            if not isinstance(heads, Sequence) or isinstance(heads, str | bytes):
                raise HeadSetError(f"layer {layer}: expected a list of heads, got {show(heads)}")
            indices = sorted(_index(head, f"head of layer {layer}") for head in heads)
            if layer in layers or len(set(indices)) != len(indices):
                raise HeadSetError(f"layer {layer}: given twice, or a head of it is: {show(heads)}")
            if indices:
                layers[layer] = tuple(indices)
        if not layers:
            raise HeadSetError("expected at least one head, got none")
        return cls(tuple(sorted(layers.items())), name, provenance)

    @classmethod
    def load(cls, path: str | Path) -> "HeadSet":
        """Loads a head set file.

        Raises:
            HeadSetError: the file is missing or malformed; says which and why.
        """
        path = Path(path)
        try:
            return cls.from_json(json.loads(path.read_text(encoding="utf-8")), name=path.stem)
        except OSError as e:
            raise HeadSetError(f"head set file {path}: cannot be read: {e.strerror}") from e
        except (HeadSetError, ValueError, RecursionError) as e:
            raise HeadSetError(f"head set file {path}: {e}") from e

    def save(self, path: str | Path) -> None:
        """Writes a head set file with the heads and their provenance.

        Readers see the whole file, or what was there before.
        """
        text = _dump({**self.provenance, "heads": self.to_json()})
        file = Path(path).resolve()
        scratch = file.with_name(f"{file.name}.{os.getpid()}")
        try:
            scratch.write_text(text + "\n", encoding="utf-8")
            scratch.replace(file)
        finally:
            scratch.unlink(missing_ok=True)

    def check(
        self,
        num_layers: int,
        num_heads: int | Sequence[int],
        attention_layers: Sequence[int] | None = None,
    ) -> None:
        """Checks that every head exists in a model.

        Args:
            num_layers: Layers of the model.
            num_heads: Query heads of a layer, or of each layer where they differ.
            attention_layers: Layers that have attention heads; None means all.

        Raises:
            HeadSetError: names the head and the model's sizes, or the layer that has no heads and
                those that have.
        """
        for layer, heads in self.layers:
            if isinstance(num_heads, int):
                count, others = num_heads, ""
            else:
                count, others = num_heads[min(layer, num_layers - 1)], ", in this layer"
            if layer >= num_layers or heads[-1] >= count:
                raise HeadSetError(
                    f"layer {layer}, head {heads[-1]} is out of range: this model has "
                    f"{num_layers} layers (0 to {num_layers - 1}) of {count} query heads "
                    f"(0 to {count - 1}){others}"
                )
            if attention_layers is not None and layer not in attention_layers:
                raise HeadSetError(
                    f"layer {layer} has no attention heads: it holds a recurrence, a convolution "
                    f"or an MLP. Layers with attention heads: {ranges(attention_layers)}"
                )

    def to_json(self) -> dict[str, list[int]]:
        """``{"layer": [head, …], …}``, as `from_json` reads it and as requests give heads."""
        return {str(layer): list(heads) for layer, heads in self.layers}

    def to_wire(self) -> list[list[int]]:
        """``[[layer, head, head, …], …]``."""
        return [[layer, *heads] for layer, heads in self.layers]

    @classmethod
    def from_wire(cls, wire: Sequence[Sequence[int]]) -> "HeadSet":
        return cls(tuple((layer, tuple(heads)) for layer, *heads in wire))


def ranges(indices: Iterable[int]) -> str:
    """Numbers for people, those that follow one another as a range: ``0-3, 7, 9-10``."""
    groups: list[list[int]] = []
    for index in sorted(indices):
        if groups and index == groups[-1][1] + 1:
            groups[-1][1] = index
        else:
            groups.append([index, index])
    return ", ".join(f"{a}" if a == b else f"{a}-{b}" for a, b in groups) or "none"


def _dump(value: Any, indent: str = "") -> str:
    """JSON with one line per field; lists stay on a line, for there are rankings of all heads."""
    if not isinstance(value, Mapping) or not value:
        return json.dumps(value, ensure_ascii=False)
    inner = indent + " "
    fields = (f"{inner}{json.dumps(str(k))}: {_dump(v, inner)}" for k, v in value.items())
    return "{\n" + ",\n".join(fields) + f"\n{indent}}}"


def _index(value: Any, what: str) -> int:
    if isinstance(value, str) and value.isascii() and value.isdigit() and len(value) < 10:
        value = int(value)
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 10**9:
        raise HeadSetError(f"expected a {what} as a number from 0 on, got {show(value)}")
    return value
