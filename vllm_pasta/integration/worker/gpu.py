"""vLLM's GPU attention backends, with steering added after the plain kernel.

Registered in place of each backend, by its own name, so what the platform chooses, or
``--attention-backend``, keeps its meaning. Each is made when it is first asked for, since that
imports its base. docs/gpu.md says what ran on hardware.

What a CUDA graph captures must not depend on what is steered. So steering lives in buffers at
fixed addresses (`steering.slots`), a step's metadata only refers to them and to the model runner's
own persistent tensors, and what is captured is always launched.
"""

import copy
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from vllm import envs
from vllm.v1.attention.backend import AttentionBackend, CommonAttentionMetadata

from vllm_pasta.errors import UnsupportedError
from vllm_pasta.integration.registry import GPU_BACKENDS
from vllm_pasta.integration.worker import lse
from vllm_pasta.integration.worker.backend import SteeringBuilder, SteeringImpl, steered_backend
from vllm_pasta.integration.worker.rows import EmphasisRows
from vllm_pasta.integration.worker.watch import WatchedRow
from vllm_pasta.kernels.gpu.launch import Batch, Workspace, steered_attention, warm_up
from vllm_pasta.kernels.reference import gather_keys
from vllm_pasta.steering.slots import SteeringBuffers

FP8 = {
    "fp8": torch.float8_e4m3fn,
    "fp8_e4m3": torch.float8_e4m3fn,
    "fp8_e5m2": torch.float8_e5m2,
}
"""What vLLM's names of KV cache dtypes mean on CUDA."""


@dataclass(frozen=True)
class Steering:
    """A step's steering, for the layers of a group.

    Attributes:
        buffers: Who is steered how, and in which rows of this step.
        workspaces: What the launches of a layer share with those of others, by head size.
        batch: The step's requests.
        num_tokens: Of the step; rows from there on are padding.
        must_launch: Whether kernels are launched though nothing is steered: for a graph.
        is_steered: Whether any request of the step is.
        watched: The row of this step whose weights are asked for; nearly always None.
    """

    buffers: SteeringBuffers
    workspaces: dict[int, Workspace]
    batch: Batch
    num_tokens: int
    is_steered: bool
    must_launch: bool = False
    watched: WatchedRow | None = None

    def launches(self, is_cuda: bool) -> bool:
        """Whether kernels are launched. Also where nothing is steered, in graphs, which are
        replayed when something is."""
        if self.is_steered or self.must_launch:
            return True
        return is_cuda and bool(torch.cuda.is_current_stream_capturing())


class GPUSteeringBuilder(SteeringBuilder):
    """A step's steering is a `Steering`; None for a draft model's own steps."""

    device: torch.device
    vllm_config: Any
    kv_cache_spec: Any
    _is_capturing = _is_drafting = False
    _buffers: SteeringBuffers

    def _prepare(self, rows: EmphasisRows, impls: list[Any]) -> None:
        self._buffers = rows.buffers_on(self.device)
        self._workspaces = rows.workspaces
        for size in {impl.head_size for impl in impls} - rows.workspaces.keys():
            rows.workspaces[size] = Workspace(size, self.device, envs.VLLM_BATCH_INVARIANT)
        for impl in impls:
            given: list[bool | None] = [None]
            if lse.is_given(impl):
                # None too: cascade attention, and some of FlashInfer's kernels, give none.
                given = [lse.is_flashinfer(impl), None]
            for in_base_2 in given:
                warm_up(
                    self._buffers,
                    rows.workspaces[impl.head_size],
                    impl.attention,
                    (impl.num_heads, impl.num_kv_heads, impl.head_size),
                    self.kv_cache_spec.block_size,
                    self.vllm_config.model_config.dtype,
                    FP8.get(impl.kv_cache_dtype),
                    in_base_2,
                )

    def build_for_cudagraph_capture(self, common_attn_metadata: CommonAttentionMetadata) -> Any:
        self._is_capturing = True
        try:
            return super().build_for_cudagraph_capture(common_attn_metadata)  # type: ignore[misc]
        finally:
            self._is_capturing = False

    def build_for_drafting(
        self, common_attn_metadata: CommonAttentionMetadata, draft_index: int
    ) -> Any:
        self._is_drafting = True
        try:
            return super().build_for_drafting(common_attn_metadata, draft_index)  # type: ignore[misc]
        finally:
            self._is_drafting = False

    def update_block_table(
        self, metadata: Any, blk_table: torch.Tensor, slot_mapping: torch.Tensor
    ) -> Any:
        """The base copies the other group's metadata; its steering has that group's block table."""
        updated = super().update_block_table(metadata, blk_table, slot_mapping)  # type: ignore[misc]
        if metadata.steering is not None:
            updated = copy.copy(updated) if updated is metadata else updated
            steering: Steering = metadata.steering
            updated.steering = replace(
                steering,
                batch=replace(steering.batch, block_table=blk_table),
                watched=steering.watched and steering.watched.over(blk_table),
            )
        return updated

    def _steering(
        self, rows: EmphasisRows, common: CommonAttentionMetadata, metadata: Any
    ) -> Steering | None:
        if self._is_drafting:
            return None
        if common.causal is not True:
            raise UnsupportedError("this step's attention is not causal")
        if self._is_capturing:
            self._buffers.hide()
            is_steered, watched = False, None
        else:
            slots = rows.slots_of(common)
            is_steered = self._buffers.show(slots)
            watched = WatchedRow.of(rows, common, common.block_table_tensor, slots)
        max_query_len = common.max_query_len
        if self._is_capturing and self._replays_any_batch:
            max_query_len = max(max_query_len, 2)
        return Steering(
            self._buffers,
            self._workspaces,
            Batch(
                common.query_start_loc, common.seq_lens, common.block_table_tensor, max_query_len
            ),
            common.num_actual_tokens,
            is_steered,
            must_launch=self._is_capturing,
            watched=watched,
        )

    @property
    def _replays_any_batch(self) -> bool:
        """Whether full graphs are replayed for batches with prompts too: then one row per request
        at capture does not mean one row per request at replay."""
        mode = self.vllm_config.compilation_config.cudagraph_mode
        return bool(mode.has_full_cudagraphs() and not mode.separate_routine())


class GPUSteeringImpl(SteeringImpl):
    """Runs the base's kernel, then steers the output of the steered (row, head) pairs."""

    num_heads: int
    head_size: int
    kv_cache_dtype: str

    def forward(
        self,
        layer: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: Any,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        steering: Steering | None = self._steering_of(attn_metadata, output_scale)
        arguments = (
            layer, query, key, value, kv_cache, attn_metadata, output,
            output_scale, output_block_scale,
        )  # fmt: skip
        if self.layer_index is None or attn_metadata is None:
            return super().forward(*arguments)  # type: ignore[misc, no-any-return]
        if steering is None:
            raise UnsupportedError("a draft model's step reached a layer that is to be steered")
        if steering.launches(query.is_cuda):
            result = self._forward_steered(steering, *arguments)
        else:
            result = super().forward(*arguments)  # type: ignore[misc]
        if steering.watched is not None:
            self._see(steering.watched, layer, query, kv_cache)
        return result

    def _forward_steered(
        self,
        steering: Steering,
        layer: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: Any,
        output: torch.Tensor,
        *scales_of_output: torch.Tensor | None,
    ) -> torch.Tensor:
        n = steering.num_tokens
        with lse.asking(self, attn_metadata, query[:n]) as answer:
            result: torch.Tensor = super().forward(  # type: ignore[misc]
                layer, query, key, value, kv_cache, attn_metadata, output, *scales_of_output
            )
        query, output = query[:n], output[:n]
        plain = answer.of(query)
        fp8 = FP8.get(self.kv_cache_dtype)
        scales = None
        if fp8 is not None:
            kv_cache, scales = kv_cache.view(fp8), (layer._k_scale, layer._v_scale)
            if query.dtype != output.dtype:
                query = query.to(output.dtype) * layer._q_scale.to(output.dtype)
        steered_attention(
            query, kv_cache, output, steering.buffers, self.layer_index or 0, steering.batch,
            self.attention, steering.workspaces[self.head_size],
            scales, *(plain or (None, False)),
        )  # fmt: skip
        return result

    def _see(
        self, row: WatchedRow, layer: Any, query: torch.Tensor, kv_cache: torch.Tensor
    ) -> None:
        """Keeps what the watched row attends to in this layer."""
        fp8, q, scale = FP8.get(self.kv_cache_dtype), query[row.index].float(), 1.0
        if fp8 is not None:
            kv_cache, scale = kv_cache.view(fp8), layer._k_scale
            if query.dtype == fp8:
                q = q * layer._q_scale
        keys = partial(gather_keys, kv_cache[..., : self.head_size])
        row.see(self.layer_index or 0, q * scale, self.attention, keys)


def __getattr__(name: str) -> type[AttentionBackend]:
    """``FLASH_ATTN``, ``FLASHINFER``, …: the steered version of vLLM's own of that name."""
    if name not in GPU_BACKENDS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return steered_backend(name, GPUSteeringBuilder, GPUSteeringImpl)
