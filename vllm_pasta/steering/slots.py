"""Who is steered how, on a device, at addresses that never change: CUDA graphs may keep them.

``plan`` packs a step's steering anew, which suits a CPU. A captured graph replays with the
addresses that it was captured with. So here every request has a row of one tensor, its *slot*,
written once when the request comes; a step only says which of its requests stands in which slot.
A kernel gets tensors whose shapes do not depend on what is steered, and looks for itself.
"""

import itertools
from collections.abc import Iterable

import numpy as np
import torch

from vllm_pasta.request.resolution import MAX_SPANS, ResolvedEmphasis

FIRST, NUM_SPANS, EMPHASISED, LOG_ALPHA, HEADER = range(5)
"""Columns of a slot's row; ``HEADER`` is how many come before the heads."""

MAX_BOUNDS = 2 * MAX_SPANS + 1
"""Most bounds of a slot's row: its spans' and the prompt's end."""

PLAIN = -1
"""In place of a slot: this request is not steered."""


class SteeringBuffers:
    """The steered requests of an engine.

    Args:
        max_slots: Most requests at a time.
        max_batch: Most requests in a step, padding included.
        num_layers: Of the whole model.
        num_heads: Query heads of this rank.
        head_offset: The first of them, counted over the whole model.
        device: Where kernels run.

    Attributes:
        rows: int32 ``[max_slots, HEADER + num_layers * words + MAX_BOUNDS]`` on the device. A
            slot's row holds the position of the first emphasised token, the numbers of spans and
            of emphasised tokens, ``log(alpha)`` as the bits of a float32; then for each layer
            ``words`` words with a bit for each steered query head of this rank; then the bounds:
            start and end of each span, in order, and the prompt's length. From 0 to the first
            bound keys are scaled, from there to the second they are not, and so on in turn; from
            the last on they are not.
        slots: int32 ``[max_batch]`` on the device; the slot of each request of this step, or
            ``PLAIN``.
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
    ) -> None:
        self.num_layers, self.num_heads, self.head_offset = num_layers, num_heads, head_offset
        self.words = -(-num_heads // 32)
        self.device = torch.device(device)
        self._is_pinned = self.device.type == "cuda"
        width = HEADER + num_layers * self.words + MAX_BOUNDS
        self.rows = torch.zeros(max_slots, width, dtype=torch.int32, device=self.device)
        self.slots = torch.full((max_batch,), PLAIN, dtype=torch.int32, device=self.device)
        self._host = np.zeros((max_slots, width), dtype=np.int32)
        self._slot_of = np.full(max_slots, PLAIN, dtype=np.int32)
        self._waiting: list[int] = []  # slots to be copied to the device
        self._shown = 0  # of `slots`, how many may be other than PLAIN

    @property
    def bounds_offset(self) -> int:
        """The column at which a row's bounds begin."""
        return HEADER + self.num_layers * self.words

    @property
    def nbytes(self) -> int:
        """Bytes on the device."""
        return sum(t.numel() * t.element_size() for t in (self.rows, self.slots))

    def write(self, slot: int, emphasis: ResolvedEmphasis | None) -> None:
        """Says what is steered for the request that has this slot from now on; None: nothing.

        The device is told by the next `show`.
        """
        heads = None if emphasis is None else self._bits(emphasis)
        if emphasis is None or heads is None:
            self._slot_of[slot] = PLAIN
            return
        row = self._host[slot]
        row[FIRST], row[NUM_SPANS] = emphasis.first, len(emphasis.spans)
        row[EMPHASISED] = sum(end - start for start, end in emphasis.spans)
        row[LOG_ALPHA] = np.float32(np.log(emphasis.alpha)).view(np.int32)
        row[HEADER : self.bounds_offset] = heads
        bounds = [*itertools.chain.from_iterable(emphasis.spans), emphasis.prompt_len]
        row[self.bounds_offset : self.bounds_offset + len(bounds)] = bounds
        self._slot_of[slot] = slot
        self._waiting.append(slot)

    def _bits(self, emphasis: ResolvedEmphasis) -> np.ndarray | None:
        """The steered heads of this rank as words; None if there are none."""
        bits = np.zeros((self.num_layers, self.words * 32), dtype=np.uint8)
        for layer, heads in emphasis.heads.layers:
            local = np.asarray(heads) - self.head_offset
            bits[layer, local[(local >= 0) & (local < self.num_heads)]] = 1
        packed = np.packbits(bits, axis=1, bitorder="little").view("<i4")
        return packed.ravel() if packed.any() else None

    def show(self, requests: np.ndarray | Iterable[int]) -> bool:
        """Tells the device what this step's requests are; never waits for it.

        Args:
            requests: int ``[batch]``; the slot of each request of the step, in the batch's order.

        Returns:
            Whether any of them is steered.
        """
        slots = self._slot_of[np.asarray(requests, dtype=np.int64)]
        steered = bool((slots != PLAIN).any())
        count = len(slots) if steered else 0
        if self._waiting:
            changed = np.unique(np.asarray(self._waiting, dtype=np.int64))
            self._waiting.clear()
            index = self._staged(torch.from_numpy(changed))
            self.rows.index_copy_(0, index, self._staged(torch.from_numpy(self._host[changed])))
        if shown := max(count, self._shown):
            staged = np.full(shown, PLAIN, dtype=np.int32)
            staged[:count] = slots[:count]
            self.slots[:shown].copy_(self._pinned(torch.from_numpy(staged)), non_blocking=True)
            self._shown = count
        return steered

    def hide(self) -> None:
        """Before a graph is captured: no request is shown."""
        self.show(())

    def _staged(self, tensor: torch.Tensor) -> torch.Tensor:
        return self._pinned(tensor).to(self.device, non_blocking=True)

    def _pinned(self, tensor: torch.Tensor) -> torch.Tensor:
        """A copy of its own: torch reuses pinned memory only once the copies from it are done, so
        what a step in flight still reads is never overwritten."""
        return tensor.pin_memory() if self._is_pinned else tensor
