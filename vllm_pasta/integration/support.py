"""Decides whether an engine can honour emphasis: here, and nowhere else.

What is not known to work is refused. An engine on which emphasis is switched on and which cannot
honour it does not start.
"""

from typing import TYPE_CHECKING, Any

import vllm
from vllm import envs
from vllm.config import get_layers_from_vllm_config
from vllm.logger import init_logger
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.model_executor.layers.mamba.abstract import MambaBase
from vllm.platforms import current_platform

from vllm_pasta.errors import UnsupportedError
from vllm_pasta.integration.registry import GPU_BACKENDS
from vllm_pasta.integration.scheduler import connectors
from vllm_pasta.request.heads import ranges
from vllm_pasta.request.shape import ModelShape, attention_layers

if TYPE_CHECKING:
    from vllm.config import VllmConfig

logger = init_logger(__name__)

LAYOUTS = ("vec", "vec16", "amx")
"""KV cache layouts that the CPU kernels read."""

GPU_VLLM = "0.32."
"""Prefix of the vLLM versions whose GPU backends and model runners were read."""

GPU_CACHE_DTYPES = ("auto", "fp8", "fp8_e4m3", "fp8_e5m2")
"""KV cache dtypes that the Triton kernels read, beside the model's own by name."""

MAX_GPU_HEAD_SIZE = 256

SPECULATIVE_METHODS = ("ngram", "draft_model")
"""Ways of drafting that were tested. The draft itself is not steered."""

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
    model, cache = vllm_config.model_config, vllm_config.cache_config
    speculative = vllm_config.speculative_config
    method = speculative and speculative.method
    reasons = {
        f"speculative decoding is of method {method}, not {' or '.join(SPECULATIVE_METHODS)}": (
            speculative is not None and method not in SPECULATIVE_METHODS
        ),
        "kv_sharing_fast_prefill is on": cache.kv_sharing_fast_prefill,
        "the Rust front end is in use, which passes no admission": envs.VLLM_USE_RUST_FRONTEND,
        "VLLM_BATCH_INVARIANT is set, which steered attention does not keep": (
            envs.VLLM_BATCH_INVARIANT and not is_gpu()
        ),
        f"the runner is {model.runner_type}, not generate": model.runner_type != "generate",
        "the model has MLA attention": model.use_mla,
        "the model has no attention heads to steer": model.is_attention_free,
        "the model is an encoder-decoder": model.is_encoder_decoder,
        "the model is a diffusion model": model.is_diffusion,
        **(_gpu_reasons(vllm_config) if is_gpu() else _cpu_reasons(vllm_config)),
    }
    _refuse(
        [reason for reason, holds in reasons.items() if holds]
        + connectors.refusals(vllm_config.kv_transfer_config)
    )


def _cpu_reasons(vllm_config: "VllmConfig") -> dict[str, bool]:
    cache_dtype = vllm_config.cache_config.cache_dtype
    return {
        f"the platform is {current_platform.device_type}, not cpu or cuda": (
            not current_platform.is_cpu()
        ),
        "Model Runner V2 is in use": vllm_config.use_v2_model_runner,
        f"the KV cache is {cache_dtype}": cache_dtype != "auto",
    }


def _gpu_reasons(vllm_config: "VllmConfig") -> dict[str, bool]:
    model, parallel = vllm_config.model_config, vllm_config.parallel_config
    speculative = vllm_config.speculative_config
    backend = vllm_config.attention_config.backend
    cache_dtype = vllm_config.cache_config.cache_dtype
    own_dtype = str(model.dtype).removeprefix("torch.")
    return {
        f"on a GPU emphasis needs vLLM {GPU_VLLM}x, this is {vllm.__version__}": (
            not vllm.__version__.startswith(GPU_VLLM)
        ),
        f"the attention backend is {backend and backend.name}, not {', '.join(GPU_BACKENDS)}": (
            backend is not None and backend.name not in GPU_BACKENDS
        ),
        "pipeline parallel with Model Runner V2, which tells only the last stage whose the rows "
        "are (VLLM_USE_V2_MODEL_RUNNER=0 has another)": (
            parallel.pipeline_parallel_size > 1 and vllm_config.use_v2_model_runner
        ),
        "context parallel": parallel.decode_context_parallel_size > 1
        or parallel.prefill_context_parallel_size > 1,
        "a step is split into microbatches (dual batch overlap)": parallel.use_ubatching,
        "speculative decoding verifies adaptively": speculative is not None
        and speculative.enable_adaptive_verification,
        "sleep mode is on, which empties the GPU memory that steering lives in": (
            model.enable_sleep_mode
        ),
        "the KV cache is sparse (HiSparse)": (
            vllm_config.attention_config.hisparse_config is not None
        ),
        "the model has reference sliding windows": model.rswa_window is not None,
        f"the KV cache is {cache_dtype}": cache_dtype not in (*GPU_CACHE_DTYPES, own_dtype),
    }


def is_draft(layer_name: str) -> bool:
    """Whether a layer belongs to a draft model, which is not steered."""
    return layer_name.startswith(_DRAFT_PREFIX)


def check_layers(vllm_config: "VllmConfig") -> None:
    """Checks that every layer of the model has an attention backend of ours, in the worker, once
    the model is there.

    Raises:
        UnsupportedError: lists the layers that have another.
    """
    layers = {
        name: layer
        for name, layer in get_layers_from_vllm_config(vllm_config, AttentionLayerBase).items()
        # vLLM counts the layers of recurrences among those of attention: they too keep a state.
        if not is_draft(name) and not isinstance(layer, MambaBase)
    }
    others = {
        name: type(getattr(layer, "impl", layer)).__name__
        for name, layer in layers.items()
        if not getattr(getattr(layer, "impl", None), "may_steer", False)
    }
    _refuse(
        [
            f"layer {name} has {kind}, which is not vllm-pasta's: let no other plugin replace it, "
            f"and choose one of {', '.join(GPU_BACKENDS) if is_gpu() else 'CPU_ATTN'}"
            for name, kind in others.items()
        ]
    )
    shape = shape_of(vllm_config)
    start, end = vllm_config.model_config.get_layers_start_end_indices(vllm_config.parallel_config)
    expected = {layer for layer in shape.attention_layers if start <= layer < end}
    found = {layer_index(name) for name in layers}
    if found != expected:
        _refuse(
            [
                f"the model has attention heads in layers {ranges(found)}, and its configuration "
                f"says {ranges(expected)}, so a head set could not be checked"
            ]
        )
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
    num_heads = model.get_num_attention_heads(parallel) * parallel.tensor_parallel_size
    return ModelShape(num_layers, num_heads, layers)


def check_layer(name: str, layer: Attention, num_heads: int) -> None:
    """Checks one attention layer, in the worker, once the model is there.

    Args:
        name: The layer's.
        layer: The layer.
        num_heads: Query heads of this rank; what requests may name is checked against them.

    Raises:
        UnsupportedError: lists every reason.
    """
    impl, kind = layer.impl, type(layer).__name__
    reasons = {
        # Other kinds have builders of their own, which may rearrange the batch's rows.
        f"is of kind {kind}, not Attention": type(layer) is not Attention,
        f"has {impl.num_heads} query heads, not {num_heads} as the model": (
            impl.num_heads != num_heads
        ),
        "has values of another head size than its keys": layer.head_size_v != layer.head_size,
        **(_gpu_layer_reasons(layer) if is_gpu() else _cpu_layer_reasons(layer)),
    }
    _refuse([f"layer {name} {reason}" for reason, holds in reasons.items() if holds])


def _cpu_layer_reasons(layer: Attention) -> dict[str, bool]:
    impl = layer.impl
    return {
        "has an fp8 KV cache": impl.is_fp8_kv_cache,
        f"has attention of type {impl.attn_type}": impl.attn_type != "decoder",
        f"has KV cache layout {layer.isa}, not {', '.join(LAYOUTS)}": layer.isa not in LAYOUTS,
    }


def _gpu_layer_reasons(layer: Attention) -> dict[str, bool]:
    impl: Any = layer.impl
    cache_dtype, attn_type = impl.kv_cache_dtype, getattr(impl, "attn_type", "decoder")
    scales = (layer._q_scale, layer._k_scale, layer._v_scale)
    return {
        f"has attention of type {attn_type}": attn_type != "decoder",
        f"has head size {layer.head_size}, above {MAX_GPU_HEAD_SIZE}": (
            layer.head_size > MAX_GPU_HEAD_SIZE
        ),
        f"has a KV cache of {cache_dtype}": (
            cache_dtype not in (*GPU_CACHE_DTYPES, "float16", "bfloat16")
        ),
        "has fp8 scales of its own for each head": any(scale.numel() != 1 for scale in scales),
        "has ALiBi with square roots": getattr(impl, "use_alibi_sqrt", False),
        "has chunked attention": getattr(impl, "chunk_lookback", -1) != -1,
    }


def _refuse(reasons: list[str]) -> None:
    if reasons:
        raise UnsupportedError(
            "vllm-pasta cannot honour emphasis on this engine: "
            + "; ".join(reasons)
            + ". Change that, or leave emphasis off (no --plugin pasta, no 'pasta' in "
            "additional_config or VLLM_PLUGINS)"
        )
