"""What a prompt's last row attends to, for the playground.

The front end sends a request of its own, whose resolved emphasis also says that it is watched. It
is scheduled and runs as any other. In the step that computes the prompt's last token, each
attention layer also computes the weights of that one row, over the keys that are in the cache, as
if no head were steered; the front end applies the factors. Nothing is computed for other requests.

`AttentionWatcher` is vLLM's ``worker_extension_cls``, and hands the weights out.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch

from vllm_pasta.integration.worker import rows
from vllm_pasta.kernels.reference import row_weights
from vllm_pasta.steering.plan import LayerAttention


@dataclass(frozen=True, eq=False)
class WatchedRow:
    """A prompt's last row, in the step that computes it.

    Attributes:
        request: Which of the step's requests it is of.
        index: Of the row among the step's query rows.
        seq_len: Number of its keys: the prompt's tokens.
        block_table: int32 ``[max_blocks]``; its KV cache blocks.
        weights: By layer, see `row_weights`, of the heads of this rank; filled by `see`.
    """

    request: int
    index: int
    seq_len: int
    block_table: torch.Tensor
    weights: dict[int, torch.Tensor]

    @classmethod
    def of(
        cls,
        batch: "rows.EmphasisRows",
        metadata: Any,
        block_table: torch.Tensor,
        slots: Iterable[int] | None = None,
    ) -> "WatchedRow | None":
        """The row of this step that is watched, if there is one.

        Args:
            batch: Whose rows are whose.
            metadata: vLLM's attention metadata, of a backend or common to all.
            block_table: int32 ``[num_requests, max_blocks]``.
            slots: The slot of each of the step's requests; None: they are in the order of slots.
        """
        if not batch.watched:
            return None
        places = dict(enumerate(slots)) if slots is not None else {i: i for i in batch.watched}
        for request, slot in places.items():
            emphasis = batch.watched.get(int(slot))
            if emphasis is None or int(metadata.seq_lens[request]) != emphasis.prompt_len:
                continue
            assert emphasis.watch
            return cls(
                request,
                int(metadata.query_start_loc[request + 1]) - 1,
                emphasis.prompt_len,
                block_table[request],
                batch.seen(emphasis.watch),
            )
        return None

    def over(self, block_table: torch.Tensor) -> "WatchedRow":
        """The same row in a group of layers with another block table: ``[num_requests, …]``."""
        return replace(self, block_table=block_table[self.request])

    def see(
        self,
        layer: int,
        query: torch.Tensor,
        attention: LayerAttention,
        keys: Callable[[torch.Tensor, int, int], torch.Tensor],
    ) -> None:
        """Keeps the weights of one layer.

        Args:
            layer: Its index.
            query: ``[num_heads, size]``; the row's.
            attention: What the layer computes.
            keys: Reads float32 ``[num_kv_heads, n, size]`` out of the cache, by the block table,
                the first token and where to stop.
        """
        start = max(0, self.seq_len - (attention.window or self.seq_len))
        read = keys(self.block_table, start, self.seq_len)
        self.weights[layer] = row_weights(query, read, start, attention)


class AttentionWatcher:
    """Methods that vLLM adds to its worker, for ``collective_rpc``."""

    vllm_config: Any

    def pasta_attention(self, name: str) -> list[tuple[int, int, bytes]]:
        """Hands out, once, what a watched request's prompt attended to on this rank.

        Args:
            name: The watched request's.

        Returns:
            For each layer its index, its number of heads here, and their weights (see
            `row_weights`) as bytes. Nothing where nothing was seen.
        """
        seen = rows.rows_of(self.vllm_config).take_seen(name)
        return [
            (layer, len(weights), weights.cpu().contiguous().numpy().tobytes())
            for layer, weights in sorted(seen.items())
        ]
