"""An independent reference: PASTA on transformers, one sequence at a time.

An attention function with an additive bias: for a steered head, log(alpha) on every key of the
prompt outside the emphasised ranges. Imports nothing of vllm-pasta.
"""

import math
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM, DynamicCache


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


def _add_bias(logits, layer, position):
    """Adds log(alpha) to scaled keys, in place.

    logits: float ``[1, heads, rows, keys]``, or one row for all where the softmax will cancel the
    difference. position: int ``[rows]``; rows before the first emphasised token see nothing that
    is emphasised, so they stay as they are.
    """
    if _current is None or layer not in _current.heads:
        return
    emphasised = {t for a, b in _current.spans for t in range(a, b)}
    bias = torch.tensor(
        [
            math.log(_current.alpha) if t < _current.prompt_len and t not in emphasised else 0.0
            for t in range(logits.shape[-1])
        ]
    )
    steered = position >= min(emphasised)
    for head in _current.heads[layer]:
        logits[:, head] += torch.where(steered[:, None], bias, 0.0)


def _attention(
    module, query, key, value, attention_mask, scaling,
    sliding_window=None, softcap=None, s_aux=None, **kwargs,
):  # fmt: skip
    group = query.shape[1] // key.shape[1]
    key = key.repeat_interleave(group, dim=1).float()
    value = value.repeat_interleave(group, dim=1).float()
    rows, keys = query.shape[2], key.shape[2]
    position = torch.arange(keys - rows, keys)
    logits = query.float() @ key.transpose(2, 3) * scaling
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    _add_bias(logits, module.layer_idx, position)
    distance = position[:, None] - torch.arange(keys)
    hidden = (distance < 0) | (distance >= (sliding_window or keys))
    logits = logits.masked_fill(hidden, float("-inf"))
    if s_aux is not None:
        logits = torch.cat([logits, s_aux.float().view(1, -1, 1, 1).expand(1, -1, rows, 1)], -1)
    weights = logits.softmax(dim=-1)[..., :keys]
    return (weights @ value).transpose(1, 2).to(query.dtype), None


AttentionInterface.register("pasta_oracle", _attention)


def _bloom_hook(module, args, kwargs):
    """Bloom takes no attention function, but adds its ALiBi, [heads, 1, keys], to the logits."""
    alibi = kwargs["alibi"].clone()
    _add_bias(alibi[None], module.layer_idx, torch.tensor([alibi.shape[-1]]))
    return args, {**kwargs, "alibi": alibi}


class Oracle:
    """A transformers model under steered attention."""

    def __init__(self, path, dtype=torch.float32):
        bloom = AutoConfig.from_pretrained(path).model_type == "bloom"
        self.model = AutoModelForCausalLM.from_pretrained(
            path, dtype=dtype, attn_implementation="eager" if bloom else "pasta_oracle"
        ).eval()
        for block in self.model.transformer.h if bloom else ():
            block.self_attention.register_forward_pre_hook(_bloom_hook, with_kwargs=True)
            block.mlp.gelu_impl = torch.nn.GELU()  # as vLLM; transformers approximates it

    @torch.inference_mode()
    def generate(self, prompt_ids, max_tokens, steering=None, stop_ids=()):
        """Greedy tokens, and the log-probabilities each was chosen from: float32 [n, vocab]."""
        tokens, rows = [], []
        with _steering(steering):
            ids, cache = torch.tensor([prompt_ids]), DynamicCache()  # keeps all keys
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

    @torch.inference_mode()
    def beam_search(self, prompt_ids, width, max_tokens, steering=None, eos=None, penalty=1.0):
        """Beams as vLLM counts them, best first: ``[(tokens, sum of log-probabilities)]``.

        Without a cache: every step of every beam is a whole forward pass. Beams that end with
        ``eos`` are done; all compete by sum / (prompt and generated tokens) ** penalty at the end,
        ``eos`` not counted.
        """
        beams, done = [([], 0.0)], []
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

        def score(beam):
            count = len(prompt_ids) + len(beam[0]) - (beam[0][-1] == eos)
            return beam[1] / count**penalty

        return sorted(done + beams, key=score, reverse=True)[:width]
