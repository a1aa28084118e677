"""Real servers, in processes of their own, as a user starts them."""

import os
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

VLLM = Path(sys.executable).parent / "vllm"
SERVE = ("--served-model-name", "m", "--host", "127.0.0.1", "--dtype", "float32",
         "--enforce-eager", "--max-model-len", "1024", "--gpu-memory-utilization", "0.05",
         "--plugin", "pasta")  # fmt: skip


def environment(**changes):
    """As a user's: nothing of what conftest sets for in-process engines."""
    env = {k: v for k, v in os.environ.items() if k != "VLLM_ENABLE_V1_MULTIPROCESSING"}
    return {**env, "VLLM_CPU_KVCACHE_SPACE": "1", **changes}


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def metric(server, name):
    """The sum of those of a server's metrics whose lines begin so."""
    lines = httpx.get(f"{server}/metrics").text.splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.startswith(name))


@contextmanager
def running(commands, folder, health="/health"):
    """Starts servers side by side; stops them when the block ends.

    Args:
        commands: Pairs of a command, which must take ``--port``, and its environment variables.
        folder: Where their logs go.
        health: Path that answers 200 once a server is up.

    Yields:
        Their base URLs, once all are up.
    """
    urls, processes, logs = [], [], []
    try:
        for i, (command, env) in enumerate(commands):
            port = free_port()
            urls.append(f"http://127.0.0.1:{port}")
            logs.append((folder / f"{i}.log").open("w+"))
            process = subprocess.Popen(
                [*command, "--port", str(port)],
                env=environment(**env), stdout=logs[-1], stderr=subprocess.STDOUT,
            )  # fmt: skip
            processes.append(process)
        for url, process, log in zip(urls, processes, logs, strict=True):
            _wait(url + health, process, log)
        yield urls
    finally:
        for process in processes:
            process.terminate()
        for process in processes:
            process.wait(timeout=60)


def _wait(url, process, log):
    for _ in range(600):
        try:
            if httpx.get(url).status_code == 200:
                return
        except httpx.HTTPError:
            pass
        if process.poll() is not None:
            break
        time.sleep(0.5)
    log.seek(0)
    pytest.fail(f"the server did not come up:\n{log.read()[-5000:]}")
