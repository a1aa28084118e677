"""Steered generation equals the oracle: tokens, and log-probabilities within float error.

Broken by: a wrong bias, head, layer, row, span, prompt end or batch row; a skipped chunk or step.
"""

import functools
from dataclasses import dataclass
from itertools import combinations

import pytest
import torch
from models import random_ids, tiny_llama
from vllm import SamplingParams

from vllm_pasta import HeadSet, ResolvedEmphasis
from vllm_pasta.integration.frontend.admission import Admitted
from vllm_pasta.request.resolution import WIRE_KEY, strongest
from vllm_pasta.verify.oracle import Oracle, Steering

ALL_HEADS = {layer: [0, 1, 2, 3] for layer in range(4)}
LOGPROB_TOLERANCE = 2e-4  # plain vLLM against the oracle: 4e-5 on these models


@dataclass
class Case:
    """One request. ``spans`` None means plain."""

    prompt: list[int]
    spans: list[tuple[int, int]] | None = None
    heads: dict[int, list[int]] | None = None
    alpha: float = 0.01
    max_tokens: int = 16
    factors: list[float] | None = None  # of the spans, where they are not all 1
    share: float | None = None  # instead of alpha

    @property
    def steering(self):
        if self.spans is None:
            return None
        return Steering(
            self.spans, self.heads, self.alpha, len(self.prompt), self.factors, self.share
        )

    @property
    def extra_args(self):
        heads = self.spans and {str(layer): heads for layer, heads in self.heads.items()}
        if self.factors:
            spans, factors = strongest(zip(self.spans, self.factors, strict=True), self.alpha)
            heads = HeadSet.from_json(heads)
            resolved = ResolvedEmphasis(spans, self.alpha, heads, len(self.prompt), factors)
            return {WIRE_KEY: Admitted(resolved.to_wire())}
        strength = {"alpha": self.alpha} if self.share is None else {"share": self.share}
        return self.spans and {"emphasis": {"spans": self.spans, "heads": heads, **strength}}

    @property
    def params(self):
        return SamplingParams(
            temperature=0,
            max_tokens=self.max_tokens,
            ignore_eos=True,
            detokenize=False,
            logprobs=-1,
            extra_args=self.extra_args,
        )


SHORT, MIDDLE, LONG = random_ids(24, 1), random_ids(90, 2), random_ids(200, 3)
CASES = {
    "plain": Case(MIDDLE),
    "one span": Case(MIDDLE, [(30, 45)], {1: [0, 1], 2: [3]}),
    "several spans": Case(MIDDLE, [(5, 9), (40, 41), (70, 80)], {0: [2], 3: [0, 1]}),
    "overlapping spans": Case(MIDDLE, [(20, 40), (30, 50), (50, 55), (22, 24)], ALL_HEADS),
    "span at the first token": Case(SHORT, [(0, 1)], {1: [1], 2: [2]}),
    "span at the last token": Case(SHORT, [(23, 24)], ALL_HEADS),
    "whole prompt": Case(SHORT, [(0, 24)], ALL_HEADS),
    "alpha 1e-4": Case(MIDDLE, [(60, 75)], {1: [0, 1, 2, 3]}, alpha=1e-4),
    "alpha 0.5": Case(MIDDLE, [(60, 75)], ALL_HEADS, alpha=0.5),
    "alpha 1": Case(MIDDLE, [(60, 75)], ALL_HEADS, alpha=1),
    "alpha 20": Case(MIDDLE, [(60, 75)], {1: [0, 1, 2, 3]}, alpha=20.0),
    "one head": Case(MIDDLE, [(10, 80)], {2: [1]}),
    "all heads": Case(MIDDLE, [(10, 20)], ALL_HEADS),
    "only the last layer": Case(MIDDLE, [(10, 20)], {3: [0, 3]}),
    "prompt of several chunks": Case(LONG, [(60, 70)], {1: [0], 3: [1, 2]}),
    "span across a chunk's edge": Case(LONG, [(120, 135)], ALL_HEADS),
    "span in the last chunk": Case(LONG, [(195, 199)], ALL_HEADS),
    "one-token prompt": Case([77], [(0, 1)], ALL_HEADS),
    "long generation": Case(SHORT, [(4, 9)], {1: [0, 1], 2: [2, 3]}, max_tokens=200),
    "plain long": Case(LONG, max_tokens=40),
    **{
        f"strengths: {name}": Case(LONG, spans, ALL_HEADS, alpha, 24, factors)
        for name, alpha, spans, factors in (
            # Each but the last two: a merge, over the chunks of 64 tokens and generated ones.
            ("weaker and full", 0.01, [(30, 45), (60, 70), (150, 160)], [0.1, 1.0, 0.5]),
            ("overlapping", 0.01, [(20, 140), (50, 60), (55, 90)], [0.1, 1.0, 0.3]),
            ("none full", 0.001, [(30, 70), (120, 199)], [0.1, 0.02]),
            ("above 1", 0.1, [(30, 70), (70, 75)], [0.5, 3.0]),
            ("below alpha", 0.1, [(30, 70), (120, 135)], [1.0, 0.001]),
            ("of alpha 1", 1.0, [(30, 70), (120, 135)], [0.01, 0.2]),
        )
    },
    **{
        f"share: {name}": Case(prompt, spans, heads, max_tokens=24, share=share)
        for name, prompt, spans, heads, share in (
            ("of some heads", MIDDLE, [(30, 45)], {1: [0, 1], 2: [3]}, 0.3),
            ("of all heads", MIDDLE, [(5, 9), (40, 41), (70, 80)], ALL_HEADS, 0.5),
            ("small", MIDDLE, [(30, 70)], ALL_HEADS, 0.45),  # many rows have it
            ("large", MIDDLE, [(60, 61)], ALL_HEADS, 0.99),  # bounded by the least factor
            ("over chunks", LONG, [(60, 70), (120, 135)], ALL_HEADS, 0.6),
            ("at the first token", SHORT, [(0, 1)], ALL_HEADS, 0.9),
        )
    },
    "share: long generation": Case(SHORT, [(4, 9)], ALL_HEADS, max_tokens=120, share=0.7),
}


@functools.cache
def answers(oracle):
    """Its own to each of `CASES`; once for all test files of a worker."""
    return {
        name: oracle.generate(case.prompt, case.max_tokens, case.steering)
        for name, case in CASES.items()
    }


@pytest.fixture(scope="session")
def expected(tiny_oracle):
    return answers(tiny_oracle)


def run(llm, cases):
    outputs = llm.generate(
        [{"prompt_token_ids": case.prompt} for case in cases],
        [case.params for case in cases],
        use_tqdm=False,
    )
    return [output.outputs[0] for output in outputs]


def logprobs(output):
    """The full rows: float32 [n, vocab]."""
    return torch.tensor([[row[i].logprob for i in range(len(row))] for row in output.logprobs])


def check(output, expected, tolerance=LOGPROB_TOLERANCE):
    tokens, rows = expected
    assert list(output.token_ids) == tokens
    assert (logprobs(output) - rows).abs().max() < tolerance


@pytest.mark.parametrize("name", ["strengths: overlapping", "share: over chunks", "plain"])
def test_guesses_change_nothing(name, tiny_oracle, expected):
    """The oracle's answer is its own, whether it is given nothing, the answer or another one."""
    case, (tokens, rows) = CASES[name], expected[name]
    other = [(token + 1) % 256 for token in tokens]
    for guess in (tokens, [*tokens, 1, 2], tokens[:5], other, [*tokens[:7], *other[7:]]):
        found, seen = tiny_oracle.generate(case.prompt, case.max_tokens, case.steering, guess=guess)
        assert found == tokens
        assert (seen - rows).abs().max() < LOGPROB_TOLERANCE
    at = tokens.index(tokens[9])
    for guess in (tokens, tokens[:5], ()):
        found, _ = tiny_oracle.generate(
            case.prompt, case.max_tokens, case.steering, {tokens[9]}, guess=guess
        )
        assert found == tokens[: at + 1]


@pytest.mark.parametrize("name", CASES)
def test_alone(name, small_batches, expected):
    (output,) = run(small_batches, [CASES[name]])
    check(output, expected[name])


@pytest.mark.parametrize("stride", [1, 3, 7])
def test_all_at_once(stride, small_batches, expected):
    """Each with other heads, alpha and spans, plain ones between, five times the batch's size."""
    names = [name for i in range(stride) for name in list(CASES)[i::stride]]
    for name, output in zip(names, run(small_batches, [CASES[n] for n in names]), strict=True):
        check(output, expected[name])


def test_cases_differ(expected):
    """The oracle itself tells the cases apart: equal output could hide anything."""
    plain = expected["plain"][1]
    others = ("share: of some heads", "share: of all heads", "share: small", "share: large")
    for name in (
        *("one span", "several spans", "alpha 1e-4", "alpha 0.5", "alpha 20", "one head"), *others
    ):  # fmt: skip
        rows = expected[name][1]
        assert (rows[0] - plain[0]).abs().max() > 50 * LOGPROB_TOLERANCE, name
    assert torch.equal(expected["alpha 1"][1], plain)
    strengths = [rows[0] for name, (_, rows) in expected.items() if name.startswith("strengths")]
    for a, b in combinations([*strengths, expected["plain long"][1][0]], 2):
        assert (a - b).abs().max() > 50 * LOGPROB_TOLERANCE


def test_n_greater_than_one(small_batches, tiny_oracle):
    """Every one of n samples is steered, each request's by its own marks: what each token was drawn
    from is the steered distribution."""
    cases = [CASES[name] for name in ("one span", "several spans", "plain")]
    sampling = [case.params for case in cases]
    for params in sampling:  # a seed with a cut prompt kills plain vLLM's CPU runner
        params.n, params.temperature = 3, 1.0
    prompts = [{"prompt_token_ids": case.prompt} for case in cases]
    requests = small_batches.generate(prompts, sampling, use_tqdm=False)
    for case, request in zip(cases, requests, strict=True):
        assert len({tuple(output.token_ids) for output in request.outputs}) == 3
        for output in request.outputs:
            rows = tiny_oracle.prompt_logprobs(case.prompt + list(output.token_ids), case.steering)
            got = logprobs(output)
            assert (got - rows[len(case.prompt) - 1 : -1]).abs().max() < LOGPROB_TOLERANCE


def test_abort_in_mid_flight(small_batches, expected):
    """A request that leaves early frees a batch row; those that move into it keep their own."""
    engine = small_batches.llm_engine
    names = ["long generation", "one span", "plain long", "all heads", "several spans"]
    for name in names:
        case = CASES[name]
        params = case.params
        engine.add_request(name, {"prompt_token_ids": case.prompt}, params)
    outputs, steps = {}, 0
    while engine.has_unfinished_requests():
        for output in engine.step():
            outputs[output.request_id] = output
        steps += 1
        if steps == 8:
            engine.abort_request(["long generation"])
    for name in names[1:]:
        check(outputs[name].outputs[0], expected[name])


@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_size", "block_size"),
    [(4, 4, 32, 64), (8, 1, 32, 32), (6, 2, 64, 128), (4, 2, 80, 32), (2, 1, 128, 256)],
)
def test_shapes(heads, kv_heads, head_size, block_size, engine, tmp_path):
    """Grouped queries, head sizes and block sizes other than the default."""
    model = tiny_llama(tmp_path, heads=heads, kv_heads=kv_heads, head_size=head_size, layers=2)
    llm = engine(model, skip_tokenizer_init=True, block_size=block_size)
    oracle = Oracle(model)
    cases = [
        Case(LONG, [(40, 60)], {0: [heads - 1], 1: list(range(heads))}),
        Case(MIDDLE),
        Case(MIDDLE, [(0, 5), (85, 90)], {1: [0]}, alpha=0.1),
    ]
    for case, output in zip(cases, run(llm, cases), strict=True):
        expected = oracle.generate(case.prompt, case.max_tokens, case.steering)
        # With AVX2 alone, the error of a plain request, which is vLLM's own, is 2.05e-4.
        check(output, expected, LOGPROB_TOLERANCE if torch.cpu._is_avx512_supported() else 5e-4)


@pytest.mark.parametrize("layout", ["amx", "vec"])
def test_bf16(layout, engine, tiny, tiny_oracle, monkeypatch):
    """In bf16 the error is at most twice that of the same computation in plain PyTorch."""
    from vllm.v1.attention.backends import cpu_attn

    if layout == "amx" and not torch.cpu._is_amx_tile_supported():
        pytest.skip("no AMX on this machine")
    monkeypatch.setattr(cpu_attn, "_get_attn_isa", lambda *_: layout)
    llm = engine(
        tiny, dtype="bfloat16", skip_tokenizer_init=True, block_size={"amx": 64, "vec": 96}[layout]
    )
    case = Case(LONG, [(60, 90)], ALL_HEADS, alpha=0.05, max_tokens=1)
    params = case.params
    params.prompt_logprobs = -1
    (request,) = llm.generate({"prompt_token_ids": case.prompt}, params, use_tqdm=False)
    ours = torch.tensor(
        [[row[i].logprob for i in range(256)] for row in request.prompt_logprobs[1:]]
    )
    truth = tiny_oracle.prompt_logprobs(case.prompt, case.steering)[:-1]
    plain = Oracle(tiny, torch.bfloat16).prompt_logprobs(case.prompt, case.steering)[:-1]
    unsteered = tiny_oracle.prompt_logprobs(case.prompt)[:-1]
    error, allowed = (ours - truth).abs().mean(), 2 * (plain - truth).abs().mean()
    assert error < allowed
    assert allowed < (unsteered - truth).abs().mean() / 3  # else the bound would prove nothing


def test_smollm2(smollm2_engine, smollm2_oracle):
    """The real model, real prompts, the default block size."""
    tokenizer = smollm2_engine.get_tokenizer()
    heads = {layer: list(range(9)) for layer in range(20, 25)}
    facts = [
        ("Michael Jordan plays basketball", "Michael Jordan plays tennis", "Michael Jordan plays"),
        ("The Louvre is in Paris", "The Louvre is in Rome", "To see the Louvre one travels to"),
        ("Danielle Darrieux speaks French", "Danielle Darrieux speaks English", "She speaks"),
    ]
    prompts, params, asked = [], [], []
    for i, (old, new, question) in enumerate(facts):
        prompt = f"Previously, {old}. Currently, {new}. {question}"
        ids = tokenizer(prompt).input_ids
        start = len(tokenizer(f"Previously, {old}. Currently,").input_ids)
        end = len(tokenizer(f"Previously, {old}. Currently, {new}").input_ids)
        for steered in (True, False):
            emphasis = {
                "text": new,
                "alpha": 10.0 ** -(i + 1),
                "heads": {str(layer): h for layer, h in heads.items() if layer != 20 + i},
            }
            steering = Steering(
                [(start, end)],
                {layer: h for layer, h in heads.items() if layer != 20 + i},
                10.0 ** -(i + 1),
                len(ids),
            )
            prompts.append(prompt)
            params.append(
                SamplingParams(
                    temperature=0,
                    max_tokens=24,
                    ignore_eos=True,
                    logprobs=5,
                    extra_args={"emphasis": emphasis} if steered else None,
                )
            )
            asked.append((ids, 24, steering if steered else None))
    outputs = [r.outputs[0] for r in smollm2_engine.generate(prompts, params, use_tqdm=False)]
    expected = []
    for output, of in zip(outputs, asked, strict=True):
        tokens, rows = smollm2_oracle.generate(*of, guess=output.token_ids)
        expected.append((tokens, rows))
        assert list(output.token_ids) == tokens
        for row, got in zip(rows, output.logprobs, strict=True):
            for token, logprob in got.items():
                assert abs(row[token] - logprob.logprob) < 2e-3
    for i in (0, 2, 4):  # emphasis does something here
        assert (expected[i][1][0] - expected[i + 1][1][0]).abs().max() > 0.5


def test_compiled(engine, tiny, expected):
    """With torch.compile, vLLM's default, as without."""
    names = ["one span", "plain", "prompt of several chunks", "overlapping spans"]
    llm = engine(tiny, skip_tokenizer_init=True, enforce_eager=False, max_num_batched_tokens=64,
                 max_num_seqs=4)  # fmt: skip
    for name, output in zip(names, run(llm, [CASES[n] for n in names]), strict=True):
        check(output, expected[name])


def test_no_async_scheduling(tiny):
    """vLLM turns it off on CPU, asked for or not. Once it does not, both ways are to be tested."""
    from vllm import EngineArgs

    args = EngineArgs(
        str(tiny), skip_tokenizer_init=True, async_scheduling=True, gpu_memory_utilization=0.05
    )
    assert not args.create_engine_config().scheduler_config.async_scheduling
