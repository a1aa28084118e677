"""Estimates to first order what steering each head alone would do, by one backward pass.

The plain model runs once for each example. Every layer computes each head's output with and without
steering. The difference, times the gradient of the objective with respect to the head's output, is
the estimated change of the objective (attribution patching, Nanda 2023). The estimate is exact in
the head's own attention and linear in everything after it.

Examples of all tasks run together in batches: what one row of a batch does has no part in another's
gradient, so each has its own estimate, as if it had run by itself.

The model runs on transformers and must have plain softmax attention, which is checked. The
estimates give a shortlist, which vLLM verifies afterwards.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from vllm_pasta.errors import PastaError
from vllm_pasta.profiling.methods import Head
from vllm_pasta.profiling.prompts import Prompt
from vllm_pasta.request.shape import attention_layers
from vllm_pasta.steering.bias import key_bias, segments

BATCH_TOKENS = 1024
"""Tokens of one forward and backward pass, padding included."""

TOLERANCE = 2e-3
"""How far log-probabilities by this module's attention may be from transformers' own, in fp32."""

MEAN_TOLERANCE = 0.1
"""How far they may be on average in a dtype whose own error is large."""

_NAME = "pasta_gradients"


class _Recorder:
    """Computes the attention of one forward pass, and estimates in its backward pass.

    Attributes:
        estimates: Layer -> float32 ``[rows of the batch, heads]``; filled by the backward pass.
    """

    def __init__(self, bias: torch.Tensor) -> None:
        self._bias = bias  # [batch, keys]: log alpha on the prompt's other tokens
        self.estimates: dict[int, torch.Tensor] = {}

    def __call__(
        self, module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
        attention_mask: Any, scaling: float, **kwargs: Any,
    ) -> tuple[torch.Tensor, None]:  # fmt: skip
        group, dtype = query.shape[1] // key.shape[1], query.dtype
        query = query.float()
        key, value = (x.float().repeat_interleave(group, 1) for x in (key, value))
        rows = query.shape[2]
        future = torch.ones(rows, rows, dtype=torch.bool, device=query.device).triu(1)
        # Padding stands after the text, where no token of the text can see it.
        logits = (query @ key.transpose(2, 3) * scaling).masked_fill(future, -math.inf)
        output = logits.softmax(-1) @ value  # [batch, heads, rows, head size]
        with torch.no_grad():
            change = (logits + self._bias[:, None, None]).softmax(-1) @ value - output

        def record(gradient: torch.Tensor) -> None:
            self.estimates[module.layer_idx] = (gradient * change).sum((2, 3)).cpu()

        if output.requires_grad:
            output.register_hook(record)
        return output.to(dtype).transpose(1, 2).contiguous(), None


def own_dtype() -> bool:
    """Whether gradients run in the model's own dtype: on a GPU, and in bf16 on a CPU with AMX.

    Other CPUs multiply bf16 matrices more slowly than fp32 ones, and fp16 is quick on none.
    Attention is fp32 everywhere.
    """
    return torch.cuda.is_available() or bool(torch.cpu._is_amx_tile_supported())


def _attention(*args: Any, pasta_recorder: _Recorder, **kwargs: Any) -> tuple[torch.Tensor, None]:
    return pasta_recorder(*args, **kwargs)


class GradientModel:
    """A model on transformers: in its own dtype where that is quick, see `own_dtype`; else in fp32.

    Raises:
        PastaError: transformers cannot load it, or not with an attention of the caller's.
    """

    def __init__(self, model: str, **options: Any) -> None:
        """Loads the model.

        Args:
            model: A folder or a name.
            options: Arguments of ``from_pretrained``, such as ``revision``.
        """
        from transformers import (
            AttentionInterface,
            AutoConfig,
            AutoModelForCausalLM,
            AutoModelForImageTextToText,
        )

        AttentionInterface.register(_NAME, _attention)
        on_gpu = torch.cuda.is_available()
        self._device = torch.device("cuda" if on_gpu else "cpu")
        try:
            config = AutoConfig.from_pretrained(model, **options)
            loader: Any = AutoModelForCausalLM
            self._of_text: str | dict[str, str] = _NAME
            if (text := config.get_text_config()) is not config:
                loader = AutoModelForImageTextToText
                self._of_text = {  # what encodes images keeps its own attention
                    name: _NAME
                    for name in config.sub_configs
                    if getattr(config, name, None) is text
                }
            self._model = loader.from_pretrained(
                model, dtype="auto" if own_dtype() else torch.float32,
                attn_implementation=self._of_text, **options,
            )  # fmt: skip
            if not on_gpu and self._model.dtype != torch.bfloat16:
                self._model = self._model.float()
            self._model = self._model.to(self._device).eval()
        except Exception as e:  # whatever a model's own code may raise
            raise PastaError(f"the gradient search cannot load {model} on transformers: {e}") from e
        self._config = self._model.config.get_text_config()
        self._layers = attention_layers(self._config, self._config.num_hidden_layers)
        self._checked = False
        # Nothing but the heads' outputs needs a gradient: not the 135 million weights.
        self._model.requires_grad_(False)
        self._model.get_input_embeddings().register_forward_hook(
            lambda module, inputs, output: output.requires_grad_()
        )

    def estimate(self, prompts: Sequence[Prompt], alpha: float) -> dict[Head, float]:
        """The estimated change of the objective by each head, averaged over the prompts.

        The objective is log P(target) − log P(foil) of the first tokens if answers are compared by
        these, otherwise the mean of log P over those tokens of the target that count.

        Args:
            prompts: Prompts with targets.
            alpha: Scale factor.

        Raises:
            PastaError: as `estimate_each`.
        """
        each = self.estimate_each(prompts, alpha)
        return {head: sum(of[head] for of in each) / len(each) for head in each[0]}

    def estimate_each(
        self,
        prompts: Sequence[Prompt],
        alpha: float,
        done: Callable[[int], object] = lambda count: None,
    ) -> list[dict[Head, float]]:
        """As `estimate`, for each prompt by itself.

        Args:
            prompts: Prompts with targets, of any tasks.
            alpha: Scale factor.
            done: Called with the number of prompts that are done since the last call.

        Raises:
            PastaError: the model's attention is more than a softmax of scaled products, so that
                the estimates would be of another model.
        """
        found: list[dict[Head, float]] = [{} for _ in prompts]
        for batch in _batches(prompts):
            chosen = [prompts[i] for i in batch]
            if not self._checked:
                self._check(chosen[-1])
                self._checked = True
            estimates = self._estimate(chosen, alpha)
            for row, i in enumerate(batch):
                found[i] = {
                    (layer, head): float(estimates[layer][row, head])
                    for layer in self._layers
                    for head in range(estimates[layer].shape[1])
                }
            done(len(batch))
        return found

    def _check(self, prompt: Prompt) -> None:
        ids = torch.tensor([prompt.ids], device=self._device)
        recorder = _Recorder(torch.zeros(1, len(prompt.ids), device=self._device))
        rows = self._model(input_ids=ids, pasta_recorder=recorder).logits[0]
        rows[-1].max().backward()
        seen = sorted(recorder.estimates)
        self._model.set_attn_implementation("eager")  # the others leave out soft caps and sinks
        with torch.no_grad():
            expected = self._model(input_ids=ids).logits[0].float().log_softmax(-1)
            differences = (rows.float().log_softmax(-1) - expected).abs()
        self._model.set_attn_implementation(self._of_text)
        exact = rows.dtype == torch.float32
        difference = float(differences.max() if exact else differences.mean())
        allowed = TOLERANCE if exact else MEAN_TOLERANCE
        if tuple(seen) != self._layers or not difference <= allowed:
            raise PastaError(
                "the gradient search knows plain softmax attention alone, and this model's is "
                f"another: log-probabilities differ by {difference:.2g}, and of "
                f"{len(self._layers)} layers with heads {len(seen)} use it. Use the search full "
                "or halving, which ask vLLM"
            )

    def _estimate(self, prompts: Sequence[Prompt], alpha: float) -> dict[int, torch.Tensor]:
        texts = [prompt.ids + _target(prompt)[:-1] for prompt in prompts]
        width = max(map(len, texts))
        ids = torch.tensor([text + [0] * (width - len(text)) for text in texts])
        biases = []
        for prompt in prompts:
            cut = segments(prompt.spans, alpha, len(prompt.ids))
            biases.append(key_bias([s.end for s in cut], [s.bias for s in cut], width))
        recorder = _Recorder(torch.stack(biases).to(self._device))
        # Rows whose next token is one of the answer's, over all of the batch.
        at = sorted({row for p, text in zip(prompts, texts, strict=True)
                     for row in range(len(p.ids) - 1, len(text))})  # fmt: skip
        logits = self._model(
            input_ids=ids.to(self._device),
            logits_to_keep=torch.tensor(at, device=self._device),
            pasta_recorder=recorder,  # transformers hands it to the attention function
        ).logits.float()
        of_row = {row: i for i, row in enumerate(at)}
        objective = logits.new_zeros(())
        for number, prompt in enumerate(prompts):
            target = _target(prompt)
            rows = [of_row[len(prompt.ids) - 1 + i] for i in range(len(target))]
            logprobs = logits[number, rows].log_softmax(-1)
            if not prompt.choices:
                objective = objective + logprobs[range(len(target)), target][prompt.judged].mean()
                continue
            objective = objective + logprobs[0, target[0]]
            if prompt.foil:
                objective = objective - logprobs[0, prompt.foil[0]]
        objective.backward()
        return recorder.estimates


def _target(prompt: Prompt) -> list[int]:
    return prompt.target[:1] if prompt.choices else prompt.target


def _batches(prompts: Sequence[Prompt]) -> Iterator[list[int]]:
    """Indices of prompts of like length, `BATCH_TOKENS` together; the shortest first."""
    batch: list[int] = []
    lengths = [len(prompt.ids) + len(_target(prompt)) for prompt in prompts]
    for i in sorted(range(len(prompts)), key=lengths.__getitem__):
        length = lengths[i]
        if batch and (len(batch) + 1) * length > BATCH_TOKENS:
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch
