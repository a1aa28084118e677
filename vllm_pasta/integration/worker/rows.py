"""Which row of the batch carries which emphasis, in the worker.

What tells depends on the vLLM; see `Source`. On stock vLLM it is the group
``vllm.logits_processors``: `EmphasisRows` is such a plugin, which changes no logits. Model Runner
V1 and V2 want different kinds, and V2 accepts no class but its own, so the class is of both.
"""

import enum
from collections.abc import Callable
from functools import cached_property
from typing import TYPE_CHECKING, Any
from weakref import WeakValueDictionary

import numpy as np
import torch
from vllm.distributed import get_pp_group, get_tensor_model_parallel_rank
from vllm.sampling_params import SamplingParams
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessor, process_dict_updates
from vllm.v1.worker.gpu.sample.logits_processor.interface import (
    LogitsProcessor as LogitsProcessorV2,
)

from vllm_pasta.errors import UnsupportedError
from vllm_pasta.integration import patching
from vllm_pasta.integration.config import is_enabled
from vllm_pasta.integration.patching import Patch
from vllm_pasta.request.emphasis import has_emphasis
from vllm_pasta.request.resolution import ResolvedEmphasis
from vllm_pasta.steering.plan import StaticPlan
from vllm_pasta.steering.slots import SteeringBuffers

if TYPE_CHECKING:
    from vllm.config import VllmConfig

MODEL_RUNNER_V2 = "Model Runner V2"
"""The part of vLLM with which a patch is applied."""

_NOT_TOLD = "attention metadata does not say which request each row belongs to"

_instances: "WeakValueDictionary[int, EmphasisRows]" = WeakValueDictionary()


class Source(enum.Enum):
    """What tells which request a row of the batch belongs to."""

    BATCH_UPDATES = enum.auto()
    """Model Runner V1: `EmphasisRows.update_state` gets the requests that were added to, removed
    from and moved within the batch, after the batch is in its final order and before attention
    metadata is built. A row is its own slot."""
    SLOTS = enum.auto()
    """Model Runner V2: `EmphasisRows.add_request` gets the request that has a slot from now on (and
    is not called when it leaves), and ``req_idx`` of attention metadata is the slot of each row. In
    the last pipeline stage the sampler tells, in the others the function `add_request`."""
    METADATA = enum.auto()
    """Model Runner V1 of a vLLM with the diff in ``patches/``: ``get_sampling_params`` of
    attention metadata. A row is its own slot."""

    @classmethod
    def of(cls, vllm_config: "VllmConfig") -> "Source":
        """What tells on the model runner of this engine."""
        if vllm_config.use_v2_model_runner:  # its metadata has `get_sampling_params` unset
            return cls.SLOTS
        if hasattr(CommonAttentionMetadata, "get_sampling_params"):
            return cls.METADATA
        return cls.BATCH_UPDATES


def _instance_of(vllm_config: "VllmConfig") -> "EmphasisRows | None":
    rows = _instances.get(id(vllm_config))
    return rows if rows is not None and rows.vllm_config is vllm_config else None


def rows_of(vllm_config: "VllmConfig") -> "EmphasisRows":
    """The row tracker of the engine whose model runner holds this very config object, for an
    attention backend that honours it.

    Raises:
        UnsupportedError: vLLM did not load logits-processor plugins for this engine.
    """
    rows = _instance_of(vllm_config)
    if rows is None:
        source = Source.of(vllm_config)
        if source is not Source.METADATA and not (source is Source.SLOTS and not _has_sampler()):
            raise UnsupportedError(
                "vLLM did not load vllm-pasta's logits processor (group vllm.logits_processors), "
                "so no batch row could be told from another"
            )
        rows = EmphasisRows(vllm_config)
    rows.is_honoured = True
    return rows


class EmphasisRows(LogitsProcessor, LogitsProcessorV2):
    """The steered rows of the current batch.

    Args:
        vllm_config: The engine's.
        args: The rest of vLLM's interfaces (device and pinning, or V2's request state); not used.

    Attributes:
        source: What tells whose a row is; None where emphasis is off.
        is_honoured: Whether an attention backend asked for the rows.
        watched: By slot, the requests that are watched: nearly always none.
        workspaces: What layers of a head size share, by that; the GPU backends' business.

    Raises:
        UnsupportedError: emphasis is on, and the model that V2 has loaded by then has a layer
            whose attention backend is not this plugin's.
    """

    def __init__(self, vllm_config: "VllmConfig", *args: Any) -> None:
        self.vllm_config = vllm_config
        self.source = Source.of(vllm_config) if is_enabled(vllm_config) else None
        self._emphasis: dict[int, ResolvedEmphasis] = {}  # by batch row; on V2 by slot
        self.watched: dict[int, ResolvedEmphasis] = {}
        self._plan: StaticPlan | None = None
        self._buffers: SteeringBuffers | None = None
        self._params: list[SamplingParams | None] = []  # by batch row, as metadata last told
        self.is_honoured = False
        self.workspaces: dict[int, Any] = {}
        self._seen: tuple[str, dict[int, torch.Tensor]] | None = None
        if self.source is Source.SLOTS:  # V2 creates this when the model is loaded
            from vllm_pasta.integration import support  # heavy, and front ends load this module

            support.check_layers(vllm_config)
            if not _has_sampler():
                patching.apply_part(MODEL_RUNNER_V2)
        _instances[id(vllm_config)] = self

    @property
    def plan(self) -> StaticPlan | None:
        """The steered rows, packed; None where the batch has none."""
        if self._plan is None and self._emphasis:
            self._plan = StaticPlan.pack(
                sorted(self._emphasis.items(), key=lambda item: item[0]), self._local
            )
        return self._plan

    def seen(self, name: str) -> dict[int, torch.Tensor]:
        """What the watched request of this name attends to, by layer; empty at first, for the
        module `watch` to fill. One is kept: another name drops the one before."""
        if self._seen is None or self._seen[0] != name:
            self._seen = (name, {})
        return self._seen[1]

    def take_seen(self, name: str) -> dict[int, torch.Tensor]:
        """The same, and drops it; empty where there is none of this name."""
        seen = self.seen(name)
        self._seen = None
        return seen

    def plan_of(self, metadata: CommonAttentionMetadata) -> StaticPlan | None:
        """The `plan` of the batch whose attention metadata this is.

        Raises:
            UnsupportedError: the metadata should say whose its rows are, and does not.
        """
        if self.source is Source.METADATA:
            if metadata.get_sampling_params is None and self.vllm_config.speculative_config:
                return None  # a draft model's own steps
            self._follow(metadata)
        return self.plan

    def plan_from(self, slots: np.ndarray, first: int) -> StaticPlan | None:
        """Of a step whose requests have these slots, those from row ``first`` on, packed; None
        where none of them is steered."""
        found = (
            (row, self._emphasis.get(int(slot)))
            for row, slot in enumerate(slots[first:].tolist(), first)
        )
        steered = [(row, emphasis) for row, emphasis in found if emphasis is not None]
        return StaticPlan.pack(steered, self._local) if steered else None

    def slots_of(self, metadata: CommonAttentionMetadata) -> np.ndarray:
        """The slot of each request of the batch whose attention metadata this is, in its order;
        of `buffers_on`.

        Raises:
            UnsupportedError: the metadata should say whose its rows are, and does not.
        """
        if self.source is Source.SLOTS:
            if metadata.req_idx is None:
                raise UnsupportedError(_NOT_TOLD)
            slots: np.ndarray = metadata.req_idx
            return slots
        if self.source is Source.METADATA:
            self._follow(metadata)
        return np.arange(metadata.num_reqs)

    def buffers_on(self, device: torch.device) -> SteeringBuffers:
        """Where the steered requests are written as they come; the same for every caller."""
        if self._buffers is None:
            config = self.vllm_config
            # As vLLM's own backends size theirs: padded batches may be larger than real ones.
            size = max(
                config.scheduler_config.max_num_seqs,
                config.compilation_config.max_cudagraph_capture_size or 0,
            )
            self._buffers = SteeringBuffers(
                size,
                size,
                config.model_config.get_total_num_hidden_layers(),
                max(map(len, self._local)),
                device=device,
                local=self._local,
            )
            for slot, emphasis in self._emphasis.items():
                self._buffers.write(slot, emphasis)
        return self._buffers

    @cached_property
    def _local(self) -> tuple[range, ...]:
        """For each layer its query heads of this rank."""
        from vllm_pasta.integration import support  # heavy, and front ends load this module

        return support.local_heads(self.vllm_config, get_tensor_model_parallel_rank())

    def _follow(self, metadata: CommonAttentionMetadata) -> None:
        if metadata.get_sampling_params is None:
            raise UnsupportedError(_NOT_TOLD)
        params: list[SamplingParams | None] = metadata.get_sampling_params()
        if params != self._params:  # the very same objects, in most steps
            self._params = params
            states = ((row, self._new_state(p)) for row, p in enumerate(params) if p is not None)
            self._set({row: emphasis for row, emphasis in states if emphasis is not None})

    def _set(self, emphasis: dict[int, ResolvedEmphasis]) -> None:
        """The steered requests are these from now on."""
        before, self._emphasis = self._emphasis, emphasis
        self._plan = None  # rows may have moved
        self.watched = {row: one for row, one in emphasis.items() if one.watch}
        if emphasis and not self.is_honoured:
            raise UnsupportedError(
                "a request with emphasis is about to run, but the attention backend is not "
                "vllm-pasta's: select none, and let no other plugin replace it"
            )
        if self._buffers is not None:
            for row in before.keys() | emphasis.keys():
                if before.get(row) is not emphasis.get(row):
                    self._buffers.write(row, emphasis.get(row))

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        """V1's interface: how the batch changed since the last step."""
        if self.source is None or batch_update is None:
            return
        # A steering backend asks the metadata instead; without one, `_set` must refuse.
        if self.source is not Source.METADATA or not self.is_honoured:
            emphasis = dict(self._emphasis)
            process_dict_updates(emphasis, batch_update, self._new_state)
            self._set(emphasis)

    def add_request(self, req_idx: int, sampling_params: SamplingParams) -> bool:
        """V2's interface: whose this slot is now.

        Returns:
            Whether `apply` is to be called for the request: never.
        """
        if self.source is not None:
            emphasis = self._new_state(sampling_params)
            others = {slot: e for slot, e in self._emphasis.items() if slot != req_idx}
            self._set(others if emphasis is None else {**others, req_idx: emphasis})
        return False

    def apply(self, logits: torch.Tensor, *args: Any) -> torch.Tensor:
        return logits

    def is_argmax_invariant(self) -> bool:
        return True

    @classmethod
    def validate_params(cls, sampling_params: SamplingParams) -> None:
        """Refuses emphasis where the plugin proper is switched off, so that none is ignored."""
        if not patching.is_applied() and has_emphasis(sampling_params.extra_args):
            raise ValueError(
                "emphasis: vllm-pasta is installed but switched off here (VLLM_PLUGINS does not "
                "name pasta), so this request would run unsteered"
            )

    @staticmethod
    def _new_state(params: SamplingParams, *_: Any) -> ResolvedEmphasis | None:
        if has_emphasis(params.extra_args):
            raise UnsupportedError(
                "a request with emphasis reached the worker without passing admission; "
                "was it built without vLLM's InputProcessor?"
            )
        return ResolvedEmphasis.carried_by(params)


def _build_logitsprocs(
    original: Callable[..., Any], vllm_config: "VllmConfig", *args: Any, **kwargs: Any
) -> Any:
    """Puts `EmphasisRows` back, since vLLM drops plugins' processors with speculative decoding."""
    processors = original(vllm_config, *args, **kwargs)
    if vllm_config.speculative_config is not None and is_enabled(vllm_config):
        processors.argmax_invariant.append(EmphasisRows(vllm_config))
    return processors


def add_request(
    vllm_config: "VllmConfig", req_idx: int, sampling_params: SamplingParams | None
) -> None:
    """Says whose a slot of Model Runner V2 is now, where no sampler does: in a pipeline stage that
    is not the last.

    Raises:
        UnsupportedError: the request is steered, and no attention backend of this stage asked for
            the rows.
    """
    if _has_sampler() or sampling_params is None or not is_enabled(vllm_config):
        return
    rows = _instance_of(vllm_config) or EmphasisRows(vllm_config)
    rows.add_request(req_idx, sampling_params)


def _has_sampler() -> bool:
    return bool(get_pp_group().is_last_rank)


def _add_requests(original: Callable[..., Any], runner: Any, scheduler_output: Any) -> None:
    """Model Runner V2's: also tells of the new requests."""
    original(runner, scheduler_output)
    for new in scheduler_output.scheduled_new_reqs:
        slot = runner.req_states.req_id_to_index[new.req_id]
        add_request(runner.vllm_config, slot, new.sampling_params)


PATCHES = (
    Patch(
        "vllm.v1.sample.logits_processor:build_logitsprocs",
        _build_logitsprocs,
        "82609dd72304",
        "vllm.v1.attention.backend:CommonAttentionMetadata.get_sampling_params",
    ),
    Patch(
        "vllm.v1.worker.gpu.model_runner:GPUModelRunner.add_requests",
        _add_requests,
        "8321187d017e",
        "request_slot",
        part=MODEL_RUNNER_V2,
    ),
)
HOOKS = {"request_slot": add_request}
