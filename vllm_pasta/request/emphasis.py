"""What a request asks for: the emphasis as the user wrote it, checked for shape alone.

What is left of it once prompt, model and server defaults are known is a ``ResolvedEmphasis`` (see
``resolution``). Only that ever reaches a worker.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

from vllm_pasta.errors import EmphasisError, HeadSetError, show
from vllm_pasta.request.heads import HeadSet
from vllm_pasta.request.marks import (
    Mark,
    parse_alpha,
    parse_chars,
    parse_share,
    parse_spans,
    parse_texts,
)
from vllm_pasta.request.markup import MARKUPS
from vllm_pasta.request.resolution import KEY, Span, check_count

FLAT_KEYS = {
    "emphasis_alpha": "alpha",
    "emphasis_share": "share",
    "emphasis_heads": "heads",
    "emphasis_markup": "markup",
}
"""Keys beside ``emphasis`` in ``extra_args``, for transports that carry scalars and flat lists."""

RETURN_KEY = "return_emphasis"
"""Key in ``extra_args``: whether the response says what was emphasised."""


OFF = '{"markup": "off"}'
"""The form of "no emphasis" that flat transports can carry."""

REFUSED_KEY = "emphasis_refused"
"""Key in ``extra_args`` that says why a request is refused, where that was found before it could
be answered: in a batch file's line."""


def is_ours(key: Any) -> bool:
    """Whether a key of ``extra_args`` is meant for us, known or misspelt."""
    return isinstance(key, str) and (key.startswith(KEY) or key == RETURN_KEY)


def is_nothing(value: Any) -> bool:
    """Whether the value of the field ``emphasis`` asks that there be none: null, false or an
    empty object."""
    return value is None or value is False or (isinstance(value, Mapping) and not value)


def has_emphasis(extra_args: Mapping[str, Any] | None) -> bool:
    """Whether ``extra_args`` asks for emphasis, well formed or not. To ask that there be none
    (null, false, an empty object, or markup "off" and nothing else) is not to ask for it."""
    return extra_args is not None and any(
        isinstance(key, str)
        and key.startswith(KEY)
        and not is_nothing(value)
        and value not in (({"markup": "off"}, OFF) if key == KEY else ("off",))
        for key, value in extra_args.items()
    )


@dataclass(frozen=True)
class Emphasis:
    """One request's emphasis as the user wrote it.

    Attributes:
        spans: Token ranges ``(start, end)`` of the prompt's token ids, half open.
        marks: What to find in the prompt, from the fields ``text`` and ``chars``.
        markup: Which markup in the text itself to read: "tag", "markdown", "stars", "off"; None
            means the server's.
        keep_marks: Whether stars stay in the text; None means the server's.
        alpha: Scale factor for the other prompt tokens; None means the server's.
        heads: A head set, or the name of one known to the server; None means the server's.
        alphas: A factor for each of ``spans``; empty where all are 1, full strength.
        share: In place of ``alpha``, the least share of attention that the marks get; None means
            that none is asked for.
    """

    spans: tuple[Span, ...] = ()
    marks: tuple[Mark, ...] = ()
    markup: str | None = None
    keep_marks: bool | None = None
    alpha: float | None = None
    heads: HeadSet | str | None = None
    alphas: tuple[float, ...] = ()
    share: float | None = None

    @property
    def is_off(self) -> bool:
        """Whether it asks that nothing be emphasised, whatever the server's default is."""
        return self.markup == "off" and not self.spans and not self.marks

    @classmethod
    def parse(
        cls, extra_args: Mapping[str, Any] | None, prompt: tuple[int, int] | None = None
    ) -> "Emphasis | None":
        """Reads ``extra_args["emphasis"]`` and the flat keys beside it.

        Null, false and an empty object ask for a plain request, as ``{"markup": "off"}`` does.

        Args:
            extra_args: The request's.
            prompt: Which prompt of a list it is for, from 0, and how many there are; chooses from
                ``{"prompts": [one for each]}``.

        Returns:
            The emphasis, or None where ``extra_args`` says nothing about it.

        Raises:
            EmphasisError: not a known shape; an unknown field; a value out of range.
        """
        if not extra_args or not any(
            isinstance(key, str) and key.startswith(KEY) for key in extra_args
        ):
            return None
        if not has_emphasis(extra_args):
            is_off = KEY in extra_args or extra_args.get("emphasis_markup") == "off"
            return cls(markup="off") if is_off else None
        for key in extra_args:
            if isinstance(key, str) and key.startswith(KEY) and key not in (KEY, *FLAT_KEYS):
                raise EmphasisError(
                    f"unknown field {show(key)}; known are {', '.join((KEY, *FLAT_KEYS))}",
                    field=KEY,
                )
        fields = _fields(_of_prompt(extra_args.get(KEY), prompt))
        is_nothing = not any(value is not None for value in fields.values())
        for key, name in FLAT_KEYS.items():
            if extra_args.get(key) is None:
                continue
            if fields.get(name) is not None:
                raise EmphasisError(f"given twice, here and as emphasis.{name}", field=key)
            fields[name] = extra_args[key]
        spans = parse_spans(fields.get("spans"), "emphasis.spans")
        alphas = tuple(alpha for _, alpha in spans)
        marks = (
            *parse_texts(fields.get("text"), "emphasis.text"),
            *parse_chars(fields.get("chars"), "emphasis.chars"),
        )
        markup = _markup(fields.get("markup"))
        if not spans and not marks and markup is None:
            if not is_nothing or KEY not in extra_args:
                raise EmphasisError(
                    "expected something to emphasise in `text`, `chars` or `spans`, or `markup`; "
                    "got neither",
                    field=KEY,
                )
            markup = "off"
        check_count(len(spans) + len(marks))
        alpha, share = _alpha(fields.get("alpha")), _share(fields.get("share"))
        if alpha is not None and share is not None:
            raise EmphasisError(
                "expected `alpha` or `share`, got both: one is a factor for the prompt's other "
                "tokens, the other finds that factor",
                field="emphasis.share",
            )
        return cls(
            tuple(span for span, _ in spans),
            marks,
            markup,
            _keep_marks(fields.get("keep_marks"), markup),
            alpha,
            _heads(fields.get("heads")),
            () if all(factor == 1.0 for factor in alphas) else alphas,
            share,
        )


def _of_prompt(value: Any, prompt: tuple[int, int] | None) -> Any:
    """The part of an emphasis that is for one prompt of a list."""
    if isinstance(value, str) and (parsed := _json_object(value)) is not None:
        if "prompts" not in parsed:
            return value
        value = parsed
    if not isinstance(value, Mapping) or "prompts" not in value:
        return value
    items = value["prompts"]
    if len(value) > 1:
        raise EmphasisError("goes alone: give all else in its items", field="emphasis.prompts")
    if not isinstance(items, list | tuple):
        raise EmphasisError(
            f"expected a list of emphases, one for each prompt, got {show(items)}",
            field="emphasis.prompts",
        )
    index, count = prompt or (0, 1)
    if len(items) != count:
        raise EmphasisError(
            f"expected one emphasis for each prompt (null for none); there are {count} prompts, "
            f"got {len(items)}",
            field="emphasis.prompts",
        )
    item = items[index]
    return [item] if isinstance(item, str) else item


def _fields(value: Any) -> dict[str, Any]:
    """The emphasis as a dict of known fields, whatever shape it came in."""
    if is_nothing(value):
        return {}
    hint = ""
    if isinstance(value, str) and (parsed := _json_object(value)) is not None:
        value = parsed
        hint = (
            ". This string is JSON, so it is read as an emphasis; where it is the text to "
            'emphasise, give it in a list: ["…"]'
        )
    if isinstance(value, str | list | tuple):
        return {"text": value}
    if not isinstance(value, Mapping):
        raise EmphasisError(
            "expected an object with `text`, `chars` or `spans`, a string, or a list of marks; "
            f"got {show(value)}",
            field=KEY,
        )
    known = ("spans", "text", "chars", "markup", "keep_marks", "alpha", "heads", "share", "prompts")
    if unknown := [key for key in value if key not in known[:-1]]:
        raise EmphasisError(
            f"unknown field {show(unknown[0])}; known are {', '.join(known)}{hint}", field=KEY
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
                "tags never stay; this is for markdown and stars", field="emphasis.keep_marks"
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


def _share(value: Any) -> float | None:
    if value is None:
        return None
    try:
        return parse_share(value)
    except ValueError as e:
        raise EmphasisError(str(e), field="emphasis.share") from None


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
