"""The GPU's way through vLLM's real engine, without a GPU: both model runners, vLLM's own Triton
attention (and the FlashAttention and FlashInfer backends, over stand-ins for their kernels), our
kernel, sliding windows, soft caps and sinks, requests that come, go and use each other's slots, two
pipeline stages, and engines that sleep (`gpu_job`).

Broken by: a builder or impl that is not ours; a slot that keeps its last request's steering; a row
that is taken for another; a chunk, a prefix hit or a decode step that is not steered; a pipeline
stage that is not told whose its rows are; what is kept where sleep mode discards it.
"""

import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path

import drafts
import prepared
import pytest
from last_row import last_row
from models import MLA, tiny_llama, tiny_model

from vllm_pasta.verify.oracle import Oracle, Steering

TESTS = Path(__file__).parent.parent
LAYERS = 2

ENGINES = {  # backend, whether Model Runner V2, model type
    "Triton, V1, sinks": ("TRITON_ATTN", False, "gpt_oss"),
    "Triton, V2, soft cap": ("TRITON_ATTN", True, "gemma2"),
    "FlashAttention, V2": ("FLASH_ATTN", True, "llama"),
    "FlashInfer, V2": ("FLASHINFER", True, "llama"),
    "FlashAttention, V2, pipeline": ("FLASH_ATTN", True, "llama", "pipeline"),
    "Triton, MLA, V2": ("TRITON_MLA", True, "deepseek_v3"),
}
EAGLE = "FLASH_ATTN"
"""The backend on which an EAGLE draft drafts, on V2; on the others the model itself does."""


@dataclass
class Run:
    backend: str
    is_v2: bool
    report: dict
    expected: list  # tokens of each of `gpu_job.CASES`, by the oracle
    looks: dict  # what the last token of `gpu_job.LONG` attends to, plain and emphasised, by it


# V2, windows and soft caps are each in a quicker test: the next two, the first, and test_triton.
SLOW = {"Triton, V2, soft cap": [pytest.mark.slow]}


@pytest.fixture(
    scope="module",
    params=[pytest.param(of, id=name, marks=SLOW.get(name, ())) for name, of in ENGINES.items()],
)
def run(request, tmp_path_factory):
    backend, is_v2, model_type, *other = request.param
    model = tmp_path_factory.mktemp(model_type)
    if model_type == "llama":
        tiny_llama(model, layers=LAYERS)
    elif model_type in MLA:
        tiny_model(model, model_type, num_hidden_layers=LAYERS)
    else:  # a windowed layer, and one that sees all
        tiny_model(
            model,
            model_type,
            num_hidden_layers=LAYERS,
            initializer_range=0.1,  # a Gemma 2 with more repeats the prompt's last token
            layer_types=["sliding_attention", "full_attention"],
        )
    if backend == EAGLE and not other:
        other = [drafts.eagle(model, tmp_path_factory.mktemp("eagle"))]
    path = [str(TESTS.parent), os.environ.get("PYTHONPATH", "")]
    done = prepared.run(
        [sys.executable, TESTS / "support" / "gpu_job.py", model, backend, *other],
        {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(path),
            "TRITON_INTERPRET": "1",
            "VLLM_USE_V2_MODEL_RUNNER": str(int(is_v2)),
        },
        imported=prepared.GPU,
    )
    assert done.returncode == 0, done.stderr[-5000:]
    lines = [line for line in done.stdout.splitlines() if line.startswith("REPORT ")]
    report = json.loads(lines[0].removeprefix("REPORT "))
    return Run(backend, is_v2, report, *expected(model, report["mixed"]))


def expected(model, answers):
    from gpu_job import CASES, LONG, WATCHED

    oracle = Oracle(model)
    tokens = [
        oracle.generate(ids, n, steering(emphasis, ids), guess=answer)[0]
        for (ids, n, emphasis), answer in zip(CASES, answers, strict=True)
    ]
    looks = {
        "plain": last_row(oracle, LONG, None),
        "emphasised": last_row(oracle, LONG, steering(WATCHED, LONG)),
    }
    return tokens, looks


def steering(emphasis, ids):
    return emphasis and Steering(
        emphasis["spans"],
        {int(layer): heads for layer, heads in emphasis["heads"].items()},
        emphasis.get("alpha", 0.01),
        len(ids),
    )


def test_equals_the_oracle(run):
    report, expected = run.report, run.expected
    for backends, runner in zip(report["backends"], report["runners"], strict=True):
        assert backends == [run.backend]
        assert runner.startswith("vllm.v1.worker.cpu.") == run.is_v2
    assert report["plain"] == expected[:1]
    assert report["mixed"] == expected
    assert report["again"] == expected[:3]


def test_drafts_equal_the_oracle(run):
    if "drafts" not in run.report:
        pytest.skip("vLLM has no draft models of this kind")
    drafts = run.report["drafts"]
    assert run.report["drafted"] == run.expected[3:]
    assert drafts["draft_tokens"] > 0
    if run.backend != EAGLE:  # whose draft is seldom right
        assert (drafts["accepted_tokens"] > 0) == run.is_v2  # by the same model


def test_sleep(run):
    """At either level vLLM discards the KV cache alone, of what is looked at; what it discards is
    overwritten here."""
    if "slept" not in run.report:
        pytest.skip("the memory of other processes is not looked at")
    caches, own = run.report["pools"]
    assert caches == ["kv_cache"]
    assert own == ["runtime"]
    assert run.report["slept"] == [run.expected[:3]] * 2


def test_attention(run):
    """What a prompt's last token attends to, plain and emphasised, as the oracle has it."""
    from gpu_job import WATCHED

    if "seen" not in run.report:
        pytest.skip("two stages are not looked into")
    seen = run.report["seen"]
    marked = [i for start, end in WATCHED["spans"] for i in range(start, end)]
    for kind, weights in run.looks.items():
        assert seen["map"][kind] == pytest.approx(weights[1][3].tolist(), abs=1e-5)
        for of in seen["heads"]:
            mass = float(weights[of["layer"]][of["head"]][marked].sum())
            assert of[kind] == pytest.approx(mass, abs=1e-5), of
    assert len(seen["heads"]) == 3


def test_log_sum_exp(run):
    """FlashAttention and FlashInfer are asked for it where something is steered, and only there."""
    if len(run.report["runners"]) > 1:
        pytest.skip("the calls of other processes are not counted")
    assert run.report["asked before"] == 0
    assert (run.report["asked"] > 8 * LAYERS) == (run.backend in ("FLASH_ATTN", "FLASHINFER"))


def test_cases_differ(run):
    """Else equal tokens would prove little: prompts are the same, emphasis is not."""
    for same in ((0, 2, 6), (1, 3, 5)):
        n = min(len(run.expected[i]) for i in same)
        assert len({tuple(run.expected[i][:n]) for i in same}) == len(same)
