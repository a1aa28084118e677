"""What a prompt's last row attends to, for the playground.

The front end sends a request of its own, whose resolved emphasis also says that it is watched. It
is scheduled and runs as any other. In the step that computes the prompt's last token, each
attention layer also computes the weights of that one row, over the keys that are in the cache, as
if no head were steered; the front end applies the factors. Nothing is computed for other requests.

`AttentionWatcher` is vLLM's ``worker_extension_cls``, and hands the weights out.
"""

from dataclasses import dataclass
from typing import Any

import torch

from vllm_pasta.integration.worker import rows
from vllm_pasta.kernels.reference import row_weights
from vllm_pasta.steering.plan import LayerAttention


@dataclass(frozen=True, eq=False)
class WatchedRow:
    """A prompt's last row, in the step that computes it.

    Attributes:
        index: Of the row among the step's query rows.
        seq_len: Number of its keys: the prompt's tokens.
        block_table: int32 ``[max_blocks]``; its KV cache blocks.
        weights: By layer, see `row_weights`, of the heads of this rank; filled by `see`.
    """

    index: int
    seq_len: int
    block_table: torch.Tensor
    weights: dict[int, torch.Tensor]

    @classmethod
    def of(cls, batch: "rows.EmphasisRows", metadata: Any) -> "WatchedRow | None":
        """The row of this step that is watched, if there is one.

        Args:
            batch: Whose rows are whose.
            metadata: vLLM's attention metadata of the CPU backend.
        """
        for row, emphasis in batch.watched:
            if int(metadata.seq_lens[row]) != emphasis.prompt_len:
                continue
            assert emphasis.watch
            index = int(metadata.query_start_loc[row + 1]) - 1
            seen = batch.seen(emphasis.watch)
            return cls(index, emphasis.prompt_len, metadata.block_table[row], seen)
        return None

    def see(
        self,
        layer: int,
        query: torch.Tensor,
        kv_cache: torch.Tensor,
        attention: LayerAttention,
        layout: str,
    ) -> None:
        """Keeps the weights of one layer.

        Args:
            layer: Its index.
            query: ``[num_tokens, num_heads, head_size]``.
            kv_cache: ``[num_blocks, num_kv_heads, block_size, 2 * head_size]``.
            attention: What the layer computes.
            layout: See `vllm_pasta.kernels.reference.gather_kv`.
        """
        self.weights[layer] = row_weights(
            query[self.index], kv_cache, self.block_table, self.seq_len, attention, layout
        )


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
            (layer, len(weights), weights.contiguous().numpy().tobytes())
            for layer, weights in sorted(seen.items())
        ]
