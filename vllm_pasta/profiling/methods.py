"""Ways to make a model follow a part of its prompt: marks, demonstrations, steered heads."""

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from vllm_pasta.errors import HeadSetError, PastaError
from vllm_pasta.request.head_sets import library
from vllm_pasta.request.heads import DEFAULT_ALPHA, HeadSet, ranges

Head = tuple[int, int]
"""Layer and query head, both from 0 on."""

SHOTS = 3
"""Demonstrations of "few-shot", as in the paper."""


def head_name(head: Head) -> str:
    """How commands, head set files and reports write a head: ``17.3`` is head 3 of layer 17."""
    return f"{head[0]}.{head[1]}"


def parse_head(name: str) -> Head:
    """Reads a `head_name`.

    Raises:
        PastaError: it is not one.
    """
    match = re.fullmatch(r"(\d+)\.(\d+)", name)
    if not match:
        raise PastaError(f"expected a head such as 17.3 (layer 17, head 3), got {name!r}")
    return int(match[1]), int(match[2])


MARKS = {"starred": "*", "quoted": '"'}

KNOWN = (
    "zero-shot, starred, quoted, few-shot, all, layer:L, layers:A-B, head:L.H, or a head set's "
    "name or file"
)


@dataclass(frozen=True)
class Method:
    """One way to make a model follow a part of its prompt.

    Attributes:
        name: The method's name in tables.
        mark: Text put on both sides of the emphasised part; may be empty.
        shots: Number of demonstrations before the prompt.
        heads: Steered heads; None means no steering.
        alpha: Scale factor of the steered heads' attention to the prompt's other tokens.
        share: Instead of ``alpha``, the least share of the emphasised part; None means none.
    """

    name: str
    mark: str = ""
    shots: int = 0
    heads: HeadSet | None = None
    alpha: float = 1.0
    share: float | None = None

    @property
    def key(self) -> str:
        """Differs between methods that compute different things; the name plays no part."""
        if self.heads is None:
            return f"{self.mark}{self.shots}"
        wire = json.dumps(self.heads.to_wire())
        short = wire if len(wire) < 12 else hashlib.sha256(wire.encode()).hexdigest()[:12]
        strength = f"{self.alpha:g}" if self.share is None else f"share {self.share:g}"
        return f"{self.mark}{self.shots}{short}@{strength}"


PLAIN = Method("zero-shot")


def steer(name: str, heads: Sequence[Head], alpha: float) -> Method:
    """The method that steers exactly these heads."""
    return Method(name, heads=head_set(heads), alpha=alpha)


def head_set(heads: Sequence[Head]) -> HeadSet:
    """The head set of these heads."""
    layers: dict[str, list[int]] = {}
    for layer, head in heads:
        layers.setdefault(str(layer), []).append(head)
    return HeadSet.from_json(layers)


def parse(text: str, alpha: float | None, every: Sequence[Head]) -> Method:
    """The method of that name.

    Args:
        text: A name; `KNOWN` lists them.
        alpha: Scale factor of a method that steers; None means the head set's own, else 0.01.
        every: All heads of the model.

    Raises:
        PastaError: the name is unknown, or it names heads that the model does not have.
    """
    if text == PLAIN.name:
        return PLAIN
    if text in MARKS:
        return Method(text, mark=MARKS[text])
    if text == "few-shot":
        return Method(text, shots=SHOTS)
    factor = DEFAULT_ALPHA if alpha is None else alpha
    if text == "all":
        return steer(text, every, factor)
    if match := re.fullmatch(r"layers?:(\d+)(?:-(\d+))?", text):
        first, last = int(match[1]), int(match[2] or match[1])
        chosen = [head for head in every if first <= head[0] <= last]
        if not chosen or last > every[-1][0]:
            raise PastaError(f"{text}: this model's layers are {_layers(every)}")
        return steer(text, chosen, factor)
    if re.fullmatch(r"head:\d+\.\d+", text):
        head = parse_head(text.removeprefix("head:"))
        if head not in every:
            raise PastaError(
                f"{text}: this model's last head is {head_name(every[-1])}, and its layers are "
                f"{_layers(every)}"
            )
        return steer(text, [head], factor)
    heads = load_heads(text, every)
    return Method(text, heads=heads, alpha=(heads.alpha or factor) if alpha is None else alpha)


def _layers(every: Sequence[Head]) -> str:
    """The layers that have heads, for people."""
    layers = sorted({layer for layer, _ in every})
    if layers[-1] == len(layers) - 1:
        return f"0 to {layers[-1]}"
    return f"{ranges(layers)} (the others have no attention heads)"


def load_heads(text: str, every: Sequence[Head]) -> HeadSet:
    """A head set by name or file, checked against the model.

    Raises:
        PastaError: there is no such head set; or it has a head that the model does not have.
    """
    try:
        heads = library.find(text)
    except HeadSetError as e:
        raise PastaError(f"method {text!r}: expected {KNOWN}; {e}") from e
    most = {layer: head + 1 for layer, head in every}  # the last head of a layer comes last
    counts = [most.get(layer, max(most.values())) for layer in range(every[-1][0] + 1)]
    heads.check(len(counts), counts if len(set(counts)) > 1 else counts[0], sorted(most))
    return heads


def parse_all(
    texts: Sequence[str],
    alphas: Sequence[float | None],
    counts: Sequence[int],
    every: Sequence[Head],
    shares: Sequence[float] = (),
) -> list[Method]:
    """All methods of these names; those that steer, once for each alpha and each share.

    Args:
        texts: Names, see `KNOWN`.
        alphas: Scale factors; None means a head set's own, else 0.01.
        counts: For head sets that a profile made: further methods, each with that many heads from
            the top of the profile's rankings.
        every: All heads of the model.
        shares: Shares, see `Method.share`.

    Raises:
        PastaError: as `parse`; or a count is above the number of ranked heads.
    """
    found: dict[str, Method] = {}
    strengths: list[tuple[float | None, float | None]]
    strengths = [(alpha, None) for alpha in alphas] + [(1.0, share) for share in shares]
    for text in texts:
        for alpha, share in strengths:
            method = parse(text, alpha, every)
            methods = [method]
            if method.heads and counts and "profiles" in method.heads.provenance:
                methods += _first_of_ranking(method, counts)
            for each in methods:
                name = each.name
                if each.heads is not None and len(strengths) > 1:
                    name += f" α={each.alpha:g}" if share is None else f" share={share:g}"
                own = None if each.heads is None else share
                found[name] = replace(each, name=name, share=own)
    return list(found.values())


def _first_of_ranking(method: Method, counts: Sequence[int]) -> list[Method]:
    """The first heads of a profile's ranking; heads of several tasks' rankings take turns."""
    assert method.heads is not None
    rankings = [p["ranking"] for p in method.heads.provenance["profiles"].values()]
    order = list(dict.fromkeys(name for turn in zip(*rankings, strict=True) for name in turn))
    if max(counts) > len(order):
        raise PastaError(f"expected at most the model's {len(order)} heads, got {max(counts)}")
    heads = [parse_head(name) for name in order]
    return [steer(f"{method.name}: top {count}", heads[:count], method.alpha) for count in counts]
