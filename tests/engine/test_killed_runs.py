"""`vllm-pasta profile` and `eval`, killed at random points and started again."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from contextlib import suppress

import psutil
import pytest
from models import worded_llama

from vllm_pasta.tasks import load

RUN = """
import json, os, sys
import transformers.models.llama
from vllm import LLM
from vllm.model_executor.models import llama, registry
from vllm.v1.engine import core, llm_engine
from vllm.v1.worker import cpu_worker
from vllm_pasta import cli
from vllm_pasta.profiling import asker

registry._run_in_subprocess = lambda inspect: inspect()  # it would import vLLM once more
asker.CHUNK = 1  # one answer in a call of the engine: a kill can fall between any two
for line in sys.stdin:
    folder, *arguments = json.loads(line)
    child = os.fork()
    if child == 0:
        os.chdir(folder)
        for name, stream in (("out", sys.stdout), ("err", sys.stderr)):
            os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream.fileno())
        status = 70
        try:
            status = cli.main(arguments)
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
    print(child, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""
"""Imports vLLM, which takes longer than a run; then each command is a process of its own."""

COMMANDS = {
    "profile": ("--examples", "6", "--top-k", "4", "--alpha", "0.1", "--out", "heads.json"),
    "eval": (
        "--examples", "30", "--generations", "2", "--methods", "zero-shot,starred,all,layer:1",
        "--json", "--out", "heads.answers.jsonl",
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A tiny random Llama that knows the words of the generated examples."""
    task = load("counterfact")
    texts = [f"{probe.text} {probe.target}" for e in task.make() for probe in task.probes(e)]
    return worded_llama(tmp_path_factory.mktemp("worded"), texts)


class Runner:
    """Runs `vllm-pasta` on the tiny model; one command at a time."""

    def __init__(self, model):
        self._model = str(model)
        self._process = subprocess.Popen(
            [sys.executable, "-c", RUN], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def start(self, name, folder):
        """Returns the process id."""
        folder.mkdir(exist_ok=True)
        engine = {"dtype": "float32", "max_num_seqs": 8, "kv_cache_memory_bytes": 2**24}
        arguments = [name, self._model, *COMMANDS[name], "--eager", "--engine", json.dumps(engine)]
        self._process.stdin.write(json.dumps([str(folder), *arguments]) + "\n")
        self._process.stdin.flush()
        return int(self._process.stdout.readline())

    def wait(self):
        """The exit status; minus the signal's number if one ended it."""
        return int(self._process.stdout.readline())

    def finish(self, name, folder):
        """What an undisturbed run comes to, but for the time that it took."""
        self.start(name, folder)
        assert self.wait() == 0, (folder / "err").read_text()[-3000:]
        if name == "eval":
            return json.loads((folder / "out").read_text())
        heads = json.loads((folder / "heads.json").read_text())
        return {key: value for key, value in heads.items() if not key.endswith("seconds")}

    def close(self):
        self._process.stdin.close()
        self._process.wait()


@pytest.fixture(scope="module")
def runner(model):
    runner = Runner(model)
    yield runner
    runner.close()


def answers(folder):
    """The answers in the file, by key; checks that each is there once, and the last line whole."""
    text = (folder / "heads.answers.jsonl").read_text(encoding="utf-8")
    assert text.endswith("\n")
    lines = [json.loads(line) for line in text.split("\n")[:-1]]
    found = {line["key"]: line for line in lines if "key" in line}
    assert len(found) == sum("key" in line for line in lines), "an answer was asked for twice"
    return found


@pytest.mark.parametrize(
    ("name", "kills"),
    [
        ("profile", 2),
        pytest.param("profile", 25, marks=[pytest.mark.slow, pytest.mark.timeout(3000)]),
        pytest.param("eval", 25, marks=[pytest.mark.slow, pytest.mark.timeout(3000)]),
    ],
)
def test_killed_at_random(name, kills, runner, tmp_path):
    """An answer that is lost or asked for again, half a line that stays, another result."""
    rng = random.Random(kills)
    began = time.monotonic()
    whole = runner.finish(name, tmp_path / "whole")
    took = time.monotonic() - began
    folder, kept, in_writing = tmp_path / "cut", b"", 0
    file = folder / "heads.answers.jsonl"
    for i in range(kills):
        pid = runner.start(name, folder)
        end = time.monotonic() + 600
        if i % 3 == 2:  # anywhere, most likely before the first answer
            time.sleep(rng.uniform(0, took))
        else:  # soon after it has written something
            while not (file.exists() and file.stat().st_size > len(kept)) and is_running(pid):
                assert time.monotonic() < end
                time.sleep(0.002)
            time.sleep(rng.uniform(0, 0.08))
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        assert runner.wait() in (-signal.SIGKILL, 0), (folder / "err").read_text()[-3000:]
        now = file.read_bytes() if file.exists() else b""
        assert now.startswith(kept)  # what was whole
        in_writing += len(now) > len(kept)
        kept = now[: now.rfind(b"\n") + 1]
    assert in_writing
    print(f"{name}: {kills} kills, {in_writing} while answers were written")
    assert runner.finish(name, folder) == whole
    assert answers(folder) == answers(tmp_path / "whole")


def is_running(pid):
    with suppress(psutil.NoSuchProcess):
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    return False
