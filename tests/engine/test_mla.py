"""Multi-head latent attention (DeepSeek V2 and V3): tiny random models, over vLLM's CPU backends.

Broken by: a query that is not absorbed, or by another head's weights; rows of decoding requests and
of prompts taken for each other; keys of the compressed part alone; a bias on another token's key.
"""

import gc
from copy import copy
from dataclasses import replace

import pytest
import torch
from answers import Answers
from last_row import last_row
from models import MLA, random_ids, tiny_model
from test_exact import LOGPROB_TOLERANCE, Case, check, run

from vllm_pasta.errors import UnsupportedError
from vllm_pasta.integration.frontend.flags import WATCHER
from vllm_pasta.integration.frontend.routes.attention import look_offline
from vllm_pasta.verify.oracle import Oracle

SHORT, LONG, OTHER = random_ids(24, 1), random_ids(200, 3), random_ids(140, 4)
ALL = {layer: [0, 1, 2, 3] for layer in range(4)}
CASES = {
    "plain": Case(LONG),
    "across chunks": Case(LONG, [(5, 9), (60, 70), (199, 200)], ALL, 0.1),
    "one head": Case(OTHER, [(100, 120)], {2: [1]}),
    "heads differ by layer": Case(OTHER, [(20, 24)], {0: [3], 1: [0, 3], 3: [1, 2]}),
    "alpha above 1": Case(OTHER, [(10, 30)], ALL, 20.0),
    "several strengths": Case(LONG, [(30, 45), (60, 70)], ALL, 0.01, factors=[0.1, 1.0]),
    "share": Case(LONG, [(5, 9), (150, 170)], ALL, share=0.8, max_tokens=24),
    "short": Case(SHORT, [(4, 9)], ALL, max_tokens=40),
    "one token": Case([77], [(0, 1)], ALL),
    "plain beside": Case(OTHER),
}


@pytest.fixture
def chunks(monkeypatch):
    """vLLM's CPU platform turns chunked prefill and prefix caching off for its reference backend,
    which could do both: it gathers the context as other platforms do. This turns them on again."""
    from vllm.platforms.cpu import CpuPlatform

    original = CpuPlatform.check_and_update_config

    def check_and_update_config(cls, vllm_config):
        original(vllm_config)
        vllm_config.scheduler_config.enable_chunked_prefill = True
        vllm_config.scheduler_config.max_num_batched_tokens = 64
        vllm_config.cache_config.enable_prefix_caching = True

    monkeypatch.setattr(
        CpuPlatform, "check_and_update_config", classmethod(check_and_update_config)
    )


def start_mla(folder, dtype="float32", **options):
    from conftest import start

    if dtype == "float32":  # else vLLM takes the AMX backend where there is AMX, which is of bf16
        options["attention_config"] = {"backend": "CPU_MLA"}
    options.setdefault("worker_extension_cls", WATCHER)
    return start(folder, dtype=dtype, skip_tokenizer_init=True, max_num_seqs=4, **options)


def check_all(llm, oracle):
    for case, output in zip(CASES.values(), run(llm, list(CASES.values())), strict=True):
        expected = Answers(oracle).to(case, output)
        check(output, expected)
        if case.spans and case is not CASES["one token"]:
            tokens = case.prompt + expected[0][:-1]
            plain = oracle.prompt_logprobs(tokens)[len(case.prompt) - 1 :]
            assert (expected[1] - plain).abs().max() > 20 * LOGPROB_TOLERANCE


@pytest.fixture(scope="module", params=MLA)
def model(request, tmp_path_factory):
    folder = tiny_model(tmp_path_factory.mktemp(request.param), request.param)
    llm = start_mla(folder)
    yield llm, Oracle(folder), folder
    del llm
    gc.collect()


def test_mixed_batch(model):
    """Steered and plain, prompts and decoding, more requests than the batch holds."""
    llm, oracle, _ = model
    check_all(llm, oracle)


def test_attention(model):
    """What a prompt's last token attends to, plain and emphasised, as the oracle has it."""
    llm, oracle, _ = model
    case = CASES["heads differ by layer"]
    spans = [list(span) for span in case.spans]
    emphasis = {"spans": spans, "heads": case.heads, "alpha": case.alpha}
    seen = look_offline(llm, emphasis, case.prompt, (3, 2))
    for kind, steering in (("plain", None), ("emphasised", case.steering)):
        weights = last_row(oracle, case.prompt, steering)
        assert seen["map"][kind] == pytest.approx(weights[3][2].tolist(), abs=1e-5)
    assert seen["map"]["plain"] != pytest.approx(seen["map"]["emphasised"], abs=1e-3)


def test_layer_that_cannot_be_steered(model):
    """Found in the worker, once the layers are there."""
    from vllm.config import get_layers_from_vllm_config
    from vllm.model_executor.layers.attention import MLAAttention

    from vllm_pasta.integration.support import check_layer

    layers = get_layers_from_vllm_config(model[0].llm_engine.vllm_config, MLAAttention)
    for where, attribute, value, reason in (
        ("layer", "__class__", type("Own", (MLAAttention,), {}), "of kind Own, not MLAAttention"),
        ("impl", "num_heads", 2, "has 2 query heads, not 4 as the config"),
        ("layer", "q_pad_num_heads", 64, "has queries padded to 64 heads"),
        ("impl", "kv_cache_dtype", "fp8_ds_mla", "has a latent KV cache of fp8_ds_mla, not auto"),
        ("layer", "use_sparse", True, "keys that an indexer chooses"),
        ("layer", "sliding_window", 128, "a sliding window over a latent KV cache"),
        ("impl", "dcp_world_size", 2, "has its latent KV cache spread over 2 ranks"),
    ):
        layer = copy(next(iter(layers.values())))
        layer.impl = copy(layer.impl)
        check_layer("layers.0", layer, 4)
        setattr(layer if where == "layer" else layer.impl, attribute, value)
        with pytest.raises(UnsupportedError, match=f"layer layers.0 .*{reason}"):
            check_layer("layers.0", layer, 4)


def test_chunks_and_prefix_cache(chunks, tmp_path):
    """A prompt's later chunks attend to the paged context, and to what others left in the cache."""
    llm = start_mla(tiny_model(tmp_path, "deepseek_v3"))
    oracle = Oracle(tmp_path)
    check_all(llm, oracle)
    check_prefix_cache(llm, lambda case, output: check(output, Answers(oracle).to(case, output)))


def check_prefix_cache(llm, check_output):
    """Blocks before the first emphasised token are shared with plain requests, no others."""
    llm.reset_prefix_cache()
    block = llm.llm_engine.vllm_config.cache_config.block_size
    before, whole = 70 // block * block, 199 // block * block
    steered = Case(LONG, [(70, 75)], ALL, max_tokens=4)
    for case, shared in (
        (replace(steered, spans=None), 0),
        (steered, before),
        (steered, whole),
        (replace(steered, alpha=0.5), before),
    ):
        (request,) = llm.generate({"prompt_token_ids": case.prompt}, case.params, use_tqdm=False)
        assert request.num_cached_tokens == shared
        check_output(case, request.outputs[0])


@pytest.mark.skipif(not torch.cpu._is_amx_tile_supported(), reason="needs AMX")
def test_amx(tmp_path):
    """vLLM's other CPU backend, of bf16 alone: error at most twice plain PyTorch's."""
    llm = start_mla(
        tiny_model(tmp_path, "deepseek_v2", torch.bfloat16),
        "bfloat16",
        block_size=32,
        max_num_batched_tokens=64,
    )
    truth, plain = Oracle(tmp_path), Oracle(tmp_path, torch.bfloat16)
    cases = [replace(CASES["across chunks"], max_tokens=24), CASES["heads differ by layer"]]
    for case, output in zip(cases, run(llm, cases), strict=True):
        # The tokens are the engine's own; each row is held to the same text under the oracle.
        text = case.prompt + list(output.token_ids)[:-1]
        rows = slice(len(case.prompt) - 1, None)
        got = torch.tensor([[row[i].logprob for i in range(256)] for row in output.logprobs])
        exact = truth.prompt_logprobs(text, case.steering)[rows]
        error = (got - exact).abs().mean()
        allowed = 2 * (plain.prompt_logprobs(text, case.steering)[rows] - exact).abs().mean()
        assert error < allowed
        # Else the bound would prove nothing.
        assert allowed < (truth.prompt_logprobs(text)[rows] - exact).abs().mean()
    check_prefix_cache(llm, lambda case, output: None)


def test_without_latent_cache(tmp_path, monkeypatch):
    """VLLM_MLA_DISABLE runs the same model with plain attention: what is offered for GPUs."""
    monkeypatch.setenv("VLLM_MLA_DISABLE", "1")
    llm = start_mla(tiny_model(tmp_path, "deepseek_v2"), max_num_batched_tokens=64)
    check_all(llm, Oracle(tmp_path))
