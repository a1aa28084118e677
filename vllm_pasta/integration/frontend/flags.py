"""Flags of ``vllm serve`` (and every vLLM command that takes engine arguments)."""

import argparse
from collections.abc import Callable
from importlib.metadata import entry_points
from typing import Any

from vllm_pasta.integration.config import KEY, engine_options, section_of
from vllm_pasta.integration.patching import Patch
from vllm_pasta.request.head_sets import auto
from vllm_pasta.request.heads import DEFAULT_ALPHA

STRENGTHS = {"alpha", "share"}
"""Keys of the section ``pasta`` of which one may be given."""
# What workers need for the playground's look inside; named, since front ends do not import it.
WATCHER = "vllm_pasta.integration.worker.watch.AttentionWatcher"

MIDDLEWARE = "vllm_pasta.integration.frontend.middleware.EmphasisMiddleware"
ROUTES = "vllm_pasta.integration.frontend.routes.AttachRoutes"


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
    """Adds ``--pasta-heads``, ``--pasta-alpha``, ``--pasta-share`` and ``--pasta-playground``."""
    group = parser.add_argument_group("vllm-pasta", "Emphasis: steered attention, per request.")
    group.add_argument(
        "--pasta-heads",
        metavar="FILE",
        help="Head set of requests that give none: a file, a bundled head set's name, or 'auto': "
        "find heads for this model before the first start, and keep them. Switches emphasis on.",
    )
    group.add_argument(
        "--pasta-alpha",
        type=float,
        metavar="ALPHA",
        help="Factor by which attention to the prompt's other tokens is scaled, for requests "
        f"that give none (default: the head set's own, else {DEFAULT_ALPHA}). Switches emphasis "
        "on.",
    )
    group.add_argument(
        "--pasta-share",
        type=float,
        metavar="SHARE",
        help="In place of --pasta-alpha: the share of a steered head's attention to the prompt "
        "that marks get at least, above 0 and below 1. Switches emphasis on.",
    )
    group.add_argument(
        "--pasta-playground",
        action="store_true",
        help="Serve a page at /playground, to mark words and compare answers. Switches emphasis "
        "on. `vllm serve` alone has it.",
    )


def apply_flags(args: argparse.Namespace, engine_args: Any) -> None:
    """Puts what the flags say into the engine's ``additional_config``, in section ``pasta``, and
    the plugin's middleware into the server's ``--middleware``. Flags win."""
    middleware = getattr(args, "middleware", None)
    playground = getattr(args, "pasta_playground", False)
    if isinstance(middleware, list) and MIDDLEWARE not in middleware:
        args.middleware = [*middleware, MIDDLEWARE]  # the app is built after the engine
        if playground:
            args.middleware.append(ROUTES)
    flags = {
        "heads": getattr(args, "pasta_heads", None),
        "alpha": getattr(args, "pasta_alpha", None),
        "share": getattr(args, "pasta_share", None),
    }
    given = {key: value for key, value in flags.items() if value is not None}
    if playground and not engine_args.worker_extension_cls:
        engine_args.worker_extension_cls = args.worker_extension_cls = WATCHER
    if given or playground or KEY in (getattr(args, "plugin", None) or ()):
        config = engine_args.additional_config
        section = dict(config.get(KEY) or {})
        if given.keys() & STRENGTHS:  # a flag's strength replaces the configuration's
            section = {key: value for key, value in section.items() if key not in STRENGTHS}
        engine_args.additional_config = {**config, KEY: {**section, **given}}
        # Further API servers start from these, in processes that load plugins only after this.
        args.additional_config = engine_args.additional_config
    _find_heads(args, engine_args)


def _find_heads(args: argparse.Namespace, engine_args: Any) -> None:
    """Where several API servers will start, beside an engine: finds ``"auto"`` heads before either.

    A single API server finds them itself, in `Admission`, since it starts before its engine.
    """
    section = section_of(engine_args.additional_config)
    is_auto = isinstance(section, dict) and section.get("heads") == auto.AUTO
    if is_auto and (getattr(args, "api_server_count", None) or 1) > 1:
        auto.ensure(engine_args.model, engine_args.revision, engine_options(engine_args))


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
        "0b7444570415 28ea69a1405b",
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
