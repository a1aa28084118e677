"""A vLLM engine in a process of its own, seen from its parent: start, ask, take turns, close."""

import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from vllm_pasta.errors import PastaError
from vllm_pasta.verify.requests import Request

START_TIMEOUT_S = 400
LOG_TAIL_LINES = 25

COMMAND = (sys.executable, "-m", "vllm_pasta.verify.worker")


class Engine:
    """A process group that runs `worker`.

    The process starts at once; `about` waits until its engine is there. An engine that is not to
    disturb another's times is stopped (SIGSTOP) outside its turns.

    Attributes:
        name: For messages, and the log file's name.
        log: What vLLM printed.
    """

    def __init__(
        self,
        name: str,
        llm: Mapping[str, Any],
        folder: Path,
        *,
        is_steered: bool = True,
        in_process: bool = True,
        environment: Mapping[str, str] | None = None,
        command: tuple[str, ...] = COMMAND,
    ) -> None:
        """Starts the process.

        Args:
            name: The engine's.
            llm: Arguments of ``vllm.LLM``.
            folder: Where its log goes.
            is_steered: Whether the plugin is loaded and emphasis is on.
            in_process: Whether the engine core runs in the worker itself, where it can be looked
                into; else as vLLM's default, in a further process.
            environment: Variables that it gets beside this process's own.
            command: What is run, before the arguments of ``vllm.LLM`` as JSON.
        """
        self.name, self.log = name, folder / f"{name.replace(' ', '-').replace(',', '')}.log"
        self._about: dict[str, Any] | None = None
        self._buffer = b""
        options = {**llm, **({"additional_config": {"pasta": {}}} if is_steered else {})}
        plugins = {} if is_steered else {"VLLM_PLUGINS": ""}
        with self.log.open("wb") as log:
            self._process = subprocess.Popen(
                [*command, json.dumps(options)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                start_new_session=True,
                env={
                    **os.environ,
                    "VLLM_NO_USAGE_STATS": "1",
                    "VLLM_ENABLE_V1_MULTIPROCESSING": str(int(not in_process)),
                    "TOKENIZERS_PARALLELISM": "false",
                    **plugins,
                    **(environment or {}),
                },
            )

    def about(self, timeout_s: float = START_TIMEOUT_S) -> dict[str, Any]:
        """What the engine runs, once it is there: see `worker.describe`.

        Raises:
            PastaError: it did not start; with the end of its log.
        """
        if self._about is None:
            self._about = self._read(timeout_s)
        return self._about

    def generate(
        self, requests: list[Request] | list[dict[str, Any]], timeout_s: float = 300, **options: Any
    ) -> dict[str, Any]:
        """Answers requests: see `worker.generate`.

        Raises:
            PastaError: vLLM failed or took too long; with the end of its log.
        """
        plain = [r.to_json() if isinstance(r, Request) else r for r in requests]
        return self._ask({"operation": "generate", "requests": plain, **options}, timeout_s)

    def metrics(self) -> dict[str, Any]:
        """vLLM's counters by name."""
        return self._ask({"operation": "metrics"}, 60)

    def pause(self) -> None:
        """Stops the processes until the next turn."""
        self._signal(signal.SIGSTOP)

    @contextmanager
    def turn(self) -> Iterator[None]:
        """Lets the processes run inside the block, and stops them after it."""
        self._signal(signal.SIGCONT)
        time.sleep(0.05)
        try:
            yield
        finally:
            self.pause()

    def close(self) -> None:
        """Ends the processes."""
        for number in (signal.SIGCONT, signal.SIGTERM):
            self._signal(number)
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout=20)
        self._signal(signal.SIGKILL)  # what is left of the group
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()

    def __enter__(self) -> "Engine":
        return self

    def __exit__(self, *error: Any) -> None:
        self.close()

    def _ask(self, question: dict[str, Any], timeout_s: float) -> dict[str, Any]:
        self.about()
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(question).encode() + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise self._failed("ended") from None
        answer = self._read(timeout_s)
        if "error" in answer:
            raise self._failed(f"failed: {answer['error']}")
        return answer

    def _read(self, timeout_s: float) -> dict[str, Any]:
        assert self._process.stdout is not None
        deadline = time.monotonic() + timeout_s
        while b"\n" not in self._buffer:
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([self._process.stdout], [], [], left)[0]:
                raise self._failed(f"gave no answer in {timeout_s:.0f} s")
            piece = os.read(self._process.stdout.fileno(), 2**20)
            if not piece:
                raise self._failed("ended")
            self._buffer += piece
        line, _, self._buffer = self._buffer.partition(b"\n")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def _failed(self, how: str) -> PastaError:
        lines = self.log.read_text(encoding="utf-8", errors="replace").splitlines()
        tail = "\n".join(lines[-LOG_TAIL_LINES:])
        return PastaError(f"the engine {self.name!r} {how}. The end of {self.log}:\n{tail}")

    def _signal(self, number: signal.Signals) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, number)
