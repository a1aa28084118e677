"""vLLM's CPU attention backend, with steering added after the plain kernel.

Registered in place of ``CPU_ATTN``: the CPU platform of stock vLLM takes no custom backend. Where
one does (see ``patches/``), it is registered as ``CUSTOM``.
"""

from functools import partial
from typing import Any

import torch
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend, CPUAttentionMetadata

from vllm_pasta.integration.worker.backend import SteeringBuilder, SteeringImpl, steer
from vllm_pasta.integration.worker.rows import EmphasisRows
from vllm_pasta.integration.worker.watch import WatchedRow
from vllm_pasta.kernels.cpu.select import prepare, steered_attention
from vllm_pasta.kernels.reference import gather_kv
from vllm_pasta.steering.plan import StepPlan


class CPUSteeringBuilder(SteeringBuilder):
    """A step's steering is a `StepPlan`, or None where no row is steered."""

    def _prepare(self, rows: EmphasisRows, impls: list[Any]) -> None:
        prepare()

    def _steering(
        self, rows: EmphasisRows, common: CommonAttentionMetadata, metadata: CPUAttentionMetadata
    ) -> StepPlan | None:
        static = rows.plan_of(common)
        metadata.watched = None
        if static is None:
            return None
        metadata.watched = WatchedRow.of(rows, metadata, metadata.block_table)
        return StepPlan.build(
            static, metadata.query_start_loc, metadata.seq_lens, metadata.block_table
        )


class CPUSteeringImpl(SteeringImpl):
    """Runs the base's kernel, then steers the output of the steered (row, head) pairs, once."""

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
        plan: StepPlan | None = self._steering_of(attn_metadata, output_scale)
        heads = None if plan is None else plan.static.layers.get(self.layer_index or 0)
        whole = plan is not None and heads is not None and plan.takes_whole(heads)
        if not whole:
            super().forward(  # type: ignore[misc]
                layer, query, key, value, kv_cache, attn_metadata, output,
                output_scale, output_block_scale,
            )  # fmt: skip
        if plan is not None and heads is not None:
            steered_attention(
                query, kv_cache, output, plan, heads, self.attention, layer.isa, whole
            )
        if self.layer_index is not None and attn_metadata is not None and attn_metadata.watched:
            row: WatchedRow = attn_metadata.watched
            read = partial(_keys, kv_cache, layer.isa)
            row.see(self.layer_index, query[row.index], self.attention, read)
        return output


def _keys(
    kv_cache: torch.Tensor, layout: str, block_table: torch.Tensor, start: int, end: int
) -> torch.Tensor:
    heads = torch.arange(kv_cache.shape[1])
    return gather_kv(kv_cache, block_table, start, end, heads, layout)[0]


SteeredCPUAttentionBackend = steer(CPUAttentionBackend, CPUSteeringBuilder, CPUSteeringImpl)
