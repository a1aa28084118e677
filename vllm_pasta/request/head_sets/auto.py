"""``"heads": "auto"``: the heads that a search found for a model, kept in the cache folder.

The search is ``vllm-pasta profile MODEL --auto``. A server that finds nothing kept runs it as a
process of its own before its engine starts, so the weights never lie twice on a device. Whoever
comes second waits for the first, and takes what that found.
"""

import fcntl
import hashlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from vllm_pasta import envs
from vllm_pasta.errors import HeadSetError
from vllm_pasta.request.heads import HeadSet

AUTO = "auto"
"""The name under which a server knows the set that was found for its model."""

RECIPE = 1
"""Part of a kept set's file name. Another number makes every model be searched anew."""

SAMPLES = 64
SAMPLE_BYTES = 65536
"""Of each file of a model, so many pieces of so many bytes go into its digest: all of 16 GB would
take longer than the engine's start."""

MESSAGE_CHARACTERS = 2000
"""Of what the search wrote last, so much is in the error if it fails."""

_READ = (".json", ".jinja", ".safetensors", ".bin", ".pt", ".model", ".txt", ".gguf")


def digest(model: str, revision: str | None = None) -> str | None:
    """What tells one model from another: 16 hexadecimal digits; None if it is not on this machine.

    A model of a hub is known by its commit, a folder by the names, sizes and samples of its files.

    Args:
        model: A folder, or ``owner/name`` of a hub.
        revision: The branch, tag or commit of a hub's model; None means the main branch.
    """
    folder = Path(model)
    if not folder.is_dir():
        from huggingface_hub import try_to_load_from_cache

        try:
            file = try_to_load_from_cache(model, "config.json", revision=revision)
        except ValueError:  # not the name of a model of a hub
            return None
        if not isinstance(file, str):
            return None
        folder = Path(file).parent
    if folder.parent.name == "snapshots" and re.fullmatch(r"[0-9a-f]{40}", folder.name):
        return folder.name[:16]
    found = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        if path.suffix in _READ and path.is_file():
            size = path.stat().st_size
            found.update(f"{path.name}\0{size}\0".encode())
            step = max(SAMPLE_BYTES, size // SAMPLES)
            with path.open("rb") as file_:
                for at in (*range(0, size, step), max(0, size - SAMPLE_BYTES)):
                    file_.seek(at)
                    found.update(file_.read(SAMPLE_BYTES))
    return found.hexdigest()[:16]


def path(model: str, revision: str | None = None) -> Path | None:
    """Where the heads that are found for a model are kept; None if it is not on this machine."""
    key = digest(model, revision)
    return None if key is None else envs.cache_dir() / "heads" / f"auto{RECIPE}-{key}.json"


def load(model: str, revision: str | None = None) -> HeadSet | None:
    """The heads that were found for a model; None if none were.

    Raises:
        HeadSetError: the kept file is damaged; says which.
    """
    file = path(model, revision)
    return replace(HeadSet.load(file), name=AUTO) if file is not None and file.exists() else None


@contextmanager
def alone(file: Path, waiting: Callable[[], object]) -> Iterator[None]:
    """Holds other processes off that would find the same heads, on this machine.

    Args:
        file: Where the heads will be kept.
        waiting: Called if another process is at it, before this one waits.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.with_suffix(".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            waiting()
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def ensure(model: str, revision: str | None, engine: Mapping[str, Any]) -> HeadSet:
    """The heads that were found for a model, or else are found now, by a process of its own.

    Its progress goes to this process's stderr.

    Args:
        model: As vLLM was given it.
        revision: As vLLM was given it.
        engine: Arguments of ``vllm.LLM`` that the model needs, as JSON values.

    Raises:
        HeadSetError: the search failed; the message ends with its own.
    """
    found = load(model, revision)
    if found is not None:
        return found
    command = [sys.executable, "-m", "vllm_pasta.cli", "profile", model, "--auto"]
    with subprocess.Popen(
        [*command, "--engine", json.dumps(dict(engine))],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    ) as search:
        assert search.stderr is not None
        said = b""
        while piece := os.read(search.stderr.fileno(), 4096):
            os.write(2, piece)
            said = (said + piece)[-MESSAGE_CHARACTERS:]
    found = load(model, revision) if search.returncode == 0 else None
    if found is None:
        last = said.decode(errors="replace").strip().rpartition("vllm-pasta: ")[2]
        raise HeadSetError(
            f'"heads": "auto": no heads were found for {model}. Name a head set instead, or find '
            f"one with `vllm-pasta profile`, whose other searches need no gradients. The search "
            f"ended with status {search.returncode}: {last or 'no message'}"
        )
    return found
