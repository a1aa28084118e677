"""Every environment variable that vllm-pasta reads, with its default and meaning."""

import os
from pathlib import Path


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
