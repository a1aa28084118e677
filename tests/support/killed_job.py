"""Starts an engine, which takes longer than a run. Then each command is a process of its own, with
a copy of that engine in the state that it had when it was up."""

import os
import sys
from multiprocessing.connection import Connection


def run_commands(connection: Connection, model: str, options: dict):
    """Sends "up"; then, for each command, its process id and what it ended with.

    Args:
        connection: Gets, for each command, the folder in which it runs, and its arguments.
        model: The model's folder.
        options: The engine's, as each command asks for it.
    """
    import vllm
    from many_engines import in_one_process

    from vllm_pasta import cli
    from vllm_pasta.profiling.asker import engine
    from vllm_pasta.profiling.engine import engine_options

    in_one_process()
    assert engine.CHUNK > 1
    engine.CHUNK = 1  # one answer in a call of the engine: a kill can fall between any two
    options = engine_options(options, eager=True)
    llm = vllm.LLM(model, **options)

    def started(name, **asked):
        assert (name, asked) == (model, options)
        return llm

    vllm.LLM = started
    connection.send("up")
    while True:
        try:
            folder, *arguments = connection.recv()
        except EOFError:
            return
        child = os.fork()
        if child == 0:
            _run(cli.main, folder, arguments)
        connection.send(child)
        connection.send(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))


def _run(main, folder, arguments):
    """In a fork: runs a command to its end, with its output in files of the folder."""
    os.chdir(folder)
    for name, stream in (("out", sys.stdout), ("err", sys.stderr)):
        os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream.fileno())
    status = 70
    try:
        status = main(arguments)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
