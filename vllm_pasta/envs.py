"""The environment variables that vllm-pasta reads, each with its meaning and default."""

import os
from pathlib import Path

from vllm_pasta.errors import ConfigError


def cache_dir() -> Path:
    """``VLLM_PASTA_CACHE``: folder for what is made once and kept.

    It holds the demo's converted model, the compiled C++ kernel, the heads that were found for
    models, IFEval's sentence model, and the logs of the engines that commands start. Default:
    ``$XDG_CACHE_HOME/vllm-pasta``, or ``~/.cache/vllm-pasta``.
    """
    if path := os.environ.get("VLLM_PASTA_CACHE"):
        return Path(path)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "vllm-pasta"


def data_dir() -> Path | None:
    """``VLLM_PASTA_DATA``: folder with public evaluation data, e.g. ``counterfact.jsonl``.

    Default: none; tasks then generate their examples.
    """
    path = os.environ.get("VLLM_PASTA_DATA")
    return Path(path) if path else None


def kernel() -> str:
    """``VLLM_PASTA_KERNEL``: the implementation of steered attention on the CPU.

    ``auto`` (default) is the C++ kernel, or plain torch with a warning if the kernel cannot be
    built; ``cpp`` is the C++ kernel or an error; ``reference`` is plain torch.

    Raises:
        ConfigError: the variable has another value.
    """
    choices = ("auto", "cpp", "reference")
    choice = os.environ.get("VLLM_PASTA_KERNEL") or "auto"
    if choice not in choices:
        raise ConfigError(f"VLLM_PASTA_KERNEL: expected one of {choices}, got {choice!r}")
    return choice
