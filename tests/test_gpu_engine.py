"""The GPU's way through vLLM's real engine, without a GPU: both model runners, vLLM's own Triton
attention, our kernels, and requests that come, go and use each other's slots (`gpu_job`).

Broken by: a builder or impl that is not ours; a slot that keeps its last request's steering; a row
that is taken for another; a chunk, a prefix hit or a decode step that is not steered.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from models import tiny_llama
from oracle import Oracle, Steering

TESTS = Path(__file__).parent


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_llama(tmp_path_factory.mktemp("tiny-gpu"), layers=2)


@pytest.fixture(scope="module", params=["0", "1"], ids=["V1", "V2"])
def report(request, model):
    path = [str(TESTS.parent), os.environ.get("PYTHONPATH", "")]
    result = subprocess.run(
        [sys.executable, TESTS / "gpu_job.py", model],
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join(path),
            "VLLM_USE_V2_MODEL_RUNNER": request.param,
        },
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr[-5000:]
    lines = [line for line in result.stdout.splitlines() if line.startswith("REPORT ")]
    return request.param, json.loads(lines[0].removeprefix("REPORT "))


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
    which, report = report
    assert report["backends"] == ["TRITON_ATTN"]
    assert report["runner"].startswith("vllm.v1.worker.cpu.") == (which == "1")
    assert report["mixed"] == expected
    assert report["again"] == expected
    assert report["alone"] == expected[1:3]


def test_wants_to_be_asked_for(report):
    assert "--pasta-gpu experimental" in report[1]["refused"]
