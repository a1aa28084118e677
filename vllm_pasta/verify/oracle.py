"""An independent reference: PASTA on transformers, one sequence at a time.

An attention function with an additive bias: for a steered head, the log of its factor on every key
of the prompt: alpha outside the emphasised ranges; or, with a share, what each row needs there.
Imports nothing of vllm-pasta.
"""

from collections.abc import Container, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AttentionInterface,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    DynamicCache,
)


@dataclass
class Steering:
    """``spans`` of token positions, ``heads`` as {layer: [query heads]}, ``factors`` of the spans.

    Where spans overlap, the largest factor counts; None means that all are 1. With ``share``,
    ``alpha`` and ``factors`` do not matter.
    """

    spans: list[tuple[int, int]]
    heads: dict[int, list[int]]
    alpha: float
    prompt_len: int
    factors: list[float] | None = None
    share: float | None = None

    def is_marked(self, count: int) -> torch.Tensor:
        """Which of the first ``count`` tokens are in a span: bool."""
        result = torch.zeros(count, dtype=torch.bool)
        for start, end in self.spans:
            result[start:end] = True
        return result

    def key_factors(self, count: int) -> torch.Tensor:
        """By how much attention to each of the first ``count`` tokens is scaled: float64."""
        result = torch.full((count,), self.alpha, dtype=torch.float64)
        factors = self.factors or [1.0] * len(self.spans)
        for factor, (start, end) in sorted(zip(factors, self.spans, strict=True)):
            result[start:end] = factor  # the largest comes last
        result[self.prompt_len :] = 1.0
        return result


RECURRENCES = ("conv", "hybrid", "linear_attention", "mamba")
"""Kinds of layers, in configurations, that keep a state from token to token."""

LEAST_FACTOR = 1e-4
"""A share leads to no smaller factor."""

_current: Steering | None = None


@contextmanager
def _steering(steering: Steering | None) -> Iterator[None]:
    global _current
    _current = steering
    try:
        with torch.inference_mode():
            yield
    finally:
        _current = None


def _add_bias(logits: torch.Tensor, layer: int, position: torch.Tensor) -> None:
    """Adds log(alpha) to scaled keys, in place.

    logits: float ``[1, heads, rows, keys]``, or one row for all where the softmax will cancel the
    difference. position: int ``[rows]``; rows before the first emphasised token see nothing that
    is emphasised, so they stay as they are.
    """
    if _current is None or layer not in _current.heads or _current.share is not None:
        return
    factors = _current.key_factors(logits.shape[-1])
    marked = (factors[: _current.prompt_len] != _current.alpha).nonzero()
    if len(marked) == 0:
        return
    bias = factors.log().float().to(logits.device)
    steered = position >= int(marked[0])
    for head in _current.heads[layer]:
        logits[:, head] += torch.where(steered[:, None], bias, 0.0)


def _reach_share(logits: torch.Tensor, layer: int) -> None:
    """Scales the prompt's unmarked keys until the marked ones have their share of the prompt, in
    place; generated keys count for neither, and keep their logits.

    logits: float ``[1, heads, rows, keys]``, those of hidden keys minus infinity.
    """
    if _current is None or layer not in _current.heads or _current.share is None:
        return
    keys = logits.shape[-1]
    marked = _current.is_marked(keys)
    rest = ~marked & (torch.arange(keys) < _current.prompt_len)
    marked, rest = marked.to(logits.device), rest.to(logits.device)
    for head in _current.heads[layer]:
        rows = logits[0, head].double()
        weights = (rows - rows.amax(-1, keepdim=True)).exp()
        of_marked, of_rest = weights[:, marked].sum(-1), weights[:, rest].sum(-1)
        has = of_marked / (of_marked + of_rest)
        factor = of_marked * (1 / _current.share - 1) / of_rest
        is_short = (of_marked > 0) & (has < _current.share)
        factor = torch.where(is_short, factor.clamp(min=LEAST_FACTOR), 1.0)
        logits[0, head] += torch.where(rest, factor.log()[:, None], 0.0).float()


def _attention(
    module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
    attention_mask: Any, scaling: float,
    sliding_window: int | None = None, softcap: float | None = None,
    s_aux: torch.Tensor | None = None, **kwargs: Any,
) -> tuple[torch.Tensor, None]:  # fmt: skip
    group = query.shape[1] // key.shape[1]
    key = key.repeat_interleave(group, dim=1).float()
    value = value.repeat_interleave(group, dim=1).float()
    rows, keys = query.shape[2], key.shape[2]
    position = torch.arange(keys - rows, keys, device=query.device)
    logits = query.float() @ key.transpose(2, 3) * scaling
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    _add_bias(logits, module.layer_idx, position)
    distance = position[:, None] - torch.arange(keys, device=query.device)
    hidden = (distance < 0) | (distance >= (sliding_window or keys))
    logits = logits.masked_fill(hidden, float("-inf"))
    _reach_share(logits, module.layer_idx)
    if s_aux is not None:
        logits = torch.cat([logits, s_aux.float().view(1, -1, 1, 1).expand(1, -1, rows, 1)], -1)
    weights = logits.softmax(dim=-1)[..., :keys]
    return (weights @ value).transpose(1, 2).to(query.dtype), None


AttentionInterface.register("pasta_oracle", _attention)


def _bloom_hook(
    module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Bloom takes no attention function, but adds its ALiBi, [heads, 1, keys], to the logits."""
    alibi = kwargs["alibi"].clone()
    _add_bias(alibi[None], module.layer_idx, torch.tensor([alibi.shape[-1]], device=alibi.device))
    return args, {**kwargs, "alibi": alibi}


def _bloom_probabilities(layer: int, probabilities: torch.Tensor) -> torch.Tensor:
    """Bloom's attention after the softmax, [1, heads, rows, keys], with its share reached."""
    if _current is None or _current.share is None:
        return probabilities
    logits = probabilities.float().log()
    _reach_share(logits, layer)
    return logits.softmax(dim=-1).to(probabilities.dtype)


def _longer(images: Mapping[str, torch.Tensor], count: int) -> dict[str, torch.Tensor]:
    """The same for ``count`` tokens: what says of each token whether it is an image's, [1, tokens],
    is 0 for generated ones."""
    return {
        name: torch.nn.functional.pad(values, (0, count - values.shape[1]))
        if name.endswith("token_type_ids")
        else values
        for name, values in images.items()
    }


class Oracle:
    """A transformers model under steered attention.

    Args:
        path: The model's folder or name.
        dtype: Of its weights; attention itself is computed in float32.
        device: Where it runs.
    """

    def __init__(
        self, path: str | Path, dtype: torch.dtype = torch.float32, device: str = "cpu"
    ) -> None:
        config = AutoConfig.from_pretrained(path)
        bloom = config.model_type == "bloom"
        kinds = getattr(config.get_text_config(), "layer_types", None) or ()
        # A recurrence's state has a cache of its own; without one, every step starts anew.
        self._recurs = any(kind in RECURRENCES for kind in kinds)
        of_text = config.get_text_config() is config
        loader = AutoModelForCausalLM if of_text else AutoModelForImageTextToText
        attention: Any = "eager" if bloom else "pasta_oracle"
        if not of_text:  # what encodes images has attention of its own
            attention = {
                name: attention if getattr(config, name) is config.get_text_config() else "sdpa"
                for name in config.sub_configs
            }
        self.model = loader.from_pretrained(path, dtype=dtype, attn_implementation=attention)
        self.model = self.model.eval().to(device)
        for block in self.model.transformer.h if bloom else ():
            attention = block.self_attention
            attention.register_forward_pre_hook(_bloom_hook, with_kwargs=True)
            attention.attention_dropout.register_forward_hook(  # the first to get the softmax's
                lambda _, __, output, i=attention.layer_idx: _bloom_probabilities(i, output)
            )
            block.mlp.gelu_impl = torch.nn.GELU()  # as vLLM; transformers approximates it

    def generate(
        self,
        prompt_ids: list[int],
        max_tokens: int,
        steering: Steering | None = None,
        stop_ids: Container[int] = (),
        images: Mapping[str, torch.Tensor] | None = None,
        guess: Sequence[int] = (),
    ) -> tuple[list[int], torch.Tensor]:
        """Greedy tokens, and the log-probabilities each was chosen from: float32 [n, vocab].

        Args:
            prompt_ids: The prompt.
            max_tokens: How many tokens at most.
            steering: What is steered; None for nothing.
            stop_ids: Tokens that end the answer.
            images: What the model's processor makes of the prompt's, the token ids aside.
            guess: What the answer may be, such as the one to be judged. It saves time and changes
                nothing: one pass gives the choice after each of its tokens, which counts as long as
                all before it were chosen.
        """
        tokens: list[int] = []
        rows: list[torch.Tensor] = []
        guess = list(guess[: max_tokens - 1])
        # Where each pass is over all tokens: positions count images, too.
        anew = self._recurs or images is not None or guess
        with _steering(steering):
            ids, cache = self._ids([*prompt_ids, *guess]), None if anew else DynamicCache()
            while True:
                more = _longer(images or {}, ids.shape[1])
                out = self.model(input_ids=ids, past_key_values=cache, use_cache=not anew, **more)
                for row in out.logits[0, -1 - len(guess) :]:
                    rows.append(row.float().log_softmax(-1).cpu())
                    tokens.append(int(rows[-1].argmax()))
                    if len(tokens) == max_tokens or tokens[-1] in stop_ids:
                        return tokens, torch.stack(rows)
                    if tokens != guess[: len(tokens)]:
                        break
                guess = []
                ids = self._ids([*prompt_ids, *tokens] if anew else tokens[-1:])

    def prompt_logprobs(
        self,
        prompt_ids: list[int],
        steering: Steering | None = None,
        images: Mapping[str, torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """Log-probabilities at every prompt position: float32 [len(prompt_ids), vocab].

        ``images``: as `generate` has them.
        """
        with _steering(steering):
            ids = self._ids(prompt_ids)
            logits: torch.Tensor = self.model(input_ids=ids, **(images or {})).logits[0]
            return logits.float().log_softmax(-1).cpu()

    def beam_search(
        self,
        prompt_ids: list[int],
        width: int,
        max_tokens: int,
        steering: Steering | None = None,
        eos: int | None = None,
        penalty: float = 1.0,
        *,
        counts_prompt: bool = True,
    ) -> list[tuple[list[int], float]]:
        """Beams as vLLM counts them, best first: ``[(tokens, sum of log-probabilities)]``.

        Without a cache: every step of every beam is a whole forward pass. Beams that end with
        ``eos`` are done; all compete by sum / length ** penalty at the end.

        Args:
            prompt_ids: The prompt.
            width: Number of beams.
            max_tokens: Of each beam.
            steering: What is steered; None for nothing.
            eos: The token that ends a beam.
            penalty: See above.
            counts_prompt: Whether a beam's length is that of prompt and generated tokens, ``eos``
                not counted, as in vLLM 0.32; else that of the generated tokens, as from 0.33 on.
        """
        beams: list[tuple[list[int], float]] = [([], 0.0)]
        done: list[tuple[list[int], float]] = []
        for _ in range(max_tokens):
            longer = []
            for tokens, score in beams:
                row = self.prompt_logprobs(prompt_ids + tokens, steering)[-1]
                top = row.topk(2 * width)  # a beam's other tokens are no candidates
                longer += [
                    ([*tokens, t], score + lp)
                    for t, lp in zip(top.indices.tolist(), top.values.tolist(), strict=True)
                ]
            done += [beam for beam in longer if beam[0][-1] == eos]
            going = [beam for beam in longer if beam[0][-1] != eos]
            beams = sorted(going, key=lambda beam: -beam[1])[:width]

        def value(beam: tuple[list[int], float]) -> float:
            count = len(beam[0])
            if counts_prompt:
                count += len(prompt_ids) - (beam[0][-1] == eos)
            return float(beam[1] / count**penalty)

        return sorted(done + beams, key=value, reverse=True)[:width]

    def _ids(self, ids: list[int]) -> torch.Tensor:
        return torch.tensor([ids], device=self.model.device)
