"""`vllm-pasta verify` on this machine: real engines in processes of their own, and the report.

Broken by: anything that makes steered requests inexact; an engine that is not what it says.
"""

import json
import subprocess
import sys

import pytest

from vllm_pasta.verify.run import Machine


@pytest.mark.slow
def test_verify(tmp_path):
    command = [sys.executable, "-m", "vllm_pasta.cli", "verify", "--shape", "tiny", "--runs", "1"]
    done = subprocess.run(
        [*command, "--json", "--logs", tmp_path], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads(done.stdout)
    assert report["ok"]
    names = ["fp32", "bf16"] if Machine.here().has_fast_bf16 else ["fp32"]
    assert list(report["engines"])[:-2] == names
    for name in names:
        assert report["engines"][name]["backends"] == ["CPU_ATTN"]
        for part in ("fresh", "prefix cache"):
            errors = report["errors"][f"{name}, {part}"]["steered"]
            assert errors["tokens"] == 18 * 40
            assert errors["unsteered_mean"] > 10 * errors["mean"]
    (row,) = report["throughput"]
    assert row["same_idle"] == 1
    assert set(row["seconds"]) == {"plain", "idle", "steered"}
    assert "fp32: asking 24 requests, twice" in done.stderr
