"""Runs a kernel on random steps, and compares each with dense attention in fp64.

    python -m tools.fuzz_kernel --cases 10000
    python -m tools.fuzz_kernel --cases 10000 --sanitize

A step has any number of requests, some of them plain, of any lengths, spans, strengths, shares and
heads, in any dtype and layout of the KV cache that the kernel knows, with or without a window, a
soft cap, ALiBi and sinks. It follows from its number alone: ``--first 1234 --cases 1`` runs step
1234 again.

With --sanitize the C++ kernel is built with AddressSanitizer and UndefinedBehaviorSanitizer, whose
libraries come with g++, and the first read or write outside a tensor ends the run with its place.
"""

import argparse
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


def run(kernel: str, seeds: range) -> int:
    """Compares step by step; returns the number of those that differ."""
    sys.path.insert(0, str(ROOT / "tests" / "support"))
    if kernel == "triton":
        import torch

        if not torch.cuda.is_available():
            os.environ["TRITON_INTERPRET"] = "1"
        from gpu_cases import check_random as check
    else:
        import kernel_cases

        from vllm_pasta.kernels import reference
        from vllm_pasta.kernels.cpu import launch

        function = {"cpp": launch.steered_attention, "reference": reference.steered_attention}

        def check(seed: int) -> None:
            kernel_cases.check_random(seed, function[kernel])

    wrong, began = 0, time.monotonic()
    for seed in seeds:
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
    print(f"{kernel}: {len(seeds):,} steps in {seconds:.0f} s, {wrong} wrong", flush=True)
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
    parser.add_argument("--first", type=int, default=0, help="the first one's number (default: 0)")
    parser.add_argument(
        "--sanitize", action="store_true", help="build the C++ kernel with sanitizers"
    )
    options = parser.parse_args()
    if options.sanitize:
        if options.kernel != "cpp":
            parser.error("--sanitize: the C++ kernel alone is compiled")
        return sanitized([arg for arg in sys.argv[1:] if arg != "--sanitize"])
    return 1 if run(options.kernel, range(options.first, options.first + options.cases)) else 0


if __name__ == "__main__":
    sys.exit(main())
