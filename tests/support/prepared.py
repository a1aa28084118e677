"""Processes that have imported vLLM when they start, which takes each of them nine seconds else.

A forkserver of Python's imports vLLM once, and nothing of the plugin. A program that `start` or
`run` starts is a fork of it, and so is each process that the program spawns. All else is as in any
program: environment, arguments, cores, output and exit status are its own, vLLM loads the plugin in
each process anew, and nothing comes along from the process that asks for it. What vLLM reads from
the environment when it is imported is the tests'. Some servers and the demo are started as users
start them.
"""

import atexit
import functools
import gc
import os
import runpy
import subprocess
import sys
from collections.abc import Collection, Mapping, Sequence
from contextlib import contextmanager
from multiprocessing import (
    context,
    forkserver,
    popen_forkserver,
    process,
    reduction,
    resource_tracker,
)
from pathlib import Path
from tempfile import TemporaryDirectory
from unittest import mock

import setproctitle

IMPORTED = ("uncompiled", "vllm.entrypoints.cli.serve", "vllm.entrypoints.cli.run_batch",
            "vllm.entrypoints.llm", "vllm.v1.engine.core", "vllm.v1.worker.cpu_worker",
            "vllm.model_executor.models.llama")  # fmt: skip
GPU = ("gpu_ground", "vllm.entrypoints.llm", "vllm.v1.engine.core")


@functools.cache
def _server(imported: tuple[str, ...]) -> forkserver.ForkServer:
    server = forkserver.ForkServer()
    server.set_forkserver_preload(list(imported))
    path = os.pathsep.join([str(Path(__file__).parent), os.environ["PYTHONPATH"]])
    # A thread of OpenMP or OpenBLAS that waits when a process forks is missing in its child.
    alone = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    with mock.patch.dict(os.environ, PYTHONPATH=path, **alone):
        server.ensure_running()
    return server


class _Output:
    """This process's stdout and stderr. Who unpickles it writes there, too."""

    def __reduce__(self):
        return _write_to, (reduction.DupFd(1), reduction.DupFd(2))


def _write_to(*streams):
    for number, stream in enumerate(streams, start=1):
        os.dup2(stream.detach(), number)


class _Process(process.BaseProcess):
    """One of `multiprocessing`'s, with what it would have from the process that starts it."""

    _start_method = "spawn"  # how its own children start, too
    _imported = IMPORTED

    @staticmethod
    def _Popen(process):
        server = _server(process._imported)
        forkserver.connect_to_new_process = server.connect_to_new_process
        return popen_forkserver.Popen(process)

    def start(self):
        self._surroundings = dict(os.environ), os.sched_getaffinity(0), os.getpgrp()
        self._output = _Output()
        super().start()

    def run(self):
        _adopt(*self._surroundings)
        try:
            super().run()
        finally:
            atexit._run_exitfuncs()


class _Program(_Process):
    """A whole program."""

    _start_method = None  # Python's default

    def __init__(self, command, out, err, env, cores, folder, imported):
        super().__init__(target=_execute, name="MainProcess", args=(command, out, err, str(folder)))
        self._surroundings, self._imported = (env, cores, 0), imported

    def start(self):
        main = sys.modules["__main__"]
        sys.modules["__main__"] = type(sys)("__main__")  # else Python runs this process's there
        try:
            process.BaseProcess.start(self)
        finally:
            sys.modules["__main__"] = main


def _adopt(env: Mapping[str, str], cores: Collection[int], group: int):
    """Makes of the forkserver's child what it were if it had imported vLLM itself.

    Args:
        env: Its environment.
        cores: Those that it may run on.
        group: Of processes, the one that it belongs to; 0 for one of its own.
    """
    setproctitle.getproctitle()  # finds where titles go, which it cannot with another environment
    os.environ.clear()
    os.environ.update(env)
    os.sched_setaffinity(0, cores)
    os.setpgid(0, group)
    gc.freeze()  # what was imported is no garbage
    import torch
    from prometheus_client import values
    from vllm.model_executor.models import registry

    torch.set_num_threads(int(env.get("OMP_NUM_THREADS") or len(cores)))
    values.ValueClass = values.get_value_class()  # by PROMETHEUS_MULTIPROC_DIR
    # What a model class can do is read in a process that imports all of vLLM once more: "to avoid
    # initializing CUDA".
    registry._run_in_subprocess = lambda inspect: inspect()
    # Its own children come from the same forkserver; Python would start another.
    global _server
    _server = lambda imported: forkserver._forkserver  # noqa: E731
    forkserver._forkserver.ensure_running = resource_tracker.ensure_running
    context.SpawnContext.Process = _Process


def _execute(command: list[str], out: str, err: str, folder: str):
    """Runs what follows ``python`` on a command line."""
    os.chdir(folder)
    for file, stream in ((out, 1), (err, 2)):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
    first, *rest = command
    sys.path[:0] = filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))
    if first == "-m":
        sys.argv = rest
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
        return
    code = rest.pop(0) if first == "-c" else Path(first).read_text(encoding="utf-8")
    sys.argv = [first, *rest]
    main = sys.modules["__main__"] = type(sys)("__main__")
    if first != "-c":
        main.__file__ = os.path.abspath(first)
        sys.path.insert(0, os.path.dirname(main.__file__))
    exec(compile(code, first, "exec"), main.__dict__)


class Running:
    """A program that was started, to be handled as a `subprocess.Popen`."""

    def __init__(self, process: _Program, command: list[str]):
        self._process, self._command, self.pid = process, command, process.pid

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if self.poll() is None:
            raise subprocess.TimeoutExpired(self._command, timeout)
        return self.poll()

    def terminate(self):
        self._process.terminate()

    def kill(self):
        self._process.kill()


def start(
    command: Sequence,
    out: Path,
    err: Path,
    env: Mapping[str, str] | None = None,
    cores: Collection[int] = (),
    folder: Path | None = None,
    imported: tuple[str, ...] = IMPORTED,
) -> Running:
    """Starts a program of Python's; it and what it starts are a group of processes.

    Args:
        command: Begins with ``sys.executable``, or with a script that it runs.
        out: File to whose end stdout goes.
        err: And stderr; may be the same.
        env: The program's environment; by default this process's.
        cores: Those that it may run on; by default this process's.
        folder: Its working folder; by default this process's.
        imported: Modules that are imported when it starts, vLLM's among them.
    """
    words = [os.fspath(word) for word in command]
    if words[0] == sys.executable:
        del words[0]
    program = _Program(
        words, str(out), str(err), dict(os.environ if env is None else env),
        cores or os.sched_getaffinity(0), folder or os.getcwd(), imported,
    )  # fmt: skip
    program.start()
    return Running(program, words)


def run(command: Sequence, env=None, timeout: float | None = None, **options):
    """As `subprocess.run` that captures text; ``options`` as of `start`."""
    with TemporaryDirectory() as folder:
        out, err = (Path(folder) / name for name in ("out", "err"))
        out.touch()
        err.touch()
        program = start(command, out, err, env, **options)
        try:
            program.wait(timeout)
        finally:
            program.kill()
        return subprocess.CompletedProcess(
            command, program.poll(), out.read_text(), err.read_text()
        )


@contextmanager
def spawned():
    """Within, what this process spawns has imported vLLM, too: an engine's other processes."""
    before = context.SpawnContext.Process
    context.SpawnContext.Process = _Process
    try:
        yield
    finally:
        context.SpawnContext.Process = before
