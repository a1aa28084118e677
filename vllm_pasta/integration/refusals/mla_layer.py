"""What a layer of multi-head latent attention (MLA) is refused for."""

from vllm.model_executor.layers.attention import MLAAttention

from vllm_pasta.integration.refusals.refusal import shown_by

MLA_LAYER = shown_by(
    "tests/engine/test_mla.py::test_layer_that_cannot_be_steered",
    (
        "mla-layer-kind",
        "is of kind {0.layer.__class__.__name__}, not MLAAttention",
        lambda e: type(e.layer) is not MLAAttention,
    ),
    (
        "mla-layer-heads",
        "has {0.impl.num_heads} query heads, not {0.num_heads} as the configuration says",
        lambda e: e.impl.num_heads != e.num_heads,
    ),
    (
        "mla-layer-padded",
        "has queries padded to {0.layer.q_pad_num_heads} heads",
        lambda e: e.layer.q_pad_num_heads is not None,
    ),
    (
        "mla-layer-kv-cache-dtype",
        "has a latent KV cache of {0.impl.kv_cache_dtype}, not auto, float16 or bfloat16",
        lambda e: e.impl.kv_cache_dtype not in ("auto", "float16", "bfloat16"),
    ),
    (
        "mla-layer-sparse",
        "takes only the keys that an indexer chooses",
        lambda e: e.impl.is_sparse or e.layer.use_sparse,
    ),
    (
        "mla-layer-window",
        "has a sliding window over a latent KV cache",
        lambda e: e.layer.sliding_window is not None,
    ),
    (
        "mla-layer-context-parallel",
        "has its latent KV cache spread over {0.impl.dcp_world_size} ranks",
        lambda e: e.impl.dcp_world_size > 1,
    ),
)
"""Of a layer that has an attention backend of this plugin for MLA, once the model is loaded."""
