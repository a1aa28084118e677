"""What the layers of a model are refused for, in the worker, once the model is loaded."""

from typing import Any

import torch
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.mamba.mamba_mixer import MambaMixer

from vllm_pasta.integration.refusals.gpu_engine import GPU_CACHE_DTYPES
from vllm_pasta.integration.refusals.refusal import (
    ADMISSION_TESTS,
    GPU_TESTS,
    Refusal,
    shown_by,
)
from vllm_pasta.integration.registry import CPU_MLA_BACKENDS, GPU_BACKENDS, GPU_MLA_BACKENDS

LAYOUTS = ("vec", "vec16", "amx")
"""KV cache layouts that the CPU kernels read."""

MAX_GPU_HEAD_SIZE = 512

LAYERS = shown_by(
    f"{ADMISSION_TESTS}test_layers_that_the_configuration_does_not_say",
    (
        "layers",
        "the model has attention heads in layers {0.found_ranges}, and its configuration says "
        "{0.expected_ranges}, so a head set could not be checked",
        lambda e: e.found != e.expected,
    ),
)
"""Of all layers of a worker."""

RECURRENCE = shown_by(
    f"{ADMISSION_TESTS}test_recurrence_that_vllm_cannot_run",
    (
        "mamba-1",
        "is Mamba 1, for which vLLM has no operator on a CPU: the first request would end the "
        "engine, emphasised or not",
        lambda e: (
            isinstance(e.layer, MambaMixer) and not hasattr(torch.ops._C, "selective_scan_fwd")
        ),
    ),
    device="cpu",
)
"""Of a layer that keeps a state instead of KV, and is not steered."""


def _has_own_value_size(impl: Any) -> bool:
    return "DiffKV" in type(impl).__name__


_BACKENDS = tuple(
    Refusal(
        f"{device}-layer-backend",
        "has {0.impl.__class__.__name__}, which is not vllm-pasta's: let no other plugin replace "
        f"it, and choose one of {', '.join(backends)}",
        lambda e: not getattr(e.impl, "may_steer", False) and not _has_own_value_size(e.impl),
        f"{GPU_TESTS}test_layers_of_other_backends",
        device,
    )
    for device, backends in (
        ("cpu", ("CPU_ATTN", *CPU_MLA_BACKENDS)),
        ("gpu", (*GPU_BACKENDS, *GPU_MLA_BACKENDS)),
    )
)

BACKEND = (
    *shown_by(
        f"{GPU_TESTS}test_layers_of_other_backends",
        (
            "layer-own-value-size",
            "has {0.impl.__class__.__name__}, for values of another size than keys, which the "
            "plugin has no version of",
            lambda e: _has_own_value_size(e.impl),
        ),
    ),
    *_BACKENDS,
)
"""Of a layer: its attention backend is not one of this plugin's."""

LAYER = (
    *shown_by(
        "tests/engine/test_attention_kinds.py::test_chunked_local_attention_is_refused",
        (  # Other kinds have builders of their own, which may rearrange the batch's rows.
            "layer-kind",
            "is of kind {0.layer.__class__.__name__}, not Attention",
            lambda e: type(e.layer) is not Attention,
        ),
    ),
    *shown_by(
        f"{ADMISSION_TESTS}test_layer_that_cannot_be_steered",
        (
            "layer-heads",
            "has {0.impl.num_heads} query heads, not {0.num_heads} as the configuration says",
            lambda e: e.impl.num_heads != e.num_heads,
        ),
        (
            "layer-value-size",
            "has values of another head size than its keys",
            lambda e: e.layer.head_size_v != e.layer.head_size,
        ),
    ),
    *shown_by(
        f"{ADMISSION_TESTS}test_layer_that_cannot_be_steered",
        ("layer-fp8", "has an fp8 KV cache", lambda e: e.impl.is_fp8_kv_cache),
        (
            "layer-attention-type",
            "has attention of type {0.impl.attn_type}, not decoder",
            lambda e: e.impl.attn_type != "decoder",
        ),
        (
            "layer-layout",
            f"has KV cache layout {{0.layer.isa}}, not {', '.join(LAYOUTS)}",
            lambda e: e.layer.isa not in LAYOUTS,
        ),
        device="cpu",
    ),
    *shown_by(
        f"{GPU_TESTS}test_layer_that_cannot_be_steered",
        (
            "gpu-layer-attention-type",
            "has attention of type {0.impl.attn_type}, not decoder",
            lambda e: getattr(e.impl, "attn_type", "decoder") != "decoder",
        ),
        (
            "gpu-layer-head-size",
            f"has head size {{0.layer.head_size}}, above {MAX_GPU_HEAD_SIZE}",
            lambda e: e.layer.head_size > MAX_GPU_HEAD_SIZE,
        ),
        (
            "gpu-layer-kv-cache-dtype",
            f"has a KV cache of {{0.impl.kv_cache_dtype}}, not {', '.join(GPU_CACHE_DTYPES)}, "
            "float16 or bfloat16",
            lambda e: e.impl.kv_cache_dtype not in (*GPU_CACHE_DTYPES, "float16", "bfloat16"),
        ),
        (
            "gpu-layer-fp8-scales",
            "has fp8 scales of its own for each head",
            lambda e: any(
                scale.numel() != 1
                for scale in (e.layer._q_scale, e.layer._k_scale, e.layer._v_scale)
            ),
        ),
        (
            "gpu-layer-alibi-sqrt",
            "has ALiBi with square roots",
            lambda e: getattr(e.impl, "use_alibi_sqrt", False),
        ),
        (
            "gpu-layer-chunks",
            "has chunked attention",
            lambda e: getattr(e.impl, "chunk_lookback", -1) != -1,
        ),
        device="gpu",
    ),
)
"""Of a layer that has an attention backend of this plugin, once the model is loaded."""
