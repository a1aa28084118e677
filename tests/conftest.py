"""Engines are costly: each is started once per session, and most tests share one.

Also: what kind of test each is (by its folder), how long it may take, which worker runs it, and an
end to a session that hangs. README.md beside this file says what each part takes.
"""

import faulthandler
import functools
import gc
import os
from pathlib import Path

# Before vllm is imported. In process: quick to start, and tests can look inside.
os.environ.update(
    VLLM_ENABLE_V1_MULTIPROCESSING="0",
    VLLM_LOGGING_LEVEL=os.environ.get("VLLM_LOGGING_LEVEL", "WARNING"),
    VLLM_NO_USAGE_STATS="1",
    HF_HUB_OFFLINE="1",
    TOKENIZERS_PARALLELISM="false",
)
if not os.path.exists("/dev/nvidia0"):
    os.environ["TRITON_INTERPRET"] = "1"  # read when torch imports triton
os.environ["PYTHONPATH"] = os.pathsep.join(  # of all that tests start
    [str(Path(__file__).parent / "support" / "startup"), os.environ.get("PYTHONPATH", "")]
).rstrip(os.pathsep)

import prepared
import pytest
from startup import sitecustomize as sitecustomize  # this process too

# torch and what imports it only where it is needed: pytest-xdist's first process needs none of it.

ALL_CORES = sorted(os.sched_getaffinity(0))
WORKER = os.environ.get("PYTEST_XDIST_WORKER")  # gw0, gw1, ...; None without pytest-xdist
if WORKER:
    # Each worker has cores of its own: OpenMP's threads spin while they wait for each other, so two
    # pools on one core stop one another.
    count = min(int(os.environ["PYTEST_XDIST_WORKER_COUNT"]), len(ALL_CORES))
    os.sched_setaffinity(0, ALL_CORES[int(WORKER[2:]) % count :: count])
    import torch

    torch.set_num_threads(len(os.sched_getaffinity(0)))
CORES = os.sched_getaffinity(0)

KINDS = {  # folder, and marker -> how long one test may take, in seconds, on the slowest machine
    "unit": 120,
    "engine": 600,
    "server": 900,
    "gpu": 900,
    "upstream": 900,
}
SESSION_SECONDS = 80 * 60  # continuous integration stops at 90 minutes, and shows nothing then
# Workers take the first group that nobody has yet, so what takes long comes first.
FIRST = ("server", "gpu", "upstream", "engine", "unit")
LAST = ("test_api_servers",)  # of their folder


LASTING = "VLLM_USE_BREAKABLE_CUDAGRAPH"
"""vLLM sets it in this process for some models, as DeepSeek V3.2, and then compiles none."""
if LASTING not in os.environ:

    def pytest_runtest_teardown():
        """What vLLM set for one test's model must not reach the next test's."""
        os.environ.pop(LASTING, None)


def start(model, **options):
    """An in-process engine with settings that suit small tests."""
    from many_engines import in_one_process
    from vllm import LLM, envs
    from vllm.v1.engine import core

    in_one_process()
    envs.disable_envs_cache()  # else a variable that a test sets is not seen
    # Engines of one process share its process groups: one that ends must leave them to the others.
    core.cleanup_dist_env_and_memory = lambda: None

    defaults = {
        "dtype": "float32",
        "enforce_eager": True,
        "gpu_memory_utilization": 0.05,
        "kv_cache_memory_bytes": 2**27,  # engines are kept, so this adds up
        "max_model_len": 1024,
        "max_logprobs": -1,
        "disable_log_stats": True,
        "additional_config": {"pasta": {}},
    }
    try:
        return LLM(str(model), **{**defaults, **options})
    finally:
        os.sched_setaffinity(0, CORES)  # vLLM binds this thread, and what it starts inherits that


@pytest.fixture(scope="session")
def engine():
    """Starts engines by their options; keeps each until the session ends."""
    started = {}

    def get(model, **options):
        key = repr((str(model), sorted(options.items())))
        if key not in started:
            started[key] = start(model, **options)
        return started[key]

    yield get
    started.clear()
    gc.collect()


@pytest.fixture(scope="session")
def smollm2():
    from vllm_pasta.cli.smollm2 import model_path

    return model_path()


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """A random Llama: 4 layers, 4 query heads on 2 KV heads, head size 32, a token per byte."""
    from models import byte_tokenizer, tiny_llama

    return byte_tokenizer(tiny_llama(tmp_path_factory.mktemp("tiny")))


@pytest.fixture(scope="session")
def tiny_text(smollm2, tmp_path_factory):
    """The random Llama with a real tokenizer and its chat template: SmolLM2's."""
    from models import tiny_llama
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    folder = tiny_llama(tmp_path_factory.mktemp("tiny-text"), vocab=len(tokenizer))
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_oracle(tiny):
    from vllm_pasta.verify.oracle import Oracle

    return Oracle(tiny)


@pytest.fixture(scope="session")
def smollm2_oracle(smollm2):
    import torch

    from vllm_pasta.verify.oracle import Oracle

    return Oracle(smollm2, torch.float32)


@pytest.fixture(scope="session")
def small_batches(engine, tiny):
    """At most 4 requests and 64 tokens a step: every long prompt is cut, most requests wait."""
    return engine(
        tiny, skip_tokenizer_init=True, block_size=32, max_num_seqs=4, max_num_batched_tokens=64
    )


@pytest.fixture(scope="session")
def smollm2_engine(engine, smollm2):
    """The real model in fp32; the bundled head set is its default."""
    return engine(
        smollm2,
        max_num_seqs=3,
        max_num_batched_tokens=1024,
        additional_config={"pasta": {"heads": "smollm2-135m-instruct"}},
    )


@pytest.fixture(scope="session")
def verdicts():
    """What becomes of every architecture; `tools.registry` keeps it, and makes its tables of it."""
    from tools import registry

    with prepared.spawned():
        return registry.verdicts()


@pytest.fixture
def two_ranks(monkeypatch):
    """Has vLLM run the two workers of an engine as processes, both on one core of this process.

    They wait for each other at every step. On a core of its own each, the one whose core other
    tests use would keep the other idle.
    """
    core = min(CORES)
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", f"{core}|{core}")
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
    with prepared.spawned():
        yield


def pytest_configure(config):
    # pytest-timeout ends a test that hangs in Python, and no other. This thread is not Python's.
    # Captured output is not yet redirected here, so this is the terminal.
    faulthandler.dump_traceback_later(SESSION_SECONDS, exit=True, file=os.dup(2))


@pytest.hookimpl(tryfirst=True)  # pytest-xdist reads the groups in its own hook of this name
def pytest_collection_modifyitems(items):
    for item in items:
        kind = kind_of(item)
        item.add_marker(kind)
        if not item.get_closest_marker("timeout"):
            item.add_marker(pytest.mark.timeout(KINDS[kind]))
        if WORKER and not item.get_closest_marker("xdist_group"):
            item.add_marker(pytest.mark.xdist_group(group(item, kind)))
        if item.get_closest_marker("cuda") and not has_gpu():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
    if WORKER:
        # test_disaggregated, which comes first, has as many processes.
        items.sort(key=lambda item: (FIRST.index(kind_of(item)), item.path.stem in LAST))


@functools.cache
def has_gpu():
    import torch

    return torch.cuda.is_available()


def kind_of(item):
    return item.path.relative_to(Path(__file__).parent).parts[0]


def group(item, kind):
    """Tests of one group run on one worker, one after the other."""
    if kind == "engine" and hasattr(item, "callspec"):
        for fixture in ("run", "model"):  # of a module, and costly for each of its parameters
            if fixture in item.callspec.params:
                return f"{item.path.stem} {item.callspec.params[fixture]}"
    return item.path.stem
