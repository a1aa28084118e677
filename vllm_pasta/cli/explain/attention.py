"""Where a prompt's attention goes, plain and emphasised: by an engine, for ``--attention``."""

import argparse
import gc
import sys
from collections.abc import Sequence
from typing import Any

from vllm_pasta.cli import terminal
from vllm_pasta.cli.session import engine_session
from vllm_pasta.profiling.engine import engine_options
from vllm_pasta.profiling.report import html
from vllm_pasta.request.locate import Located
from vllm_pasta.request.tokens import decoded

MOST_LINES = 15
"""Heads, and tokens, that are shown in a terminal."""


def head(text: str) -> tuple[int, int] | None:
    """The value of ``--attention``: ``LAYER:HEAD``; empty for the head that gains most.

    Raises:
        argparse.ArgumentTypeError: anything else.
    """
    layer, _, number = text.partition(":")
    if text and not (layer.isdecimal() and number.isdecimal()):
        raise argparse.ArgumentTypeError(f"expected LAYER:HEAD, as 20:3, got {text!r}")
    return (int(layer), int(number)) if text else None


def look(
    model: str,
    heads: str | None,
    options: dict[str, Any],
    located: Located,
    strength: dict[str, Any],
    at: tuple[int, int] | None,
) -> dict[str, Any]:
    """Starts an engine, and runs the prompt plain and emphasised, each for one token.

    Args:
        model: A model for vLLM.
        heads: The engine's head set, for an emphasis that names none.
        options: Arguments of ``vllm.LLM``.
        located: The prompt's token ids, and where its marks are.
        strength: ``heads``, ``alpha`` and ``share`` of the request, as far as it has them.
        at: Layer and head whose weights are told token by token; None means the steered head that
            gains most.

    Returns:
        See `look_offline` in `vllm_pasta.integration.frontend.routes.attention`.

    Raises:
        PastaError: the request is refused, or this engine's attention cannot be looked into.
    """
    spans = [{"tokens": list(span), "alpha": alpha} for span, alpha in located.strengths]
    emphasis = {"spans": spans, **strength}
    with engine_session("explain") as stream, terminal.Phase("starting vLLM", stream):
        from vllm import LLM

        from vllm_pasta.integration.frontend.flags import WATCHER
        from vllm_pasta.integration.frontend.routes.attention import look_offline

        default = {"pasta": {} if heads is None else {"heads": heads}}
        options = {"worker_extension_cls": WATCHER, "additional_config": default, **options}
        llm = LLM(model, **engine_options(options, eager=True))
        try:
            return look_offline(llm, emphasis, list(located.token_ids), at)
        finally:
            del llm
            gc.collect()  # stops the engine while its last words still go to the log


def _heads(told: dict[str, Any]) -> list[list[str]]:
    """A table of the steered heads, the one that gains most first."""
    gains = sorted(told["heads"], key=lambda one: one["plain"] - one["emphasised"])
    lines = [
        [
            f"layer {one['layer']}, head {one['head']}",
            *map(_share, (one["plain"], one["emphasised"])),
        ]
        for one in gains
    ]
    mean = [sum(one[kind] for one in gains) / len(gains) for kind in ("plain", "emphasised")]
    return [
        ["attention to the marks", "plain", "emphasised"],
        [f"mean of {len(gains)} heads", *map(_share, mean)],
        *lines,
    ]


def _tokens(told: dict[str, Any], pieces: Sequence[str]) -> list[list[str]]:
    """A table of the prompt's tokens, those with the most attention first."""
    weights = list(zip(told["map"]["plain"], told["map"]["emphasised"], strict=True))
    order = sorted(range(len(weights)), key=lambda i: -max(weights[i]))
    return [
        ["token", "plain", "emphasised"],
        *([f"{i} {pieces[i]!r}", *map(_share, weights[i])] for i in order),
    ]


def show(told: dict[str, Any], located: Located, tokenizer: Any) -> None:
    """Prints the heads, and where one of them looks, to stdout."""
    print()
    _print(_heads(told), "heads")
    print(f"\nlayer {told['layer']}, head {told['head']}, from the prompt's last token to:")
    _print(_tokens(told, _pieces(located, tokenizer)), "tokens")


def _print(cells: list[list[str]], what: str) -> None:
    terminal.print_table(cells[: MOST_LINES + 1])
    if (more := len(cells) - MOST_LINES - 1) > 0:
        print(f"… and {more} {what} more: --json or --html shows all")
    sys.stdout.flush()


def parts(told: dict[str, Any], located: Located, tokenizer: Any) -> list[html.Part]:
    """The same for a page: two maps of the prompt, and tables that sort."""
    pieces = _pieces(located, tokenizer)
    most = max((*told["map"]["plain"], *told["map"]["emphasised"])) or 1.0
    where = f"layer {told['layer']}, head {told['head']}"
    return [
        *(
            html.Heat(
                f"Where {where} looks, {kind}",
                [
                    (piece, weight, (weight / most) ** 0.5)
                    for piece, weight in zip(pieces, of, strict=True)
                ],
            )
            for kind, of in told["map"].items()
        ),
        html.Table("Attention of the prompt's last token", _heads(told)),
    ]


def _pieces(located: Located, tokenizer: Any) -> list[str]:
    """The text of each of the prompt's tokens; those that make up a character share it."""
    seen = decoded(located.token_ids, tokenizer.decode)
    result, position = [], 0
    for _, end in seen.offsets:
        result.append(seen.text[position:end])
        position = max(position, end)
    return result


def _share(weight: float) -> str:
    return f"{100 * weight:.1f} %"
