"""`vllm serve --api-server-count 2 --data-parallel-size 2`: several front ends and engines, one
/metrics."""

import json
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from conftest import ALL_CORES
from models import random_ids
from prometheus_client.mmap_dict import MmapedDict
from servers import SERVE, VLLM, http, metric, running

from vllm_pasta.verify.oracle import Steering

HEADS = {"1": [0, 1], "2": [3]}
PROMPT = random_ids(60, 4)
SPAN = [20, 30]
COUNT = 60


@pytest.fixture(scope="module")
def counters(tmp_path_factory):
    return tmp_path_factory.mktemp("prometheus")


@pytest.fixture(scope="module")
def server(tiny, counters, tmp_path_factory):
    folder = tmp_path_factory.mktemp("servers")
    (folder / "heads.json").write_text(json.dumps(HEADS))
    command = [VLLM, "serve", tiny, *SERVE, "--api-server-count", "2", "--data-parallel-size", "2",
               "--pasta-heads", folder / "heads.json"]  # fmt: skip
    env = {"PROMETHEUS_MULTIPROC_DIR": str(counters),
           "VLLM_CPU_OMP_THREADS_BIND": f"{ALL_CORES[0]}|{ALL_CORES[-1]}"}  # fmt: skip
    with running([(command, env)], folder, are_prepared=True) as (url,):
        yield url


def by_process(folder: Path, name: str):
    """A counter's value in each process that has counted."""
    values = Counter()
    for path in folder.glob("counter_*.db"):
        for key, value, *_ in MmapedDict.read_all_values_from_file(path):
            if json.loads(key)[1] == name:
                values[path.name] += value
    return values


def test_two_api_servers(server, counters, tiny_oracle):
    """Both steer and refuse, both engines run some, and /metrics sums up, whichever answers."""
    heads = {int(layer): h for layer, h in HEADS.items()}
    steering = Steering([tuple(SPAN)], heads, 0.01, len(PROMPT))
    steered, plain = (tiny_oracle.generate(PROMPT, 8, s)[0] for s in (steering, None))
    assert steered != plain
    asked = [{"spans": [SPAN]}, None, {"spans": [[50, 99]]}]

    def ask(i):
        body = {"model": "m", "prompt": PROMPT, "max_tokens": 8, "temperature": 0,
                "ignore_eos": True, "return_token_ids": True, "emphasis": asked[i % 3]}  # fmt: skip
        reply = http.post(f"{server}/v1/completions", json=body)
        if reply.status_code == 400:
            return reply.json()["error"]["message"]
        return reply.json()["choices"][0]["token_ids"]

    with ThreadPoolExecutor(12) as pool:
        for i, answer in enumerate(pool.map(ask, range(COUNT))):
            if i % 3 == 2:
                assert answer.startswith("emphasis.spans[0]: expected an end of at most 60")
            else:
                assert answer == (plain if i % 3 else steered)
    for engine in (0, 1):
        done = f'vllm:request_success_total{{engine="{engine}",finished_reason="length"'
        assert metric(server, done) > 0
    for name, factor in (
        ("pasta_requests_steered_total", 1),
        ("pasta_emphasised_tokens_total", SPAN[1] - SPAN[0]),
        ("pasta_requests_refused_total", 1),
        ('pasta_step_rows_total{kind="steered"}', 8),
        ('pasta_step_rows_total{kind="plain"}', 8),
    ):
        shares = by_process(counters, name.partition("{")[0])
        assert len(shares) == 2, name
        assert min(shares.values()) > 0
        for _ in range(8):  # from either
            assert metric(server, name) == factor * COUNT / 3
