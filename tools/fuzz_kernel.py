"""Runs a kernel on random steps, and compares each with dense attention in fp64.

    python -m tools.fuzz_kernel --cases 10000
    python -m tools.fuzz_kernel --cases 10000 --sanitize

A step has any number of requests, some of them plain, of any lengths, spans, strengths, shares and
heads, in any dtype and layout of the KV cache that the kernel knows, with or without a window, a
soft cap, ALiBi and sinks. It follows from its number alone: ``--first 1234 --cases 1`` runs step
1234 again.

With --sanitize the C++ kernel is built with AddressSanitizer and UndefinedBehaviorSanitizer, whose
libraries come with g++, and the first read or write outside a tensor ends the run with its place.
--source runs a changed copy of the kernel: ``kernel.cpp`` with ``math.hpp`` beside it.
"""

import argparse
import math
import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
FLAGS = (
    "-O1 -g -fno-omit-frame-pointer -fsanitize=address,undefined,float-cast-overflow "
    "-fno-sanitize-recover=all"
)


def sanitized(arguments: list[str]) -> int:
    """Runs this program again, with a kernel of that kind.

    The sanitizers' libraries must come first in a process, and Python was not linked with them.
    """
    libraries = []
    for name in ("libasan.so", "libubsan.so"):
        done = subprocess.run(
            ["g++", f"-print-file-name={name}"], capture_output=True, text=True, check=True
        )
        libraries.append(str(Path(done.stdout.strip()).resolve(strict=True)))
    environment = {
        **os.environ,
        "LD_PRELOAD": " ".join(libraries),
        "CXXFLAGS": f"{os.environ.get('CXXFLAGS', '')} {FLAGS}".strip(),
        # Python frees little at its end, and torch still less.
        "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=1",
        "UBSAN_OPTIONS": "print_stacktrace=1",
    }
    return subprocess.run(
        [sys.executable, "-m", "tools.fuzz_kernel", *arguments], env=environment, cwd=ROOT
    ).returncode


def run(
    kernel: str, seeds: range, source: Path | None = None, most_seconds: float = math.inf
) -> int:
    """Compares step by step; returns the number of those that differ.

    Args:
        kernel: Its name.
        seeds: The steps' numbers.
        source: The C++ kernel's, if it is not the package's.
        most_seconds: After which no further step begins.
    """
    sys.path.insert(0, str(ROOT / "tests" / "support"))
    if kernel == "triton":
        import torch

        if not torch.cuda.is_available():
            os.environ["TRITON_INTERPRET"] = "1"
        from gpu_cases import check_random as check
    else:
        import kernel_cases

        from vllm_pasta.kernels import reference
        from vllm_pasta.kernels.cpu import build, launch

        if source is not None:
            build.SOURCES = (source, source.with_name("math.hpp"))
        function = {"cpp": launch.steered_attention, "reference": reference.steered_attention}

        def check(seed: int) -> None:
            kernel_cases.check_random(seed, function[kernel])

    wrong, count, began = 0, 0, time.monotonic()
    for seed in seeds:
        if time.monotonic() - began > most_seconds:
            break
        count += 1
        try:
            check(seed)
        except AssertionError as e:
            wrong += 1
            print(f"step {seed}: {str(e).splitlines()[0] if str(e) else 'differs'}", flush=True)
        except Exception:
            print(f"step {seed}:", flush=True)
            raise
    seconds = time.monotonic() - began
    if "libasan" in Path("/proc/self/maps").read_text():
        kernel += " with sanitizers"
    print(
        f"{kernel}: {count:,} steps from {seeds.start} on in {seconds:.0f} s, {wrong} wrong",
        flush=True,
    )
    return wrong


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tools.fuzz_kernel",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--kernel", choices=("cpp", "reference", "triton"), default="cpp",
        help="triton is interpreted where there is no GPU (default: cpp)",
    )  # fmt: skip
    parser.add_argument("--cases", type=int, default=1000, help="how many (default: 1000)")
    parser.add_argument(
        "--seconds", type=float, default=math.inf, help="begin no step after so long (no limit)"
    )
    parser.add_argument("--first", type=int, default=0, help="the first one's number (default: 0)")
    parser.add_argument(
        "--sanitize", action="store_true", help="build the C++ kernel with sanitizers"
    )
    parser.add_argument(
        "--source", type=lambda text: Path(text).resolve(strict=True), metavar="FILE",
        help="the C++ kernel's kernel.cpp (default: the package's)",
    )  # fmt: skip
    options = parser.parse_args()
    if options.kernel != "cpp" and (options.sanitize or options.source):
        parser.error("--sanitize, --source: the C++ kernel alone is compiled")
    if options.sanitize:
        return sanitized([arg for arg in sys.argv[1:] if arg != "--sanitize"])
    seeds = range(options.first, options.first + options.cases)
    return 1 if run(options.kernel, seeds, options.source, options.seconds) else 0


if __name__ == "__main__":
    sys.exit(main())
