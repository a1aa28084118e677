"""The reference: PASTA on transformers with eager attention, one static batch.

An additive bias of log(alpha) on the logits of steered heads, as `pastalib` computes it, but on
current transformers and without its per-head Python loops, so if anything it is faster. The batch
is padded on the left to its longest prompt and runs until its longest answer is done.
"""

import math
import time
from typing import Any

import torch
from transformers import AttentionInterface, AutoModelForCausalLM

_bias: dict[int, torch.Tensor] = {}  # layer -> float [batch, heads, 1, prompt length]
_padding: torch.Tensor  # bool [batch, prompt length]: True where there is no token


def _attention(
    module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
    attention_mask: Any, scaling: float, **kwargs: Any,
) -> tuple[torch.Tensor, None]:  # fmt: skip
    """transformers' eager attention, with the bias added to the logits."""
    group = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
    logits = query @ key.transpose(2, 3) * scaling
    rows, keys = query.shape[2], key.shape[2]
    prompt = _padding.shape[1]
    if module.layer_idx in _bias:
        logits[..., :prompt] += _bias[module.layer_idx].to(logits.dtype)
    logits[..., :prompt].masked_fill_(_padding[:, None, None], -1e9)
    if rows > 1:
        future = torch.ones(rows, keys, dtype=torch.bool).triu(keys - rows + 1)
        logits.masked_fill_(future, -1e9)
    weights = logits.softmax(-1, dtype=torch.float32).to(query.dtype)
    return (weights @ value).transpose(1, 2).contiguous(), None


AttentionInterface.register("pasta_eager", _attention)


class Reference:
    """A model on transformers, threads as many as torch has."""

    def __init__(self, model: str, dtype: str) -> None:
        self._model = AutoModelForCausalLM.from_pretrained(
            model, dtype=getattr(torch, dtype), attn_implementation="pasta_eager"
        ).eval()

    @torch.inference_mode()
    def run(self, batch: list[dict[str, Any]]) -> dict[str, Any]:
        """Greedy answers of a batch, see `benchmarks.workloads.Workload.batch`."""
        global _bias, _padding
        length = max(len(item["ids"]) for item in batch)
        ids = torch.zeros(len(batch), length, dtype=torch.long)
        _padding = torch.ones(len(batch), length, dtype=torch.bool)
        for i, item in enumerate(batch):
            ids[i, length - len(item["ids"]) :] = torch.tensor(item["ids"])
            _padding[i, length - len(item["ids"]) :] = False
        _bias = self._biases(batch, length)
        began = time.perf_counter()
        positions = (~_padding).long().cumsum(1).sub(1).clamp(min=0)
        cache, tokens = None, []
        for _ in range(max(item["output_tokens"] for item in batch)):
            out = self._model(
                input_ids=ids, position_ids=positions, past_key_values=cache, use_cache=True,
                logits_to_keep=1,
            )  # fmt: skip
            cache = out.past_key_values
            ids = out.logits[:, -1].argmax(-1, keepdim=True)
            positions = positions[:, -1:] + 1
            tokens.append(ids[:, 0].tolist())
        seconds = time.perf_counter() - began
        answers = [
            list(row)[: item["output_tokens"]]
            for row, item in zip(zip(*tokens, strict=True), batch, strict=True)
        ]
        return {"seconds": [seconds] * len(batch), "tokens": answers}

    def _biases(self, batch: list[dict[str, Any]], length: int) -> dict[int, torch.Tensor]:
        biases: dict[int, torch.Tensor] = {}
        for i, item in enumerate(batch):
            emphasis = item["emphasis"]
            if emphasis is None:
                continue
            row = torch.full((length,), math.log(emphasis["alpha"]))
            for start, end in emphasis["spans"]:
                offset = length - len(item["ids"])
                row[start + offset : end + offset] = 0.0
            for layer, heads in emphasis["heads"].items():
                bias = biases.setdefault(
                    int(layer),
                    torch.zeros(len(batch), self._model.config.num_attention_heads, 1, length),
                )
                bias[i, heads, 0] = row
        return biases
