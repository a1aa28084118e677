"""Models that mix attention with recurrences: Mamba 2, gated delta net, short convolutions. Tiny
random models.

Broken by: a head set's layer taken for another; a recurrence's state shared between differently
steered requests; attention blocks that are enlarged to the state's size and read at another stride.
"""

import gc
from dataclasses import replace

import pytest
import torch
from answers import Answers
from models import HYBRIDS, random_ids, tiny_model
from test_exact import LOGPROB_TOLERANCE, Case, check, run
from vllm import SamplingParams

from vllm_pasta.errors import EmphasisError
from vllm_pasta.profiling.engine import every_head
from vllm_pasta.verify.oracle import Oracle

SHORT, LONG, OTHER = random_ids(24, 1), random_ids(200, 3), random_ids(140, 4)
LAYERS = {"granitemoehybrid": [1, 3], "falcon_h1": [0, 1, 2, 3], "nemotron_h": [1, 3],
          "lfm2": [1, 3], "qwen3_5_text": [1, 3], "qwen3_next": [1, 3]}  # fmt: skip
BF16 = ("qwen3_5_text", "qwen3_next")  # vLLM's CPU kernel of gated delta net takes no other
FP32 = [kind for kind in HYBRIDS if kind not in BF16]
OPTIONS = {
    # On a CPU, eagerly, vLLM 0.32 rotates queries of three dimensions wrongly, with the plugin or
    # without: its operator takes them for ones of two. Its Python version is right.
    "lfm2": {"compilation_config": {"custom_ops": ["-rotary_embedding"]}},
}


class Model:
    """A hybrid model under vLLM and under the oracle."""

    def __init__(self, kind, folder, dtype="float32", **options):
        from conftest import start
        from vllm.distributed import parallel_state

        if kind == "qwen3_next" and parallel_state._TP is not None:
            # Engines in this process share the groups of the first, which has no experts.
            parallel_state._EP = parallel_state._EP or parallel_state._TP
        self.folder = tiny_model(folder, kind, getattr(torch, dtype))
        self.llm = start(
            folder,
            dtype=dtype,
            skip_tokenizer_init=True,
            max_num_seqs=4,
            max_num_batched_tokens=64,
            enable_prefix_caching=True,
            **{**OPTIONS.get(kind, {}), **options},
        )
        self.oracle = Oracle(folder)
        self.answers = Answers(self.oracle)
        self.layers = LAYERS[kind]
        everywhere = {layer: [0, 1, 2, 3] for layer in self.layers}
        self.cases = {
            "plain": Case(LONG),
            "across chunks": Case(LONG, [(5, 9), (60, 70), (199, 200)], everywhere, 0.1),
            "one head": Case(OTHER, [(100, 120)], {self.layers[-1]: [2]}),
            "alpha above 1": Case(OTHER, [(10, 30)], everywhere, 20.0),
            "short": Case(SHORT, [(4, 9)], everywhere, max_tokens=30),
            "plain beside": Case(OTHER),
        }


@pytest.fixture(scope="module", params=FP32)
def model(request, tmp_path_factory):
    model = Model(request.param, tmp_path_factory.mktemp(request.param))
    yield model
    del model
    gc.collect()


def test_mixed_batch(model):
    """Steered and plain, in chunks and decoding, more requests than the batch holds."""
    outputs = run(model.llm, list(model.cases.values()))
    for (name, case), output in zip(model.cases.items(), outputs, strict=True):
        expected = model.answers.to(case, output)
        check(output, expected)
        if case.spans:
            tokens = case.prompt + expected[0][:-1]
            plain = model.oracle.prompt_logprobs(tokens)[len(case.prompt) - 1 :]
            assert (expected[1] - plain).abs().max() > 20 * LOGPROB_TOLERANCE, name


def test_states_are_shared_by_equal_requests_alone(model):
    """The prefix cache holds KV blocks and states of recurrences, found by the same hashes."""
    model.llm.reset_prefix_cache()
    everywhere = {layer: [0, 1, 2, 3] for layer in model.layers}
    prompt = random_ids(400, 5)
    steered = Case(prompt, [(300, 310)], everywhere, max_tokens=4)
    hits = []
    for case in (
        replace(steered, spans=None),
        replace(steered, spans=None),
        steered,
        steered,
        replace(steered, alpha=0.02),
        replace(steered, spans=[(5, 9)]),
        replace(steered, spans=[(5, 9)]),
    ):
        (request,) = model.llm.generate({"prompt_token_ids": prompt}, case.params, use_tqdm=False)
        check(request.outputs[0], model.answers.to(case, request.outputs[0]))
        hits.append(request.num_cached_tokens)
    block = model.llm.llm_engine.vllm_config.cache_config.block_size
    before, whole = 300 // block * block, 399 // block * block
    # vLLM keeps a prompt's last state, and one where a later prompt parts from it: the third finds
    # the plain prompt's KV before its span and no state there, and leaves one to the fifth.
    assert hits == [0, whole, 0, whole, before, 0, whole]
    assert 0 < before < whole  # else nothing was tested


def test_layers_without_heads_are_refused(model):
    """A head set may name attention layers alone."""
    if len(model.layers) == 4:
        pytest.skip("every layer has attention heads beside its recurrence")
    emphasis = {"spans": [[2, 5]], "heads": {"0": [1]}}
    params = SamplingParams(max_tokens=1, extra_args={"emphasis": emphasis})
    with pytest.raises(EmphasisError, match=r"layer 0 has no attention heads.*heads: 1, 3"):
        model.llm.generate({"prompt_token_ids": SHORT}, params, use_tqdm=False)


@pytest.mark.parametrize("kind", HYBRIDS)
def test_profiles_ask_attention_heads_alone(kind, tmp_path):
    """What `vllm-pasta profile` steers, one by one."""
    heads = every_head(str(tiny_model(tmp_path, kind)))
    assert heads == [(layer, head) for layer in LAYERS[kind] for head in range(4)]


@pytest.mark.parametrize("kind", BF16)
def test_gated_delta_net(kind, tmp_path):
    """Error at most twice plain PyTorch's."""
    model = Model(kind, tmp_path, "bfloat16")
    case = replace(model.cases["across chunks"], alpha=0.01, max_tokens=1)
    params = case.params
    params.prompt_logprobs = -1
    (request,) = model.llm.generate({"prompt_token_ids": LONG}, params, use_tqdm=False)
    got = torch.tensor(
        [[row[i].logprob for i in range(256)] for row in request.prompt_logprobs[1:]]
    )
    truth = model.oracle.prompt_logprobs(LONG, case.steering)[:-1]
    plain = Oracle(tmp_path, torch.bfloat16).prompt_logprobs(LONG, case.steering)[:-1]
    unsteered = model.oracle.prompt_logprobs(LONG)[:-1]
    error, allowed = (got - truth).abs().mean(), 2 * (plain - truth).abs().mean()
    assert error < allowed
    assert allowed < (unsteered - truth).abs().mean()  # else the bound would prove nothing


def test_preemption(tmp_path):
    """A KV cache too small for the batch: states and KV are computed anew, and are the same."""
    model = Model(
        "granitemoehybrid",
        tmp_path,
        num_gpu_blocks_override=10,  # of 128 tokens' KV, or one state; the first is nobody's
        max_model_len=256,
        disable_log_stats=False,
    )
    cases = [
        replace(case, prompt=random_ids(90 + 10 * i, i), max_tokens=50)
        for i, case in enumerate(
            [Case(None), Case(None, [(20, 30)], {1: [0, 3]}), Case(None, [(5, 8)], {3: [2]}),
             Case(None)]
        )
    ]  # fmt: skip
    for case, output in zip(cases, run(model.llm, cases), strict=True):
        check(output, model.answers.to(case, output))
    preemptions = [m.value for m in model.llm.get_metrics() if m.name == "vllm:num_preemptions"]
    assert sum(preemptions) > 0


@pytest.mark.slow
def test_compiled(tmp_path):
    """With torch.compile, vLLM's default, as without; then vLLM rotates LFM2's queries rightly."""
    model = Model("lfm2", tmp_path, enforce_eager=False, compilation_config={})
    cases = list(model.cases.values())
    for case, output in zip(cases, run(model.llm, cases), strict=True):
        check(output, model.answers.to(case, output))


@pytest.mark.usefixtures("two_ranks")
def test_two_ranks(tmp_path):
    """Heads are numbered over the whole model."""
    model = Model("granitemoehybrid", tmp_path, tensor_parallel_size=2)
    names = ("across chunks", "one head")
    cases = [replace(model.cases[name], max_tokens=6) for name in names]
    for case, output in zip(cases, run(model.llm, cases), strict=True):
        check(output, model.answers.to(case, output))
    model.llm.llm_engine.engine_core.shutdown()
