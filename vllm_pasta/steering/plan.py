"""One step's steering as packed tensors: the only thing a kernel is told.

A step is one forward pass over a batch of requests. ``StaticPlan`` holds what lasts as long as the
batch's members: spans, alpha and heads of each steered request. ``StepPlan`` adds what changes in
every step: which query rows and how much context each request has.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from vllm_pasta.request.resolution import ResolvedEmphasis

MIN_WHOLE_SHARE = 0.25
"""See `StepPlan.takes_whole`."""


@dataclass(frozen=True, eq=False)
class LayerAttention:
    """What a layer computes, steering aside: causal attention of some kind.

    Attributes:
        scale: Softmax scale; above 0.
        window: How many keys a row sees, its own included; None means all up to its own.
        soft_cap: Logits become ``soft_cap * tanh(logits / soft_cap)``, before ``log(alpha)`` is
            added; None means they stay.
        alibi_slopes: float32 ``[num_heads]``; ``slope * (key position - row position)`` is added
            to the logits. None means nothing is.
        sinks: ``[num_heads]``; one more logit in each row's softmax, without a value. It is no
            token of the prompt, so it is never scaled. None means no sinks.
    """

    scale: float
    window: int | None = None
    soft_cap: float | None = None
    alibi_slopes: torch.Tensor | None = None
    sinks: torch.Tensor | None = None


@dataclass(frozen=True)
class LayerHeads:
    """The steered heads of one layer, per request, as compressed rows.

    Attributes:
        offsets: int32 ``[R + 1]``; request r's heads are ``heads[offsets[r]:offsets[r + 1]]``.
        heads: int32 ``[n]``; query heads, numbered within this rank.
        share: Share of the R requests that have a steered head in this layer.
    """

    offsets: torch.Tensor
    heads: torch.Tensor
    share: float

    @classmethod
    def pack(cls, heads: Sequence[Sequence[int]]) -> "LayerHeads":
        """Packs each request's heads."""
        return cls(
            _offsets(heads),
            _int32([head for row in heads for head in row]),
            sum(map(bool, heads)) / len(heads),
        )


@dataclass(frozen=True)
class StaticPlan:
    """The steered requests of a batch: R requests with S spans in all.

    Attributes:
        batch_rows: int64 ``[R]`` (numpy); row of each request in the batch.
        first: int32 ``[R]``; position of the first emphasised token.
        prompt_len: int32 ``[R]``; tokens from there on are generated.
        log_alpha: float32 ``[R]``; added to the logits of the prompt's other tokens.
        span_offsets: int32 ``[R + 1]``; request r's spans are
            ``spans[span_offsets[r]:span_offsets[r + 1]]``.
        spans: int32 ``[S, 2]``; half-open token ranges, sorted and disjoint per request.
        layers: Heads per layer (numbered over the whole model); layers without are left out.
    """

    batch_rows: np.ndarray
    first: torch.Tensor
    prompt_len: torch.Tensor
    log_alpha: torch.Tensor
    span_offsets: torch.Tensor
    spans: torch.Tensor
    layers: dict[int, LayerHeads]

    @classmethod
    def pack(
        cls,
        requests: Sequence[tuple[int, ResolvedEmphasis]],
        head_offset: int = 0,
        num_local_heads: int | None = None,
    ) -> "StaticPlan":
        """Packs ``(batch row, emphasis)`` pairs.

        Args:
            requests: The steered requests, in any order.
            head_offset: This rank's first query head.
            num_local_heads: How many query heads this rank has; None means all.
        """
        end = None if num_local_heads is None else head_offset + num_local_heads
        layers: dict[int, list[list[int]]] = {}
        for r, (_, emphasis) in enumerate(requests):
            for layer, heads in emphasis.heads.layers:
                local = [h - head_offset for h in heads if h >= head_offset]
                if end is not None:
                    local = [h for h in local if h < end - head_offset]
                if local:
                    layers.setdefault(layer, [[] for _ in requests])[r] = local
        spans = [emphasis.spans for _, emphasis in requests]
        return cls(
            batch_rows=np.array([row for row, _ in requests], dtype=np.int64),
            first=_int32([emphasis.first for _, emphasis in requests]),
            prompt_len=_int32([emphasis.prompt_len for _, emphasis in requests]),
            log_alpha=torch.tensor(
                [emphasis.alpha for _, emphasis in requests], dtype=torch.float64
            )
            .log()
            .float(),
            span_offsets=_offsets(spans),
            spans=_int32([span for group in spans for span in group]).reshape(-1, 2),
            layers={layer: LayerHeads.pack(heads) for layer, heads in layers.items()},
        )


@dataclass(frozen=True, eq=False)
class StepPlan:
    """One step's steered requests.

    Query row i of request r stands at position ``seq_len[r] - query_len[r] + i`` and is steered
    if that is at least ``first[r]``; rows before see nothing emphasised, so they are plain.

    Attributes:
        static: What lasts.
        query_start: int32 ``[R]``; index of the request's first query row in the step.
        query_len: int32 ``[R]``; number of its query rows in the step.
        seq_len: int32 ``[R]``; number of its keys, this step's included.
        block_table: int32 ``[R, max_blocks]``; its KV cache blocks. Those before a layer's window
            may have been given away, and hold anything.
        is_whole_decode: Whether the step has one row per request, all of them steered: then a
            kernel may compute whole layers, and the plain one need not run.
    """

    static: StaticPlan
    query_start: torch.Tensor
    query_len: torch.Tensor
    seq_len: torch.Tensor
    block_table: torch.Tensor
    is_whole_decode: bool = False

    def takes_whole(self, heads: LayerHeads) -> bool:
        """Whether to compute a whole layer at once, instead of after the plain kernel.

        Measured on CPU: the whole layer costs 1.1 times the plain kernel, and steering after it
        up to half of it, by the share of requests to be steered.
        """
        return self.is_whole_decode and heads.share >= MIN_WHOLE_SHARE

    @classmethod
    def build(
        cls,
        static: StaticPlan,
        query_start_loc: torch.Tensor,
        seq_lens: torch.Tensor,
        block_table: torch.Tensor,
    ) -> "StepPlan | None":
        """Cuts a step out of vLLM's batch metadata.

        Args:
            static: The steered requests of the batch.
            query_start_loc: int32 ``[B + 1]``; start of each request's query rows.
            seq_lens: int32 ``[B]``; number of keys of each request.
            block_table: int32 ``[B, max_blocks]``.

        Returns:
            The plan, or None where no query row of this step is steered.
        """
        rows = torch.from_numpy(static.batch_rows)
        seq_len = seq_lens[rows]
        active = seq_len > static.first
        if not bool(active.any()):
            return None
        query_start = query_start_loc[rows]
        is_decode = len(query_start_loc) - 1 == int(query_start_loc[-1])
        return cls(
            static=static,
            query_start=query_start,
            query_len=query_start_loc[rows + 1] - query_start,
            seq_len=seq_len,
            block_table=block_table[rows],
            is_whole_decode=is_decode and len(rows) == len(seq_lens) and bool(active.all()),
        )


def _int32(values: Sequence[int] | Sequence[tuple[int, int]]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def _offsets(groups: Sequence[Sequence[object]]) -> torch.Tensor:
    return _int32([0, *np.cumsum([len(group) for group in groups]).tolist()])
