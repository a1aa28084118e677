"""The whole check of ``vllm-pasta verify``: which engines, which requests, and the `Report`."""

import os
import platform
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from vllm_pasta import __version__
from vllm_pasta.errors import PastaError
from vllm_pasta.verify import models
from vllm_pasta.verify.engine import Engine
from vllm_pasta.verify.exactness import LOGPROBS, Comparison, Judge
from vllm_pasta.verify.models import Size
from vllm_pasta.verify.requests import Request, mixed
from vllm_pasta.verify.throughput import Pair, Row, Workload

SLOTS = 8
CHUNK_TOKENS = 128
KV_BYTES = 2**28
"""Least memory of an engine's KV cache: enough for the small random models."""
PARAMETERS_ON_CPU = 1_000_000_000
"""A named model with more is not run by the oracle on a CPU: see `exact_model`."""
SHARE_ON_GPU = 0.2
"""The oracle may take so much of a GPU's memory."""


@dataclass(frozen=True)
class Options:
    """What the command is asked for.

    Attributes:
        model: A model for vLLM, or None.
        shape: One of `models.SHAPES`, whose throughput is measured with random weights.
        exactness, throughput: What to check.
        runs: Timed runs of each kind.
    """

    model: str | None = None
    shape: str | None = None
    exactness: bool = True
    throughput: bool = True
    runs: int = 3


@dataclass(frozen=True)
class Machine:
    """What the checks depend on.

    Attributes:
        device: Its name.
        is_gpu: Whether vLLM runs on CUDA.
        has_fast_bf16: Whether vLLM's bf16 is fit for use: not on an x86 CPU without AVX-512.
        memory_bytes: Of the GPU; of no meaning on a CPU.
    """

    device: str
    is_gpu: bool
    has_fast_bf16: bool
    memory_bytes: int = 0

    @classmethod
    def here(cls) -> "Machine":
        """This one."""
        import torch

        if torch.cuda.is_available():
            properties = torch.cuda.get_device_properties(0)
            return cls(properties.name, True, True, properties.total_memory)
        name = platform.processor() or platform.machine()
        cpuinfo = Path("/proc/cpuinfo")
        if cpuinfo.exists():
            lines = cpuinfo.read_text(encoding="utf-8").splitlines()
            name = next((x.split(":", 1)[1].strip() for x in lines if "model name" in x), name)
        cores = len(os.sched_getaffinity(0))
        is_x86 = platform.machine().lower() in ("x86_64", "amd64")
        has_fast_bf16 = not is_x86 or torch.cpu._is_avx512_supported()
        return cls(f"{name}, cores: {cores}", False, has_fast_bf16)


@dataclass
class Check:
    """One line of the report.

    Attributes:
        name: What was checked.
        is_ok: Whether it holds.
        detail: Figures, or what is wrong.
    """

    name: str
    is_ok: bool
    detail: str


@dataclass
class Report:
    """What the command found.

    Attributes:
        device: Where it ran.
        versions: Of the packages that matter.
        notes: What a reader must know, e.g. which model was checked.
        engines: What each engine runs, by name.
        checks: Their results.
        comparisons: Errors of each engine, by name.
        rows: Throughput.
    """

    device: str
    versions: dict[str, str]
    notes: list[str] = field(default_factory=list)
    engines: dict[str, dict[str, Any]] = field(default_factory=dict)
    checks: list[Check] = field(default_factory=list)
    comparisons: dict[str, Any] = field(default_factory=dict)
    rows: list[Row] = field(default_factory=list)

    @property
    def is_ok(self) -> bool:
        return all(check.is_ok for check in self.checks)

    def to_json(self) -> dict[str, Any]:
        """Everything, as plain data."""
        return {
            "ok": self.is_ok,
            "device": self.device,
            "versions": self.versions,
            "notes": self.notes,
            "engines": self.engines,
            "checks": [vars(check) for check in self.checks],
            "errors": self.comparisons,
            "throughput": [row.to_json() for row in self.rows],
        }


Progress = Callable[[str, float], None]
"""Told what is being done, and how much of everything is done by then (0 to 1)."""


def verify(options: Options, folder: Path, progress: Progress) -> Report:
    """Checks this machine.

    Args:
        options: What to check.
        folder: For models, and the engines' logs.
        progress: Told of every step.
    """
    machine = Machine.here()
    report = Report(machine.device, versions())
    names = list(configurations(machine)) if options.exactness else []
    steps = 3 * len(names) + ((2 + options.runs) if options.throughput else 0)
    done = iter(range(steps + 1))

    def step(what: str) -> None:
        progress(what, next(done, steps) / max(1, steps))

    if options.exactness:
        check_exactness(options, machine, folder, report, step)
    if options.throughput:
        check_throughput(options, machine, folder, report, step)
    progress("done", 1.0)
    return report


def versions() -> dict[str, str]:
    """Versions of what steered attention depends on."""
    found = {"vllm-pasta": __version__, "python": platform.python_version()}
    for package in ("vllm", "torch", "triton", "transformers"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def configurations(machine: Machine) -> dict[str, tuple[dict[str, Any], dict[str, str]]]:
    """The engines that are held against the oracle: arguments of ``vllm.LLM`` and environment.

    On a GPU both model runners run in bf16 with torch.compile and CUDA graphs. On a CPU, where vLLM
    has one runner, fp32 shows that greedy tokens are equal, and bf16 is what people serve.
    """
    common = {
        "max_num_seqs": SLOTS,  # fewer than there are requests, so slots are used again
        "max_num_batched_tokens": CHUNK_TOKENS,  # long prompts come in chunks
        "max_model_len": 1024,
        "max_logprobs": LOGPROBS,
        "skip_tokenizer_init": True,
        "kv_cache_memory_bytes": KV_BYTES,
        "gpu_memory_utilization": 0.05,
        "disable_log_stats": True,
    }
    if machine.is_gpu:
        graphs = {
            **common,
            "dtype": "bfloat16",
            "block_size": 16,
            "compilation_config": {"cudagraph_capture_sizes": [1, 2, 4, 8, 32, 128]},
        }
        return {
            f"Model Runner {runner}": (graphs, {"VLLM_USE_V2_MODEL_RUNNER": value})
            for runner, value in (("V2", "1"), ("V1", "0"))
        }
    eager = {**common, "enforce_eager": True, "block_size": 32}
    found: dict[str, tuple[dict[str, Any], dict[str, str]]] = {
        "fp32": ({**eager, "dtype": "float32"}, {})
    }
    if machine.has_fast_bf16:
        found["bf16"] = ({**eager, "dtype": "bfloat16"}, {})
    return found


def check_exactness(
    options: Options,
    machine: Machine,
    folder: Path,
    report: Report,
    step: Callable[[str], None],
) -> None:
    """Every engine answers the same requests twice; see `configurations`."""
    import transformers

    transformers.logging.disable_progress_bar()
    model, note = exact_model(options, machine, folder)
    report.notes.append(note)
    size = Size.of(model)
    is_named = options.model is not None and str(model) == options.model
    requests = mixed(size, longest=200, max_tokens=24) if is_named else mixed(size)
    # All requests at once, so that the prefix cache keeps what the second round looks for.
    tokens = sum(len(request.prompt) + request.max_tokens + 128 for request in requests)
    kv_bytes = max(KV_BYTES, size.kv_bytes(tokens, 4))
    for name, (llm, environment) in configurations(machine).items():
        step(f"{name}: starting an engine")
        try:
            llm = {**llm, "model": str(model), "kv_cache_memory_bytes": kv_bytes}
            with Engine(name, llm, folder, environment=environment) as engine:
                report.engines[name] = engine.about()
                step(f"{name}: asking {len(requests)} requests, twice")
                asked = [request.to_json(logprobs=LOGPROBS) for request in requests]
                rounds = [engine.generate(asked, timeout_s=600) for _ in range(2)]
        except PastaError as e:
            report.checks.append(Check(f"{name}: the engine runs", False, str(e)))
            step(f"{name}: failed")
            continue
        step(f"{name}: asking the independent implementation")
        on_gpu = machine.is_gpu and is_named
        judge = Judge(model, llm["dtype"], "cuda" if on_gpu else "cpu")
        for what, answer in zip(("fresh", "prefix cache"), rounds, strict=True):
            comparison = judge.compare(requests, answer["outputs"])
            report.comparisons[f"{name}, {what}"] = {
                "steered": comparison.steered.to_json(),
                "plain": comparison.plain.to_json(),
                "allowed": round(comparison.allowed, 6),
                "seconds": round(answer["seconds"], 2),
            }
            report.checks.append(_exact(f"{name}: exact, {what}", comparison, answer["seconds"]))
        report.checks += _engine_did(name, requests, rounds[1])


def _exact(name: str, comparison: Comparison, seconds: float) -> Check:
    problems = comparison.problems()
    steered, plain = comparison.steered, comparison.plain
    detail = (
        f"{steered.equal_tokens + plain.equal_tokens} of {steered.tokens + plain.tokens} greedy "
        f"tokens equal; mean |Δ log p| steered {steered.mean:.2g}, plain {plain.mean:.2g}, "
        f"without steering {_mean(steered.unsteered):.2g}; {seconds:.1f} s"
    )
    return Check(name, not problems, "; ".join([*problems, detail]) if problems else detail)


def _engine_did(name: str, requests: list[Request], second: dict[str, Any]) -> list[Check]:
    """That the requests met what they were to meet: slots, chunks, the prefix cache."""
    long = sum(len(request.prompt) > CHUNK_TOKENS for request in requests)
    found = sum(output["cached"] for output in second["outputs"])
    total = sum(len(request.prompt) for request in requests)
    return [
        Check(
            f"{name}: what they met",
            long > 0 and found > 0 and len(requests) > SLOTS,
            f"{len(requests)} requests in {SLOTS} slots, {long} prompts in chunks, "
            f"{found} of {total} prompt tokens from the prefix cache",
        )
    ]


def exact_model(options: Options, machine: Machine, folder: Path) -> tuple[str | Path, str]:
    """The model that is held against the oracle, and a sentence about it.

    That is the named one where the oracle has room for it, else a small random Llama.
    """
    why = "no model was named"
    if options.model is not None:
        parameters = num_parameters(options.model)
        room = (
            SHARE_ON_GPU * machine.memory_bytes / 6  # fp32 and bf16
            if machine.is_gpu
            else PARAMETERS_ON_CPU
        )
        if parameters <= room:
            return options.model, f"exactness: {options.model} itself"
        why = f"{options.model} is too large for the reference here"
    model = models.tiny_llama(
        folder / "tiny-llama", heads=8, kv_heads=2, head_size=64, initializer_range=0.06
    )
    return model, f"exactness: a random Llama of 4 layers ({why})"


def num_parameters(model: str) -> int:
    """Of a model's architecture, without loading its weights."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

    config = AutoConfig.from_pretrained(model)
    of_text = config.get_text_config() is config
    with torch.device("meta"):
        made = (AutoModelForCausalLM if of_text else AutoModelForImageTextToText).from_config(
            config
        )
    return sum(parameter.numel() for parameter in made.parameters())


def check_throughput(
    options: Options,
    machine: Machine,
    folder: Path,
    report: Report,
    step: Callable[[str], None],
) -> None:
    """Plain, idle and steered, in turns."""
    dtype = "bfloat16" if machine.has_fast_bf16 else "float32"
    extra: dict[str, Any] = {"dtype": dtype, "enforce_eager": not machine.is_gpu}
    if options.model is not None and options.shape is None:
        model: str | Path = options.model
        report.notes.append(f"throughput: {options.model}, {dtype}")
    else:
        shape = options.shape or ("qwen3-0.6b" if machine.is_gpu else "smollm2-135m")
        model = models.save_shape(shape, folder / shape)
        extra["load_format"] = "dummy"
        report.notes.append(f"throughput: {shape}'s shape with random weights, {dtype}")
    sizes = (32, 512, 64) if machine.is_gpu else (8, 256, 16)
    workload = Workload("10 % of the heads in 30 % of the layers", *sizes)
    step("throughput: starting plain vLLM and vLLM with emphasis")
    pair = Pair(model, folder, [workload], extra, 0.3 if machine.is_gpu else 0.05)
    try:
        about = pair.start()
        report.engines |= {f"throughput, {name}": entry for name, entry in about.items()}
        step("throughput: warming up")
        row = pair.run(workload, options.runs, lambda: step("throughput: timing, in turns"))
    except PastaError as e:
        report.checks.append(Check("throughput: the engines run", False, str(e)))
        return
    finally:
        pair.close()
    report.rows.append(row)
    report.checks.append(
        Check(
            "throughput: the engines run",
            True,  # random weights may say one token for ever, whatever they attend to
            f"idle, {row.same_idle:.0%} of the requests have plain vLLM's tokens; steered, "
            f"{1 - row.changed:.0%}",
        )
    )


def _mean(values: list[float]) -> float:
    return sum(values) / len(values) if values else 0.0
