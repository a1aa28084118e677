"""The log-sum-exp of vLLM's Triton attention, in Triton's interpreter.

Broken by: a store of another row or head; an output that is not vLLM's own to the bit.
"""

import json
import os
import sys
from pathlib import Path

import prepared
import pytest

from vllm_pasta.integration.worker.triton_lse import DIGESTS

JOB = Path(__file__).parents[1] / "support" / "triton_lse_job.py"


@pytest.fixture(scope="module")
def report():
    env = {**os.environ, "TRITON_INTERPRET": "1"}
    done = prepared.run([sys.executable, JOB], env, timeout=600, imported=prepared.GPU)
    assert not done.returncode, done.stderr[-3000:]
    return json.loads(done.stdout.split("REPORT")[1])


def test_kernels_are_those_that_were_read(report):
    assert report["digests"].keys() == DIGESTS.keys()
    for name, digest in report["digests"].items():
        assert digest in DIGESTS[name].split()


@pytest.mark.parametrize("step", ["prefill None", "prefill 24", "decode None", "decode 24"])
def test_log_sum_exp(step, report):
    """Of whole rows, and where segments of a row's keys are put together."""
    found = report[step]
    assert not found["is base 2"]
    assert found["as plain"] == 0
    assert max(found["as dense"], found["log-sum-exp"]) < 1e-5
