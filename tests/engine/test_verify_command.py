"""`vllm-pasta verify` on this machine: real engines in processes of their own, and the report.

Broken by: anything that makes steered requests inexact; an engine that is not what it says.
"""

import json
import subprocess
import sys

import psutil
import pytest

from vllm_pasta.verify.run import Machine

KILLED = """
import pathlib, sys, time
from vllm_pasta.verify.engine import Engine
code = '''
import subprocess, sys, time
from vllm_pasta.verify import worker
worker.end_with_parent()
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
print({"child": child.pid}.__repr__().replace("'", '"'), flush=True)
time.sleep(600)
'''
engine = Engine("one", {}, pathlib.Path(sys.argv[1]), command=(sys.executable, "-c", code))
child = engine.about()["child"]
engine.pause()
print(engine._process.pid, child, flush=True)
time.sleep(600)
"""


def test_killed_amid_its_engines(tmp_path):
    """An engine that waits for its turn, stopped, and what it started: they stayed for ever."""
    parent = subprocess.Popen([sys.executable, "-c", KILLED, tmp_path], stdout=subprocess.PIPE)
    started = [psutil.Process(int(pid)) for pid in parent.stdout.readline().split()]
    parent.kill()
    parent.wait()
    for process in started:
        process.wait(timeout=60)


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
