"""One step's steering as packed tensors: the only thing a kernel is told.

A step is one forward pass over a batch of requests. ``StaticPlan`` holds what lasts as long as the
batch's members: spans, alpha and heads of each steered request. ``StepPlan`` adds what changes in
every step: which query rows and how much context each request has.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from vllm_pasta.request.resolution import ResolvedEmphasis
from vllm_pasta.steering import bias

MIN_WHOLE_SHARE = 0.25
"""See `StepPlan.takes_whole`."""

ENDLESS = 2**31 - 1
"""The end of a segment that has none."""


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
    """The steered requests of a batch: R requests with S segments (see ``bias``) in all.

    Attributes:
        batch_rows: int64 ``[R]`` (numpy); row of each request in the batch.
        first: int32 ``[R]``; position of the first emphasised token.
        segment_offsets: int32 ``[R + 1]``; request r's segments are
            ``segment_offsets[r]:segment_offsets[r + 1]``.
        ends: int32 ``[S]``; where each segment of keys ends. A request's last one holds what is
            generated, and has no end.
        biases: float32 ``[S]``; added to the logits of the segment's keys.
        merge_weights: float32 ``[S]``; what of a segment's keys a merge adds to the plain output,
            times ``1 - exp(merge_bases)``: see `bias.merge_base`. With a share, 1 for the marked
            and the generated keys, 0 for the others.
        merge_bases: float32 ``[R]``; log of what the plain output counts for; 0 where the request
            must be computed without it. With a share, log of the least factor.
        odds: float32 ``[R]``; `ResolvedEmphasis.odds`: 0 where there is no share.
        layers: Heads per layer (numbered over the whole model); layers without are left out.
    """

    batch_rows: np.ndarray
    first: torch.Tensor
    segment_offsets: torch.Tensor
    ends: torch.Tensor
    biases: torch.Tensor
    merge_weights: torch.Tensor
    merge_bases: torch.Tensor
    odds: torch.Tensor
    layers: dict[int, LayerHeads]

    @classmethod
    def pack(
        cls,
        requests: Sequence[tuple[int, ResolvedEmphasis]],
        local: Sequence[range] | None = None,
    ) -> "StaticPlan":
        """Packs ``(batch row, emphasis)`` pairs.

        Args:
            requests: The steered requests, in any order.
            local: For each layer of the model the query heads that this rank has; None means all.
        """
        layers: dict[int, list[list[int]]] = {}
        for r, (_, emphasis) in enumerate(requests):
            for layer, heads in emphasis.heads.layers:
                here = list(heads)
                if local is not None:
                    own = local[layer]
                    here = [head - own.start for head in heads if head in own]
                if here:
                    layers.setdefault(layer, [[] for _ in requests])[r] = here
        cuts, weights, bases = zip(*(_segments(emphasis) for _, emphasis in requests), strict=True)
        return cls(
            batch_rows=np.array([row for row, _ in requests], dtype=np.int64),
            first=_int32([emphasis.first for _, emphasis in requests]),
            segment_offsets=_offsets(cuts),
            ends=_int32([segment.end for cut in cuts for segment in cut]),
            biases=_float32([segment.bias for cut in cuts for segment in cut]),
            merge_weights=_float32([weight for row in weights for weight in row]),
            merge_bases=_float32(bases),
            odds=_float32([emphasis.odds for _, emphasis in requests]),
            layers={layer: LayerHeads.pack(heads) for layer, heads in layers.items()},
        )

    def share_of(self, r: int, begin: int, end: int) -> bias.Share | None:
        """What request r's factors follow from, for its keys ``[begin, end)``; None where it has no
        share."""
        if not (odds := float(self.odds[r])):
            return None
        cut = slice(*self.segment_offsets[r : r + 2].tolist())
        ends = self.ends[cut].tolist()
        rest = bias.key_bias(ends, self.merge_weights[cut].tolist(), end)[begin:] == 0
        prompt = torch.arange(begin, end) < ends[-2]  # the last segment is what is generated
        return bias.Share(~rest & prompt, rest, odds, float(self.merge_bases[r]))


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


def _segments(emphasis: ResolvedEmphasis) -> tuple[list[bias.Segment], list[float], float]:
    """One request's segments, their merge weights, and the log of its merge base."""
    alpha, factors = emphasis.alpha, emphasis.factors
    cut = bias.segments(emphasis.spans, alpha, emphasis.prompt_len, factors)
    cut.append(bias.Segment(ENDLESS, 1.0))
    if emphasis.share is not None:
        weights = [float(segment.factor == 1.0) for segment in cut]
        return [bias.Segment(segment.end, 1.0) for segment in cut], weights, math.log(alpha)
    base = bias.merge_base(alpha, factors)
    if base is None:
        return cut, [1.0] * len(cut), 0.0
    return cut, [bias.merge_weight(alpha, base, s.factor) for s in cut], math.log(base)


def _int32(values: Sequence[int]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def _float32(values: Sequence[float]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float32)


def _offsets(groups: Sequence[Sequence[object]]) -> torch.Tensor:
    return _int32([0, *np.cumsum([len(group) for group in groups]).tolist()])
