"""Beam search with emphasis finds the beams that the oracle finds, with their scores.

Broken by: a prompt's end that moves while beams grow, so that generated tokens are scaled; marks
searched again in a beam's own prompt; a beam search that takes another's emphasis, or none.
Over HTTP: tests/server/test_server.py.
"""

import dataclasses
import re

import pytest
import vllm
from vllm.sampling_params import BeamSearchParams, StructuredOutputsParams

import vllm_pasta
from vllm_pasta import EmphasisError
from vllm_pasta.request.head_sets.library import bundled
from vllm_pasta.request.markup import Markup
from vllm_pasta.verify.oracle import Steering

HEADS = {layer: list(heads) for layer, heads in bundled()["smollm2-135m-instruct"].layers}
TAGGED = "Name three colours. <emphasis>Answer in JSON.</emphasis> Be brief."
PROMPT = TAGGED.replace("<emphasis>", "").replace("</emphasis>", "")
PART = "Answer in JSON."
WIDTH, LENGTH = 3, 5
COUNTS_PROMPT = vllm.__version__.startswith("0.32.")
"""How this vLLM counts a beam's length; see `Oracle.beam_search`."""


@pytest.fixture(scope="module")
def steering_of(smollm2_engine):
    """What it means to emphasise a part of a prompt."""
    tokenizer = smollm2_engine.get_tokenizer()

    def run(prompt, part, alpha=0.01, heads=HEADS):
        before = prompt[: prompt.index(part)]
        start = len(tokenizer(before.rstrip()).input_ids)
        end = len(tokenizer(before + part).input_ids)
        return Steering([(start, end)], heads, alpha, len(tokenizer(prompt).input_ids))

    return run


@pytest.fixture(scope="module")
def oracle_beams(smollm2_engine, smollm2_oracle, steering_of):
    """By prompt, what `steering_of` takes, and options."""
    tokenizer = smollm2_engine.get_tokenizer()

    def run(prompt, *part, **options):
        steering = steering_of(prompt, *part) if part else None
        ids, eos = tokenizer(prompt).input_ids, tokenizer.eos_token_id
        return smollm2_oracle.beam_search(
            ids, WIDTH, LENGTH, steering, eos, counts_prompt=COUNTS_PROMPT, **options
        )

    return run


def ask(llm, prompts, emphasis=None, **options):
    """The beams of each prompt, as the oracle gives them."""
    params = BeamSearchParams(**{"beam_width": WIDTH, "max_tokens": LENGTH, **options})
    if emphasis is not None:
        params.extra_args = {"emphasis": emphasis}
    tokenizer = llm.get_tokenizer()
    return [
        [
            (beam.tokens[len(tokenizer(prompt).input_ids) :], beam.cum_logprob)
            for beam in output.sequences
        ]
        for prompt, output in zip(
            (prompt.replace("<emphasis>", "").replace("</emphasis>", "") for prompt in prompts),
            llm.beam_search(prompts, params),
            strict=True,
        )
    ]


def check(beams, expected):
    assert [tokens for tokens, _ in beams] == [tokens for tokens, _ in expected]
    for (_, score), (_, truth) in zip(beams, expected, strict=True):
        assert abs(score - truth) < 1e-3 * LENGTH


def test_same_beams_as_oracle(smollm2_engine, oracle_beams):
    """Two prompts side by side, each with its own place of the mark; then plain beams again."""
    longer = "Listen. " + PROMPT
    first, second = ask(smollm2_engine, [PROMPT, longer], PART)
    check(first, oracle_beams(PROMPT, PART))
    check(second, oracle_beams(longer, PART))
    (plain,) = ask(smollm2_engine, [PROMPT])
    check(plain, oracle_beams(PROMPT))
    assert plain != first


def test_end_of_text_and_length_penalty(smollm2_engine, oracle_beams):
    """Beams that end compete with those that go on. By this penalty one that ends is among the best
    however a beam's length is counted; by a larger one it is where the prompt counts alone."""
    eos = smollm2_engine.get_tokenizer().eos_token_id
    prompt = (
        "<|im_start|>user\nSay yes or no, in one word. Be brief.<|im_end|>\n<|im_start|>assistant\n"
    )
    expected = oracle_beams(prompt, "in one word", penalty=0.1)
    assert any(tokens[-1] == eos for tokens, _ in expected)
    (beams,) = ask(smollm2_engine, [prompt], "in one word", length_penalty=0.1)
    check(beams, expected)


def test_emphasis_of_its_own(smollm2_engine, oracle_beams):
    """Heads and alpha of the request, by vllm_pasta's params."""
    heads = {21: [0, 4], 23: list(range(9))}
    extra = {"text": PART, "alpha": 0.1, "heads": {str(k): v for k, v in heads.items()}}
    params = vllm_pasta.BeamSearchParams(
        beam_width=WIDTH, max_tokens=LENGTH, extra={"emphasis": extra}
    )
    assert isinstance(params, BeamSearchParams)
    (output,) = smollm2_engine.beam_search([PROMPT], params)
    prompt_tokens = len(smollm2_engine.get_tokenizer()(PROMPT).input_ids)
    beams = [(beam.tokens[prompt_tokens:], beam.cum_logprob) for beam in output.sequences]
    check(beams, oracle_beams(PROMPT, PART, 0.1, heads))


def test_markup(smollm2_engine, oracle_beams, monkeypatch):
    """The request's and the server's; what was taken out stays out, in every step."""
    expected = oracle_beams(PROMPT, PART)
    check(ask(smollm2_engine, [TAGGED], {"markup": "tag"})[0], expected)
    admission = smollm2_engine.llm_engine.input_processor.pasta_admission
    config = dataclasses.replace(admission.config, markup=Markup("tag"))
    monkeypatch.setattr(admission, "config", config)
    check(ask(smollm2_engine, [TAGGED])[0], expected)
    check(ask(smollm2_engine, [PROMPT])[0], oracle_beams(PROMPT))


def test_structured_outputs(smollm2_engine, smollm2_oracle, steering_of):
    """Where vLLM makes other params for each beam, they carry the emphasis too."""
    pattern = '[^0-9"]+'
    grammar = StructuredOutputsParams(regex=pattern)
    grammar._backend = "xgrammar"  # vLLM 0.32 does not know its own default, "auto", here
    (beams,) = ask(smollm2_engine, [PROMPT], PART, structured_outputs=grammar)
    tokenizer = smollm2_engine.get_tokenizer()
    ids = tokenizer(PROMPT).input_ids
    assert len(beams) == WIDTH
    for tokens, score in beams:
        assert re.fullmatch(pattern, tokenizer.decode(tokens))
        rows = smollm2_oracle.prompt_logprobs(ids + tokens, steering_of(PROMPT, PART))
        rows = rows[len(ids) - 1 : -1]
        truth = sum(float(row[t]) for row, t in zip(rows, tokens, strict=True))
        assert abs(score - truth) < 1e-3 * LENGTH


@pytest.mark.parametrize(
    ("emphasis", "words"),
    [("Answer in XML.", "is not in the prompt"), ({"txt": 1}, "unknown field 'txt'")],
)
def test_refused(emphasis, words, smollm2_engine):
    """Before anything runs, also where the other prompt has the mark."""
    with pytest.raises(EmphasisError, match=words):
        ask(smollm2_engine, [PROMPT, "Answer in XML. Now."], emphasis)
    assert not smollm2_engine.llm_engine.has_unfinished_requests()


def test_not_switched_on(smollm2_engine, monkeypatch):
    """An engine without emphasis refuses it, and beams go on without."""
    admission = smollm2_engine.llm_engine.input_processor.pasta_admission
    monkeypatch.setattr(admission, "config", None)
    with pytest.raises(EmphasisError, match="--plugin pasta"):
        ask(smollm2_engine, [PROMPT], PART)
