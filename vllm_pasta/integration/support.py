"""Decides whether an engine can honour emphasis: here, and nowhere else.

An engine on which emphasis is switched on and which cannot honour it does not start. The reasons
are in `refusals`.
"""

from collections.abc import Iterable
from typing import TYPE_CHECKING

from vllm.config import get_layers_from_vllm_config
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.platforms import current_platform

from vllm_pasta.errors import UnsupportedError
from vllm_pasta.integration.refusals import BACKEND, ENGINE, LAYER, Engine, Layer, Refusal

if TYPE_CHECKING:
    from vllm.config import VllmConfig

_DRAFT_PREFIX = "draft_model."
"""What vLLM puts before the names of a draft model's layers."""


def is_gpu() -> bool:
    """Whether emphasis runs by the GPU's backends and kernels."""
    return bool(current_platform.is_cuda())


def check_engine(vllm_config: "VllmConfig") -> None:
    """Checks what the configuration alone tells.

    Raises:
        UnsupportedError: lists every reason.
    """
    _refuse(_reasons(ENGINE, Engine(vllm_config)))


def is_draft(layer_name: str) -> bool:
    """Whether a layer belongs to a draft model, which is not steered."""
    return layer_name.startswith(_DRAFT_PREFIX)


def check_layers(vllm_config: "VllmConfig") -> None:
    """Checks that every layer of the model has an attention backend of this plugin, in the worker,
    once the model is there.

    Raises:
        UnsupportedError: lists the layers that have another.
    """
    layers = get_layers_from_vllm_config(vllm_config, AttentionLayerBase)
    _refuse(
        f"layer {name} {reason}"
        for name, layer in layers.items()
        if not is_draft(name)
        for reason in _reasons(BACKEND, Layer(layer))
    )


def check_layer(name: str, layer: Attention, num_heads: int) -> None:
    """Checks one attention layer, in the worker, once the model is there.

    Args:
        name: The layer's.
        layer: The layer.
        num_heads: Query heads of this rank; what requests may name is checked against them.

    Raises:
        UnsupportedError: lists every reason.
    """
    _refuse(f"layer {name} {reason}" for reason in _reasons(LAYER, Layer(layer, num_heads)))


def _reasons(refusals: Iterable[Refusal], subject: Engine | Layer) -> Iterable[str]:
    """The sentences of those refusals that hold for an engine or a layer."""
    here = (None, "gpu" if is_gpu() else "cpu")
    return (
        refusal.sentence.format(subject)
        for refusal in refusals
        if refusal.device in here and refusal.holds(subject)
    )


def _refuse(reasons: Iterable[str]) -> None:
    if found := list(reasons):
        raise UnsupportedError(
            "vllm-pasta cannot honour emphasis on this engine: "
            + "; ".join(found)
            + ". Change that, or leave emphasis off (no --plugin pasta, no 'pasta' in "
            "additional_config or VLLM_PLUGINS)"
        )
