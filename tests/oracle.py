"""An independent reference: PASTA on transformers, one sequence at a time.

An attention function with an additive bias: for a steered head, log(alpha) on every key of the
prompt outside the emphasised ranges. Imports nothing of vllm-pasta.
"""

import math
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from transformers import AttentionInterface, AutoModelForCausalLM


@dataclass
class Steering:
    """``spans`` of token positions, ``heads`` as {layer: [query heads]}."""

    spans: list[tuple[int, int]]
    heads: dict[int, list[int]]
    alpha: float
    prompt_len: int


_current: Steering | None = None


@contextmanager
def _steering(steering: Steering | None):
    global _current
    _current = steering
    try:
        yield
    finally:
        _current = None


def _attention(module, query, key, value, attention_mask, scaling, **kwargs):
    group = query.shape[1] // key.shape[1]
    key = key.repeat_interleave(group, dim=1).float()
    value = value.repeat_interleave(group, dim=1).float()
    rows, keys = query.shape[2], key.shape[2]
    logits = query.float() @ key.transpose(2, 3) * scaling
    if _current is not None and module.layer_idx in _current.heads:
        emphasised = {t for a, b in _current.spans for t in range(a, b)}
        bias = torch.tensor(
            [
                math.log(_current.alpha) if t < _current.prompt_len and t not in emphasised else 0.0
                for t in range(keys)
            ]
        )
        for head in _current.heads[module.layer_idx]:
            logits[:, head] += bias
    future = torch.ones(rows, keys, dtype=torch.bool).triu(keys - rows + 1)
    weights = logits.masked_fill(future, float("-inf")).softmax(dim=-1)
    return (weights @ value).transpose(1, 2).to(query.dtype), None


AttentionInterface.register("pasta_oracle", _attention)


class Oracle:
    """A transformers model under steered attention."""

    def __init__(self, path, dtype=torch.float32):
        self.model = AutoModelForCausalLM.from_pretrained(
            path, dtype=dtype, attn_implementation="pasta_oracle"
        ).eval()

    @torch.inference_mode()
    def generate(self, prompt_ids, max_tokens, steering=None, stop_ids=()):
        """Greedy tokens, and the log-probabilities each was chosen from: float32 [n, vocab]."""
        tokens, rows = [], []
        with _steering(steering):
            ids, cache = torch.tensor([prompt_ids]), None
            while len(tokens) < max_tokens:
                out = self.model(input_ids=ids, past_key_values=cache, use_cache=True)
                cache = out.past_key_values
                rows.append(out.logits[0, -1].float().log_softmax(-1))
                tokens.append(int(rows[-1].argmax()))
                if tokens[-1] in stop_ids:
                    break
                ids = torch.tensor([tokens[-1:]])
        return tokens, torch.stack(rows)

    @torch.inference_mode()
    def prompt_logprobs(self, prompt_ids, steering=None):
        """Log-probabilities at every prompt position: float32 [len(prompt_ids), vocab]."""
        with _steering(steering):
            return (
                self.model(input_ids=torch.tensor([prompt_ids])).logits[0].float().log_softmax(-1)
            )
