"""vLLM's engines on a GPU equal the independent implementation: every backend that is installed,
both model runners, every graph mode, and the features of `gpu_scenarios`.

In bf16 a steered request's mean error is at most twice plain PyTorch's, or 1.5 times what the
engine's plain requests have. Every engine has fewer slots than requests, and prompts in chunks.

Broken by: a graph that holds a request's data; a slot that keeps its last request's steering; rows
of another request; KV that differently steered requests share; a step that is not steered.
"""

import gc

import pytest
from gpu_scenarios import INVALID, ON_CPU, SCENARIOS, Fleet

from vllm_pasta.verify.exactness import Judge
from vllm_pasta.verify.run import SLOTS

pytestmark = [] if ON_CPU else [pytest.mark.cuda]


@pytest.fixture(scope="module")
def fleet(request, tmp_path_factory):
    """Starts what this session's tests need."""
    names = [item.callspec.params["name"] for item in request.session.items
             if item.path == request.path and hasattr(item, "callspec")]  # fmt: skip
    fleet = Fleet(list(dict.fromkeys(names)), tmp_path_factory.mktemp("engines"))
    yield fleet
    fleet.close()
    gc.collect()


@pytest.fixture(scope="module")
def judges():
    """One for each model and dtype: loading and asking again is what takes time."""
    made = {}

    def get(path, dtype):
        if (path, dtype) not in made:
            made[path, dtype] = Judge(path, dtype)
        return made[path, dtype]

    return get


@pytest.fixture
def result(request, fleet):
    scenario = SCENARIOS[request.node.callspec.params["name"]]
    if scenario.missing:
        pytest.skip(scenario.missing)
    result = fleet[request.node.callspec.params["name"]]
    if INVALID in result.error:
        pytest.skip(result.error.partition(INVALID)[2].splitlines()[0])
    assert not result.error, result.error
    return result


@pytest.mark.parametrize("name", SCENARIOS)
def test_exact(name, result, judges):
    """Tokens and log-probabilities, in each part of what the engine was asked."""
    for part_name, part in result.parts.items():
        path = result.model[0 if part.lora is None else part.lora + 1]
        comparison = judges(path, result.dtype).compare(part.requests, part.outputs, part.is_greedy)
        assert not comparison.problems(), (part_name, comparison.problems())


@pytest.mark.parametrize("name", SCENARIOS)
def test_ran_as_named(name, result):
    """The engine was what the scenario's name says, and its requests met what they were to meet."""
    scenario, about = SCENARIOS[name], result.about
    assert len(result.parts["fresh"].requests) > SLOTS
    again = result.parts["prefix cache"].outputs
    if scenario.model == "llama" and "preemption" not in name:
        assert sum(output["cached"] for output in again) > 0
    assert [output is None for output in result.parts["abort"].outputs[1:3]] == [True, True]
    samples = result.parts["samples"].outputs
    assert any(len(set(map(tuple, output["tokens"]))) > 1 for output in samples)
    for counter in scenario.counted:
        assert result.counters[counter] > 0
    if not ON_CPU:
        assert about["backends"] == [scenario.backend]
        assert about["runner"] == scenario.runner
        if "graphs" in name:  # else it is vLLM's to choose
            assert about["graphs"] == scenario.graphs
        assert about["kv_cache"].startswith("fp8") == ("fp8" in name)
