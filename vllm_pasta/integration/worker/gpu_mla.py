"""vLLM's Triton backend for MLA on a GPU, with steering added after its kernels.

Registered in place of ``TRITON_MLA``. Decoding rows, which CUDA graphs hold, are steered by the
plugin's Triton kernel over the latent cache, as `gpu` steers others, but over all keys: vLLM's
log-sum-exp has the query's dtype, which is too coarse to merge with. Prompts, which no graph holds,
are steered in torch, as `mla` does on a CPU.
"""

from dataclasses import dataclass
from typing import Any

import torch
from vllm import envs
from vllm.v1.attention.backend import AttentionBackend, CommonAttentionMetadata

from vllm_pasta.errors import UnsupportedError
from vllm_pasta.integration.registry import GPU_MLA_BACKENDS
from vllm_pasta.integration.worker.backend import steered_backend
from vllm_pasta.integration.worker.gpu import GPUSteeringBuilder, Steering
from vllm_pasta.integration.worker.mla import MLASteeringImpl, describe
from vllm_pasta.integration.worker.rows import EmphasisRows
from vllm_pasta.integration.worker.watch import WatchedRow
from vllm_pasta.kernels.gpu.launch import MIN_BLOCK_M, Batch, Workspace, steered_attention, warm_up
from vllm_pasta.steering.plan import StepPlan


@dataclass(frozen=True)
class MLASteering(Steering):
    """A step's steering, for the layers of a group: of its decoding rows, which come first.

    Attributes:
        prompts: The steered requests among the others.
    """

    prompts: StepPlan | None = None


class GPUMLASteeringBuilder(GPUSteeringBuilder):
    """A step's steering is an `MLASteering`; None for a draft model's own steps."""

    reorder_batch_threshold: int

    def _describe(self, layer: Any) -> None:
        describe(layer)

    def _prepare(self, rows: EmphasisRows, impls: list[Any]) -> None:
        self._buffers = rows.buffers_on(self.device)
        self._workspaces = rows.workspaces
        for impl in impls:
            rank = impl.kv_lora_rank
            if rank not in rows.workspaces:
                rows.workspaces[rank] = Workspace(rank, self.device, envs.VLLM_BATCH_INVARIANT)
            warm_up(
                self._buffers,
                rows.workspaces[rank],
                impl.attention,
                (impl.num_heads, tiles_of(impl.num_heads), impl.head_size),
                self.kv_cache_spec.block_size,
                self.vllm_config.model_config.dtype,
                value=(rank, 0),
            )

    def _steering(
        self, rows: EmphasisRows, common: CommonAttentionMetadata, metadata: Any
    ) -> Steering | None:
        steering = super()._steering(rows, common, metadata)
        if steering is None:
            return None
        count, prompts = metadata.num_decodes, None
        if metadata.num_prefills and steering.is_steered:
            static = rows.plan_from(rows.slots_of(common), count)
            if static is not None:
                prompts = StepPlan.build(
                    static,
                    common.query_start_loc_cpu,
                    common.seq_lens_cpu_upper_bound,  # exact for prompts
                    common.block_table_tensor,
                )
        batch = Batch(
            common.query_start_loc[: count + 1],
            common.seq_lens[:count],
            common.block_table_tensor[:count],
            min(common.max_query_len, self.reorder_batch_threshold),
        )
        fields = {**vars(steering), "batch": batch, "num_tokens": metadata.num_decode_tokens}
        return MLASteering(**fields, prompts=prompts)


class GPUMLASteeringImpl(MLASteeringImpl):
    """Runs the base's kernels, then steers the output of the steered (row, head) pairs."""

    num_heads: int

    def _steering_of(self, metadata: Any, output_scale: Any) -> Any:
        steering = super()._steering_of(metadata, output_scale)
        if steering is None and self.layer_index is not None and metadata is not None:
            raise UnsupportedError("a draft model's step reached a layer that is to be steered")
        return steering

    def _steers_decodes(self, steering: MLASteering) -> bool:
        return steering.launches(steering.buffers.device.type == "cuda")

    def _steer_decodes(
        self, steering: MLASteering, q: torch.Tensor, kv_cache: torch.Tensor, output: torch.Tensor
    ) -> None:
        n = steering.num_tokens
        steered_attention(
            q[:n], kv_cache[:, None].expand(-1, tiles_of(self.num_heads), -1, -1), output[:n],
            steering.buffers, self.layer_index or 0, steering.batch, self.attention,
            steering.workspaces[self.kv_lora_rank], value_at=0,
        )  # fmt: skip

    def _watched(self, metadata: Any, steering: MLASteering | None) -> WatchedRow | None:
        return None if steering is None else steering.watched

    def _prompts(self, steering: MLASteering | None) -> StepPlan | None:
        return None if steering is None else steering.prompts


def tiles_of(num_heads: int) -> int:
    """How many tiles the query heads make, all of the same keys: a tile has as many rows as tensor
    cores take, or fewer. To the kernel each tile has a KV head of its own."""
    sizes = (size for size in range(MIN_BLOCK_M, 0, -1) if num_heads % size == 0)
    return num_heads // next(sizes)


def __getattr__(name: str) -> type[AttentionBackend]:
    """``TRITON_MLA``: the steered version of vLLM's own of that name."""
    if name not in GPU_MLA_BACKENDS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return steered_backend(name, GPUMLASteeringBuilder, GPUMLASteeringImpl)
