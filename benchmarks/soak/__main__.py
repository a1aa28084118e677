"""Loads a real server with mixed traffic, and holds its answers against the oracle.

    python -m benchmarks.soak --hours 2 --json soak.json --plot soak.png

Requests of every way of marking, plain ones, some that must be refused, streams, clients that leave
in mid-stream, n = 2, a LoRA adapter, structured outputs and chats with growing history arrive at a
changing rate. A small KV cache makes the prefix cache evict and requests be preempted. Sampled
answers are judged by the oracle on transformers: every log-probability, and every greedy token.
Ends with 1 if an answer is wrong, or a request did not end as it should, or the server died, which
ends the run at once. The figures so far are written every half minute, so that an interrupted run
leaves them. Traffic goes to this machine alone.
"""

import argparse
import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
from transformers import AutoConfig, AutoTokenizer

from benchmarks.soak import report
from benchmarks.soak.adapter import merge, write
from benchmarks.soak.client import Client
from benchmarks.soak.judge import Judge
from benchmarks.soak.traffic import Size, Traffic
from benchmarks.soak.watch import Watch
from benchmarks.throughput import describe, say
from vllm_pasta.verify.oracle import Oracle

BLOCK = 32
ADAPTER = "adapter"
START_SECONDS = 600


@contextmanager
def server(
    options: argparse.Namespace, log: Path, adapter: Path
) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """A server with few KV blocks. Yields its address and its process."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    command = [
        str(Path(sys.executable).parent / "vllm"), "serve", options.model, "--plugin", "pasta",
        "--served-model-name", "m", "--host", "127.0.0.1", "--port", str(port),
        "--dtype", options.dtype, "--enforce-eager", "--max-model-len", str(options.longest),
        "--block-size", str(BLOCK), "--num-gpu-blocks-override", str(options.kv_tokens // BLOCK),
        "--max-num-seqs", "16", "--gpu-memory-utilization", "0.05", "--max-logprobs", "1",
        # Two slots for one adapter: vLLM 0.32 on a CPU runs requests without one in the last.
        "--enable-lora", "--max-loras", "2", "--max-lora-rank", "8",
        "--lora-modules", f"{ADAPTER}={adapter}",
    ]  # fmt: skip
    env = {**os.environ, "VLLM_PLUGINS": "pasta", "VLLM_LOGGING_LEVEL": "WARNING"}
    env.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    # Else what glibc keeps of freed memory grows for hours, and hides what would be a leak.
    env.setdefault("MALLOC_MMAP_THRESHOLD_", str(2**20))
    with log.open("w") as out:
        process = subprocess.Popen(
            command, env=env, stdout=out, stderr=subprocess.STDOUT, start_new_session=True
        )
    try:
        deadline = time.monotonic() + START_SECONDS
        while True:
            if process.poll() is not None or time.monotonic() > deadline:
                raise SystemExit(f"the server did not start:\n{log.read_text()[-3000:]}")
            try:
                if httpx.get(f"{url}/health", timeout=5).status_code == 200:
                    break
            except httpx.HTTPError:
                time.sleep(1)
        yield url, process
    finally:
        process.terminate()
        try:
            process.wait(timeout=60)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)


def run(options: argparse.Namespace) -> tuple[dict[str, Any], Any]:
    """One run: the figures, and what was counted."""
    config = AutoConfig.from_pretrained(options.model).get_text_config()
    size = Size(config.num_hidden_layers, config.num_attention_heads, options.longest)
    seconds = options.hours * 3600 if options.hours else options.minutes * 60
    with tempfile.TemporaryDirectory() as folder:
        oracles = {name: Oracle(options.model) for name in ("m", ADAPTER)}
        write(oracles[ADAPTER].model, Path(folder) / ADAPTER, options.seed)
        merge(oracles[ADAPTER].model, Path(folder) / ADAPTER)
        say("starting the server …")
        log = Path(options.log or Path(folder) / "log")
        with server(options, log, Path(folder) / ADAPTER) as (url, process):
            known = httpx.get(f"{url}/v1/emphasis/head_sets", timeout=60).json()["head_sets"]
            sets = {
                name: {int(layer): heads for layer, heads in described["heads"].items()}
                for name, described in known.items()
            }
            tokenizer = AutoTokenizer.from_pretrained(options.model)
            traffic = Traffic(tokenizer, size, sets, options.seed, tuple(oracles))
            judge = Judge(oracles, options.judge, options.seed)
            watch = Watch(url, process.pid, every=max(1.0, seconds / 200))
            client = Client(
                url, traffic, options.rate, seconds, options.requests, judge.put, options.seed
            )

            def save() -> None:
                if options.json:
                    write_json(options, report.figures(client.counts, judge, watch))

            try:
                asyncio.run(show(client, judge, process, seconds, save))
            finally:
                watch.close()
                judge.close()
            return report.figures(client.counts, judge, watch), client.counts


def write_json(options: argparse.Namespace, figures: dict[str, Any]) -> None:
    """Writes the figures, so far or in the end; what was there stays if that fails."""
    path = Path(options.json)
    new = path.with_name(path.name + ".new")
    new.write_text(
        json.dumps({**describe("soak", options), **figures}, indent=1) + "\n", encoding="utf-8"
    )
    new.replace(path)


async def show(
    client: Client,
    judge: Judge,
    process: subprocess.Popen[bytes],
    seconds: float,
    save: Callable[[], None],
) -> None:
    """Runs the client, and every half minute says how far it is, and saves the figures.

    Where the server has ended there is nothing to wait for, and the run ends too.
    """
    task = asyncio.create_task(client.run())
    begin = said = time.monotonic()
    while not task.done():
        await asyncio.wait([task], timeout=1)
        now, counts = time.monotonic(), client.counts
        minutes = (now - begin) / 60
        if now - said >= 30 or task.done():
            said = now
            say(
                f"{minutes:.1f} of {seconds / 60:.1f} min: "
                f"{sum(counts.kinds.values())} requests, {judge.judged} judged, "
                f"{len(judge.wrong)} wrong, {counts.fault_count} faults"
            )
            save()
        if process.poll() is not None and not task.done():
            counts.fault(f"the server ended after {minutes:.1f} minutes: see its log (--log)")
            task.cancel()
            await asyncio.wait([task])
            return
    await task


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.soak",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", help="folder or name; default: SmolLM2-135M from its package")
    parser.add_argument("--minutes", type=float, default=10, help="how long (default: 10)")
    parser.add_argument("--hours", type=float, help="the same in hours")
    parser.add_argument("--rate", type=float, default=1.0, help="mean requests a second (1)")
    parser.add_argument("--requests", type=int, default=100_000, help="at most so many")
    parser.add_argument("--judge", type=float, default=0.3, help="share that is judged (0.3)")
    parser.add_argument(
        "--longest", type=int, default=512, help="the model's context, tokens (512)"
    )
    parser.add_argument("--kv-tokens", type=int, default=1536, help="size of the KV cache (1536)")
    parser.add_argument("--seed", type=int, default=0, help="another one gives other traffic")
    parser.add_argument("--json", metavar="FILE", help="also write the figures here")
    parser.add_argument("--log", metavar="FILE", help="keep what the server prints here")
    parser.add_argument("--plot", metavar="FILE", help="also draw them; needs matplotlib")
    options = parser.parse_args()
    if options.model is None:
        from vllm_pasta.cli.smollm2 import model_path

        options.model = str(model_path())
    options.dtype, options.eager, options.runs = "float32", True, 1
    result, counts = run(options)
    print(report.text(result))
    if options.json:
        write_json(options, result)
    if options.plot:
        report.draw(counts, result, Path(options.plot))
    if found := report.problems(result):
        raise SystemExit("failed: " + "; ".join(found))
    print("every judged answer is the oracle's")


if __name__ == "__main__":
    main()
