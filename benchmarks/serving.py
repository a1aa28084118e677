"""Times online serving with emphasis against plain vLLM, by vLLM's own load generator.

Two servers run side by side, one of them stopped (SIGSTOP) while the other is loaded: stock vLLM
with the plugin switched off, and the same with it on and every request emphasised. Figures are
vLLM's: time to first token and inter-token latency, in ms, at several request rates.
"""

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

from benchmarks.contestants import Contestant
from benchmarks.throughput import MEMORY_UTILIZATION, default_dtype, describe, say

EMPHASIS = {"spans": [[16, 36]], "heads": "smollm2-135m-instruct"}
METRICS = ("median_ttft_ms", "p99_ttft_ms", "median_itl_ms", "p99_itl_ms", "output_throughput")
VLLM = str(Path(sys.executable).parent / "vllm")


class Server(Contestant):
    """A server: ``vllm serve``."""

    def __init__(self, name: str, options: argparse.Namespace) -> None:
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            self.port = s.getsockname()[1]
        command = [
            VLLM, "serve", options.model, "--served-model-name", "m", "--host", "127.0.0.1",
            "--port", str(self.port), "--max-model-len", "2048", "--no-enable-prefix-caching",
            "--gpu-memory-utilization", str(MEMORY_UTILIZATION), "--dtype", options.dtype,
        ]  # fmt: skip
        nowhere = subprocess.DEVNULL
        super().__init__(name, command, 1, stdout=nowhere, stderr=nowhere)
        with self.killed_on_error():
            self._wait()
        self.pause()

    def load(self, options: argparse.Namespace, rate: float, seed: int) -> dict[str, float]:
        """Runs ``vllm bench serve`` once; returns its figures."""
        body = {"vllm_xargs": {"emphasis": json.dumps(EMPHASIS)}} if self.name == "pasta" else {}
        with tempfile.TemporaryDirectory() as folder, self.turn():
            result = subprocess.run(
                [VLLM, "bench", "serve", "--backend", "openai", "--base-url",
                 f"http://127.0.0.1:{self.port}", "--model", "m", "--tokenizer", options.model,
                 "--dataset-name", "random", "--random-input-len", str(options.input_tokens),
                 "--random-output-len", str(options.output_tokens), "--ignore-eos",
                 "--num-prompts", str(options.prompts), "--request-rate", str(rate),
                 "--seed", str(seed), "--extra-body", json.dumps(body), "--disable-tqdm",
                 "--percentile-metrics", "ttft,itl", "--metric-percentiles", "99",
                 "--save-result", "--result-dir", folder, "--result-filename", "result.json"],
                env={**os.environ, "VLLM_PLUGINS": "", "VLLM_LOGGING_LEVEL": "ERROR"},
                capture_output=True, text=True,
            )  # fmt: skip
            path = Path(folder) / "result.json"
            if not path.exists():
                raise SystemExit(f"vllm bench serve failed:\n{result.stderr[-3000:]}")
            figures: dict[str, Any] = json.loads(path.read_text())
        if figures["completed"] != options.prompts:
            raise SystemExit(f"{self.name}: {figures['completed']} of {options.prompts} answered")
        return {name: figures[name] for name in METRICS}

    def _wait(self) -> None:
        for _ in range(600):
            if self.process.poll() is not None:
                raise SystemExit(f"the {self.name} server died")
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health", timeout=5)
            except (urllib.error.URLError, OSError):
                time.sleep(1)
            else:
                return
        raise SystemExit(f"the {self.name} server did not come up")


def run(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Runs every rate on both servers, alternating; returns a row for each rate."""
    servers: list[Server] = []
    try:
        for name in ("vllm", "pasta"):
            say(f"starting the {name} server …")
            servers.append(Server(name, options))
        for server in servers:
            server.load(options, float("inf"), seed=99)  # warm up
        rows = []
        for rate in options.rates:
            figures: dict[str, list[dict[str, float]]] = {"vllm": [], "pasta": []}
            for i in range(options.runs):
                for server in servers if i % 2 else reversed(servers):
                    say(f"rate {rate}: run {i + 1} of {options.runs}, {server.name} …")
                    figures[server.name].append(server.load(options, rate, seed=i))
            row: dict[str, Any] = {"rate": rate}
            for metric in METRICS:
                plain, ours = (
                    statistics.median(run[metric] for run in figures[name])
                    for name in ("vllm", "pasta")
                )
                row[metric] = {
                    "vllm": round(plain, 2),
                    "pasta": round(ours, 2),
                    "ratio": round(ours / plain, 3),
                }
            rows.append(row)
        return rows
    finally:
        for server in servers:
            server.close()


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.serving",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", help="folder or name; default: SmolLM2-135M from its package")
    parser.add_argument("--rates", nargs="+", type=float, default=[0.5, 2.0], help="requests per s")
    parser.add_argument("--runs", type=int, default=2, help="runs of each (default: 2)")
    parser.add_argument("--prompts", type=int, default=24, help="requests per run (default: 24)")
    parser.add_argument("--input-tokens", type=int, default=512)
    parser.add_argument("--output-tokens", type=int, default=64)
    parser.add_argument("--dtype", help="default: bfloat16, or float32 on a CPU without AVX-512")
    parser.add_argument("--json", metavar="FILE", help="also write the results here")
    options = parser.parse_args()
    if options.model is None:
        from vllm_pasta.cli.smollm2 import model_path

        options.model = str(model_path())
    options.dtype = options.dtype or default_dtype()
    result = {"rows": run(options), **describe("serving", options)}
    print("| requests/s | metric | plain vLLM | every request emphasised | ratio |")
    print("|---|---|---|---|---|")
    for row in result["rows"]:
        for metric in METRICS:
            figures = row[metric]
            print(
                f"| {row['rate']:g} | {metric} | {figures['vllm']} | {figures['pasta']} "
                f"| {figures['ratio']} |"
            )
    if options.json:
        Path(options.json).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
