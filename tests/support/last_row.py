"""What a prompt's last token attends to on the oracle."""

import torch
from transformers import AttentionInterface

from vllm_pasta.verify import oracle


def last_row(of, ids, steering):
    """By layer, float ``[heads, tokens]``; ``of`` is an `oracle.Oracle`."""
    seen = {}

    def attention(module, query, key, value, mask, scaling, **options):
        keys = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
        logits = query[:, :, -1:] @ keys.transpose(2, 3) * scaling
        oracle._add_bias(logits, module.layer_idx, torch.tensor([key.shape[2] - 1]))
        oracle._reach_share(logits, module.layer_idx)
        seen[module.layer_idx] = logits.softmax(-1)[0, :, 0]
        return oracle._attention(module, query, key, value, mask, scaling, **options)

    AttentionInterface.register("last_row", attention)
    of.model.set_attn_implementation("last_row")
    try:
        of.prompt_logprobs(ids, steering)
    finally:
        of.model.set_attn_implementation("pasta_oracle")
    return seen
