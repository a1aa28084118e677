"""`vllm-pasta profile` and `eval`, killed at random points and started again."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
from models import worded_llama

from vllm_pasta.tasks import load

RUN = """
import json, os, sys
import uncompiled
import vllm
from vllm.model_executor.models import registry
from vllm_pasta import cli
from vllm_pasta.profiling.asker import engine
from vllm_pasta.profiling.engine import engine_options

registry._run_in_subprocess = lambda inspect: inspect()  # it would import vLLM once more
assert engine.CHUNK > 1
engine.CHUNK = 1  # one answer in a call of the engine: a kill can fall between any two
model, options = sys.argv[1], engine_options(json.loads(sys.argv[2]), eager=True)
llm = vllm.LLM(model, **options)

def started(name, **asked):
    assert (name, asked) == (model, options)
    return llm

vllm.LLM = started
print("up", flush=True)
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
"""Starts an engine, which takes longer than a run. Then each command is a process of its own, with
a copy of that engine in the state that it had when it was up."""

ENGINE = {"dtype": "float32", "max_num_seqs": 8, "kv_cache_memory_bytes": 2**24}
COMMANDS = {
    "profile": ("--examples", "6", "--top-k", "4", "--alpha", "0.1", "--out", "heads.json"),
    "eval": (
        "--examples", "8", "--generations", "2", "--methods", "zero-shot,starred,all,layer:1",
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

    def __init__(self, model, log):
        self._model = str(model)
        core = min(os.sched_getaffinity(0))  # with one thread, which alone a fork copies
        support = str(Path(__file__).parents[1] / "support")
        path = os.pathsep.join([support, os.environ["PYTHONPATH"]])
        self._process = subprocess.Popen(
            [sys.executable, "-c", RUN, self._model, json.dumps(ENGINE)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", "VLLM_CPU_OMP_THREADS_BIND": str(core),
                 "PYTHONPATH": path},
        )  # fmt: skip
        while (line := self._process.stdout.readline()) != "up\n":
            assert line, "the engine did not start"

    def start(self, name, folder):
        """Returns the process id."""
        folder.mkdir(exist_ok=True)
        arguments = [name, self._model, *COMMANDS[name], "--eager", "--engine", json.dumps(ENGINE)]
        self._process.stdin.write(json.dumps([str(folder), *arguments]) + "\n")
        self._process.stdin.flush()
        return int(self._process.stdout.readline())

    def wait(self):
        """The exit status; minus the signal's number if one ended it."""
        return int(self._process.stdout.readline())

    def finish(self, name, folder):
        """What an undisturbed run comes to."""
        self.start(name, folder)
        assert self.wait() == 0, (folder / "err").read_text()[-3000:]
        return result(name, folder)

    def close(self):
        self._process.kill()
        self._process.wait()


@pytest.fixture(scope="module")
def runner(model, tmp_path_factory):
    with (tmp_path_factory.mktemp("runner") / "log").open("w") as log:
        runner = Runner(model, log)
        yield runner
        runner.close()


def result(name, folder):
    """What a run wrote and printed, but for the time that it took."""
    if name == "eval":
        return json.loads((folder / "out").read_text())
    heads = json.loads((folder / "heads.json").read_text())
    return {key: value for key, value in heads.items() if not key.endswith("seconds")}


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
        ("profile", 5),
        ("eval", 5),
        pytest.param("profile", 50, marks=[pytest.mark.slow, pytest.mark.timeout(1800)]),
        pytest.param("eval", 50, marks=[pytest.mark.slow, pytest.mark.timeout(1800)]),
    ],
)
def test_killed_at_random(name, kills, runner, tmp_path):
    """An answer that is lost or asked for again, half a line that stays, another result."""
    rng = random.Random(kills)
    began = time.monotonic()
    whole = runner.finish(name, tmp_path / "whole")
    took = time.monotonic() - began
    every = answers(tmp_path / "whole")
    folder, kept, killed, in_writing, wholes = tmp_path / "cut", b"", 0, 0, 0
    file = folder / "heads.answers.jsonl"

    def finished():
        """A run that came to its end; the next one begins anew."""
        assert result(name, folder) == whole
        assert answers(folder) == every
        for path in folder.iterdir():
            path.unlink()

    while killed < kills:
        pid = runner.start(name, folder)
        if rng.random() < 0.25:  # anywhere, most likely before the first answer
            time.sleep(rng.uniform(0, took))
        else:  # soon after it has written something
            end = time.monotonic() + 100
            while not (file.exists() and file.stat().st_size > len(kept)) and is_running(pid):
                assert time.monotonic() < end
                time.sleep(0.001)
            time.sleep(rng.uniform(0, 0.05))
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        status = runner.wait()
        if status == 0:
            finished()
            kept = b""
            wholes += 1
            continue
        assert status == -signal.SIGKILL, (folder / "err").read_text()[-3000:]
        killed += 1
        now = file.read_bytes() if file.exists() else b""
        assert now.startswith(kept)  # what was whole
        in_writing += len(now) > len(kept)
        if now and rng.random() < 0.3:  # a machine that stops can leave a part of the last line
            now = now[: -rng.randint(1, len(now) - now[:-1].rfind(b"\n") - 1)]
            file.write_bytes(now)
        kept = now[: now.rfind(b"\n") + 1]
    assert in_writing > kills / 3
    assert runner.finish(name, folder) == whole
    finished()
    print(f"{name}: {kills} kills, {in_writing} amid {len(every)} answers, {wholes} whole runs")


def is_running(pid):
    with suppress(psutil.NoSuchProcess):
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    return False
