"""vLLM's CPU attention backend, with steering added after the plain kernel.

Registered in place of ``CPU_ATTN``: the CPU platform of vLLM 0.32 takes no custom backend. Where
one does (see ``patches/``), it is registered as ``CUSTOM``.
"""

from itertools import filterfalse
from typing import Any

import torch
from vllm.config import VllmConfig, get_layers_from_vllm_config
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.models.utils import extract_layer_index
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.attention.backends.cpu_attn import (
    CPUAttentionBackend,
    CPUAttentionBackendImpl,
    CPUAttentionMetadata,
    CPUAttentionMetadataBuilder,
)
from vllm.v1.kv_cache_interface import AttentionSpec

from vllm_pasta.integration import support
from vllm_pasta.integration.config import is_enabled
from vllm_pasta.integration.rows import EmphasisRows, rows_of
from vllm_pasta.ops import prepare, steered_attention
from vllm_pasta.plan import LayerAttention, StepPlan


class SteeredCPUAttentionBackend(CPUAttentionBackend):
    """``CPU_ATTN`` that honours emphasis. Without any, it does what its base does."""

    @staticmethod
    def get_impl_cls() -> type["SteeredCPUAttentionImpl"]:
        return SteeredCPUAttentionImpl

    @staticmethod
    def get_builder_cls() -> type["SteeredCPUAttentionMetadataBuilder"]:
        return SteeredCPUAttentionMetadataBuilder


class SteeredCPUAttentionMetadataBuilder(CPUAttentionMetadataBuilder):
    """Puts a step's plan beside the base's metadata, as attribute ``steering``.

    An engine has one builder per group of layers whose KV cache is managed alike. All take their
    rows from the same `EmphasisRows`; block tables are the group's own.

    Raises:
        UnsupportedError: emphasis is on, and a layer of this group cannot honour it.
    """

    def __init__(
        self,
        kv_cache_spec: AttentionSpec,
        layer_names: list[str],
        vllm_config: VllmConfig,
        device: torch.device,
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self._rows: EmphasisRows | None = None
        if is_enabled(vllm_config):
            support.check_engine(vllm_config)
            layers = get_layers_from_vllm_config(vllm_config, Attention, layer_names)
            num_heads = vllm_config.model_config.get_num_attention_heads(
                vllm_config.parallel_config
            )
            for name in filterfalse(support.is_draft, layer_names):
                support.check_layer(name, layers[name], num_heads)
                impl = layers[name].impl
                impl.layer_index = extract_layer_index(name)
                impl.attention = layer_attention(impl)
            self._rows = rows_of(vllm_config)
            prepare()

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> CPUAttentionMetadata:
        metadata = super().build(common_prefix_len, common_attn_metadata, fast_build)
        metadata.steering = None
        static = None if self._rows is None else self._rows.plan_of(common_attn_metadata)
        if static is not None:
            metadata.steering = StepPlan.build(
                static, metadata.query_start_loc, metadata.seq_lens, metadata.block_table
            )
        return metadata


class SteeredCPUAttentionImpl(CPUAttentionBackendImpl):
    """Runs the base's kernel, then steers the output of the steered (row, head) pairs, once."""

    layer_index: int | None = None
    """Over the whole model; set by the builder where emphasis is on. None in a draft model."""
    attention: LayerAttention

    def forward(
        self,
        layer: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: CPUAttentionMetadata | None,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        plan: StepPlan | None = getattr(attn_metadata, "steering", None)
        index = self.layer_index
        heads = None if plan is None or index is None else plan.static.layers.get(index)
        whole = plan is not None and heads is not None and plan.takes_whole(heads)
        if not whole:
            super().forward(
                layer, query, key, value, kv_cache, attn_metadata, output,
                output_scale, output_block_scale,
            )  # fmt: skip
        if plan is not None and heads is not None:
            steered_attention(
                query, kv_cache, output, plan, heads, self.attention, layer.isa, whole
            )
        return output


def layer_attention(impl: CPUAttentionBackendImpl) -> LayerAttention:
    """What the base's kernel computes for this layer, in our terms."""
    return LayerAttention(
        scale=impl.scale,
        window=None if impl.sliding_window == -1 else impl.sliding_window,
        soft_cap=impl.logits_soft_cap or None,
        alibi_slopes=impl.alibi_slopes,
        sinks=impl.sinks,
    )
