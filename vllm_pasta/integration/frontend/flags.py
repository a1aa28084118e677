"""Flags of ``vllm serve`` (and every vLLM command that takes engine arguments)."""

import argparse
from collections.abc import Callable
from importlib.metadata import entry_points
from typing import Any

from vllm_pasta.integration.config import DEFAULT_ALPHA, KEY
from vllm_pasta.integration.patching import Patch

MIDDLEWARE = "vllm_pasta.integration.frontend.middleware.EmphasisMiddleware"


def add_plugin_flag(parser: argparse.ArgumentParser) -> None:
    """Adds ``--plugin``."""
    group = parser.add_argument_group("Plugins")
    group.add_argument(
        "--plugin",
        action="append",
        type=_plugin,
        metavar="NAME",
        help="Require this plugin (repeatable). 'pasta' switches emphasis on.",
    )


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Adds ``--pasta-heads`` and ``--pasta-alpha``."""
    group = parser.add_argument_group("vllm-pasta", "Emphasis: steered attention, per request.")
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


def apply_flags(args: argparse.Namespace, engine_args: Any) -> None:
    """Puts what the flags say into the engine's ``additional_config``, in section ``pasta``, and
    the plugin's middleware into the server's ``--middleware``. Flags win."""
    middleware = getattr(args, "middleware", None)
    if isinstance(middleware, list) and MIDDLEWARE not in middleware:
        args.middleware = [*middleware, MIDDLEWARE]  # the app is built after the engine
    flags = {
        "heads": getattr(args, "pasta_heads", None),
        "alpha": getattr(args, "pasta_alpha", None),
    }
    given = {key: value for key, value in flags.items() if value is not None}
    if given or KEY in (getattr(args, "plugin", None) or ()):
        config = engine_args.additional_config
        engine_args.additional_config = {**config, KEY: {**(config.get(KEY) or {}), **given}}
        # Further API servers start from these, in processes that load plugins only after this.
        args.additional_config = engine_args.additional_config


def _plugin(name: str) -> str:
    known = sorted({entry.name for entry in entry_points(group="vllm.general_plugins")})
    if name not in known:
        raise argparse.ArgumentTypeError(f"no plugin {name!r}; installed: {', '.join(known)}")
    return name


def _add_cli_args(original: Callable[..., Any], parser: Any, *args: Any, **kwargs: Any) -> Any:
    parser = original(parser, *args, **kwargs)
    add_plugin_flag(parser)
    add_flags(parser)
    return parser


def _from_cli_args(original: Callable[..., Any], cls: Any, args: Any) -> Any:
    engine_args = original(cls, args)
    apply_flags(args, engine_args)
    return engine_args


PATCHES = (
    Patch(
        "vllm.engine.arg_utils:EngineArgs.add_cli_args",
        _add_cli_args,
        "0b7444570415 eb63de155f31",
        "cli_args",
    ),
    Patch(
        "vllm.engine.arg_utils:EngineArgs.from_cli_args",
        _from_cli_args,
        "51a013f61829",
        "cli_parsed",
    ),
)
HOOKS: dict[str, Callable[..., Any]] = {"cli_args": add_flags, "cli_parsed": apply_flags}
