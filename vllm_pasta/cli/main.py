"""The command ``vllm-pasta``. Importing this module needs neither vllm nor torch."""

import argparse
import sys
from collections.abc import Sequence
from typing import Protocol

from vllm_pasta import __version__
from vllm_pasta.cli import eval, explain, profile, verify
from vllm_pasta.cli.demo import command as demo
from vllm_pasta.errors import PastaError


class Command(Protocol):
    """What a subcommand's module holds.

    Attributes:
        HELP: One line for the list of commands.
        DESCRIPTION: The paragraph above the command's own options.
    """

    HELP: str
    DESCRIPTION: str

    def add_arguments(self, parser: argparse.ArgumentParser) -> None: ...

    def run(self, args: argparse.Namespace) -> int:
        """Runs the command; returns its exit status."""


COMMANDS: dict[str, Command] = {
    "demo": demo,
    "explain": explain,
    "eval": eval,
    "profile": profile,
    "verify": verify,
}


def parser() -> argparse.ArgumentParser:
    """The parser of all commands; it sets ``run`` to the chosen command's function."""
    top = argparse.ArgumentParser(
        prog="vllm-pasta", description="Emphasis for vLLM: attention steering per request."
    )
    top.add_argument("--version", action="version", version=f"vllm-pasta {__version__}")
    commands = top.add_subparsers(title="commands", required=True, metavar="COMMAND")
    for name, module in COMMANDS.items():
        command = commands.add_parser(name, help=module.HELP, description=module.DESCRIPTION)
        module.add_arguments(command)
        command.set_defaults(run=module.run)
    return top


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command.

    Returns:
        The exit status: 0, or 1 after a `PastaError` or where a file cannot be read or written, 2
        for wrong arguments, 130 when interrupted.
    """
    args = parser().parse_args(argv)
    try:
        status: int = args.run(args)
    except (PastaError, OSError) as e:  # OSError: a full disk, a folder that is read-only
        print(f"vllm-pasta: {e}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("vllm-pasta: interrupted", file=sys.stderr)
        return 130
    return status


if __name__ == "__main__":
    sys.exit(main())
