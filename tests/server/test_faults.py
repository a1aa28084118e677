"""What clients see when something breaks, and that nothing runs unsteered because of it."""

import json
import signal
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import psutil
import pytest
from servers import SERVE, USUAL, VLLM, http, running

PROMPT = "Previously, Ann lived in Rome. Currently, Ann lives in Oslo. Ann lives in"
FACT = "Ann lives in Oslo"
HEADS = {str(layer): list(range(9)) for layer in range(20, 25)}


@pytest.fixture
def server(smollm2, tmp_path):
    """A server whose head set is a file: (its address, the file)."""
    heads = tmp_path / "heads.json"
    heads.write_text(json.dumps(HEADS))
    command = [VLLM, "serve", smollm2, *SERVE, "--pasta-heads", heads, "--shutdown-timeout", "60"]
    with running([(command, {"VLLM_PLUGINS": "pasta", **USUAL})], tmp_path) as (url,):
        yield url, heads


def body(**fields):
    asked = {"model": "m", "prompt": PROMPT, "max_tokens": 8, "temperature": 0}
    return {**asked, "emphasis": FACT, **fields}


def complete(url, **fields):
    reply = http.post(f"{url}/v1/completions", json=body(**fields))
    assert reply.status_code == 200, reply.text
    return reply.json()["choices"][0]["text"]


def long_stream(url):
    """Reads a long steered stream to its end: (chunks, whether [DONE] came, what was raised)."""
    chunks, is_done = 0, False
    try:
        asked = body(stream=True, max_tokens=900, ignore_eos=True)
        with httpx.stream("POST", f"{url}/v1/completions", json=asked, timeout=300) as reply:
            for line in reply.iter_lines():
                chunks += line.startswith("data: {")
                is_done |= line == "data: [DONE]"
    except httpx.HTTPError as e:
        return chunks, is_done, type(e).__name__
    return chunks, is_done, None


def test_files_clients_and_the_engine(server):
    """One server, broken bit by bit: its head-set file, its clients, and at last its engine."""
    url, heads = server
    steered, plain = complete(url), complete(url, emphasis=None)
    assert steered != plain

    # The head-set file is replaced, cut off and removed: it was read when the server started.
    for content in (json.dumps({"0": [0]}), '{"20": [0', None):
        heads.write_text(content) if content is not None else heads.unlink()
        assert complete(url) == steered

    # A request's fields name head sets, never files.
    for name in (str(heads), "/etc/passwd", "../../etc/passwd"):
        reply = http.post(f"{url}/v1/completions", json=body(emphasis_heads=name))
        assert reply.status_code == 400
        assert "root:" not in reply.text

    # Clients that vanish in mid-stream leave the others' answers as they were.
    for _ in range(3):
        asked = body(stream=True, max_tokens=400, ignore_eos=True)
        with httpx.stream("POST", f"{url}/v1/completions", json=asked, timeout=300) as reply:
            next(reply.iter_lines())
        assert (complete(url), complete(url, emphasis=None)) == (steered, plain)

    # The engine is killed while it answers: no client gets a whole answer, and the server ends.
    (engine,) = (
        process
        for process in psutil.process_iter()
        if process.name().startswith("VLLM::EngineCor") and process.ppid() in _pids(url)
    )
    with ThreadPoolExecutor(3) as pool:
        streams = [pool.submit(long_stream, url) for _ in range(3)]
        time.sleep(3)
        engine.send_signal(signal.SIGKILL)
        ends = [stream.result() for stream in streams]
    assert all(chunks < 900 for chunks, _, _ in ends), ends
    deadline = time.monotonic() + 120
    while True:
        try:
            reply = http.post(f"{url}/v1/completions", json=body())
        except httpx.HTTPError:
            break  # the server is gone
        assert reply.status_code >= 500
        assert time.monotonic() < deadline
        time.sleep(1)


def _pids(url):
    """The processes that listen at a server's port."""
    port = httpx.URL(url).port
    return {c.pid for c in psutil.net_connections("tcp") if c.laddr and c.laddr.port == port}
