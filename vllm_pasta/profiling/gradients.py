"""A first-order estimate of what steering each head alone would do, by one backward pass.

For an example, the plain model runs once. In each layer, what every head would give if it were
steered is computed beside what it gives; the difference, times the gradient of the objective with
respect to the head's output, is the estimated change of the objective (attribution patching, Nanda
2023). Exact in the head's own attention, linear in all that comes after it.

On transformers, for models with plain full attention; a shortlist, verified in vLLM afterwards.
"""

import math
from collections.abc import Iterable
from typing import Any

import torch

from vllm_pasta.profiling.methods import Head
from vllm_pasta.profiling.prompts import Prompt
from vllm_pasta.steering.bias import key_bias, segments


class _Recorder:
    """The attention function of one backward pass: collects each layer's estimates.

    Attributes:
        estimates: float32 ``[layers, heads]``; filled by the backward pass.
    """

    def __init__(self, bias: torch.Tensor, layers: int, heads: int) -> None:
        self._bias = bias  # [keys]: log alpha on the prompt's other tokens
        self.estimates = torch.zeros(layers, heads)

    def __call__(
        self, module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
        attention_mask: Any, scaling: float, **kwargs: Any,
    ) -> tuple[torch.Tensor, None]:  # fmt: skip
        group = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
        rows = query.shape[2]
        future = torch.ones(rows, rows, dtype=torch.bool, device=query.device).triu(1)
        logits = (query @ key.transpose(2, 3) * scaling).masked_fill(future, -math.inf)
        output = logits.softmax(-1) @ value  # [1, heads, rows, head size]
        with torch.no_grad():
            change = (logits + self._bias).softmax(-1) @ value - output

        def record(gradient: torch.Tensor) -> None:
            self.estimates[module.layer_idx] += (gradient * change).sum((0, 2, 3)).cpu()

        output.register_hook(record)
        return output.transpose(1, 2).contiguous(), None


_current: _Recorder | None = None


def _attention(*args: Any, **kwargs: Any) -> tuple[torch.Tensor, None]:
    assert _current is not None
    return _current(*args, **kwargs)


class GradientModel:
    """A model on transformers, in fp32."""

    def __init__(self, model: str) -> None:
        from transformers import AttentionInterface, AutoModelForCausalLM

        AttentionInterface.register("pasta_gradients", _attention)
        self._model = AutoModelForCausalLM.from_pretrained(
            model, dtype=torch.float32, attn_implementation="pasta_gradients"
        ).eval()
        self._config = self._model.config.get_text_config()
        # Nothing but the heads' outputs needs a gradient: not the 135 million weights.
        self._model.requires_grad_(False)
        self._model.get_input_embeddings().register_forward_hook(
            lambda module, inputs, output: output.requires_grad_()
        )

    def estimate(self, prompts: Iterable[Prompt], alpha: float) -> dict[Head, float]:
        """Mean estimated change of log P(target) − log P(foil) per head.

        Where answers are compared by their first token, so here; else it is the mean of log P over
        the target's tokens that are judged.
        """
        layers, heads = self._config.num_hidden_layers, self._config.num_attention_heads
        total, count = torch.zeros(layers, heads), 0
        for prompt in prompts:
            total += self._estimate(prompt, alpha)
            count += 1
        return {
            (layer, head): float(total[layer, head]) / count
            for layer in range(layers)
            for head in range(heads)
        }

    def _estimate(self, prompt: Prompt, alpha: float) -> torch.Tensor:
        global _current
        target = prompt.target[:1] if prompt.choices else prompt.target
        length = len(prompt.ids)
        cut = segments(prompt.spans, alpha, length)
        bias = key_bias([s.end for s in cut], [s.bias for s in cut], length + len(target) - 1)
        recorder = _Recorder(bias, self._config.num_hidden_layers, self._config.num_attention_heads)
        _current = recorder
        try:
            logits = self._model(
                input_ids=torch.tensor([prompt.ids + target[:-1]]), logits_to_keep=len(target)
            ).logits[0]
            logprobs = logits.log_softmax(-1)
            if prompt.choices:
                objective = logprobs[0, target[0]]
                if prompt.foil:
                    objective = objective - logprobs[0, prompt.foil[0]]
            else:
                objective = logprobs[range(len(target)), target][prompt.judged].mean()
            objective.backward()
        finally:
            _current = None
        return recorder.estimates
