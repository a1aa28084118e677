"""A short run of the soak: a real server under mixed traffic, its answers held against the oracle.

And that its judge sees what it is there to see: `python -m benchmarks.soak` runs for hours.
"""

import asyncio
import json
import subprocess
import sys
from pathlib import Path
from typing import cast

import prepared
import pytest
from servers import USUAL, environment

from benchmarks.soak.__main__ import show
from benchmarks.soak.client import Answer, Client
from benchmarks.soak.judge import Judge
from benchmarks.soak.traffic import Ask, Traffic
from vllm_pasta.verify.oracle import Steering

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("model", ["tiny_text", pytest.param("smollm2", marks=pytest.mark.slow)])
def test_a_short_run(model, tmp_path, request):
    """Steered, plain and refused requests, whole and streamed: none is answered wrongly."""
    model = request.getfixturevalue(model)
    result = tmp_path / "result.json"
    # The server is started as a user's.
    run = prepared.run(
        [sys.executable, "-m", "benchmarks.soak", "--model", model, "--requests", "30",
         "--minutes", "3", "--rate", "4", "--judge", "0.7", "--json", result],
        environment(**USUAL), folder=ROOT,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout + run.stderr[-2000:]
    figures = json.loads(result.read_text())
    assert figures["requests"] == 30
    assert figures["wrong_answers"] == figures["faults"] == figures["server_errors"] == 0
    assert figures["judged_steered"] > 5
    assert figures["refused_as_expected"] > 0
    assert figures["median_effect_of_steering"] > 20 * figures["largest_error"]


@pytest.fixture(scope="module")
def answers(tiny_oracle):
    """The oracle's own answer to one prompt, steered and not."""
    ids = list(range(40, 90))
    steering = Steering([(5, 12)], {1: [0, 1], 2: [3]}, 0.01, len(ids))
    body = {"model": "m", "max_tokens": 6, "temperature": 0}
    made = {}
    for name, how in (("steered", steering), ("plain", None)):
        tokens, rows = tiny_oracle.generate(ids, 6, how)
        logprobs = rows.gather(1, rows.argmax(-1, keepdim=True))[:, 0].tolist()
        made[name] = (tokens, logprobs)
    return {
        (asked, given): Answer(Ask("", "", body, ids, how), *made[given], text="")
        for asked, how in (("steered", steering), ("plain", None))
        for given in made
    }


@pytest.mark.parametrize("asked", ["steered", "plain"])
@pytest.mark.parametrize("given", ["steered", "plain"])
def test_the_judge_sees_a_leak(asked, given, answers, tiny_oracle):
    """The plain answer to a steered request is wrong, and the other way round."""
    judge = Judge({"m": tiny_oracle}, share=1.0, seed=0)
    judge.put(answers[asked, given])
    judge.close()
    assert (len(judge.wrong), judge.judged) == (int(asked != given), 1)


def test_a_server_that_ends_ends_the_run(tiny_oracle):
    """The run of an hour does not go on against nothing, and counts the death as a fault."""
    server = subprocess.Popen([sys.executable, "-c", ""])
    server.wait()
    judge = Judge({"m": tiny_oracle}, share=1.0, seed=0)
    # No request is sent: the first would come after some minutes.
    client = Client("http://127.0.0.1:9", cast(Traffic, None), 1e-6, 3600, 10, judge.put, 0)
    asyncio.run(show(client, judge, server, 3600, save=lambda: None))
    judge.close()
    assert client.counts.fault_count == 1
    assert "the server ended" in client.counts.faults[0]
