"""The engine of a profile or an evaluation: the model's heads, vLLM's options, and their record."""

import logging
import platform
from collections.abc import Mapping
from hashlib import sha256
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from vllm_pasta import __version__
from vllm_pasta.profiling.methods import Head
from vllm_pasta.request.shape import ModelShape

logger = logging.getLogger(__name__)


def every_head(model: str) -> list[Head]:
    """All heads of a model by its configuration, in order; layers without attention have none."""
    from transformers import AutoConfig

    shape = ModelShape.of(AutoConfig.from_pretrained(model).get_text_config())
    return [
        (layer, head) for layer in shape.attention_layers for head in range(shape.heads_of(layer))
    ]


def versions() -> dict[str, str]:
    """Versions of the packages that answers depend on."""
    found = {"vllm-pasta": __version__}
    for package in ("vllm", "torch", "transformers"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "unknown"
    return found


def describe(name: str, model: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """The record of what all answers of a run depend on; a `Store` keeps it with them.

    Args:
        name: What to call the model.
        model: Its folder or name.
        options: Arguments of ``vllm.LLM``.
    """
    config = Path(model) / "config.json"
    revision = sha256(config.read_bytes()).hexdigest()[:12] if config.is_file() else "hub"
    kept = {k: v for k, v in options.items() if k in ("dtype", "quantization", "revision")}
    return {"model": name, "config": revision, "options": kept, "versions": versions()}


def cpu_dtype() -> str | None:
    """``"float32"`` where this machine's CPU runs vLLM in bf16 slowly, else None.

    vLLM's bf16 layers fall back to a slow path on x86 CPUs without AVX-512: there fp32 is several
    times as fast. None means that the model's own dtype serves: on a GPU, and on every other CPU.
    """
    import torch

    if torch.cuda.is_available() or platform.machine().lower() not in ("x86_64", "amd64"):
        return None
    # The test by which vLLM chooses between its AVX-512 and its AVX2 library (platforms/cpu.py).
    return None if torch.cpu._is_avx512_supported() else "float32"


FP32_NOTICE = "This CPU has no AVX-512, without which vLLM is slow in bf16: running in fp32."


def with_cpu_dtype(options: Mapping[str, Any]) -> dict[str, Any]:
    """``options`` of ``vllm.LLM`` with `cpu_dtype` as ``dtype``, unless they name a dtype."""
    dtype = cpu_dtype()
    if dtype is None or "dtype" in options:
        return dict(options)
    logger.warning(FP32_NOTICE)
    return {**options, "dtype": dtype}


def engine_options(given: Mapping[str, Any], eager: bool) -> dict[str, Any]:
    """Arguments of ``vllm.LLM`` that suit many short prompts, overridden by the ``given`` ones."""
    defaults = {
        "max_num_batched_tokens": 4096,
        "max_num_seqs": 256,
        "gpu_memory_utilization": 0.1,  # must be free at the start; short prompts need little
        "disable_log_stats": True,
        "enforce_eager": eager,
        "additional_config": {"pasta": {}},
    }
    return with_cpu_dtype({**defaults, **given})
