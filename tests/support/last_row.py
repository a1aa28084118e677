"""What a prompt's last token attends to on the oracle."""

import torch
from transformers import AttentionInterface

from vllm_pasta.verify import oracle


def last_row(of, ids, steering):
    """By layer, float ``[heads, tokens]``; ``of`` is an `oracle.Oracle`."""
    seen = {}

    def attention(module, query, key, value, mask, scaling, **options):
        count = key.shape[2]
        unit = torch.eye(count).expand(
            1, key.shape[1], count, count
        )  # values: the weights come out
        last = query[:, :, -1:]
        weights, _ = oracle._attention(module, last, key, unit, mask, scaling, **options)
        seen[module.layer_idx] = weights[0, 0]
        return oracle._attention(module, query, key, value, mask, scaling, **options)

    AttentionInterface.register("last_row", attention)
    of.model.set_attn_implementation("last_row")
    try:
        of.prompt_logprobs(ids, steering)
    finally:
        of.model.set_attn_implementation("pasta_oracle")
    return seen
