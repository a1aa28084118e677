"""The command ``vllm-pasta``: one file for each subcommand."""

from vllm_pasta.cli.main import main, parser

__all__ = ["main", "parser"]
