"""Ways to make a model follow a part of its prompt: marks, demonstrations, steered heads."""

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass

from vllm_pasta.errors import HeadSetError, PastaError
from vllm_pasta.request.heads import HeadSet, bundled

Head = tuple[int, int]
"""Layer and query head, both from 0 on."""

SHOTS = 3
"""Demonstrations of "few-shot", as in the paper."""

MARKS = {"starred": "*", "quoted": '"'}

KNOWN = (
    "zero-shot, starred, quoted, few-shot, all, layer:L, layers:A-B, head:L.H, or a head set's "
    "name or file"
)


@dataclass(frozen=True)
class Method:
    """One way.

    Attributes:
        name: What tables call it.
        mark: Put on both sides of what is emphasised.
        shots: Number of demonstrations before the prompt.
        heads: Steered heads; None means no steering.
        alpha: Scale factor of the steered heads' attention to the prompt's other tokens.
    """

    name: str
    mark: str = ""
    shots: int = 0
    heads: HeadSet | None = None
    alpha: float = 1.0

    @property
    def key(self) -> str:
        """Tells apart what is computed differently, whatever it is called."""
        if self.heads is None:
            return f"{self.mark}{self.shots}"
        wire = json.dumps(self.heads.to_wire())
        short = wire if len(wire) < 12 else hashlib.sha256(wire.encode()).hexdigest()[:12]
        return f"{self.mark}{self.shots}{short}@{self.alpha:g}"


PLAIN = Method("zero-shot")


def steer(name: str, heads: Sequence[Head], alpha: float) -> Method:
    """Steers exactly these heads."""
    return Method(name, heads=head_set(heads), alpha=alpha)


def head_set(heads: Sequence[Head]) -> HeadSet:
    """The head set of these heads."""
    layers: dict[str, list[int]] = {}
    for layer, head in heads:
        layers.setdefault(str(layer), []).append(head)
    return HeadSet.from_json(layers)


def parse(text: str, alpha: float, every: Sequence[Head]) -> Method:
    """A method by its name on the command line.

    Args:
        text: See `KNOWN`.
        alpha: For methods that steer.
        every: All heads of the model.

    Raises:
        PastaError: unknown, or heads that the model does not have.
    """
    if text == PLAIN.name:
        return PLAIN
    if text in MARKS:
        return Method(text, mark=MARKS[text])
    if text == "few-shot":
        return Method(text, shots=SHOTS)
    if text == "all":
        return steer(text, every, alpha)
    if match := re.fullmatch(r"layers?:(\d+)(?:-(\d+))?", text):
        first, last = int(match[1]), int(match[2] or match[1])
        chosen = [head for head in every if first <= head[0] <= last]
        if not chosen or last > every[-1][0]:
            raise PastaError(f"{text}: this model's layers are 0 to {every[-1][0]}")
        return steer(text, chosen, alpha)
    if match := re.fullmatch(r"head:(\d+)\.(\d+)", text):
        head = int(match[1]), int(match[2])
        if head not in every:
            raise PastaError(f"{text}: this model's last head is {every[-1][0]}.{every[-1][1]}")
        return steer(text, [head], alpha)
    return Method(text, heads=load_heads(text, every), alpha=alpha)


def load_heads(text: str, every: Sequence[Head]) -> HeadSet:
    """A head set by name or file, checked against the model.

    Raises:
        PastaError: there is none; or a head that the model does not have.
    """
    try:
        heads = bundled().get(text) or HeadSet.load(text)
    except HeadSetError as e:
        raise PastaError(f"method {text!r}: expected {KNOWN}; {e}") from e
    heads.check(every[-1][0] + 1, every[-1][1] + 1, sorted({layer for layer, _ in every}))
    return heads
