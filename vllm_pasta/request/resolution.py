"""An emphasis that is ready to run: token ranges, how strong each is, and the steered heads.

Admission makes a ``ResolvedEmphasis`` of the user's ``Emphasis`` once prompt, model and server
defaults are known. It is all that the scheduler, the KV connectors and the workers get to see.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from vllm_pasta.errors import EmphasisError
from vllm_pasta.request.heads import HeadSet

KEY = "emphasis"

WIRE_KEY = "_vllm_pasta"
"""Key in ``SamplingParams.extra_args`` of the resolved emphasis, in its wire form; and in the
prompt of a beam search."""

LEAST_FACTOR = 1e-4
"""Least factor that a share may lead to: even where a head all but ignores the marks, a trace of
the prompt's other tokens stays."""

MAX_SPANS = 256
"""Most spans and marks that one request may carry, and most ranges they may come to."""

Span = tuple[int, int]


@dataclass(frozen=True)
class ResolvedEmphasis:
    """An emphasis that is ready to run.

    Attention to a token of the prompt is scaled by the token's factor: its span's, or ``alpha``
    where no span holds it. Generated tokens are never scaled.

    With a ``share`` the factor of the prompt's other tokens is each (row, head) pair's own: the
    largest in ``[alpha, 1]`` that gives the spans at least that share of what the pair attends to
    in the prompt. A pair that sees no token of a span is left as it is.

    Attributes:
        spans: Emphasised token ranges: half open, sorted, disjoint, within ``[0, prompt_len)``.
        alpha: Factor of the prompt's other tokens; > 0, finite.
        heads: The steered query heads.
        prompt_len: Number of prompt tokens. Tokens from there on are generated.
        factors: Factor of each span's tokens; > 0, finite. Empty where all are 1, which is full
            strength; a tuple of ones is stored as the empty one. Spans that touch have different
            factors, and none has ``alpha`` (`strongest` makes such).
        share: Least share of the spans, in (0, 1); None where ``alpha`` is the factor itself.
        watch: A name under which the workers keep what the prompt attends to; None for nearly all
            requests. It changes nothing else, so it is no part of the wire form that keys are of.

    Raises:
        ValueError: there are factors, and not one for each span, or a share beside them.
    """

    spans: tuple[Span, ...]
    alpha: float
    heads: HeadSet
    prompt_len: int
    factors: tuple[float, ...] = ()
    share: float | None = None
    watch: str | None = None

    def __post_init__(self) -> None:
        if self.factors and len(self.factors) != len(self.spans):
            raise ValueError(f"expected {len(self.spans)} factors, got {len(self.factors)}")
        if all(factor == 1.0 for factor in self.factors):
            object.__setattr__(self, "factors", ())
        if self.share is not None and self.factors:
            raise ValueError(f"expected no factors beside a share, got {self.factors}")

    @property
    def odds(self) -> float:
        """With a share, what the prompt's other tokens may weigh at most, in units of what the
        spans weigh; 0 without one."""
        return 0.0 if self.share is None else (1 - self.share) / self.share

    @property
    def span_factors(self) -> tuple[float, ...]:
        """Factor of each span's tokens, ones written out."""
        return self.factors or (1.0,) * len(self.spans)

    @property
    def first(self) -> int:
        """Position of the first emphasised token. Query rows before it are plain."""
        return self.spans[0][0]

    @property
    def is_plain(self) -> bool:
        """Whether steering changes nothing: all tokens of the prompt have the same factor, so
        that none is emphasised over another."""
        return self.spans in ((), ((0, self.prompt_len),)) or (
            self.alpha == 1.0 and not self.factors
        )

    @cached_property
    def digest(self) -> str:
        """Digest of strength and heads (not of spans and their factors), the same in every process
        and release."""
        share = [] if self.share is None else [self.share.hex()]
        return _digest([self.alpha.hex(), self.heads.to_wire(), *share])

    @cached_property
    def fingerprint(self) -> str:
        """Digest of all that makes one request's KV differ from another's of the same tokens, the
        same in every process."""
        return _digest(self.to_wire())

    def to_wire(self) -> dict[str, Any]:
        """Plain dict, list, float, int: for msgpack between vLLM's processes."""
        wire = {
            "spans": [list(span) for span in self.spans],
            "alpha": self.alpha,
            "heads": self.heads.to_wire(),
            "prompt_len": self.prompt_len,
        }
        if self.share is not None:
            wire["share"] = self.share
        return {**wire, "factors": list(self.factors)} if self.factors else wire

    @classmethod
    def carried_by(cls, params: Any) -> "ResolvedEmphasis | None":
        """What admission put into a request's sampling params; None where nothing is steered."""
        wire = wire_of(params)
        return None if wire is None else cls.from_wire(wire)

    @classmethod
    def from_wire(cls, wire: Mapping[str, Any]) -> "ResolvedEmphasis":
        return cls(
            spans=tuple((start, end) for start, end in wire["spans"]),
            alpha=wire["alpha"],
            heads=HeadSet.from_wire(wire["heads"]),
            prompt_len=wire["prompt_len"],
            factors=tuple(wire.get("factors", ())),
            share=wire.get("share"),
            watch=wire.get("watch"),
        )


@dataclass(frozen=True)
class Resolution:
    """What became of a request's emphasis.

    Attributes:
        emphasis: Ready to run.
        token_ids: The prompt's; others than before if markup was taken out.
        text: The prompt's, after markup was taken out; None where only token ranges were given.
        spans: The marked token ranges, those included that are as strong as unmarked tokens.
        factors: A factor for each of ``spans``; empty where all are 1, full strength.
        prompt: Which prompt of the request's list it is, from 0.
        strength_from: Who gave ``emphasis.share``, or without one ``emphasis.alpha``: "request",
            "server", "head set" or "default".
        images: For each image of the prompt, the ranges of tokens that carry its features.
    """

    emphasis: ResolvedEmphasis
    token_ids: list[int]
    text: str | None
    spans: tuple[Span, ...]
    factors: tuple[float, ...] = ()
    prompt: int = 0
    strength_from: str = "request"
    images: tuple[tuple[Span, ...], ...] = ()

    def report(self, decode: Callable[[list[int]], str]) -> list[dict[str, Any]]:
        """The marked token ranges and their text, for people, with one token for each image;
        ``images``, the images that a range touches, if any; and ``alpha``, a mark's own factor,
        where it is not 1.

        Args:
            decode: Token ids to text.
        """
        found = []
        for span, factor in zip(self.spans, self.factors or (1.0,) * len(self.spans), strict=True):
            ids, images = self._shortened(span)
            found.append(
                {
                    "tokens": list(span),
                    "text": decode(ids),
                    **({"images": images} if images else {}),
                    **({} if factor == 1.0 else {"alpha": factor}),
                }
            )
        return found

    def _shortened(self, span: Span) -> tuple[list[int], list[int]]:
        """The tokens of a span, one for each image's; and the images that it touches."""
        start, end = span
        ids: list[int] = []
        touched: list[int] = []
        ranges = [(a, b, i) for i, spans in enumerate(self.images) for a, b in spans]
        for a, b, i in sorted(ranges):
            if a < end and b > start:
                ids += self.token_ids[start : max(a, start) + (i not in touched)]
                start = min(b, end)
                touched.append(i)
        return ids + self.token_ids[start:end], sorted(set(touched))


def wire_of(params: Any) -> Mapping[str, Any] | None:
    """The wire form that a request's sampling params carry; None where nothing is steered.

    Args:
        params: vLLM's; None for a pooling request.
    """
    extra_args = (params and params.extra_args) or {}
    return extra_args.get(WIRE_KEY) or None  # empty: resolved, and there is nothing to steer


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:32]


def union(spans: Iterable[Span]) -> tuple[Span, ...]:
    """The union of half-open ranges as sorted, disjoint, non-adjacent ranges."""
    merged: list[Span] = []
    for start, end in sorted(spans):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((start, end))
    return tuple(merged)


def strongest(
    marks: Iterable[tuple[Span, float]], alpha: float
) -> tuple[tuple[Span, ...], tuple[float, ...]]:
    """Marks of different strengths as the spans and factors of a `ResolvedEmphasis`.

    Where marks overlap, the strongest counts: the one with the largest factor. Tokens whose factor
    is ``alpha`` are as good as unmarked, and fall out.

    Args:
        marks: Half-open token ranges in any order, each with the factor of its tokens.
        alpha: Factor of unmarked tokens.

    Returns:
        Spans, sorted and disjoint, those that touch of different factors; and a factor for each,
        none of them ``alpha``. No factors at all where all are 1.

    Raises:
        EmphasisError: that makes more than `MAX_SPANS` spans.
    """
    strengths: dict[float, list[Span]] = {}
    for span, factor in marks:
        strengths.setdefault(factor, []).append(span)
    taken: tuple[Span, ...] = ()  # by a larger factor
    found: list[tuple[Span, float]] = []
    for factor in sorted(strengths, reverse=True):
        if factor != alpha:
            found += [(span, factor) for span in _without(union(strengths[factor]), taken)]
        taken = union((*taken, *strengths[factor]))
    found.sort()
    check_count(len(found))
    factors = tuple(factor for _, factor in found)
    return (
        tuple(span for span, _ in found),
        () if all(factor == 1.0 for factor in factors) else factors,
    )


def _without(spans: Iterable[Span], taken: Iterable[Span]) -> list[Span]:
    """What of disjoint ``spans`` is outside the sorted, disjoint ranges ``taken``."""
    left = list(spans)
    for start, end in taken:
        left = [
            part
            for a, b in left
            for part in ((a, min(b, start)), (max(a, end), b))
            if part[0] < part[1]
        ]
    return left


def check_share(share: float, share_from: str, factors: Iterable[float]) -> None:
    """Checks that no mark has a strength of its own beside a share.

    Args:
        share: The share that is in force.
        share_from: Who gives it: "request" or "server".
        factors: A factor for each of the marked ranges; none where all are 1.

    Raises:
        EmphasisError: a mark has one.
    """
    if any(factor != 1.0 for factor in factors):
        raise EmphasisError(
            "a mark has a strength of its own, which goes with `alpha` alone, but the strength is "
            f"the {share_from}'s share {share:g}: give the request an `alpha`, or the mark none",
            field="emphasis.share",
        )


def check_count(count: int) -> None:
    """Checks a number of spans and marks.

    Raises:
        EmphasisError: more than `MAX_SPANS`.
    """
    if count > MAX_SPANS:
        raise EmphasisError(f"expected at most {MAX_SPANS} spans and marks, got {count}", field=KEY)
