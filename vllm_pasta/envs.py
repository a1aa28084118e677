"""Every environment variable that vllm-pasta reads, with its default and meaning."""

import os
from pathlib import Path

from vllm_pasta.errors import ConfigError


def cache_dir() -> Path:
    """``VLLM_PASTA_CACHE``: folder for what is made once and kept (the demo's converted model).

    Default: ``$XDG_CACHE_HOME/vllm-pasta``, or ``~/.cache/vllm-pasta``.
    """
    if path := os.environ.get("VLLM_PASTA_CACHE"):
        return Path(path)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "vllm-pasta"


def data_dir() -> Path | None:
    """``VLLM_PASTA_DATA``: folder with public evaluation data, e.g. ``counterfact.jsonl``.

    Default: none; everything works on data of our own making.
    """
    path = os.environ.get("VLLM_PASTA_DATA")
    return Path(path) if path else None


def kernel() -> str:
    """``VLLM_PASTA_KERNEL``: what computes steered attention on the CPU.

    ``auto`` (default): the C++ kernel, or plain torch with a warning where it cannot be built.
    ``cpp``: the C++ kernel or an error. ``reference``: plain torch.

    Raises:
        ConfigError: any other value.
    """
    choices = ("auto", "cpp", "reference")
    choice = os.environ.get("VLLM_PASTA_KERNEL") or "auto"
    if choice not in choices:
        raise ConfigError(f"VLLM_PASTA_KERNEL: expected one of {choices}, got {choice!r}")
    return choice
