"""vLLM's engines on a GPU, as scenarios: a backend, a model runner, graphs, a model, a feature.

Each runs in a process of its own, several at once, and answers the same kinds of requests; see
`run`. Where ``VLLM_PASTA_GPU_TESTS=cpu`` is set, what a CPU can do of a scenario runs there in
fp32, so that no mistake in these tests waits for a GPU.
"""

import importlib.util
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace

from models import lora_adapter, tiny_llama, tiny_model

from vllm_pasta.errors import PastaError
from vllm_pasta.verify.engine import Engine
from vllm_pasta.verify.exactness import LOGPROBS
from vllm_pasta.verify.models import Size
from vllm_pasta.verify.requests import mixed
from vllm_pasta.verify.run import Machine, configurations

ON_CPU = os.environ.get("VLLM_PASTA_GPU_TESTS") == "cpu"
WORKERS = 1 if ON_CPU else 6
"""Engines at once. Their models are tiny, and starting one is mostly the host's work."""

INVALID = "is not valid for this configuration. Reason: ['"
"""What vLLM says of a backend that cannot run a model on this GPU, with the plugin or without. An
error while the backend is imported reads otherwise (no quote), and is no reason to skip."""

HEAD = {"head_dim": 64}  # FlashInfer has kernels for 64, 128 and 256
MODELS = {
    "llama": lambda folder: tiny_llama(
        folder, heads=8, kv_heads=2, head_size=64, initializer_range=0.06
    ),
    "windows": lambda folder: tiny_model(folder, "mistral", **HEAD, initializer_range=0.1),
    "soft cap": lambda folder: tiny_model(folder, "gemma2", **HEAD, initializer_range=0.1),
    "sinks": lambda folder: tiny_model(folder, "gpt_oss", **HEAD),
    "latent": lambda folder: tiny_model(  # with the sizes of DeepSeek's own heads
        folder, "deepseek_v3", qk_nope_head_dim=128, v_head_dim=128, initializer_range=0.1
    ),
}
DRAFT = {"method": "draft_model", "num_speculative_tokens": 3}
NGRAM = {"method": "ngram", "prompt_lookup_min": 1, "prompt_lookup_max": 3,
         "num_speculative_tokens": 3}  # fmt: skip


@dataclass(frozen=True)
class Scenario:
    """One engine.

    Attributes:
        backend: vLLM's name of the attention backend.
        runner: "V1" or "V2".
        graphs: vLLM's CUDA graph mode.
        model: Of `MODELS`.
        llm: Further arguments of ``vllm.LLM``.
        has_loras: Whether two adapters are in the batch.
        counted: vLLM's counters that must not be 0 at the end.
        needs: A module that it cannot run without.
        on_cpu: Whether a CPU can run it too.
    """

    backend: str = "FLASH_ATTN"
    runner: str = "V2"
    graphs: str = "FULL_AND_PIECEWISE"
    model: str = "llama"
    llm: dict = field(default_factory=dict)
    has_loras: bool = False
    counted: tuple = ()
    needs: str | None = None
    on_cpu: bool = False

    @property
    def missing(self):
        """Why it cannot run here, as far as that is known before its engine is started."""
        if ON_CPU and not self.on_cpu:
            return "runs on a GPU only"
        if ON_CPU:
            return None
        if self.backend == "FLASHINFER" and importlib.util.find_spec("flashinfer") is None:
            return "FlashInfer is not installed"
        if self.needs and importlib.util.find_spec(self.needs) is None:
            return f"{self.needs} is not installed"
        return None


FLASH, TRITON, INFER = Scenario(), Scenario("TRITON_ATTN"), Scenario("FLASHINFER")
MOE = "vllm._moe_C_stable_libtorch"
SCENARIOS = {
    "FlashAttention, V2": replace(FLASH, on_cpu=True),
    "FlashAttention, V1": replace(FLASH, runner="V1"),
    "Triton, V2": TRITON,
    "Triton, V1": replace(TRITON, runner="V1"),
    "FlashInfer, V2": INFER,
    "FlashInfer, V1": replace(INFER, runner="V1"),
    # Graph modes; the first ones have vLLM's default.
    "FlashAttention, no graphs": replace(FLASH, graphs="NONE", llm={"enforce_eager": True}),
    "FlashAttention, full graphs": replace(FLASH, graphs="FULL"),
    "FlashAttention, piecewise graphs": replace(FLASH, graphs="PIECEWISE"),
    "FlashAttention, full graphs of decode steps": replace(FLASH, graphs="FULL_DECODE_ONLY"),
    "Triton, full graphs": replace(TRITON, graphs="FULL"),
    "Triton, V1, piecewise graphs": replace(TRITON, runner="V1", graphs="PIECEWISE"),
    # Layers.
    **{
        f"{name}, {model}": replace(scenario, model=model, on_cpu=scenario is FLASH,
                                    needs=MOE if model == "sinks" else None)
        for model in ("windows", "soft cap", "sinks")
        for name, scenario in (
            ("FlashAttention", FLASH), ("Triton", TRITON), ("FlashInfer", INFER)
        )
    },
    "Triton, MLA": Scenario("TRITON_MLA", model="latent", needs=MOE, on_cpu=True),
    # The KV cache.
    "FlashAttention, fp8 KV cache": replace(FLASH, llm={"kv_cache_dtype": "fp8"}),
    "Triton, fp8 KV cache": replace(TRITON, llm={"kv_cache_dtype": "fp8"}),
    "FlashInfer, fp8 KV cache": replace(INFER, llm={"kv_cache_dtype": "fp8"}),
    **{
        f"FlashAttention, {runner}, preemption": replace(
            FLASH, runner=runner, counted=("vllm:num_preemptions",), on_cpu=runner == "V2",
            llm={"num_gpu_blocks_override": 20 if ON_CPU else 40, "max_model_len": 512},
        )
        for runner in ("V2", "V1")
    },
    # Features.
    "FlashAttention, LoRA": replace(
        FLASH, has_loras=True, on_cpu=True,
        # One more than there are adapters, for vLLM's CPU build: see tests/engine/test_lora.py.
        llm={"enable_lora": True, "max_loras": 3, "max_lora_rank": 8},
    ),
    "FlashAttention, draft model": replace(
        FLASH, llm={"speculative_config": DRAFT}, on_cpu=True,
        counted=("vllm:spec_decode_num_draft_tokens", "vllm:spec_decode_num_accepted_tokens"),
    ),
    "Triton, draft model": replace(
        TRITON, llm={"speculative_config": DRAFT},
        counted=("vllm:spec_decode_num_draft_tokens", "vllm:spec_decode_num_accepted_tokens"),
    ),
    "FlashAttention, V2, n-gram": replace(
        FLASH, llm={"speculative_config": NGRAM}, counted=("vllm:spec_decode_num_draft_tokens",)
    ),
    "FlashAttention, V1, n-gram": replace(
        FLASH, runner="V1", llm={"speculative_config": NGRAM}, needs="numba", on_cpu=True,
        counted=("vllm:spec_decode_num_draft_tokens",),
    ),
}  # fmt: skip


@dataclass
class Part:
    """Requests of one call, and what came of them.

    Attributes:
        requests: What was asked.
        outputs: As `worker.generate` gives them.
        is_greedy: Whether tokens were chosen greedily.
        lora: Index of the requests' adapter; None for none.
    """

    requests: list
    outputs: list
    is_greedy: bool = True
    lora: int | None = None


@dataclass
class Result:
    """What a scenario's engine was, said and counted.

    Attributes:
        model: Folders of the model, and of those with an adapter merged in.
        dtype: The engine's.
        about: See `worker.describe`.
        parts: By name.
        counters: vLLM's, by name.
        error: Of an engine that did not start, or failed; the rest is empty then.
    """

    model: list
    dtype: str
    about: dict = field(default_factory=dict)
    parts: dict = field(default_factory=dict)
    counters: dict = field(default_factory=dict)
    error: str = ""


class Fleet:
    """Runs the scenarios of a test session, several at once, in the order of its tests.

    Args:
        names: Of `SCENARIOS`.
        folder: For models and logs.
    """

    def __init__(self, names, folder):
        wanted = [name for name in names if SCENARIOS[name].missing is None]
        models = {SCENARIOS[name].model for name in wanted}
        folders = {m: MODELS[m](folder / m.replace(" ", "-")) for m in models}
        self._pool = ThreadPoolExecutor(WORKERS)
        self._results = {
            name: self._pool.submit(run, name, folders[SCENARIOS[name].model], folder)
            for name in wanted
        }

    def __getitem__(self, name):
        """Waits for a scenario's `Result`."""
        return self._results[name].result()

    def close(self):
        self._pool.shutdown(cancel_futures=True)


def run(name, model, folder):
    """Starts a scenario's engine and asks it: afresh, again over the prefix cache, three samples of
    each request, and with requests that leave early. Returns a `Result`."""
    scenario = SCENARIOS[name]
    machine = Machine("", not ON_CPU, has_fast_bf16=not ON_CPU)
    (llm, _), *_ = configurations(machine).values()
    llm = {**llm, "model": str(model), "disable_log_stats": False, **scenario.llm}
    environment = {}
    if ON_CPU and scenario.model == "latent":  # vLLM's own choice, where there is AMX, is of bf16
        llm["attention_config"] = {"backend": "CPU_MLA"}
    if not ON_CPU:
        llm["attention_config"] = {"backend": scenario.backend}
        llm["compilation_config"] = {
            **llm["compilation_config"], "cudagraph_mode": scenario.graphs
        }  # fmt: skip
        environment["VLLM_USE_V2_MODEL_RUNNER"] = str(int(scenario.runner == "V2"))
        # Of its own, so that no two engines compile into one folder at once.
        environment["VLLM_CACHE_ROOT"] = str(folder / f"cache of {name}")
    if "speculative_config" in llm and "draft" in llm["speculative_config"]["method"]:
        llm["speculative_config"] = {**llm["speculative_config"], "model": str(model)}
    merged = []
    adapters = []
    if scenario.has_loras:
        for seed in (1, 2):
            where = folder / f"{name}-{seed}"
            where.mkdir()
            adapter, weights = lora_adapter(model, where, seed=seed)
            adapters.append([f"adapter-{seed}", seed, str(adapter)])
            merged.append(weights)
    result = Result([model, *merged], llm["dtype"])
    try:
        with Engine(name, llm, folder, environment=environment) as engine:
            result.about = engine.about()
            result.parts = ask(engine, Size.of(model), adapters)
            result.counters = engine.metrics()
    except PastaError as e:
        result.error = str(e)
    return result


def ask(engine, size, adapters):
    """The calls of `run`; returns their parts by name."""
    requests = mixed(size, count=12 if ON_CPU else 24, longest=300, max_tokens=30)
    asked = [request.to_json(logprobs=LOGPROBS) for request in requests]
    parts = {}

    def part(name, questions, indices, is_greedy=True, **options):
        outputs = engine.generate(questions, **options)["outputs"]
        parts[name] = Part([requests[i] for i in indices], outputs, is_greedy)

    every = list(range(len(requests)))
    part("fresh", asked, every, reset=True)
    part("prefix cache", asked, every)
    few = every[:6]
    part(
        "samples",
        [{**asked[i], "n": 3, "temperature": 1.0, "max_tokens": 8} for i in few],
        few,
        is_greedy=False,
    )
    part("abort", asked, every, reset=True, abort={"5": [1, 2]})
    for i, adapter in enumerate(adapters):
        part(f"adapter {i}", [{**question, "lora": adapter} for question in asked], every)
        parts[f"adapter {i}"].lora = i
    if adapters:  # all of them, and none, in one batch
        chosen = [adapters[i % 3] if i % 3 < 2 else None for i in every]
        answer = engine.generate(
            [{**q, "lora": lora} for q, lora in zip(asked, chosen, strict=True)], reset=True
        )
        for lora in (0, 1, None):
            ours = [i for i in every if (i % 3 if i % 3 < 2 else None) == lora]
            parts[f"one batch, adapter {lora}"] = Part(
                [requests[i] for i in ours], [answer["outputs"][i] for i in ours], True, lora
            )
    return parts
