"""The reference: PASTA on transformers with eager or xformers' attention, one static batch.

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


def _bias_of(module: Any, query: torch.Tensor, keys: int) -> torch.Tensor:
    """``[batch, heads, rows, keys]``: the bias, and -1e9 for keys that a row must not see."""
    batch, heads, rows = query.shape[:3]
    bias = torch.zeros(batch, heads, rows, keys, dtype=query.dtype, device=query.device)
    prompt = _padding.shape[1]
    if module.layer_idx in _bias:
        bias[..., :prompt] += _bias[module.layer_idx].to(bias.dtype)
    bias[..., :prompt].masked_fill_(_padding[:, None, None], -1e9)
    if rows > 1:
        future = torch.ones(rows, keys, dtype=torch.bool, device=query.device)
        bias.masked_fill_(future.triu(keys - rows + 1), -1e9)
    return bias


def _attention(
    module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
    attention_mask: Any, scaling: float, **kwargs: Any,
) -> tuple[torch.Tensor, None]:  # fmt: skip
    """transformers' eager attention, with the bias added to the logits."""
    group = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
    logits = query @ key.transpose(2, 3) * scaling + _bias_of(module, query, key.shape[2])
    weights = logits.softmax(-1, dtype=torch.float32).to(query.dtype)
    return (weights @ value).transpose(1, 2).contiguous(), None


def _xformers_attention(
    module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
    attention_mask: Any, scaling: float, **kwargs: Any,
) -> tuple[torch.Tensor, None]:  # fmt: skip
    """The same by xformers, which needs a GPU and never stores the attention weights."""
    from xformers.ops import memory_efficient_attention

    group = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
    bias = _bias_of(module, query, -(-key.shape[2] // 8) * 8)[..., : key.shape[2]]  # as it wants it
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    return memory_efficient_attention(q, k, v, attn_bias=bias, scale=scaling), None


AttentionInterface.register("pasta_eager", _attention)
AttentionInterface.register("pasta_xformers", _xformers_attention)


class Reference:
    """A model on transformers, on a GPU if there is one, else with as many threads as torch has.

    Args:
        model: Folder or name.
        dtype: torch's name of it.
        attention: "eager", or "xformers", an optional extra that needs a GPU.
    """

    def __init__(self, model: str, dtype: str, attention: str = "eager") -> None:
        self._device = "cuda" if torch.cuda.is_available() else "cpu"
        self._model = AutoModelForCausalLM.from_pretrained(
            model, dtype=getattr(torch, dtype), attn_implementation=f"pasta_{attention}"
        )
        self._model.eval().to(self._device)

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
        ids, _padding = ids.to(self._device), _padding.to(self._device)
        _bias = {i: bias.to(self._device) for i, bias in self._biases(batch, length).items()}
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
