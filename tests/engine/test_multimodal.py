"""Multimodal models, prompts of text: tiny random models of real architectures, in fp32.
`test_images` has prompts with images.

Broken by: layers whose names or positions (M-RoPE) are not those of a text model; a gate that
refuses the engine.
"""

import gc
from dataclasses import replace

import pytest
from answers import Answers
from models import random_ids, tiny_multimodal
from test_exact import LOGPROB_TOLERANCE, Case, check, run

from vllm_pasta.verify.oracle import Oracle

SHORT, LONG = random_ids(24, 1), random_ids(200, 3)
ALL = {layer: [0, 1, 2, 3] for layer in range(4)}
CASES = {
    "plain": Case(LONG),
    "across chunks": Case(LONG, [(10, 14), (60, 70), (199, 200)], ALL, 0.1),
    "one head": Case(LONG, [(150, 170)], {1: [2]}),
    "alpha above 1": Case(LONG, [(100, 120)], ALL, 20.0),
    "short": Case(SHORT, [(12, 18)], ALL),
}


KINDS = ("qwen2_5_vl", "gemma3", "mistral3")


@pytest.fixture(scope="module", params=KINDS)
def model(request, tmp_path_factory):
    from conftest import start

    folder = tiny_multimodal(tmp_path_factory.mktemp(request.param), request.param)
    llm = start(
        folder,
        skip_tokenizer_init=True,
        language_model_only=True,  # else vLLM wants the image processor's files
        block_size=32,
        prefix_cache_retention_interval=None,  # windowed layers keep all blocks, too
        max_num_seqs=4,
        max_num_batched_tokens=64,
    )
    yield llm, Oracle(folder)
    del llm
    gc.collect()


def test_mixed_batch(model):
    """Steered and plain, in chunks and decoding, more requests than the batch holds."""
    llm, oracle = model
    for case, output in zip(CASES.values(), run(llm, list(CASES.values())), strict=True):
        expected = Answers(oracle).to(case, output)
        check(output, expected)
        if case.spans:
            tokens = case.prompt + expected[0][:-1]
            plain = oracle.prompt_logprobs(tokens)[len(case.prompt) - 1 :]
            assert (expected[1] - plain).abs().max() > 20 * LOGPROB_TOLERANCE


def test_prefix_cache(model):
    """Blocks before the first emphasised token are shared with plain requests, no others."""
    llm, oracle = model
    llm.reset_prefix_cache()
    steered = Case(LONG, [(70, 75)], ALL, max_tokens=4)
    for case, shared in (
        (replace(steered, spans=None), 0),
        (steered, 64),
        (steered, 192),
        (replace(steered, alpha=0.5), 64),
    ):
        (request,) = llm.generate({"prompt_token_ids": case.prompt}, case.params, use_tqdm=False)
        assert request.num_cached_tokens == shared
        check(request.outputs[0], Answers(oracle).to(case, request.outputs[0]))
