"""The command ``vllm-pasta``. Importing this module needs neither vllm nor torch."""

import argparse
import sys
from collections.abc import Sequence

from vllm_pasta._version import __version__
from vllm_pasta.cli import demo, eval, explain, profile, verify
from vllm_pasta.errors import PastaError


def parser() -> argparse.ArgumentParser:
    """The parser; each subcommand sets ``run``, which takes the namespace, gives an exit status."""
    top = argparse.ArgumentParser(
        prog="vllm-pasta", description="Emphasis for vLLM: attention steering per request."
    )
    top.add_argument("--version", action="version", version=f"vllm-pasta {__version__}")
    commands = top.add_subparsers(title="commands", required=True, metavar="COMMAND")
    command = commands.add_parser(
        "demo",
        help="real prompts on vLLM, plain and emphasised, side by side",
        description=demo.DESCRIPTION,
    )
    demo.add_arguments(command)
    command.set_defaults(run=demo.run)
    command = commands.add_parser(
        "explain",
        help="which tokens an emphasis marks, without running a model",
        description=explain.DESCRIPTION,
    )
    explain.add_arguments(command)
    command.set_defaults(run=explain.run)
    command = commands.add_parser(
        "eval",
        help="how well a model follows emphasis: tasks × ways to emphasise",
        description=eval.DESCRIPTION,
    )
    eval.add_arguments(command)
    command.set_defaults(run=eval.run)
    command = commands.add_parser(
        "profile",
        help="find the heads to steer",
        description=profile.DESCRIPTION,
    )
    profile.add_arguments(command)
    command.set_defaults(run=profile.run)
    command = commands.add_parser("verify", help=verify.HELP, description=verify.DESCRIPTION)
    verify.add_arguments(command)
    command.set_defaults(run=verify.run)
    return top


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command.

    Returns:
        The exit status: 0, 1 after an error that we can name, 2 for wrong arguments.
    """
    args = parser().parse_args(argv)
    try:
        status: int = args.run(args)
    except PastaError as e:
        print(f"vllm-pasta: {e}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("vllm-pasta: interrupted", file=sys.stderr)
        return 130
    return status


if __name__ == "__main__":
    sys.exit(main())
