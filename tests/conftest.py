"""Engines are costly: each is started once per session, and most tests share one."""

import gc
import os

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

import pytest
import torch
from models import byte_tokenizer, tiny_llama

from vllm_pasta.cli.smollm2 import model_path
from vllm_pasta.verify.oracle import Oracle

CORES = os.sched_getaffinity(0)


def start(model, **options):
    """An in-process engine with settings that suit small tests."""
    from vllm import LLM, envs
    from vllm.v1.engine import core

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
    return model_path()


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """A random Llama: 4 layers, 4 query heads on 2 KV heads, head size 32, a token per byte."""
    return byte_tokenizer(tiny_llama(tmp_path_factory.mktemp("tiny")))


@pytest.fixture(scope="session")
def tiny_oracle(tiny):
    return Oracle(tiny)


@pytest.fixture(scope="session")
def smollm2_oracle(smollm2):
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


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a GPU"))
