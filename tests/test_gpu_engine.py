"""The GPU's way through vLLM's real engine, without a GPU: both model runners, vLLM's own Triton
attention (and the FlashAttention and FlashInfer backends, over stand-ins for their kernels), our
kernel, and requests that come, go and use each other's slots (`gpu_job`).

Broken by: a builder or impl that is not ours; a slot that keeps its last request's steering; a row
that is taken for another; a chunk, a prefix hit or a decode step that is not steered.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import vllm
from models import tiny_llama
from oracle import Oracle, Steering

from vllm_pasta.integration.support import GPU_VLLM

pytestmark = pytest.mark.skipif(
    not vllm.__version__.startswith(GPU_VLLM), reason=f"emphasis on a GPU needs vLLM {GPU_VLLM}x"
)
TESTS = Path(__file__).parent


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_llama(tmp_path_factory.mktemp("tiny-gpu"), layers=2)


@pytest.fixture(
    scope="module",
    params=[
        ("TRITON_ATTN", "0"),
        ("TRITON_ATTN", "1"),
        ("FLASH_ATTN", "1"),
        ("FLASHINFER", "1"),
    ],
    ids=["Triton, V1", "Triton, V2", "FlashAttention, V2", "FlashInfer, V2"],
)
def report(request, model):
    backend, v2 = request.param
    path = [str(TESTS.parent), os.environ.get("PYTHONPATH", "")]
    result = subprocess.run(
        [sys.executable, TESTS / "gpu_job.py", model, backend],
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join(path),
            "VLLM_USE_V2_MODEL_RUNNER": v2,
        },
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr[-5000:]
    lines = [line for line in result.stdout.splitlines() if line.startswith("REPORT ")]
    return backend, v2, json.loads(lines[0].removeprefix("REPORT "))


@pytest.fixture(scope="module")
def expected(model):
    from gpu_job import CASES

    oracle = Oracle(model)
    tokens = []
    for ids, n, emphasis in CASES:
        steering = emphasis and Steering(
            emphasis["spans"],
            {int(layer): heads for layer, heads in emphasis["heads"].items()},
            emphasis.get("alpha", 0.01),
            len(ids),
        )
        tokens.append(oracle.generate(ids, n, steering)[0])
    return tokens


def test_equals_the_oracle(report, expected):
    backend, v2, report = report
    assert report["backends"] == [backend]
    assert report["runner"].startswith("vllm.v1.worker.cpu.") == (v2 == "1")
    assert report["plain"] == expected[:1]
    assert report["mixed"] == expected
    assert report["again"] == expected[:3]


def test_drafts_equal_the_oracle(report, expected):
    _, v2, report = report
    assert report["drafted"] == expected[:4]
    assert report["drafts"]["draft_tokens"] > 0
    assert (report["drafts"]["accepted_tokens"] > 0) == (v2 == "1")  # by the same model


def test_log_sum_exp(report):
    """FlashAttention is asked for it where something is steered, and at first, for graphs."""
    backend, _, report = report
    layers = 2
    once = 2 * layers  # with one row a request, and with several
    assert report["asked before"] == (once if backend == "FLASH_ATTN" else 0)
    assert (report["asked"] > 8 * layers) == (backend == "FLASH_ATTN")


def test_cases_differ(expected):
    """Else equal tokens would prove little: prompts are the same, emphasis is not."""
    for same in ((0, 2, 6), (1, 3, 5)):
        n = min(len(expected[i]) for i in same)
        assert len({tuple(expected[i][:n]) for i in same}) == len(same)


def test_wants_to_be_asked_for(report):
    assert "--pasta-gpu experimental" in report[2]["refused"]
