"""`vllm-pasta profile` and `eval`, killed at random points and started again."""

import json
import multiprocessing
import os
import random
import signal
import time
from contextlib import suppress

import killed_job
import prepared
import psutil
import pytest
from models import worded_llama

from vllm_pasta.tasks import load

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

    def __init__(self, model):
        self._model = str(model)
        context = multiprocessing.get_context("spawn")
        self._connection, other = context.Pipe()
        with prepared.spawned():
            self._process = context.Process(
                target=killed_job.run_commands, args=(other, self._model, ENGINE)
            )
            self._process.start()
        other.close()  # so that an end of the process is seen here
        assert self._connection.recv() == "up"

    def start(self, name, folder):
        """Returns the process id."""
        folder.mkdir(exist_ok=True)
        arguments = [name, self._model, *COMMANDS[name], "--eager", "--engine", json.dumps(ENGINE)]
        self._connection.send([str(folder), *arguments])
        return self._connection.recv()

    def wait(self):
        """The exit status; minus the signal's number if one ended it."""
        return self._connection.recv()

    def finish(self, name, folder):
        """What an undisturbed run comes to."""
        self.start(name, folder)
        assert self.wait() == 0, (folder / "err").read_text()[-3000:]
        return result(name, folder)

    def close(self):
        self._process.kill()
        self._process.join()


@pytest.fixture(scope="module")
def runner(model):
    core = min(os.sched_getaffinity(0))
    with pytest.MonkeyPatch.context() as patch:
        # One thread, which alone a fork copies.
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("VLLM_CPU_OMP_THREADS_BIND", str(core))
        runner = Runner(model)
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
