"""vLLM's features beside emphasis: each does to steered requests what it does to plain ones.

The oracle gives the logits of every step, the test applies the feature to them by itself, and the
engine must have chosen the best. All features run in one batch, steered and plain in turn.

Broken by: a feature that acts on a steered request's neighbour, or is lost beside emphasis, or
takes a row's emphasis away. Beam search and LoRA: test_beam_search.py, test_lora.py.
"""

import re
import string
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from models import random_ids
from vllm import SamplingParams
from vllm.sampling_params import StructuredOutputsParams
from vllm.v1.sample.logits_processor import LogitsProcessor
from vllm.v1.sample.logits_processor.builtin import process_dict_updates

from vllm_pasta import EmphasisError
from vllm_pasta.verify.oracle import Steering

PROMPT = random_ids(90, 2)
STEERING = Steering([(30, 45)], {1: [0, 1], 2: [3]}, 0.01, len(PROMPT))
EMPHASIS = {"spans": [[30, 45]], "heads": {"1": [0, 1], "2": [3]}, "alpha": 0.01}
TOLERANCE = 2e-4
EOS = 2
LETTERS = [ord(letter) + 3 for letter in string.ascii_letters]  # token ids
EVEN = list(range(0, 256, 2))
STOPS = list(range(3, 256, 2))
SCHEMA = {
    "type": "object",
    "properties": {"a": {"enum": ["x", "yy"]}, "b": {"type": "boolean"}},
    "required": ["a", "b"],
    "additionalProperties": False,
}


class Forbid(LogitsProcessor):
    """A user's own logits processor: never a token that ``extra_args["forbid"]`` lists."""

    def __init__(self, vllm_config, device, is_pin_memory):
        self.forbidden = {}

    def is_argmax_invariant(self):
        return False

    def update_state(self, batch_update):
        process_dict_updates(
            self.forbidden,
            batch_update,
            lambda params, *_: (params.extra_args or {}).get("forbid"),
        )

    def apply(self, logits):
        for row, tokens in self.forbidden.items():
            logits[row, tokens] = float("-inf")
        return logits


def without(tokens):
    return lambda row, so_far: row.index_fill(0, torch.tensor(tokens), float("-inf"))


def biased(bias):
    return lambda row, so_far: row + torch.tensor([bias.get(t, 0.0) for t in range(256)])


def penalised(of_count):
    return lambda row, so_far: row - torch.tensor([of_count(so_far.count(t)) for t in range(256)])


@dataclass
class Feature:
    """``apply`` is what the feature does to a step's logits, given the tokens so far."""

    options: dict[str, Any]
    apply: Callable[[torch.Tensor, list[int]], torch.Tensor] = lambda row, so_far: row
    extra: dict[str, Any] = field(default_factory=dict)
    holds: Callable[[Any], bool] = lambda output: len(output.token_ids) == 16


def structured(holds, **constraint):
    """The grammar is vLLM's: which tokens it allows is read from the engine's own answer."""
    constraint = StructuredOutputsParams(**constraint)
    options = {"structured_outputs": constraint, "ignore_eos": False, "max_tokens": 60}
    return Feature(options, None, holds=lambda o: o.finish_reason == "stop" and holds(o.text))


FEATURES = {
    "nothing": Feature({}),
    "logit_bias": Feature({"logit_bias": {17: 6.0, 99: 5.0}}, biased({17: 6.0, 99: 5.0})),
    "allowed_token_ids": Feature({"allowed_token_ids": EVEN}, without(list(range(1, 256, 2)))),
    "min_p": Feature({"temperature": 1.0, "min_p": 1.0}),
    "top_k": Feature({"temperature": 2.0, "top_k": 1}),
    "presence_penalty": Feature({"presence_penalty": 1.5}, penalised(lambda n: 1.5 * (n > 0))),
    "frequency_penalty": Feature({"frequency_penalty": 0.7}, penalised(lambda n: 0.7 * n)),
    "bad_words": Feature({"bad_words": list(string.ascii_letters)}, without(LETTERS)),
    "custom logits processor": Feature({}, without(EVEN), {"forbid": EVEN}),
    "min_tokens": Feature(
        {"min_tokens": 6, "stop_token_ids": STOPS},
        lambda row, so_far: without(STOPS)(row, so_far) if len(so_far) < 6 else row,
        holds=lambda o: o.finish_reason == "stop" and len(o.token_ids) > 6,
    ),
    "stop": Feature(
        {"stop": list(string.ascii_letters), "max_tokens": 60},
        holds=lambda o: o.finish_reason == "stop"
        and [t in LETTERS for t in o.token_ids] == [False] * (len(o.token_ids) - 1) + [True]
        and not re.search("[A-Za-z]", o.text),
    ),
    "end of text": Feature(
        {"ignore_eos": False, "logit_bias": {EOS: 100.0}},
        biased({EOS: 100.0}),
        holds=lambda o: list(o.token_ids) == [EOS],
    ),
    "ignore_eos": Feature({"logit_bias": {EOS: 100.0}}, biased({EOS: 100.0})),
    "choice": structured(["red", "green", "blue"].__contains__, choice=["red", "green", "blue"]),
    "regex": structured(re.compile("[0-9]{3}-[a-f]{2}").fullmatch, regex="[0-9]{3}-[a-f]{2}"),
    "json": structured(
        lambda text: re.fullmatch('{"a": ?"(x|yy)", ?"b": ?(true|false)}', text),
        json=SCHEMA,
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def llm(engine, tiny):
    """Prompts are not cut: with a seed, that kills plain vLLM's CPU runner."""
    return engine(
        tiny,
        block_size=32,
        max_num_seqs=4,
        max_num_batched_tokens=512,
        scheduling_policy="priority",
        enable_prompt_embeds=True,
        logits_processors=[Forbid],
        structured_outputs_config={"backend": "xgrammar", "disable_any_whitespace": True},
    )


def params(steered, extra=None, **options):
    extra_args = {**(extra or {}), **({"emphasis": EMPHASIS} if steered else {})}
    return SamplingParams(
        **{
            "temperature": 0,
            "max_tokens": 16,
            "ignore_eos": True,
            "logprobs": -1,
            "extra_args": extra_args or None,
            **options,
        }
    )


def run(llm, sampling_params):
    prompts = [{"prompt_token_ids": PROMPT}] * len(sampling_params)
    return [o.outputs[0] for o in llm.generate(prompts, sampling_params, use_tqdm=False)]


def logprobs(output):
    """float32 [n, vocab]"""
    return torch.tensor([[row[i].logprob for i in range(256)] for row in output.logprobs])


@pytest.fixture(scope="module")
def oracle_rows(tiny_oracle):
    """What each of an output's tokens was chosen from: float32 [n, vocab]."""

    def rows(output, steered):
        ids = PROMPT + list(output.token_ids)
        steering = STEERING if steered else None
        return tiny_oracle.prompt_logprobs(ids, steering)[len(PROMPT) - 1 : -1]

    return rows


@pytest.fixture(scope="module")
def outputs(llm):
    """Of every feature, steered and plain."""
    asked = [(name, steered) for name in FEATURES for steered in (True, False)]
    features = [FEATURES[name] for name, _ in asked]
    found = run(
        llm,
        [
            params(steered, feature.extra, **feature.options)
            for feature, (_, steered) in zip(features, asked, strict=True)
        ],
    )
    return dict(zip(asked, found, strict=True))


@pytest.mark.parametrize("steered", [True, False])
@pytest.mark.parametrize("name", FEATURES)
def test_feature(name, steered, outputs, oracle_rows):
    """The best token of the oracle's logits after the feature was applied to them, every step."""
    feature, output = FEATURES[name], outputs[name, steered]
    assert feature.holds(output), (output.text, output.token_ids)
    got, rows = logprobs(output), oracle_rows(output, steered)
    if feature.apply is None:
        allowed = got.isfinite()
        assert not allowed.all()
        rows = rows.masked_fill(~allowed, float("-inf")).log_softmax(-1)
        best = rows.argmax(-1).tolist()
        got, rows = got[allowed], rows[allowed]
    else:
        tokens = list(output.token_ids)
        best = [int(feature.apply(row, tokens[:i]).argmax()) for i, row in enumerate(rows)]
    assert list(output.token_ids) == best
    assert (got - rows).abs().max() < TOLERANCE


def test_features_matter(outputs):
    """Steered differs from plain, and most features from none: equal could hide anything."""
    tokens = {key: tuple(output.token_ids) for key, output in outputs.items()}
    assert tokens["nothing", True] != tokens["nothing", False]
    for name in set(FEATURES) - {"nothing", "min_p", "top_k"}:
        assert tokens[name, True] != tokens["nothing", True], name


def test_seeds(llm, oracle_rows):
    """A seed gives the same tokens alone and in a batch; each sampled from steered logits."""
    asked = [(steered, seed) for seed in (7, 8, 7) for steered in (True, False)]
    sampling = [params(steered, temperature=1.0, seed=seed) for steered, seed in asked]
    found = run(llm, sampling)
    for (steered, _), output in zip(asked, found, strict=True):
        assert (logprobs(output) - oracle_rows(output, steered)).abs().max() < TOLERANCE
    tokens = [output.token_ids for output in found]
    assert tokens[:2] == tokens[4:]
    assert len({tuple(t) for t in tokens}) == 4
    assert run(llm, sampling[:1])[0].token_ids == tokens[0]
    sampling[0].n = 2  # the second has the next seed, and differs from that of any other request
    (request,) = llm.generate({"prompt_token_ids": PROMPT}, sampling[0], use_tqdm=False)
    assert [output.token_ids for output in request.outputs] == [tokens[0], tokens[2]]


def test_priority(llm, oracle_rows):
    """The urgent request that comes last overtakes those that wait; none takes another's place."""
    engine = llm.llm_engine
    for i in range(8):
        engine.add_request(
            f"{i}", {"prompt_token_ids": PROMPT}, params(i % 2 == 0, detokenize=False), priority=5
        )
    engine.step()  # the first are running
    engine.add_request(
        "urgent", {"prompt_token_ids": PROMPT}, params(True, detokenize=False), priority=0
    )
    done = {}
    while engine.has_unfinished_requests():
        done |= {o.request_id: o.outputs[0] for o in engine.step() if o.finished}
    assert list(done).index("urgent") < 6  # before the last four have even begun, or soon after
    for name, output in done.items():
        steered = name == "urgent" or int(name) % 2 == 0
        rows = oracle_rows(output, steered)
        assert list(output.token_ids) == rows.argmax(-1).tolist()
        assert (logprobs(output) - rows).abs().max() < TOLERANCE


@pytest.mark.parametrize("time", ["first", "again"])
def test_prompt_logprobs(time, small_batches, tiny_oracle):
    """At every position of a prompt that is cut, and of one that is in the cache."""
    prompt = random_ids(200, 3)
    emphasis = {**EMPHASIS, "spans": [[60, 70]]}
    steering = Steering([(60, 70)], STEERING.heads, STEERING.alpha, len(prompt))
    for steered in (True, False):
        extra = {"emphasis": emphasis} if steered else None
        (request,) = small_batches.generate(
            {"prompt_token_ids": prompt},
            SamplingParams(max_tokens=1, prompt_logprobs=-1, detokenize=False, extra_args=extra),
            use_tqdm=False,
        )
        rows = request.prompt_logprobs[1:]
        got = torch.tensor([[row[i].logprob for i in range(256)] for row in rows])
        truth = tiny_oracle.prompt_logprobs(prompt, steering if steered else None)[:-1]
        assert (got - truth).abs().max() < TOLERANCE


def test_prompt_embeddings(llm, tiny_oracle):
    """Their positions can be emphasised; there is no text in which a mark could be found. The cache
    keeps plain and emphasised ones apart."""
    with torch.inference_mode():
        embeds = tiny_oracle.model.get_input_embeddings()(torch.tensor(PROMPT))
    prompt = {"prompt_embeds": embeds}
    (request,) = llm.generate(prompt, params(False), use_tqdm=False)
    assert list(request.outputs[0].token_ids) == tiny_oracle.generate(PROMPT, 16)[0]
    for _ in range(2):  # again from the cache
        (request,) = llm.generate(prompt, params(True), use_tqdm=False)
        assert list(request.outputs[0].token_ids) == tiny_oracle.generate(PROMPT, 16, STEERING)[0]
    assert request.num_cached_tokens > 0
    (request,) = llm.generate(prompt, params(False), use_tqdm=False)
    assert list(request.outputs[0].token_ids) == tiny_oracle.generate(PROMPT, 16)[0]
    for emphasis in ({"text": "a"}, {"markup": "tag", "spans": [[0, 1]]}):
        refused = SamplingParams(extra_args={"emphasis": emphasis})
        with pytest.raises(EmphasisError, match="a prompt of embeddings has no text"):
            llm.generate(prompt, refused, use_tqdm=False)
