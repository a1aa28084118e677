"""Two vLLMs that take turns: one with the plugin switched off, one with it on."""

import os
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any


class Contestant:
    """A command in a process group of its own, stopped (SIGSTOP) while the other one runs.

    Args:
        name: "pasta" switches the plugin on.
        command: What to start.
        kv_cache_gib: Size of the KV cache on a CPU, in GiB.
        options: For `subprocess.Popen`.
    """

    def __init__(self, name: str, command: list[str], kv_cache_gib: float, **options: Any) -> None:
        env = {
            **os.environ,
            "VLLM_PLUGINS": "pasta" if name == "pasta" else "",
            "VLLM_LOGGING_LEVEL": "ERROR",
            "VLLM_CPU_KVCACHE_SPACE": str(kv_cache_gib),
        }
        self.name = name
        self.process = subprocess.Popen(command, env=env, start_new_session=True, **options)

    def pause(self) -> None:
        """Stops the process until its next turn."""
        self._signal(signal.SIGSTOP)

    @contextmanager
    def turn(self) -> Iterator[None]:
        """Lets the process run inside the ``with`` block."""
        self._signal(signal.SIGCONT)
        yield
        self.pause()

    @contextmanager
    def killed_on_error(self) -> Iterator[None]:
        """For the wait until it is up: nothing stays behind if that is interrupted."""
        try:
            yield
        except BaseException:
            self._signal(signal.SIGKILL)
            raise

    def close(self) -> None:
        """Ends the command, which ends what it has started: its input ends, or it gets SIGTERM."""
        self._signal(signal.SIGCONT)
        if self.process.stdin is not None:
            self.process.stdin.close()
        else:
            self.process.terminate()
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(timeout=30)
        self._signal(signal.SIGKILL)  # what is left

    def _signal(self, number: signal.Signals) -> None:
        with suppress(ProcessLookupError):  # it has ended
            os.killpg(self.process.pid, number)
