"""The demo, once as a whole command."""

import json
import os
import subprocess
import sys


def test_whole_command():
    """One engine, in a process of its own; stdout is JSON and nothing else."""
    env = {k: v for k, v in os.environ.items() if k != "VLLM_ENABLE_V1_MULTIPROCESSING"}
    command = [sys.executable, "-m", "vllm_pasta.cli", "demo", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=600)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    counts = report["counts"]
    assert counts.keys() == {"json", "counterfact"}
    assert sum(task["cases"] for task in counts.values()) == len(report["cases"]) >= 8
    # Measured on more cases in the head set's file; here, that emphasis reaches the model at all.
    assert all(task["emphasised"] > task["plain"] for task in counts.values())
    assert "Engine start" in done.stderr
    assert "WARNING" not in done.stderr
