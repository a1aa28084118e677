"""Emphasis for vLLM: mark a part of the prompt, and chosen attention heads attend to it.

The method is PASTA (Zhang et al., ICLR 2024, arXiv 2311.02262). Importing this package needs
neither vllm nor triton; ``SamplingParams`` and ``BeamSearchParams`` import vllm when they are
first asked for.
"""

from typing import TYPE_CHECKING, Any

from vllm_pasta.errors import (
    ConfigError,
    EmphasisError,
    HeadSetError,
    KernelError,
    PastaError,
    UnsupportedError,
)
from vllm_pasta.request.emphasis import Emphasis
from vllm_pasta.request.heads import HeadSet
from vllm_pasta.request.resolution import ResolvedEmphasis

__version__ = "0.1.0"

if TYPE_CHECKING:
    from vllm_pasta.integration.frontend.sampling_params import BeamSearchParams, SamplingParams

__all__ = [
    "BeamSearchParams",
    "ConfigError",
    "Emphasis",
    "EmphasisError",
    "HeadSet",
    "HeadSetError",
    "KernelError",
    "PastaError",
    "ResolvedEmphasis",
    "SamplingParams",
    "UnsupportedError",
    "__version__",
]


def __getattr__(name: str) -> Any:
    if name in ("BeamSearchParams", "SamplingParams"):
        from vllm_pasta.integration.frontend import sampling_params

        return getattr(sampling_params, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
