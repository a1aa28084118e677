"""Per-request steering state in device buffers at fixed addresses, which CUDA graphs can hold.

``plan`` packs a step's steering anew, which suits a CPU. A captured graph replays with the
addresses that it was captured with. So the plugin keeps one *record* for each request of a step,
in the batch's order, in one tensor: all that a kernel asks of a request stands in a few words
beside each other, read in one go. A request has a *slot*, for which the record is made once, when
the request comes; a step copies the records of its slots to the device, and copies nothing where
they are those of the step before.
"""

import functools
import math
from collections.abc import Iterable

import numpy as np
import torch

from vllm_pasta.request.resolution import MAX_SPANS, ResolvedEmphasis

SLOT, FIRST, PROMPT_LEN, EMPHASISED, NUM_GROUPS, LOG_ALPHA, LOG_REST, WAY, SEGMENTS = range(9)
"""Columns of a record; see `SteeringBuffers.records`."""
START, END, LOG_FACTOR, LOG_WEIGHT, SEGMENT = range(5)
"""Columns of a segment; ``SEGMENT`` is how many there are."""
GROUP = 4
"""Segments that a kernel holds at a time. A record has the first group; more are read later."""
HEADER = SEGMENTS + GROUP * SEGMENT
"""Columns of a record that come before the heads."""
MAX_GROUPS = -(-MAX_SPANS // GROUP)

DIRECT, ADDS, SUBTRACTS, SHARES = range(4)
"""Values of ``WAY``."""

PLAIN = -1
"""In place of a slot: this request is not steered."""


class SteeringBuffers:
    """The steered requests of an engine.

    Args:
        max_slots: Most requests at a time.
        max_batch: Most requests in a step, padding included.
        num_layers: Of the whole model.
        num_heads: Query heads of this rank; the most of any layer.
        head_offset: The first of them, counted over the whole model.
        device: Where kernels run.
        local: For each layer its query heads of this rank, where layers differ in them.

    Attributes:
        records: int32 ``[max_batch, HEADER + num_layers * words]`` on the device; a row for each
            request of this step. Its columns (floats as their float32 bits):

            - ``SLOT``: row of ``groups`` with the request's further groups, or ``PLAIN``; then no
              head of the record is steered.
            - ``FIRST``: position of the first emphasised token; rows before it are plain.
            - ``PROMPT_LEN``: tokens from there on are generated, and have factor 1.
            - ``EMPHASISED``: number of tokens in all segments.
            - ``NUM_GROUPS``: of segments, at least 1.
            - ``LOG_ALPHA``: natural logarithm of the factor of the prompt's tokens outside the
              segments; with a share, of their least factor.
            - ``LOG_REST``: ``log(abs(1 - alpha))``; with a share, `ResolvedEmphasis.odds`.
            - ``WAY``: whether the segments' and generated tokens' factors are all at least alpha
              (``ADDS``), all at most alpha (``SUBTRACTS``), or neither (``DIRECT``); or whether
              there is a share (``SHARES``).
            - ``SEGMENTS``: the first group. A segment is ``[START, END)`` of the prompt, with
              ``LOG_FACTOR`` = ``log(factor)`` and ``LOG_WEIGHT`` =
              ``log((factor - alpha) / (1 - alpha))``: both exactly 0 where the factor is 1.
              Segments are sorted and disjoint; those that fill the last group are empty.
            - from ``HEADER`` on, ``words`` words a layer, with a bit for each steered query head
              of this rank.
        groups: int32 ``[max_slots, (MAX_GROUPS - 1) * GROUP * SEGMENT]`` on the device; the
            second and further groups of each slot.
        words: How many int32 hold a layer's heads.
    """

    def __init__(
        self,
        max_slots: int,
        max_batch: int,
        num_layers: int,
        num_heads: int,
        head_offset: int = 0,
        device: torch.device | str = "cpu",
        local: tuple[range, ...] = (),
    ) -> None:
        self.num_layers, self.num_heads, self.head_offset = num_layers, num_heads, head_offset
        self._local = local or (range(head_offset, head_offset + num_heads),) * num_layers
        self.words = -(-num_heads // 32)
        self.device = torch.device(device)
        self._is_pinned = self.device.type == "cuda"
        width = HEADER + num_layers * self.words
        further = (MAX_GROUPS - 1) * GROUP * SEGMENT
        self.groups = torch.zeros(max_slots, further, dtype=torch.int32, device=self.device)
        # The last host row is a plain request's: PLAIN indexes it.
        self._records = np.zeros((max_slots + 1, width), dtype=np.int32)
        self._records[PLAIN, SLOT] = PLAIN
        plain = torch.from_numpy(self._records[PLAIN])
        self.records = plain.repeat(max_batch, 1).to(self.device)
        self._slot_of = np.full(max_slots, PLAIN, dtype=np.int64)
        self._waiting: dict[int, np.ndarray] = {}  # further groups to be copied, by slot
        self._shown = self._slot_of[:0]  # the slots whose records are on the device
        self._is_stale = False  # whether a record has changed since

    @property
    def nbytes(self) -> int:
        """Bytes on the device."""
        return sum(t.numel() * t.element_size() for t in (self.records, self.groups))

    def heads_at(self, layer: int) -> int:
        """The column of a record at which this layer's heads begin."""
        return HEADER + layer * self.words

    def write(self, slot: int, emphasis: ResolvedEmphasis | None) -> None:
        """Says what is steered for the request that has this slot from now on; None: nothing.

        The device is told by the next `show`.
        """
        heads = None if emphasis is None else self._bits(emphasis)
        self._is_stale = True
        if emphasis is None or heads is None:
            self._slot_of[slot] = PLAIN
            return
        segments, emphasised, way = _segments(emphasis)
        record = self._records[slot]
        record[SLOT], record[FIRST], record[PROMPT_LEN] = slot, emphasis.first, emphasis.prompt_len
        record[EMPHASISED], record[NUM_GROUPS] = emphasised, len(segments) // GROUP
        record[LOG_ALPHA] = _float_bits(math.log(emphasis.alpha))
        record[LOG_REST] = _float_bits(emphasis.odds or _log(abs(1 - emphasis.alpha)))
        record[WAY] = way
        record[SEGMENTS:HEADER] = segments[:GROUP].ravel()
        record[HEADER:] = heads
        self._slot_of[slot] = slot
        if len(segments) > GROUP:
            self._waiting[slot] = segments[GROUP:].ravel()

    def _bits(self, emphasis: ResolvedEmphasis) -> np.ndarray | None:
        """The steered heads of this rank as words; None if there are none."""
        return _head_words(emphasis.heads.layers, self._local, self.words)

    def show(self, requests: np.ndarray | Iterable[int]) -> bool:
        """Tells the device what this step's requests are; never waits for it.

        Args:
            requests: int ``[batch]``; the slot of each request of the step, in the batch's order.

        Returns:
            Whether any of them is steered.
        """
        shown = self._slot_of[np.asarray(requests, dtype=np.int64)]
        steered = bool((shown != PLAIN).any())
        if not steered:
            shown = shown[:0]
            if not len(self._shown):
                return False
        elif not self._is_stale and np.array_equal(shown, self._shown):
            return True
        for slot, groups in self._waiting.items():
            self.groups[slot, : len(groups)].copy_(self._pinned(groups), non_blocking=True)
        self._waiting.clear()
        records = self._records[shown]
        if len(self._shown) > len(shown):  # those of the step before are gone
            gone = np.repeat(self._records[[PLAIN]], len(self._shown) - len(shown), axis=0)
            records = np.concatenate([records, gone])
        self.records[: len(records)].copy_(self._pinned(records), non_blocking=True)
        self._shown, self._is_stale = shown, False
        return steered

    def hide(self) -> None:
        """Before a graph is captured: no request is shown."""
        self.show(())

    def _pinned(self, array: np.ndarray) -> torch.Tensor:
        """A copy of its own: torch reuses pinned memory only once the copies from it are done, so
        what a step in flight still reads is never overwritten."""
        tensor = torch.from_numpy(array)
        return tensor.pin_memory() if self._is_pinned else tensor


@functools.lru_cache(maxsize=64)  # requests share head sets
def _head_words(
    layers: tuple[tuple[int, tuple[int, ...]], ...], local: tuple[range, ...], words: int
) -> np.ndarray | None:
    pairs = [
        (layer, head - local[layer].start)
        for layer, heads in layers
        for head in heads
        if head in local[layer]
    ]
    if not pairs:
        return None
    bits = np.zeros((len(local), words * 32), dtype=np.uint8)
    bits[tuple(np.array(pairs).T)] = 1
    return np.packbits(bits, axis=1, bitorder="little").view("<i4").ravel()


def _segments(emphasis: ResolvedEmphasis) -> tuple[np.ndarray, int, int]:
    """Segments as int32 ``[n * GROUP, SEGMENT]``, the tokens in them, and the request's way.

    A span whose factor is alpha is as any other token of the prompt, so it is no segment.
    """
    alpha, end = emphasis.alpha, emphasis.prompt_len
    marks = zip(emphasis.spans, emphasis.span_factors, strict=True)
    pairs = [(span, factor) for span, factor in marks if factor != alpha]
    others = [1.0, *(factor for _, factor in pairs)]
    way = DIRECT
    if emphasis.share is not None:
        way = SHARES
    elif alpha < 1 and min(others) > alpha:
        way = ADDS
    elif alpha > 1 and max(others) < alpha:
        way = SUBTRACTS
    size = max(1, -(-len(pairs) // GROUP)) * GROUP
    segments = np.full((size, SEGMENT), end, dtype=np.int32)
    segments[:, LOG_FACTOR:] = 0
    for row, (span, factor) in zip(segments, pairs, strict=False):
        row[:LOG_FACTOR] = span
        row[LOG_FACTOR] = _float_bits(math.log(factor))
        if way != DIRECT:
            row[LOG_WEIGHT] = _float_bits(math.log((factor - alpha) / (1 - alpha)))
    return segments, sum(stop - start for (start, stop), _ in pairs), way


def _log(value: float) -> float:
    return math.log(value) if value else -math.inf


def _float_bits(value: float) -> np.int32:
    return np.float32(value).view(np.int32)
