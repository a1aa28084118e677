"""Flags of ``vllm serve`` (and every vLLM command that takes engine arguments)."""

import argparse
from importlib.metadata import entry_points
from typing import Any

from vllm_pasta.integration.config import DEFAULT_ALPHA, KEY

MIDDLEWARE = "vllm_pasta.integration.http.EmphasisMiddleware"


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Adds ``--plugin``, ``--pasta-heads`` and ``--pasta-alpha``."""
    group = parser.add_argument_group("vllm-pasta", "Emphasis: steered attention, per request.")
    group.add_argument(
        "--plugin",
        action="append",
        type=_plugin,
        metavar="NAME",
        help="Require this plugin (repeatable). 'pasta' switches emphasis on.",
    )
    group.add_argument(
        "--pasta-heads",
        metavar="FILE",
        help="Head set of requests that give none: a file, or a bundled head set's name. "
        "Switches emphasis on.",
    )
    group.add_argument(
        "--pasta-alpha",
        type=float,
        metavar="ALPHA",
        help="Factor by which attention to the prompt's other tokens is scaled, for requests "
        f"that give none (default: {DEFAULT_ALPHA}). Switches emphasis on.",
    )


def merge_flags(args: argparse.Namespace, additional_config: dict[str, Any]) -> dict[str, Any]:
    """``additional_config`` with the flags in its ``pasta`` section; flags win."""
    flags = {
        "heads": getattr(args, "pasta_heads", None),
        "alpha": getattr(args, "pasta_alpha", None),
    }
    given = {key: value for key, value in flags.items() if value is not None}
    if not given and KEY not in (getattr(args, "plugin", None) or ()):
        return additional_config
    return {**additional_config, KEY: {**(additional_config.get(KEY) or {}), **given}}


def add_middleware(args: argparse.Namespace) -> None:
    """Adds ours to ``--middleware``, where the command has that."""
    if isinstance(getattr(args, "middleware", None), list) and MIDDLEWARE not in args.middleware:
        args.middleware = [*args.middleware, MIDDLEWARE]


def _plugin(name: str) -> str:
    known = sorted({entry.name for entry in entry_points(group="vllm.general_plugins")})
    if name not in known:
        raise argparse.ArgumentTypeError(f"no plugin {name!r}; installed: {', '.join(known)}")
    return name
