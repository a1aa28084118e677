"""Compiles the kernel in ``kernel.cpp`` for this very CPU, at first use, with the compiler that
torch.compile needs anyway, and keeps it in the cache folder.
"""

import fcntl
import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
import sysconfig
import tempfile
from pathlib import Path

import torch

from vllm_pasta import envs
from vllm_pasta.errors import KernelError

logger = logging.getLogger(__name__)

SOURCES = (Path(__file__).with_name("kernel.cpp"), Path(__file__).with_name("math.hpp"))
FLAGS = ("-O3", "-march=native", "-std=c++17", "-fPIC", "-fopenmp", "-fno-math-errno", "-w")
TIMEOUT_S = 300


def build() -> Path:
    """Compiles the kernel unless that was done; safe with several processes at once.

    Returns:
        The shared library.

    Raises:
        KernelError: no compiler, or it failed.
        OSError: the cache folder cannot be written.
    """
    compiler = shlex.split(os.environ.get("CXX", "")) or ["g++"]  # CXX may be "ccache g++"
    if shutil.which(compiler[0]) is None:
        raise KernelError(f"found no C++ compiler {compiler[0]!r} (CXX names another)")
    folder = envs.cache_dir() / "kernels" / _key(compiler)
    library = folder / "cpu.so"
    if not _is_whole(library):
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder / "lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not _is_whole(library):
                _compile(compiler, library)
                _digest_file(library).write_text(_digest(library), encoding="utf-8")
    return library


def _is_whole(library: Path) -> bool:
    """Whether it is what was compiled: a process that loads a part of a library crashes, and a
    machine that stopped while it wrote, or a full disk, can leave that."""
    try:
        return _digest_file(library).read_text(encoding="utf-8") == _digest(library)
    except (OSError, ValueError):
        return False


def _digest_file(library: Path) -> Path:
    return library.with_suffix(".sha256")


def _digest(library: Path) -> str:
    return hashlib.sha256(library.read_bytes()).hexdigest()


def _compile(compiler: list[str], library: Path) -> None:
    logger.info("compiling the CPU kernel of vllm-pasta (once for this machine)")
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:
        object_file, result = f"{folder}/cpu.o", f"{folder}/cpu.so"
        _run(*compiler, *_flags(), "-c", str(SOURCES[0]), "-o", object_file)
        # Linked without -fopenmp: the OpenMP symbols resolve to the runtime that torch has loaded
        # (or LD_PRELOAD gave). A second one in the process would bring its own, unbound threads.
        _run(*compiler, "-shared", object_file, "-o", result)
        os.replace(result, library)


def _flags() -> list[str]:
    """``CXXFLAGS`` come last: -march=x86-64-v3 there builds what a CPU with AVX2 alone runs."""
    return [*FLAGS, *shlex.split(os.environ.get("CXXFLAGS", ""))]


def _run(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S)
    except subprocess.TimeoutExpired:
        raise KernelError(f"{' '.join(command)} took more than {TIMEOUT_S} s") from None
    if done.returncode:
        raise KernelError(f"{' '.join(command)} failed: {done.stderr.strip()[:2000]}")
    return done.stdout


def _key(compiler: list[str]) -> str:
    """Digest of all that decides what the compiled kernel is and where it runs."""
    facts = (
        *(source.read_text() for source in SOURCES),
        *_flags(),
        _run(*compiler, "--version"),
        torch.__version__,
        str(sysconfig.get_config_var("SOABI")),
        *_cpu(),
    )
    return hashlib.sha256("\0".join(facts).encode()).hexdigest()[:16]


def _cpu() -> list[str]:
    """What -march=native depends on: a home folder may be shared by different machines."""
    facts = [platform.machine()]
    try:
        first = Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
    except OSError:
        return [*facts, platform.processor()]
    wanted = ("vendor_id", "cpu family", "model", "flags", "Features", "CPU ")
    return facts + [line for line in first if line.startswith(wanted)]
