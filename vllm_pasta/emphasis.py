"""What a request asks for: the emphasis as the user wrote it, and as the engine carries it.

``Emphasis`` is the user's form, checked for shape alone. ``ResolvedEmphasis`` is what is left once
prompt, model and server defaults are known: token ranges, one alpha, one head set. Only the second
ever reaches a worker.
"""

import hashlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, cast

from vllm_pasta.errors import EmphasisError, HeadSetError
from vllm_pasta.heads import HeadSet

MAX_SPANS = 256
"""Most spans and texts that one request may carry."""

FLAT_KEYS = {"emphasis_alpha": "alpha", "emphasis_heads": "heads"}
"""Keys beside ``emphasis`` in ``extra_args``, for transports that carry scalars and flat lists."""

KEY = "emphasis"

Span = tuple[int, int]


def has_emphasis(extra_args: Mapping[str, Any] | None) -> bool:
    """Whether ``extra_args`` asks for emphasis, well formed or not."""
    return extra_args is not None and any(
        isinstance(key, str) and key.startswith(KEY) and value is not None
        for key, value in extra_args.items()
    )


@dataclass(frozen=True)
class Emphasis:
    """One request's emphasis as the user wrote it.

    Attributes:
        spans: Token ranges ``(start, end)`` of the prompt's token ids, half open.
        text: Strings to find in the prompt as the model sees it; the first occurrence counts.
        alpha: Scale factor for the other prompt tokens; None means the server's.
        heads: A head set, or the name of one known to the server; None means the server's.
    """

    spans: tuple[Span, ...] = ()
    text: tuple[str, ...] = ()
    alpha: float | None = None
    heads: HeadSet | str | None = None

    @classmethod
    def parse(cls, extra_args: Mapping[str, Any] | None) -> "Emphasis | None":
        """Reads ``extra_args["emphasis"]`` and the flat keys beside it.

        Returns:
            The emphasis, or None where ``extra_args`` asks for none.

        Raises:
            EmphasisError: not a known shape; an unknown field; a value out of range.
        """
        if not extra_args or not has_emphasis(extra_args):
            return None
        for key in extra_args:
            if isinstance(key, str) and key.startswith(KEY) and key not in (KEY, *FLAT_KEYS):
                raise EmphasisError(
                    f"unknown field; known are {', '.join((KEY, *FLAT_KEYS))}", field=key
                )
        fields = _fields(extra_args.get(KEY))
        for key, name in FLAT_KEYS.items():
            if extra_args.get(key) is None:
                continue
            if fields.get(name) is not None:
                raise EmphasisError(f"given twice, here and as emphasis.{name}", field=key)
            fields[name] = extra_args[key]
        spans = _spans(fields.get("spans"))
        text = _text(fields.get("text"))
        if not spans and not text:
            raise EmphasisError(
                "expected something to emphasise in `text` or `spans`, got neither", field=KEY
            )
        if len(spans) + len(text) > MAX_SPANS:
            raise EmphasisError(
                f"expected at most {MAX_SPANS} spans and texts, got {len(spans) + len(text)}",
                field=KEY,
            )
        return cls(spans, text, _alpha(fields.get("alpha")), _heads(fields.get("heads")))


@dataclass(frozen=True)
class ResolvedEmphasis:
    """An emphasis that is ready to run.

    Attributes:
        spans: Emphasised token ranges: half open, sorted, disjoint, within ``[0, prompt_len)``.
        alpha: Factor by which attention to the prompt's other tokens is scaled; > 0, finite.
        heads: The steered query heads.
        prompt_len: Number of prompt tokens. Tokens from there on are generated, never scaled.
    """

    spans: tuple[Span, ...]
    alpha: float
    heads: HeadSet
    prompt_len: int

    @property
    def first(self) -> int:
        """Position of the first emphasised token. Query rows before it are plain."""
        return self.spans[0][0]

    @property
    def is_plain(self) -> bool:
        """Whether steering changes nothing: alpha is 1, or the whole prompt is emphasised."""
        return self.alpha == 1.0 or self.spans == ((0, self.prompt_len),)

    @cached_property
    def digest(self) -> str:
        """Digest of alpha and heads (not of spans), the same in every process and release."""
        text = json.dumps([self.alpha.hex(), self.heads.to_wire()])
        return hashlib.sha256(text.encode()).hexdigest()[:32]

    def to_wire(self) -> dict[str, Any]:
        """Plain dict, list, float, int: for msgpack between vLLM's processes."""
        return {
            "spans": [list(span) for span in self.spans],
            "alpha": self.alpha,
            "heads": self.heads.to_wire(),
            "prompt_len": self.prompt_len,
        }

    @classmethod
    def from_wire(cls, wire: Mapping[str, Any]) -> "ResolvedEmphasis":
        return cls(
            spans=tuple((start, end) for start, end in wire["spans"]),
            alpha=wire["alpha"],
            heads=HeadSet.from_wire(wire["heads"]),
            prompt_len=wire["prompt_len"],
        )


def union(spans: Iterable[Span]) -> tuple[Span, ...]:
    """The union of half-open ranges as sorted, disjoint, non-adjacent ranges."""
    merged: list[Span] = []
    for start, end in sorted(spans):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((start, end))
    return tuple(merged)


def _fields(value: Any) -> dict[str, Any]:
    """The emphasis as a dict of known fields, whatever shape it came in."""
    if value is None:
        return {}
    if isinstance(value, str) and (parsed := _json_object(value)) is not None:
        value = parsed
    if isinstance(value, str | list | tuple):
        return {"text": value}
    if not isinstance(value, Mapping):
        raise EmphasisError(
            "expected an object with `text` or `spans`, a string, or a list of strings; "
            f"got {_show(value)}",
            field=KEY,
        )
    known = ("spans", "text", "alpha", "heads")
    if unknown := [key for key in value if key not in known]:
        raise EmphasisError(
            f"unknown field {_show(unknown[0])}; known are {', '.join(known)}", field=KEY
        )
    return dict(value)


def _json_object(text: str) -> dict[str, Any] | None:
    """The object, if ``text`` is one in JSON; else None."""
    if not text.lstrip().startswith("{"):
        return None
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return cast(dict[str, Any], value) if isinstance(value, dict) else None


def _spans(value: Any) -> tuple[Span, ...]:
    if value is None:
        return ()
    if not isinstance(value, Sequence) or isinstance(value, str | bytes):
        raise EmphasisError(
            f"expected [[start, end], …], got {_show(value)}", field="emphasis.spans"
        )
    spans = []
    for i, item in enumerate(value):
        field = f"emphasis.spans[{i}]"
        if (
            not isinstance(item, Sequence)
            or isinstance(item, str | bytes)
            or len(item) != 2
            or not all(isinstance(x, int) and not isinstance(x, bool) for x in item)
        ):
            raise EmphasisError(
                f"expected [start, end], two token positions, got {_show(item)}", field=field
            )
        start, end = item
        if start < 0 or end < 0:
            raise EmphasisError(
                f"expected positions from 0 on, got {_show(list(item))}; "
                "count from the prompt's first token",
                field=field,
            )
        if start >= end:
            raise EmphasisError(
                f"expected start < end (half open), got {_show(list(item))}", field=field
            )
        spans.append((start, end))
    return tuple(spans)


def _text(value: Any) -> tuple[str, ...]:
    if value is None:
        return ()
    if isinstance(value, str):
        value = [value]
    if not isinstance(value, Sequence):
        raise EmphasisError(
            f"expected a string or a list of strings, got {_show(value)}", field="emphasis.text"
        )
    for i, item in enumerate(value):
        field = f"emphasis.text[{i}]"
        if not isinstance(item, str):
            raise EmphasisError(f"expected a string, got {_show(item)}", field=field)
        if not item.strip():
            raise EmphasisError(f"expected text with words in it, got {_show(item)}", field=field)
    return tuple(value)


def _alpha(value: Any) -> float | None:
    if value is None:
        return None
    try:
        return parse_alpha(value)
    except ValueError as e:
        raise EmphasisError(str(e), field="emphasis.alpha") from None


def parse_alpha(value: Any) -> float:
    """A scale factor.

    Raises:
        ValueError: not a number, not finite, or not above 0.
    """
    if isinstance(value, int | float) and not isinstance(value, bool):
        try:
            alpha = float(value)
        except OverflowError:
            alpha = math.inf
        if math.isfinite(alpha) and alpha > 0:
            return alpha
    raise ValueError(f"expected a finite number above 0, got {_show(value)}")


def _heads(value: Any) -> HeadSet | str | None:
    if isinstance(value, str):
        parsed = _json_object(value)
        value = value if parsed is None else parsed
    if value is None or isinstance(value, HeadSet | str):
        return value
    try:
        return HeadSet.from_json(value)
    except HeadSetError as e:
        raise EmphasisError(str(e), field="emphasis.heads") from None


def _show(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}…"
