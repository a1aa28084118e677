"""Marks: what a user points at, before it is known which tokens that is.

A mark names a place (the whole prompt, one chat message, every message of a role) and what of it
(a text, a character range, an image, or all). Written as a string, or as an object:

    "Answer in JSON."
    {"text": "JSON", "occurrence": "last"}
    {"message": 0, "chars": [3, 9]}
    {"message": -1, "text": "JSON"}
    {"role": "system"}
    {"image": 0}
    {"message": -1, "image": "all"}

and, as an object, with a strength of its own: ``{"text": "JSON", "alpha": 0.1}``.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from vllm_pasta.errors import EmphasisError, show

Occurrence = int | Literal["all", "last"]


@dataclass(frozen=True)
class Mark:
    """One mark.

    Attributes:
        text: A string to find; None means by ``chars``, or all of the place.
        occurrence: Which of the places where ``text`` is found, from 0.
        chars: Half-open character range.
        message: Index of a chat message, negative from the end; None means the whole prompt.
        role: Every chat message of this role.
        image: Which of the place's images, from 0, negative from the end; None means none.
        alpha: Factor of the marked tokens; 1 is full strength.
        field: What the user called it, for messages; not part of its identity.
    """

    text: str | None = None
    occurrence: Occurrence = 0
    chars: tuple[int, int] | None = None
    message: int | None = None
    role: str | None = None
    image: int | Literal["all"] | None = None
    alpha: float = 1.0
    field: str = field(default="emphasis", compare=False)

    @property
    def in_chat(self) -> bool:
        """Whether the mark needs the conversation that the prompt was made from."""
        return self.message is not None or self.role is not None


def parse_texts(value: Any, where: str) -> tuple[Mark, ...]:
    """A string, a mark object, or a list of both.

    Raises:
        EmphasisError: names the item.
    """
    if value is None:
        return ()
    if isinstance(value, str | Mapping):
        value = [value]
    if not isinstance(value, Sequence) or isinstance(value, bytes):
        raise EmphasisError(
            f"expected a string or a list of strings, got {show(value)}", field=where
        )
    return tuple(
        Mark(text=_words(item, f"{where}[{i}]"), field=f"{where}[{i}]")
        if isinstance(item, str)
        else _mark(item, f"{where}[{i}]")
        for i, item in enumerate(value)
    )


def parse_chars(value: Any, where: str) -> tuple[Mark, ...]:
    """A list of ``[start, end]`` and mark objects.

    Raises:
        EmphasisError: names the item.
    """
    if value is None:
        return ()
    if isinstance(value, Mapping):
        value = [value]
    if not isinstance(value, Sequence) or isinstance(value, str | bytes):
        raise EmphasisError(f"expected [[start, end], …], got {show(value)}", field=where)
    return tuple(
        _mark(item, f"{where}[{i}]")
        if isinstance(item, Mapping)
        else Mark(chars=parse_range(item, f"{where}[{i}]", "character"), field=f"{where}[{i}]")
        for i, item in enumerate(value)
    )


def parse_range(value: Any, where: str, unit: str) -> tuple[int, int]:
    """``[start, end]``: half open, not negative, not empty.

    Raises:
        EmphasisError: says what came.
    """
    if (
        not isinstance(value, Sequence)
        or isinstance(value, str | bytes)
        or len(value) != 2
        or not all(isinstance(x, int) and not isinstance(x, bool) for x in value)
    ):
        raise EmphasisError(
            f"expected [start, end], two {unit} positions, got {show(value)}", field=where
        )
    start, end = value
    if start < 0 or end < 0:
        raise EmphasisError(
            f"expected positions from 0 on, got {show(list(value))}; count from the first {unit}",
            field=where,
        )
    if start >= end:
        raise EmphasisError(
            f"expected start < end (half open), got {show(list(value))}", field=where
        )
    return start, end


_EITHER = (("text", "chars"), ("text", "image"), ("chars", "image"), ("message", "role"))
"""Fields of a mark that do not go together."""


def _mark(value: Any, where: str) -> Mark:
    known = ("text", "occurrence", "chars", "message", "role", "image", "alpha")
    if not isinstance(value, Mapping):
        raise EmphasisError(
            f"expected a string or an object of {', '.join(known)}; got {show(value)}", field=where
        )
    if unknown := [key for key in value if key not in known]:
        raise EmphasisError(
            f"unknown field {show(unknown[0])}; known are {', '.join(known)}", field=where
        )
    given = {key: item for key, item in value.items() if item is not None}
    if not given.keys() - {"alpha", "occurrence"}:
        raise EmphasisError(
            "expected one of text, chars, image, message, role, got none", field=where
        )
    for one, other in _EITHER:
        if one in given and other in given:
            raise EmphasisError(f"expected {one} or {other}, got both", field=where)
    if "occurrence" in given and "text" not in given:
        raise EmphasisError("occurrence goes with text", field=where)
    message, role = given.get("message"), given.get("role")
    if message is not None and (not isinstance(message, int) or isinstance(message, bool)):
        raise EmphasisError(f"expected a number, got {show(message)}", field=f"{where}.message")
    if role is not None and (not isinstance(role, str) or not role):
        raise EmphasisError(f"expected a role's name, got {show(role)}", field=f"{where}.role")
    return Mark(
        text=_words(given["text"], f"{where}.text") if "text" in given else None,
        occurrence=_occurrence(given.get("occurrence", 0), f"{where}.occurrence"),
        chars=(
            parse_range(given["chars"], f"{where}.chars", "character") if "chars" in given else None
        ),
        message=message,
        role=role,
        image=_image(given.get("image"), f"{where}.image"),
        alpha=_alpha(given.get("alpha", 1.0), f"{where}.alpha"),
        field=where,
    )


def parse_spans(value: Any, where: str) -> tuple[tuple[tuple[int, int], float], ...]:
    """A list of token ranges ``[start, end]``, or ``{"tokens": [start, end], "alpha": …}``.

    Returns:
        Each range with its factor.

    Raises:
        EmphasisError: names the item.
    """
    if value is None:
        return ()
    if not isinstance(value, Sequence) or isinstance(value, str | bytes):
        raise EmphasisError(f"expected [[start, end], …], got {show(value)}", field=where)
    return tuple(_span(item, f"{where}[{i}]") for i, item in enumerate(value))


def _span(value: Any, where: str) -> tuple[tuple[int, int], float]:
    if not isinstance(value, Mapping):
        return parse_range(value, where, "token"), 1.0
    if unknown := [key for key in value if key not in ("tokens", "alpha")]:
        raise EmphasisError(
            f"unknown field {show(unknown[0])}; known are tokens, alpha", field=where
        )
    alpha = value.get("alpha")
    return (
        parse_range(value.get("tokens"), f"{where}.tokens", "token"),
        _alpha(1.0 if alpha is None else alpha, f"{where}.alpha"),
    )


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


def parse_share(value: Any) -> float:
    """A share of attention: see `vllm_pasta.request.resolution.ResolvedEmphasis.share`.

    Raises:
        ValueError: not a number, or not between 0 and 1.
    """
    if isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < 1:
        return float(value)
    raise ValueError(f"expected a number above 0 and below 1, got {show(value)}")


def _alpha(value: Any, where: str) -> float:
    try:
        return parse_alpha(value)
    except ValueError as e:
        raise EmphasisError(str(e), field=where) from None


def _words(value: Any, where: str) -> str:
    if not isinstance(value, str):
        raise EmphasisError(f"expected a string, got {show(value)}", field=where)
    if not value.strip():
        raise EmphasisError(f"expected text with words in it, got {show(value)}", field=where)
    return value


def _occurrence(value: Any, where: str) -> Occurrence:
    if value in ("all", "last") and isinstance(value, str):
        return value  # type: ignore[return-value]
    if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
        return value
    raise EmphasisError(
        f'expected a number from 0 on, "all" or "last"; got {show(value)}', field=where
    )


def _image(value: Any, where: str) -> int | Literal["all"] | None:
    if value is None or value == "all":
        return value  # type: ignore[no-any-return]
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    raise EmphasisError(f'expected a number or "all", got {show(value)}', field=where)
