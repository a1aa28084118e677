"""Decides whether an engine can honour emphasis: here, and nowhere else.

What is not known to work is refused. An engine on which emphasis is switched on and which cannot
honour it does not start.
"""

from typing import TYPE_CHECKING

from vllm import envs
from vllm.model_executor.layers.attention import Attention
from vllm.platforms import current_platform

from vllm_pasta.errors import UnsupportedError
from vllm_pasta.integration import connectors

if TYPE_CHECKING:
    from vllm.config import VllmConfig

LAYOUTS = ("vec", "vec16", "amx")
"""KV cache layouts that the kernels read."""

SPECULATIVE_METHODS = ("ngram", "draft_model")
"""Ways of drafting that were tested. The draft itself is not steered."""

_DRAFT_PREFIX = "draft_model."
"""What vLLM puts before the names of a draft model's layers."""


def check_engine(vllm_config: "VllmConfig") -> None:
    """Checks what the configuration alone tells.

    Raises:
        UnsupportedError: lists every reason.
    """
    model, cache = vllm_config.model_config, vllm_config.cache_config
    speculative = vllm_config.speculative_config
    method = speculative and speculative.method
    reasons = {
        f"the platform is {current_platform.device_type}, not cpu": not current_platform.is_cpu(),
        "Model Runner V2 is in use": vllm_config.use_v2_model_runner,
        f"speculative decoding is of method {method}, not {' or '.join(SPECULATIVE_METHODS)}": (
            speculative is not None and method not in SPECULATIVE_METHODS
        ),
        "kv_sharing_fast_prefill is on": cache.kv_sharing_fast_prefill,
        "the Rust front end is in use, which passes no admission": envs.VLLM_USE_RUST_FRONTEND,
        "VLLM_BATCH_INVARIANT is set, which steered attention does not keep": (
            envs.VLLM_BATCH_INVARIANT
        ),
        f"the KV cache is {cache.cache_dtype}": cache.cache_dtype != "auto",
        f"the runner is {model.runner_type}, not generate": model.runner_type != "generate",
        "the model has MLA attention": model.use_mla,
        "the model has layers without attention": model.is_hybrid
        or model.is_attention_free
        or model.has_inner_state,
        "the model is an encoder-decoder": model.is_encoder_decoder,
        "the model is multimodal": model.is_multimodal_model,
        "the model is a diffusion model": model.is_diffusion,
    }
    _refuse(
        [reason for reason, holds in reasons.items() if holds]
        + connectors.refusals(vllm_config.kv_transfer_config)
    )


def is_draft(layer_name: str) -> bool:
    """Whether a layer belongs to a draft model, which is not steered."""
    return layer_name.startswith(_DRAFT_PREFIX)


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
        "has an fp8 KV cache": impl.is_fp8_kv_cache,
        f"has attention of type {impl.attn_type}": impl.attn_type != "decoder",
        f"has KV cache layout {layer.isa}, not {', '.join(LAYOUTS)}": layer.isa not in LAYOUTS,
    }
    _refuse([f"layer {name} {reason}" for reason, holds in reasons.items() if holds])


def _refuse(reasons: list[str]) -> None:
    if reasons:
        raise UnsupportedError(
            "vllm-pasta cannot honour emphasis on this engine: "
            + "; ".join(reasons)
            + ". Change that, or leave emphasis off (no --plugin pasta, no 'pasta' in "
            "additional_config or VLLM_PLUGINS)"
        )
