"""What clients see when something breaks, and that nothing runs unsteered because of it."""

import json
import os
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from threading import Barrier

import httpx
import psutil
import pytest
from servers import SERVE, USUAL, VLLM, http, running

PROMPT = "Previously, Ann lived in Rome. Currently, Ann lives in Oslo. Ann lives in"
FACT = "Ann lives in Oslo"
HEADS = {str(layer): list(range(9)) for layer in range(20, 25)}


@pytest.fixture
def heads(tmp_path):
    """The file of a server's head set."""
    heads = tmp_path / "heads.json"
    heads.write_text(json.dumps(HEADS))
    return heads


@contextmanager
def served(smollm2, heads, *options, are_prepared=False, **environment):
    """A server whose head set is a file; its address."""
    command = [VLLM, "serve", smollm2, *SERVE, "--pasta-heads", heads, *options]
    commands = [(command, {"VLLM_PLUGINS": "pasta", **environment})]
    with running(commands, heads.parent, are_prepared=are_prepared) as (url,):
        yield url


def body(**fields):
    asked = {"model": "m", "prompt": PROMPT, "max_tokens": 8, "temperature": 0}
    return {**asked, "emphasis": FACT, **fields}


def complete(url, **fields):
    reply = http.post(f"{url}/v1/completions", json=body(**fields))
    assert reply.status_code == 200, reply.text
    return reply.json()["choices"][0]["text"]


LONG = 100  # tokens, which take a second


def stream(url, answers=None, **fields):
    """Reads a steered stream to its end.

    Args:
        answers: Waits here, once, when the first token has come.

    Returns:
        Its text; and what it ended with: an error's message, else a reason of vLLM's, else None.
    """
    asked = body(**{"stream": True, "max_tokens": LONG, "ignore_eos": True, **fields})
    text, end = "", None
    with (
        suppress(httpx.HTTPError),
        httpx.stream("POST", f"{url}/v1/completions", json=asked, timeout=300) as reply,
    ):
        for line in reply.iter_lines():
            if not line.startswith("data: {"):
                continue  # [DONE] says nothing: vLLM sends it after an error, too
            part = json.loads(line[6:])
            if "error" in part:
                return text, part["error"]["message"]
            text += part["choices"][0]["text"]
            end = part["choices"][0]["finish_reason"]
            if answers:
                answers.wait(timeout=300)
                answers = None
    return text, end


def amid_answers(url, break_it, count=3):
    """Breaks a server while it answers; what `stream` returns for each answer."""
    answers = Barrier(count + 1)
    with ThreadPoolExecutor(count) as pool:
        streams = [pool.submit(stream, url, answers) for _ in range(count)]
        answers.wait(timeout=300)
        break_it()
        return [stream.result() for stream in streams]


def front_end(url):
    """The process that listens at a server's port: the one that was started."""
    port = httpx.URL(url).port
    (pid,) = {
        c.pid
        for c in psutil.net_connections("tcp")
        if c.laddr.port == port and c.status == psutil.CONN_LISTEN
    }
    return psutil.Process(pid)


def process(url, name):
    """The one process of a server with that name, of which Linux keeps 15 characters."""
    group, found = front_end(url).pid, []
    for of in psutil.process_iter():
        with suppress(psutil.NoSuchProcess, ProcessLookupError):  # others come and go
            if os.getpgid(of.pid) == group and of.name().startswith(name):
                found.append(of)
    (one,) = found
    return one


ENGINE, WORKER = "VLLM::EngineCor", "VLLM::Worker"


def assert_ends(url):
    """A server that answers with errors alone, and then not at all."""
    deadline = time.monotonic() + 120
    while True:
        try:
            reply = http.post(f"{url}/v1/completions", json=body())
        except httpx.HTTPError:
            return
        assert reply.status_code >= 500
        assert time.monotonic() < deadline
        time.sleep(1)


def test_files_clients_and_the_engine(smollm2, heads):
    """One server, broken bit by bit: its head-set file, its clients, and at last its engine."""
    with served(smollm2, heads, are_prepared=True, **USUAL) as url:
        steered, plain = complete(url), complete(url, emphasis=None)
        assert steered != plain

        # The file was read at start: what becomes of it later changes nothing.
        for damage in (lambda: heads.write_text("{"), lambda: heads.write_text('{"0": [0]}'),
                       heads.unlink):  # fmt: skip
            damage()
            assert complete(url) == steered
        # A request's head set is JSON or the name of one that is known: no file is read for it.
        for sent in (str(heads), "/etc/passwd", "../heads.json"):
            reply = http.post(f"{url}/v1/completions", json=body(emphasis_heads=sent))
            assert reply.status_code == 400, reply.text
            assert "root:" not in reply.text

        # Clients that vanish in mid-stream.
        for _ in range(3):
            asked = body(stream=True, max_tokens=400, ignore_eos=True)
            with httpx.stream("POST", f"{url}/v1/completions", json=asked, timeout=300) as reply:
                next(reply.iter_lines())
            assert (complete(url), complete(url, emphasis=None)) == (steered, plain)

        # The engine is killed while it answers: no client gets a whole answer.
        for text, end in amid_answers(url, process(url, ENGINE).kill):
            assert text.startswith(steered) or steered.startswith(text)
            assert end != "length"
        assert_ends(url)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_next_start_works(smollm2, heads):
    """SIGTERM amid answers; a worker that gets no more memory, or is killed, as Linux does where
    memory is out. After each the same command serves the same again, and what came was steered."""
    ends = {}
    with served(smollm2, heads, "--shutdown-timeout", "300") as url:
        short = complete(url)
        whole, end = stream(url)
        assert (end, whole[: len(short)]) == ("length", short)
        assert not whole.startswith(complete(url, emphasis=None))
        # Without the timeout vLLM 0.32 kills its engine at once, and these would wait for ever.
        ends["SIGTERM"] = amid_answers(url, front_end(url).terminate)
        assert_ends(url)

    with served(smollm2, heads, **USUAL) as url:
        assert complete(url) == short
        worker = process(url, WORKER)

        def starve():
            # The log-probabilities of a long prompt's whole vocabulary take 200 MB.
            size = worker.memory_info().vms
            worker.rlimit(psutil.RLIMIT_AS, (size, size))
            asked = body(prompt=PROMPT + " Oslo" * 900, prompt_logprobs=1, max_tokens=1)
            reply = http.post(f"{url}/v1/completions", json=asked)
            assert reply.status_code == 500
            print(f"no memory: {reply.text}")

        ends["no memory"] = amid_answers(url, starve)
        assert_ends(url)
    log = (heads.parent / "0.log").read_text()
    # torch's words, Python's, and oneDNN's, whichever asks for memory first
    said = ("can't allocate memory", "MemoryError", "could not create a primitive")
    assert any(words in log for words in said), log[-5000:]

    with served(smollm2, heads, **USUAL) as url:
        assert complete(url) == short
        ends["the worker is killed"] = amid_answers(url, process(url, WORKER).kill)
        assert_ends(url)

    with served(smollm2, heads) as url:
        assert complete(url) == short
    for how, answers in ends.items():
        for text, end in answers:
            print(f"{how}: {len(text)} of {len(whole)} characters, then {end!r}")
            assert whole.startswith(text)
            assert (text == whole) == (end == "length") == (how == "SIGTERM")
