"""Estimates to first order what steering each head alone would do, by one backward pass.

The plain model runs once for each example. Every layer computes each head's output with and without
steering. The difference, times the gradient of the objective with respect to the head's output, is
the estimated change of the objective (attribution patching, Nanda 2023). The estimate is exact in
the head's own attention and linear in everything after it.

The model runs on transformers and must have plain full attention. The estimates give a shortlist,
which vLLM verifies afterwards.
"""

import math
from collections.abc import Iterable
from typing import Any

import torch

from vllm_pasta.profiling.methods import Head
from vllm_pasta.profiling.prompts import Prompt
from vllm_pasta.steering.bias import key_bias, segments


class _Recorder:
    """Computes the attention of one forward pass, and estimates in its backward pass.

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


def _attention(*args: Any, pasta_recorder: _Recorder, **kwargs: Any) -> tuple[torch.Tensor, None]:
    return pasta_recorder(*args, **kwargs)


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
        """The estimated change of the objective by each head, averaged over the prompts.

        The objective is log P(target) − log P(foil) of the first tokens if answers are compared by
        these, otherwise the mean of log P over those tokens of the target that count.

        Args:
            prompts: Prompts with targets.
            alpha: Scale factor.
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
        target = prompt.target[:1] if prompt.choices else prompt.target
        length = len(prompt.ids)
        cut = segments(prompt.spans, alpha, length)
        bias = key_bias([s.end for s in cut], [s.bias for s in cut], length + len(target) - 1)
        recorder = _Recorder(bias, self._config.num_hidden_layers, self._config.num_attention_heads)
        logits = self._model(
            input_ids=torch.tensor([prompt.ids + target[:-1]]),
            logits_to_keep=len(target),
            pasta_recorder=recorder,  # transformers hands it to the attention function
        ).logits[0]
        logprobs = logits.log_softmax(-1)
        if prompt.choices:
            objective = logprobs[0, target[0]]
            if prompt.foil:
                objective = objective - logprobs[0, prompt.foil[0]]
        else:
            objective = logprobs[range(len(target)), target][prompt.judged].mean()
        objective.backward()
        return recorder.estimates
