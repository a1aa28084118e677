"""Memory, processor time, open files and counters of a server's processes, sampled over time."""

import statistics
import threading
import time
from contextlib import suppress
from typing import Any

import httpx
import psutil

METRICS = {
    "vllm:num_preemptions_total": "preemptions",
    "vllm:prefix_cache_hits_total": "prefix cache hits, tokens",
    "vllm:prefix_cache_queries_total": "prefix cache queries, tokens",
    "vllm:kv_cache_usage_perc": "KV cache in use",
    "vllm:generation_tokens_total": "generated tokens",
}


class Watch:
    """Samples until it is closed.

    Args:
        url: The server's.
        pid: Of its first process; those that it started are watched too.
        every: Seconds between two samples.
    """

    def __init__(self, url: str, pid: int, every: float) -> None:
        self._url, self._process, self._every = url, psutil.Process(pid), every
        self._start = time.monotonic()
        self._is_over = threading.Event()
        self.samples: list[dict[str, Any]] = []
        self._thread = threading.Thread(target=self._run, name="watch")
        self._thread.start()

    def close(self) -> None:
        self._is_over.set()
        self._thread.join()
        self._sample()

    def _run(self) -> None:
        while not self._is_over.wait(self._every):
            self._sample()

    def _sample(self) -> None:
        sample: dict[str, Any] = {"seconds": round(time.monotonic() - self._start, 1), "mib": {}}
        sample["processor_s"] = {}
        files = 0
        with suppress(psutil.Error):
            for process in (self._process, *self._process.children(recursive=True)):
                with suppress(psutil.Error):
                    name = f"{process.name()} {process.pid}"
                    sample["mib"][name] = round(process.memory_info().rss / 2**20, 1)
                    times = process.cpu_times()
                    sample["processor_s"][name] = round(times.user + times.system, 1)
                    files += process.num_fds()
        sample["files"] = files
        with suppress(httpx.HTTPError):
            for line in httpx.get(f"{self._url}/metrics", timeout=30).text.splitlines():
                for metric, name in METRICS.items():
                    if line.startswith(metric):
                        sample[name] = sample.get(name, 0.0) + float(line.split()[-1])
        self.samples.append(sample)

    def slopes(self) -> dict[str, float]:
        """MiB an hour that each process grew by, over the second half of the samples.

        A process that was not there all the time is left out.
        """
        late = self.samples[len(self.samples) // 2 :]
        result = {}
        for name in late[0]["mib"] if len(late) > 2 else ():
            points = [(s["seconds"], s["mib"][name]) for s in late if name in s["mib"]]
            if len(points) == len(late):
                times, sizes = zip(*points, strict=True)
                slope = statistics.linear_regression(times, sizes).slope
                result[name] = round(slope * 3600, 2)
        return result
