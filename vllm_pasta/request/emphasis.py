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

from vllm_pasta.errors import EmphasisError, HeadSetError, show
from vllm_pasta.request.heads import HeadSet
from vllm_pasta.request.marks import Mark, parse_chars, parse_range, parse_texts

MAX_SPANS = 256
"""Most spans and marks that one request may carry, and most ranges they may come to."""

FLAT_KEYS = {"emphasis_alpha": "alpha", "emphasis_heads": "heads", "emphasis_markup": "markup"}
"""Keys beside ``emphasis`` in ``extra_args``, for transports that carry scalars and flat lists."""

KEY = "emphasis"

WIRE_KEY = "_vllm_pasta"
"""Key in ``SamplingParams.extra_args`` of the resolved emphasis, in its wire form; and in the
prompt of a beam search."""

MARKUPS = ("tag", "markdown", "off")

Span = tuple[int, int]


RETURN_KEY = "return_emphasis"
"""Key in ``extra_args``: whether the response says what was emphasised."""


def is_ours(key: Any) -> bool:
    """Whether a key of ``extra_args`` is meant for us, known or misspelt."""
    return isinstance(key, str) and (key.startswith(KEY) or key == RETURN_KEY)


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
        marks: What to find in the prompt, from the fields ``text`` and ``chars``.
        markup: Which markup in the text itself to read: "tag", "markdown", "off"; None means the
            server's.
        keep_marks: Whether Markdown's stars stay in the text; None means the server's.
        alpha: Scale factor for the other prompt tokens; None means the server's.
        heads: A head set, or the name of one known to the server; None means the server's.
    """

    spans: tuple[Span, ...] = ()
    marks: tuple[Mark, ...] = ()
    markup: str | None = None
    keep_marks: bool | None = None
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
                    f"unknown field {show(key)}; known are {', '.join((KEY, *FLAT_KEYS))}",
                    field=KEY,
                )
        fields = _fields(extra_args.get(KEY))
        for key, name in FLAT_KEYS.items():
            if extra_args.get(key) is None:
                continue
            if fields.get(name) is not None:
                raise EmphasisError(f"given twice, here and as emphasis.{name}", field=key)
            fields[name] = extra_args[key]
        spans = _spans(fields.get("spans"))
        marks = (
            *parse_texts(fields.get("text"), "emphasis.text"),
            *parse_chars(fields.get("chars"), "emphasis.chars"),
        )
        markup = _markup(fields.get("markup"))
        if not spans and not marks and markup in (None, "off"):
            raise EmphasisError(
                "expected something to emphasise in `text`, `chars` or `spans`, or `markup`; "
                "got neither",
                field=KEY,
            )
        check_count(len(spans) + len(marks))
        return cls(
            spans,
            marks,
            markup,
            _keep_marks(fields.get("keep_marks"), markup),
            _alpha(fields.get("alpha")),
            _heads(fields.get("heads")),
        )


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
        """Whether steering changes nothing: alpha is 1, or nothing or everything is emphasised."""
        return self.alpha == 1.0 or self.spans in ((), ((0, self.prompt_len),))

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
            "expected an object with `text`, `chars` or `spans`, a string, or a list of marks; "
            f"got {show(value)}",
            field=KEY,
        )
    known = ("spans", "text", "chars", "markup", "keep_marks", "alpha", "heads")
    if unknown := [key for key in value if key not in known]:
        raise EmphasisError(
            f"unknown field {show(unknown[0])}; known are {', '.join(known)}", field=KEY
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
            f"expected [[start, end], …], got {show(value)}", field="emphasis.spans"
        )
    return tuple(parse_range(item, f"emphasis.spans[{i}]", "token") for i, item in enumerate(value))


def _markup(value: Any) -> str | None:
    if value is None or (isinstance(value, str) and value in MARKUPS):
        return value
    raise EmphasisError(
        f"expected one of {', '.join(MARKUPS)}, got {show(value)}", field="emphasis.markup"
    )


def _keep_marks(value: Any, markup: str | None) -> bool | None:
    if value is None or isinstance(value, bool):
        if value is not None and markup == "tag":
            raise EmphasisError(
                "tags never stay; this is for markdown", field="emphasis.keep_marks"
            )
        return value
    raise EmphasisError(f"expected true or false, got {show(value)}", field="emphasis.keep_marks")


def check_count(count: int) -> None:
    """Checks a number of spans and marks.

    Raises:
        EmphasisError: more than `MAX_SPANS`.
    """
    if count > MAX_SPANS:
        raise EmphasisError(f"expected at most {MAX_SPANS} spans and marks, got {count}", field=KEY)


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
    raise ValueError(f"expected a finite number above 0, got {show(value)}")


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
