"""What a request asks for: the emphasis as the user wrote it, checked for shape alone.

What is left of it once prompt, model and server defaults are known is a ``ResolvedEmphasis`` (see
``resolution``). Only that ever reaches a worker.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from vllm_pasta.errors import EmphasisError, HeadSetError, show
from vllm_pasta.request.heads import HeadSet
from vllm_pasta.request.marks import Mark, parse_chars, parse_range, parse_texts
from vllm_pasta.request.resolution import KEY, Span, check_count

FLAT_KEYS = {"emphasis_alpha": "alpha", "emphasis_heads": "heads", "emphasis_markup": "markup"}
"""Keys beside ``emphasis`` in ``extra_args``, for transports that carry scalars and flat lists."""

MARKUPS = ("tag", "markdown", "off")

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
