"""vLLM's MLA backends of the CPU (DeepSeek and its kin), with steering added after their kernels.

Registered in place of ``CPU_MLA`` and ``AMX_MLA``. A step's rows come in two parts, each by a
method of its own: decoding rows first, whose queries are absorbed already and whose output is
latent (`forward_mqa`), then prompts, with queries and outputs of the heads (`forward_mha`). Both
are steered in the latent space, over the paged cache, which holds the step's own tokens by then.
"""

from functools import partial
from typing import Any

import torch
from vllm import _custom_ops as ops
from vllm.v1.attention.backend import AttentionBackend, CommonAttentionMetadata

from vllm_pasta.integration.registry import CPU_MLA_BACKENDS
from vllm_pasta.integration.worker.backend import SteeringBuilder, SteeringImpl, steered_backend
from vllm_pasta.integration.worker.rows import EmphasisRows
from vllm_pasta.integration.worker.watch import WatchedRow
from vllm_pasta.kernels.mla import Part, latent_attention, steered_parts
from vllm_pasta.kernels.reference import gather_keys
from vllm_pasta.steering.plan import LayerAttention, LayerHeads, StepPlan


class MLASteeringBuilder(SteeringBuilder):
    """A step's steering is a `StepPlan`, or None where no row is steered."""

    def _describe(self, layer: Any) -> None:
        describe(layer)

    def _steering(
        self, rows: EmphasisRows, common: CommonAttentionMetadata, metadata: Any
    ) -> StepPlan | None:
        static = rows.plan_of(common)
        metadata.watched = None
        if static is None:
            return None
        metadata.watched = WatchedRow.of(rows, common, common.block_table_tensor)
        return StepPlan.build(
            static, common.query_start_loc, common.seq_lens, common.block_table_tensor
        )


def describe(layer: Any) -> None:
    """Gives an MLA layer's impl what it needs to know of its layer."""
    layer.impl.layer, layer.impl.attention = layer, LayerAttention(layer.scale)


class MLASteeringImpl(SteeringImpl):
    """Runs the base's kernels, then steers the output of the steered (row, head) pairs."""

    layer: Any
    """Holds the up-projections of keys and values; set with ``layer_index``."""
    kv_lora_rank: int
    qk_nope_head_dim: int
    v_head_dim: int

    def forward_mqa(
        self, q: Any, kv_c_and_k_pe_cache: torch.Tensor, attn_metadata: Any, layer: Any
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        steering = self._steering_of(attn_metadata, None)
        is_steered = steering is not None and self._steers_decodes(steering)
        if is_steered and isinstance(q, tuple):
            q = torch.cat(q, dim=-1)
        output, lse = super().forward_mqa(q, kv_c_and_k_pe_cache, attn_metadata, layer)  # type: ignore[misc]
        if is_steered:
            self._steer_decodes(steering, q, kv_c_and_k_pe_cache, output)
        row = self._watched(attn_metadata, steering)
        if row is not None and row.index < attn_metadata.num_decode_tokens:
            q = torch.cat(q, dim=-1) if isinstance(q, tuple) else q
            self._see(row, q[row.index], kv_c_and_k_pe_cache)
        return output, lse

    def forward_mha(
        self,
        q: torch.Tensor,
        kv_c_normed: torch.Tensor,
        k_pe: torch.Tensor,
        kv_c_and_k_pe_cache: torch.Tensor,
        attn_metadata: Any,
        k_scale: torch.Tensor,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
    ) -> None:
        steering = self._steering_of(attn_metadata, output_scale)
        plan = self._prompts(steering)
        super().forward_mha(  # type: ignore[misc]
            q, kv_c_normed, k_pe, kv_c_and_k_pe_cache, attn_metadata, k_scale, output, output_scale
        )
        start = attn_metadata.num_decode_tokens
        row = self._watched(attn_metadata, steering)
        if row is not None and row.index >= start:
            every = torch.arange(q.shape[1], device=q.device)
            query = self._absorbed(q[row.index - start : row.index - start + 1], every)
            self._see(row, query[0], kv_c_and_k_pe_cache)
        heads = None if plan is None else self._heads(plan)
        if plan is None or heads is None:
            return
        by_head = output.view(len(output), -1, self.v_head_dim)
        for part in steered_parts(plan, heads, start, len(q), kv_c_and_k_pe_cache):
            query = self._absorbed(q[part.rows][:, part.heads], part.heads)
            latent = self._attend(query, part).to(q.dtype)
            by_head[part.rows, part.heads] = self._project("v", latent, part.heads)

    def _steers_decodes(self, steering: Any) -> bool:
        """Whether `_steer_decodes` is to be called in this step."""
        return self._heads(steering) is not None

    def _steer_decodes(
        self, steering: Any, q: torch.Tensor, kv_cache: torch.Tensor, output: torch.Tensor
    ) -> None:
        """Overwrites the steered pairs of decoding rows.

        Args:
            steering: The step's.
            q: ``[rows, heads, kv_lora_rank + qk_rope_head_dim]``.
            kv_cache: ``[num_blocks, block_size, kv_lora_rank + qk_rope_head_dim]``.
            output: ``[rows, heads, kv_lora_rank]``.
        """
        heads = self._heads(steering)
        assert heads is not None
        for part in steered_parts(steering, heads, 0, len(q), kv_cache):
            steered = self._attend(q[part.rows][:, part.heads], part)
            output[part.rows, part.heads] = steered.to(output.dtype)

    def _prompts(self, steering: Any) -> StepPlan | None:
        """What of a step's prompts is steered."""
        plan: StepPlan | None = steering
        return plan

    def _heads(self, plan: StepPlan) -> LayerHeads | None:
        """The steered heads of this layer."""
        return plan.static.layers.get(self.layer_index or 0)

    def _attend(self, query: torch.Tensor, part: Part) -> torch.Tensor:
        return latent_attention(query, part, self.attention.scale, self.kv_lora_rank)

    def _absorbed(self, query: torch.Tensor, heads: torch.Tensor) -> torch.Tensor:
        """Queries ``[rows, h, …]`` of these heads, as they compare with the latent cache."""
        latent = self._project("k", query[..., : self.qk_nope_head_dim], heads)
        return torch.cat([latent, query[..., self.qk_nope_head_dim :]], dim=-1)

    def _watched(self, metadata: Any, steering: Any) -> WatchedRow | None:
        """The row of this step whose weights are asked for."""
        row: WatchedRow | None = None if metadata is None else getattr(metadata, "watched", None)
        return row if self.layer_index is not None else None

    def _see(self, row: WatchedRow, query: torch.Tensor, kv_cache: torch.Tensor) -> None:
        """Keeps what the watched row attends to in this layer; its queries are absorbed."""
        keys = partial(gather_keys, kv_cache[:, None])
        row.see(self.layer_index or 0, query, self.attention, keys)

    def _project(self, which: str, x: torch.Tensor, heads: torch.Tensor) -> torch.Tensor:
        """Multiplies ``[rows, h, n]`` by these heads' up-projection of keys, transposed, or of
        values: ``[rows, h, m]``, in the same dtype."""
        weights = self.layer.W_UK_T if which == "k" else self.layer.W_UV  # [heads, n, m]
        return torch.bmm(x.transpose(0, 1), weights[heads]).transpose(0, 1)


class AMXSteeringImpl(MLASteeringImpl):
    """The same over vLLM's AMX backend, which keeps the up-projections packed, and nothing else."""

    _w_uk_packed: torch.Tensor
    _w_uv_packed: torch.Tensor
    _w_scale: torch.Tensor | None

    def _project(self, which: str, x: torch.Tensor, heads: torch.Tensor) -> torch.Tensor:
        packed = (self._w_uk_packed if which == "k" else self._w_uv_packed)[heads]
        width = self.kv_lora_rank if which == "k" else self.v_head_dim
        result = x.new_empty(len(x), len(heads), width)
        ops.bmm_cpu(result.transpose(0, 1), x.transpose(0, 1), packed, True, self._w_scale)
        return result


def __getattr__(name: str) -> type[AttentionBackend]:
    """``CPU_MLA``, ``AMX_MLA``: the steered version of vLLM's own of that name."""
    if name not in CPU_MLA_BACKENDS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    impl = AMXSteeringImpl if name == "AMX_MLA" else MLASteeringImpl
    return steered_backend(name, MLASteeringBuilder, impl)
