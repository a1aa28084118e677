"""Which row of the batch carries which emphasis, in the worker.

vLLM's logits-processor plugins (group ``vllm.logits_processors``) are told in every step which
requests were added to, removed from and moved within the batch, after the batch is in its final
order and before attention metadata is built. Ours changes no logits.

vLLM drops such plugins where speculative decoding is on; a run-time patch puts ours back. vLLM
loads the plugin in every other engine, emphasis or not, and Model Runner V2 accepts no class but
its own kind. So the class is of both kinds, and inert on V2, where no engine has emphasis on yet.

A vLLM whose attention metadata tells each row's sampling params (see ``patches/``) needs no such
detour: there the metadata is asked.
"""

from typing import TYPE_CHECKING, Any
from weakref import WeakValueDictionary

import torch
from vllm.distributed import get_tensor_model_parallel_rank
from vllm.sampling_params import SamplingParams
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessor, process_dict_updates
from vllm.v1.worker.gpu.sample.logits_processor.interface import (
    LogitsProcessor as LogitsProcessorV2,
)

from vllm_pasta.emphasis import WIRE_KEY, ResolvedEmphasis, has_emphasis
from vllm_pasta.errors import UnsupportedError
from vllm_pasta.integration.config import is_enabled
from vllm_pasta.plan import StaticPlan

if TYPE_CHECKING:
    from vllm.config import VllmConfig

_instances: "WeakValueDictionary[int, EmphasisRows]" = WeakValueDictionary()


def rows_of(vllm_config: "VllmConfig") -> "EmphasisRows":
    """The row tracker of the engine whose model runner holds this very config object, for an
    attention backend that honours it.

    Raises:
        UnsupportedError: vLLM did not load logits-processor plugins for this engine.
    """
    # Model Runner V2 has that attribute, and leaves it out.
    told = hasattr(CommonAttentionMetadata, "get_sampling_params") and not (
        vllm_config.use_v2_model_runner
    )
    rows = _instances.get(id(vllm_config))
    if rows is None or rows.vllm_config is not vllm_config:
        if not told:
            raise UnsupportedError(
                "vLLM did not load vllm-pasta's logits processor (group vllm.logits_processors), "
                "so no batch row could be told from another"
            )
        rows = EmphasisRows(vllm_config)
    rows.is_honoured, rows.is_told = True, told
    return rows


class EmphasisRows(LogitsProcessor, LogitsProcessorV2):
    """The steered rows of the current batch.

    Args:
        vllm_config: The engine's.
        args: The rest of vLLM's interfaces (device and pinning, or V2's request state); not used.

    Attributes:
        is_honoured: Whether an attention backend asked for the rows.
        is_told: Whether attention metadata tells the rows, and not `update_state`.
    """

    def __init__(self, vllm_config: "VllmConfig", *args: Any) -> None:
        self.vllm_config = vllm_config
        self._enabled = is_enabled(vllm_config)
        self._num_local_heads = (
            vllm_config.model_config.get_num_attention_heads(vllm_config.parallel_config)
            if self._enabled
            else 0
        )
        self._emphasis: dict[int, ResolvedEmphasis] = {}  # by batch row
        self._plan: StaticPlan | None = None
        self._params: list[SamplingParams | None] = []  # by batch row, as metadata last told
        self.is_honoured = self.is_told = False
        _instances[id(vllm_config)] = self

    @property
    def plan(self) -> StaticPlan | None:
        """The steered rows, packed; None where the batch has none."""
        if self._plan is None and self._emphasis:
            self._plan = StaticPlan.pack(
                sorted(self._emphasis.items(), key=lambda item: item[0]),
                head_offset=self._num_local_heads * get_tensor_model_parallel_rank(),
                num_local_heads=self._num_local_heads,
            )
        return self._plan

    def plan_of(self, metadata: CommonAttentionMetadata) -> StaticPlan | None:
        """The `plan` of the batch whose attention metadata this is.

        Raises:
            UnsupportedError: the metadata should tell whose its rows are, and does not.
        """
        if self.is_told:
            if metadata.get_sampling_params is not None:
                self._follow(metadata.get_sampling_params())
            elif self.vllm_config.speculative_config is not None:
                return None  # a draft model's own steps
            else:
                raise UnsupportedError("this attention metadata does not tell whose its rows are")
        return self.plan

    def _follow(self, params: list[SamplingParams | None]) -> None:
        if params != self._params:  # the very same objects, in most steps
            self._params = params
            states = ((row, self._new_state(p)) for row, p in enumerate(params) if p is not None)
            self._emphasis = {row: emphasis for row, emphasis in states if emphasis is not None}
            self._plan = None

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        if self._enabled and not self.is_told and batch_update is not None:
            process_dict_updates(self._emphasis, batch_update, self._new_state)
            self._plan = None  # rows may have moved
            if self._emphasis and not self.is_honoured:
                raise UnsupportedError(
                    "a request with emphasis is about to run, but the attention backend is not "
                    "vllm-pasta's: select none, and let no other plugin replace CPU_ATTN"
                )

    def add_request(self, req_idx: int, sampling_params: SamplingParams) -> bool:
        """V2's interface: whether logits are changed."""
        return False

    def apply(self, logits: torch.Tensor, *args: Any) -> torch.Tensor:
        return logits

    def is_argmax_invariant(self) -> bool:
        return True

    @classmethod
    def validate_params(cls, sampling_params: SamplingParams) -> None:
        """Refuses emphasis where the plugin proper is switched off, so that none is ignored."""
        from vllm_pasta.integration import upstream

        if not upstream.is_applied() and has_emphasis(sampling_params.extra_args):
            raise ValueError(
                "emphasis: vllm-pasta is installed but switched off here (VLLM_PLUGINS does not "
                "name pasta), so this request would run unsteered"
            )

    @staticmethod
    def _new_state(params: SamplingParams, *_: Any) -> ResolvedEmphasis | None:
        extra_args = params.extra_args or {}
        if has_emphasis(extra_args):
            raise UnsupportedError(
                "a request with emphasis reached the worker without passing admission; "
                "was it built without vLLM's InputProcessor?"
            )
        wire = extra_args.get(WIRE_KEY)
        return ResolvedEmphasis.from_wire(wire) if wire else None
