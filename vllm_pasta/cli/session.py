"""Surroundings of vLLM in a command: environment variables, log file, errors."""

import os
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO

from vllm_pasta import envs
from vllm_pasta.cli.terminal import output_to_file
from vllm_pasta.errors import PastaError

LOG_TAIL_LINES = 20


def check_plugin() -> None:
    """Checks that vLLM will load the plugin.

    Raises:
        PastaError: ``VLLM_PLUGINS`` does not name it.
    """
    chosen = os.environ.get("VLLM_PLUGINS")
    if chosen is not None and "pasta" not in chosen.split(","):
        raise PastaError(f"VLLM_PLUGINS={chosen} leaves the plugin out: unset it, or add pasta")


@contextmanager
def engine_session(name: str) -> Iterator[TextIO]:
    """Sends vLLM's output to a log in the cache folder; gives a stream for progress messages.

    Args:
        name: The command's name, after which the log is called.

    Raises:
        PastaError: vLLM is not installed, or it fails; the message ends with the end of its log.
    """
    check_plugin()
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB; the prompts are short
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    log = envs.cache_dir() / f"{name}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    with output_to_file(log) as terminal:
        try:
            yield terminal
        except ModuleNotFoundError as e:
            hint = "install vllm-pasta[cpu], or vllm-pasta[cuda] on a machine with a GPU"
            raise PastaError(f"{e}; {hint}") from e
        except PastaError:
            raise
        except Exception as e:
            traceback.print_exc()
            sys.stderr.flush()
            tail = log.read_text(encoding="utf-8", errors="replace").splitlines()[-LOG_TAIL_LINES:]
            raise PastaError(
                "\n".join([f"vLLM failed: {e}", *tail, f"The whole log is in {log}"])
            ) from e
