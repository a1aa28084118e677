"""Decides whether an engine can honour emphasis: here, and nowhere else.

An engine on which emphasis is switched on and which cannot honour it does not start. The reasons
are in `refusals`.
"""

from collections.abc import Iterable
from typing import TYPE_CHECKING

from vllm.config import get_layers_from_vllm_config
from vllm.logger import init_logger
from vllm.model_executor.layers.attention import MLAAttention
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.model_executor.layers.mamba.abstract import MambaBase
from vllm.platforms import current_platform

from vllm_pasta.errors import UnsupportedError
from vllm_pasta.integration.refusals import (
    BACKEND,
    ENGINE,
    LAYER,
    LAYERS,
    MLA_LAYER,
    RECURRENCE,
    Engine,
    Layer,
    Layers,
    Refusal,
)
from vllm_pasta.integration.versions import is_draft
from vllm_pasta.request.head_sets.library import Model
from vllm_pasta.request.heads import ranges
from vllm_pasta.request.shape import ModelShape, attention_layers, layer_heads

if TYPE_CHECKING:
    from vllm.config import VllmConfig

logger = init_logger(f"vllm.{__name__}")  # vLLM shows what is below its own name alone


def is_gpu() -> bool:
    """Whether emphasis runs by the GPU's backends and kernels."""
    return bool(current_platform.is_cuda())


def check_engine(vllm_config: "VllmConfig") -> None:
    """Checks what the configuration alone tells.

    Raises:
        UnsupportedError: lists every reason.
    """
    _refuse(_reasons(ENGINE, Engine(vllm_config)))


def check_layers(vllm_config: "VllmConfig") -> None:
    """Checks that every layer of the model has an attention backend of this plugin, in the worker,
    once the model is there.

    Raises:
        UnsupportedError: lists the layers that have another.
    """
    every = {
        name: layer
        for name, layer in get_layers_from_vllm_config(vllm_config, AttentionLayerBase).items()
        if not is_draft(layer)
    }
    # vLLM counts the layers of recurrences among those of attention: they too keep a state.
    layers = {name: layer for name, layer in every.items() if not isinstance(layer, MambaBase)}
    _refuse(
        f"layer {name} {reason}"
        for name, layer in every.items()
        for reason in _reasons(BACKEND if name in layers else RECURRENCE, Layer(layer))
    )
    shape = shape_of(vllm_config)
    start, end = vllm_config.model_config.get_layers_start_end_indices(vllm_config.parallel_config)
    expected = {layer for layer in shape.attention_layers if start <= layer < end}
    _refuse(_reasons(LAYERS, Layers({layer_index(name) for name in layers}, expected)))
    if len(shape.attention_layers) < shape.num_layers:
        logger.info_once(
            "Emphasis: %d of the model's %d layers have attention heads (%s); the others are not "
            "steered.",
            len(shape.attention_layers),
            shape.num_layers,
            ranges(shape.attention_layers),
        )


def layer_index(name: str) -> int:
    """The index of a layer in the model, which vLLM keeps in the layer's name.

    Raises:
        UnsupportedError: the name holds several numbers, or none.
    """
    numbers = [part for part in name.split(".") if part.isdigit()]
    if len(numbers) != 1:
        _refuse([f"layer {name} does not say which layer of the model it is, by one number"])
    return int(numbers[0])


def shape_of(vllm_config: "VllmConfig") -> ModelShape:
    """The layers and heads of an engine's model, by its configuration."""
    model, parallel = vllm_config.model_config, vllm_config.parallel_config
    num_layers = model.get_total_num_hidden_layers()
    layers = tuple(range(num_layers))
    if model.is_hybrid or model.has_noops:
        layers = attention_layers(model.hf_text_config, num_layers)
    heads = layer_heads(model.hf_text_config, num_layers)
    num_heads = model.get_num_attention_heads(parallel) * parallel.tensor_parallel_size
    return ModelShape(num_layers, max(heads, default=num_heads), layers, heads)


def model_of(vllm_config: "VllmConfig") -> Model:
    """Which model an engine serves, as far as head sets depend on it."""
    config = vllm_config.model_config
    return Model(
        name=config.model,
        model_type=config.hf_text_config.model_type,
        hidden_size=config.get_hidden_size(),
        shape=shape_of(vllm_config),
        revision=config.revision,
    )


def local_heads(vllm_config: "VllmConfig", rank: int) -> tuple[range, ...]:
    """For each layer of the model the query heads that a tensor-parallel rank has."""
    shape, ranks = shape_of(vllm_config), vllm_config.parallel_config.tensor_parallel_size
    counts = (shape.heads_of(layer) // ranks for layer in range(shape.num_layers))
    return tuple(range(rank * count, (rank + 1) * count) for count in counts)


def check_layer(name: str, layer: AttentionLayerBase, num_heads: int) -> None:
    """Checks one attention layer, in the worker, once the model is there.

    Args:
        name: The layer's.
        layer: The layer.
        num_heads: Query heads of this rank; what requests may name is checked against them.

    Raises:
        UnsupportedError: lists every reason.
    """
    refusals = MLA_LAYER if isinstance(layer, MLAAttention) else LAYER
    _refuse(f"layer {name} {reason}" for reason in _reasons(refusals, Layer(layer, num_heads)))


def _reasons(refusals: Iterable[Refusal], subject: Engine | Layers | Layer) -> Iterable[str]:
    """The sentences of those refusals that hold."""
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
