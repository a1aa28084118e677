"""Plain, idle and steered throughput: two engines that take turns on the same prompts.

*plain* is vLLM without the plugin. *idle* is vLLM with emphasis on and no request steered.
*steered* is the same engine with an emphasis on the requests.
"""

import random
import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from vllm_pasta.verify.engine import Engine
from vllm_pasta.verify.models import Size
from vllm_pasta.verify.requests import Request

ALPHA = 0.01
KINDS = ("plain", "idle", "steered")
WARM_UP_TOKENS = 4
"""New tokens of a request in the run that warms up."""


@dataclass(frozen=True)
class Workload:
    """Equal requests, all at once.

    Attributes:
        name: For tables.
        requests, prompt_tokens, new_tokens: Sizes.
        emphasised_tokens: Of each steered request.
        heads: Share of each steered layer's query heads, one at least.
        layers: Share of the layers that have steered heads, one at least.
        is_distinct: Whether every request has other heads, layers, spans and another alpha.
    """

    name: str
    requests: int
    prompt_tokens: int
    new_tokens: int
    emphasised_tokens: int = 20
    heads: float = 0.1
    layers: float = 0.3
    is_distinct: bool = False

    @property
    def tokens(self) -> int:
        """Of a request, when it is done."""
        return self.prompt_tokens + self.new_tokens

    def batch(self, seed: int, size: Size, is_steered: bool) -> list[Request]:
        """Requests with random prompts, the same for steered and plain ones of one seed."""
        prompts, marks = random.Random(seed), random.Random(0)
        shared = self._emphasis(marks, size)
        return [
            Request(
                [prompts.randrange(10, min(size.vocab, 40_000)) for _ in range(self.prompt_tokens)],
                self.new_tokens,
                (self._emphasis(marks, size) if self.is_distinct else shared)
                if is_steered
                else None,
            )
            for _ in range(self.requests)
        ]

    def _emphasis(self, rng: random.Random, size: Size) -> dict[str, Any]:
        length = min(self.emphasised_tokens, self.prompt_tokens)
        start = rng.randrange(max(1, self.prompt_tokens // 2 - length))
        among = size.attention_layers
        layers = sorted(rng.sample(among, max(1, round(self.layers * len(among)))))
        count = max(1, round(self.heads * size.heads))
        return {
            "spans": [[start, start + length]],
            "alpha": rng.choice([0.001, 0.01, 0.1]) if self.is_distinct else ALPHA,
            "heads": {str(i): sorted(rng.sample(range(size.heads), count)) for i in layers},
        }


@dataclass
class Row:
    """What one workload took, in seconds for the whole batch.

    Attributes:
        workload: The workload.
        seconds: Of each timed run, by kind.
        same_idle: Share of idle requests with the same tokens as on plain vLLM.
        changed: Share of steered requests with other tokens than plain ones.
    """

    workload: Workload
    seconds: dict[str, list[float]]
    same_idle: float
    changed: float

    def median(self, kind: str) -> float:
        """Of the runs, in seconds."""
        return statistics.median(self.seconds[kind])

    def ratio(self, kind: str) -> float:
        """Plain vLLM's time over this kind's; 1 means that nothing is lost."""
        return self.median("plain") / self.median(kind)

    def to_json(self) -> dict[str, Any]:
        """Everything, rounded."""
        return {
            "workload": asdict(self.workload),
            "seconds": {k: [round(s, 4) for s in v] for k, v in self.seconds.items()},
            "ratio_idle": round(self.ratio("idle"), 4),
            "ratio_steered": round(self.ratio("steered"), 4),
            "extra_ms": round(1e3 * (self.median("steered") - self.median("plain")), 1),
            "same_idle": round(self.same_idle, 4),
            "changed": round(self.changed, 4),
        }


class Pair:
    """Plain vLLM and vLLM with emphasis, of one model.

    Args:
        model: A folder or name.
        folder: For the engines' logs.
        workloads: What will be run: they decide the memory of the KV cache.
        options: Further arguments of ``vllm.LLM``.
        memory_utilization: Share of the device's memory that must be free when an engine starts.
    """

    def __init__(
        self,
        model: str | Path,
        folder: Path,
        workloads: list[Workload],
        options: dict[str, Any],
        memory_utilization: float,
    ) -> None:
        self.size = Size.of(model)
        element_bytes = 4 if options.get("dtype") == "float32" else 2
        blocks = 256  # tokens that a request's last block, and what is kept aside, may waste
        tokens = max(w.requests * (w.tokens + blocks) for w in workloads)
        llm = {
            "model": str(model),
            "skip_tokenizer_init": True,
            "enable_prefix_caching": False,
            "disable_log_stats": True,
            "max_model_len": max(w.tokens for w in workloads) + 1,
            "gpu_memory_utilization": memory_utilization,
            "kv_cache_memory_bytes": max(2**28, self.size.kv_bytes(tokens, element_bytes)),
            **options,
        }
        self.engines = {
            name: Engine(name, llm, folder, is_steered=name == "pasta", in_process=False)
            for name in ("plain", "pasta")
        }

    def start(self) -> dict[str, Any]:
        """Waits for both; returns what they run."""
        about = {name: engine.about() for name, engine in self.engines.items()}
        for engine in self.engines.values():
            engine.pause()
        return about

    def close(self) -> None:
        """Ends both."""
        for engine in self.engines.values():
            engine.close()

    def run(self, workload: Workload, runs: int, advance: Callable[[], None]) -> Row:
        """Times a workload after a short run that warms up; kinds take turns, in changing order.

        Args:
            workload: What to run.
            runs: Timed runs of each kind.
            advance: Called after each run of all kinds.
        """
        seconds: dict[str, list[float]] = {kind: [] for kind in KINDS}
        same, changed = [], []
        for i in range(runs + 1):
            tokens = {}
            for kind in KINDS[i % 3 :] + KINDS[: i % 3]:
                engine = self.engines["plain" if kind == "plain" else "pasta"]
                asked = workload if i else replace(workload, new_tokens=WARM_UP_TOKENS)
                batch = asked.batch(i, self.size, is_steered=kind == "steered")
                with engine.turn():
                    answer = engine.generate(batch)
                tokens[kind] = [output["tokens"] for output in answer["outputs"]]
                if i:
                    seconds[kind].append(answer["seconds"])
            pairs = list(zip(*(tokens[kind] for kind in KINDS), strict=True))
            same += [idle == plain for plain, idle, _ in pairs]
            changed += [steered != plain for plain, _, steered in pairs]
            advance()
        return Row(workload, seconds, sum(same) / len(same), sum(changed) / len(changed))
