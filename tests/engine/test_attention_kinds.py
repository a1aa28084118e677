"""Attention of every kind that is supported: tiny random models of real architectures, in fp32.

Windowed and full layers mixed (several KV cache groups), soft caps, sinks, ALiBi, normalised
queries and keys, grouped queries, head counts that differ by layer, layers that use another's KV
cache, head sizes 32 to 256.
Prompts are longer than the window of 40 tokens and come in chunks of 64.
"""

import gc
from dataclasses import replace

import pytest
import torch
from answers import Answers
from fastapi import FastAPI
from fastapi.testclient import TestClient
from models import ATTENTION_KINDS, WINDOW, random_ids, tiny_model
from test_exact import LOGPROB_TOLERANCE, Case, check, run

from vllm_pasta.errors import UnsupportedError
from vllm_pasta.integration.frontend.routes import EmphasisRoutes
from vllm_pasta.verify.oracle import Oracle

SHORT, LONG, OTHER = random_ids(24, 1), random_ids(200, 3), random_ids(140, 4)
ALL = {layer: [0, 1, 2, 3] for layer in range(4)}
CASES = {
    "plain": Case(LONG, max_tokens=WINDOW + 10),
    # Decoded rows see no emphasised token in a windowed layer.
    "before the window": Case(LONG, [(20, 30)], {0: [3], 1: [0, 3], 2: [1]}),
    # Decoding moves past the span.
    "in the window": Case(LONG, [(170, 180)], ALL, max_tokens=WINDOW + 10),
    "across chunks and windows": Case(LONG, [(5, 9), (40, 42), (110, 140), (199, 200)], ALL, 0.1),
    "longer than the window": Case(OTHER, [(60, 60 + WINDOW + 20)], {0: [0], 3: [2, 3]}),
    "alpha above 1": Case(OTHER, [(100, 120)], ALL, alpha=20.0),
    "shorter than the window": Case(SHORT, [(4, 9)], ALL, max_tokens=2 * WINDOW),
    # Decoding moves past the second span.
    "share": Case(LONG, [(20, 30), (165, 180)], ALL, share=0.6, max_tokens=WINDOW + 10),
    "plain beside": Case(OTHER),
}


class Model:
    """A model under vLLM and under the oracle."""

    def __init__(self, model_type, folder):
        from conftest import start
        from vllm.distributed import parallel_state

        if model_type == "gpt_oss" and parallel_state._TP is not None:
            # Engines in this process share the groups of the first, which has no experts.
            parallel_state._EP = parallel_state._EP or parallel_state._TP
        tiny_model(folder, model_type)
        self.llm = start(
            folder,
            skip_tokenizer_init=True,
            block_size=32,
            prefix_cache_retention_interval=None,  # windowed layers keep all blocks, too
            max_num_seqs=4,
            max_num_batched_tokens=64,
        )
        self.oracle = Oracle(folder)
        config = self.oracle.model.config
        counts = getattr(config, "num_attention_heads_per_layer", [4] * config.num_hidden_layers)
        everywhere = {layer: list(range(count)) for layer, count in enumerate(counts)}
        self.cases = {
            name: replace(case, heads=everywhere) if case.heads is ALL else case
            for name, case in CASES.items()
        }
        self.answers = Answers(self.oracle)

    def run(self, names):
        """Without what the prefix cache holds. Each case, and vLLM's answer."""
        self.llm.reset_prefix_cache()
        cases = [self.cases[name] for name in names]
        return zip(cases, run(self.llm, cases), strict=True)


@pytest.fixture(scope="module", params=ATTENTION_KINDS)
def model(request, tmp_path_factory):
    model = Model(request.param, tmp_path_factory.mktemp(request.param))
    yield model
    del model
    gc.collect()


def test_mixed_batch(model):
    """Steered and plain, in chunks and decoding, more requests than the batch holds."""
    for case, output in model.run(list(CASES)):
        check(output, model.answers.to(case, output))


def test_oracle_equals_plain_vllm(model):
    """Otherwise the oracle would prove nothing; and steering does something in every case."""
    for case, output in model.run(["plain", "plain beside"]):
        check(output, model.answers.to(case))
    for name, case in model.cases.items():
        if case.spans:
            expected, rows = model.answers.to(case)
            plain = model.oracle.prompt_logprobs(case.prompt + expected[:-1])
            effect = (rows - plain[len(case.prompt) - 1 :]).abs().max()
            assert effect > 50 * LOGPROB_TOLERANCE, name


def test_whole_layers(model):
    """Steps in which all are steered: our kernel computes all heads, and vLLM's does not run."""
    for case, output in model.run([name for name, case in CASES.items() if case.heads is ALL]):
        check(output, model.answers.to(case, output))


def test_prefix_cache(model):
    """Each group of layers shares the blocks before the first difference, and no other."""
    model.llm.reset_prefix_cache()
    steered = Case(LONG, [(70, 75)], ALL)
    for case, shared_tokens in (
        (Case(LONG), 0),
        (steered, 64),
        (Case(LONG), 192),
        (steered, 192),
        (replace(steered, alpha=0.02), 64),
        (replace(steered, spans=[(70, 76)]), 64),
        (replace(steered, spans=[(140, 150)]), 128),
        (replace(steered, heads={1: [2]}), 64),
        (replace(steered, share=0.5), 64),
        (steered, 192),
    ):
        (request,) = model.llm.generate(
            {"prompt_token_ids": case.prompt}, case.params, use_tqdm=False
        )
        assert request.num_cached_tokens == shared_tokens, case
        check(request.outputs[0], model.answers.to(case, request.outputs[0]))


GROUPS = {  # window and block size of each KV cache group
    "mistral": {(WINDOW, 32)},
    "gemma2": {(WINDOW, 32), (None, 32)},
    "gemma3_text": {(WINDOW, 32), (None, 32)},
    "gemma4_text": {(WINDOW, 64), (None, 32)},
    "gpt_oss": {(WINDOW, 32), (None, 32)},
    "laguna": {(WINDOW, 32), (None, 32)},
}


def test_what_was_tested(model):
    """The engine holds the kinds of layers that its name promises."""
    from vllm.config import get_layers_from_vllm_config
    from vllm.model_executor.layers.attention import Attention

    engine, model_type = model.llm.llm_engine, model.oracle.model.config.model_type
    scheduler = engine.engine_core.engine_core.scheduler
    specs = [group.kv_cache_spec for group in scheduler.kv_cache_config.kv_cache_groups]
    groups = {(getattr(spec, "sliding_window", None), spec.block_size) for spec in specs}
    assert groups == GROUPS.get(model_type, {(None, 32)})
    impls = [
        layer.impl for layer in get_layers_from_vllm_config(engine.vllm_config, Attention).values()
    ]
    assert any(impl.logits_soft_cap for impl in impls) == (model_type == "gemma2")
    assert any(impl.sinks is not None for impl in impls) == (model_type == "gpt_oss")
    assert any(impl.alibi_slopes is not None for impl in impls) == (model_type == "bloom")
    assert {impl.num_heads for impl in impls} == ({4, 6} if model_type == "laguna" else {4})
    sharing = [impl.kv_sharing_target_layer_name for impl in impls]
    assert any(sharing) == (model_type == "gemma4_text")


def test_heads_that_a_layer_does_not_have(model):
    """Checked against the layer's own count."""
    if model.oracle.model.config.model_type != "laguna":
        pytest.skip("layers do not differ")
    for layer, head, reason in ((0, 6, "6 query heads"), (1, 4, "4 query heads .* in this layer")):
        with pytest.raises(ValueError, match=f"layer {layer}, head {head} is out.*{reason}"):
            run(model.llm, [Case(SHORT, [(4, 9)], {layer: [head]})])


def test_the_route_says_which_heads_there_are(model):
    """`GET /v1/emphasis/head_sets`, where layers differ and where they do not."""
    app = FastAPI()
    EmphasisRoutes().attach_router(app)
    app.state.pasta_admission = model.llm.llm_engine.input_processor.pasta_admission
    told = TestClient(app).get("/v1/emphasis/head_sets").json()["model"]
    counts = {"laguna": [6, 4] * 2, "gemma4_text": [4] * 6}
    counts = counts.get(model.oracle.model.config.model_type) or [4] * told["layers"]
    assert told == {
        "layers": len(counts),
        "query_heads": max(counts),
        "attention_layers": list(range(len(counts))),
        "query_heads_of_layers": {str(layer): count for layer, count in enumerate(counts)},
    }


def test_chunked_local_attention_is_refused(tmp_path):
    """It cuts requests into virtual ones, so the batch's rows are not those that we know."""
    from conftest import start
    from transformers import Llama4ForCausalLM, Llama4TextConfig

    torch.manual_seed(0)
    Llama4ForCausalLM(
        Llama4TextConfig(
            vocab_size=64, hidden_size=64, intermediate_size=64, intermediate_size_mlp=64,
            num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2, head_dim=32,
            attention_chunk_size=32, interleave_moe_layer_step=5, num_local_experts=1,
        )
    ).save_pretrained(tmp_path)  # fmt: skip
    with pytest.raises(UnsupportedError, match="is of kind ChunkedLocalAttention"):
        start(tmp_path, skip_tokenizer_init=True)
