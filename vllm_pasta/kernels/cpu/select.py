"""The one entry to steered attention; picks an implementation."""

import functools
import logging

import torch

from vllm_pasta import envs
from vllm_pasta.errors import KernelError
from vllm_pasta.kernels import reference
from vllm_pasta.kernels.cpu import launch
from vllm_pasta.steering.plan import LayerAttention, LayerHeads, StepPlan

__all__ = ["prepare", "steered_attention"]

logger = logging.getLogger(__name__)


@functools.cache
def prepare() -> str:
    """Picks the implementation, and compiles it if need be: call it at start, not in a request.

    Returns:
        ``"cpp"`` or ``"reference"``: see `vllm_pasta.envs.kernel`.

    Raises:
        KernelError: the C++ kernel was asked for and cannot be built or loaded here.
        ConfigError: the environment asks for an unknown implementation.
    """
    choice = envs.kernel()
    if choice == "reference":
        return choice
    try:
        launch.load()
    except KernelError as e:
        if choice == "cpp":
            raise
        logger.warning(
            "vllm-pasta computes steered heads in plain torch, which makes steered steps several "
            "times slower: %s. Install g++ to have them computed in C++.",
            e,
        )
        return "reference"
    return "cpp"


def steered_attention(
    query: torch.Tensor,
    kv_cache: torch.Tensor,
    output: torch.Tensor,
    plan: StepPlan,
    layer_heads: LayerHeads,
    attention: LayerAttention,
    layout: str,
    whole: bool = False,
) -> None:
    """Overwrites the steered (row, head) pairs of ``output``; touches nothing else.

    Arguments are those of `vllm_pasta.kernels.reference.steered_attention`. Unless ``whole``, the
    steered pairs of ``output`` must hold the plain attention: an implementation may build on it,
    so it must not run twice on one output.
    """
    choice = prepare()
    if choice == "cpp" and not launch.covers(query, layout) and envs.kernel() == "auto":
        _warn_uncovered(query.device.type, query.dtype, layout)
        choice = "reference"
    kernel = launch.steered_attention if choice == "cpp" else reference.steered_attention
    kernel(query, kv_cache, output, plan, layer_heads, attention, layout, whole)


@functools.cache
def _warn_uncovered(device: str, dtype: torch.dtype, layout: str) -> None:
    logger.warning(
        "vllm-pasta computes steered heads in plain torch, which makes steered steps several times "
        "slower: its C++ kernel does not cover %s with KV cache layout %s on %s.",
        dtype,
        layout,
        device,
    )
