"""Real servers, in processes of their own, as a user starts them."""

import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import contextmanager, suppress
from pathlib import Path

import httpx
import prepared
import psutil
import pytest
from conftest import ALL_CORES, CORES

VLLM = Path(sys.executable).parent / "vllm"
SERVE = ("--served-model-name", "m", "--host", "127.0.0.1", "--dtype", "float32",
         "--enforce-eager", "--max-model-len", "1024", "--gpu-memory-utilization", "0.05",
         "--plugin", "pasta")  # fmt: skip

USUAL = {"VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
"""As a user's server: its worker in a process of its own. It and the engine core wait busily for
each other, so most servers of the tests have one for both.
"""

# httpx gives up after 5 seconds, which a machine with other work beside it can take to answer. Only
# a server that hangs takes as long as this: tests/conftest.py ends a test that does.
# Each request has a connection of its own: uvicorn closes one that was idle for 5 seconds, and a
# request that is sent on it at that moment is lost.
http = httpx.Client(timeout=300, limits=httpx.Limits(max_keepalive_connections=0))
START_SECONDS = 600  # all that a start takes where there are two slow cores and other work


def environment(**changes):
    """As a user's, but that vLLM may run the worker in the engine core's process (see `USUAL`)."""
    cores = ",".join(map(str, sorted(CORES)))
    return {
        **os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": cores, **changes,
    }  # fmt: skip


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def metric(server, name):
    """The sum of those of a server's metrics whose lines begin so."""
    lines = http.get(f"{server}/metrics").text.splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.startswith(name))


@contextmanager
def running(commands, folder, health="/health", are_prepared=False):
    """Starts servers side by side; stops them when the block ends.

    Args:
        commands: Pairs of a command, which must take ``--port``, and its environment variables.
        folder: Where their logs go.
        health: Path that answers 200 once a server is up.
        are_prepared: vLLM is imported when their processes start (`prepared`).

    Yields:
        Their base URLs, once all are up.
    """
    urls, processes, logs, command_of = [], [], [], {}
    try:
        for i, (command, env) in enumerate(commands):
            port = free_port()
            urls.append(f"http://127.0.0.1:{port}")
            logs.append((folder / f"{i}.log").open("w+"))
            whole = [*command, "--port", str(port)]
            if are_prepared:
                log = logs[-1].name
                process = prepared.start(whole, log, log, environment(**env), ALL_CORES)
            else:
                process = subprocess.Popen(
                    whole, env=environment(**env), stdout=logs[-1], stderr=subprocess.STDOUT,
                    start_new_session=True,
                )  # fmt: skip
            os.sched_setaffinity(process.pid, ALL_CORES)  # several processes, which wait busily
            processes.append(process)
            command_of[process.pid] = command
        for url, process, log in zip(urls, processes, logs, strict=True):
            _wait(url + health, process, log, "--kv-transfer-config" in command_of[process.pid])
        yield urls
    finally:
        for process in processes:
            process.terminate()
        for process in processes:
            try:
                process.wait(timeout=60)
            finally:  # and what it started, if that hangs
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)


def _use_all_cores(process):
    """vLLM binds what NIXL's connector runs in to the machine's last core, whatever it is told."""
    for child in psutil.Process(process.pid).children(recursive=True):
        with suppress(psutil.NoSuchProcess, ProcessLookupError):
            for thread in child.threads():
                os.sched_setaffinity(thread.id, ALL_CORES)


def _wait(url, process, log, transfers):
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        if transfers:
            _use_all_cores(process)
        with suppress(httpx.HTTPError):
            if httpx.get(url).status_code == 200:
                return
        time.sleep(0.5)
    log.seek(0)
    pytest.fail(f"the server did not come up:\n{log.read()[-5000:]}")
