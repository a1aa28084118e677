"""The benchmarks' own parts: the reference they race is right, and workloads are what they say."""

import pytest
from models import random_ids

from benchmarks.reference import Reference
from benchmarks.workloads import REFERENCE, SWEEPS, WORKLOADS, Model
from vllm_pasta.verify.oracle import Steering


def test_reference_equals_oracle(tiny, tiny_oracle):
    """Padded, batched, with other heads for each request: still the oracle's tokens."""
    batch = []
    for i, length in enumerate((20, 45, 31)):
        emphasis = {"spans": [[3, 9]], "alpha": 0.01, "heads": {"1": [0, i + 1], "3": [2]}}
        batch.append(
            {
                "ids": random_ids(length, i),
                "output_tokens": 4 + 3 * i,
                "emphasis": emphasis if i != 1 else None,
            }
        )
    answers = Reference(str(tiny), "float32").run(batch)["tokens"]
    for item, tokens in zip(batch, answers, strict=True):
        e = item["emphasis"]
        heads = e and {int(layer): heads for layer, heads in e["heads"].items()}
        steering = e and Steering(e["spans"], heads, e["alpha"], len(item["ids"]))
        assert tokens == tiny_oracle.generate(item["ids"], item["output_tokens"], steering)[0]


ALL = [*WORKLOADS.values(), *REFERENCE.values(), *(w for p in SWEEPS.values() for _, w in p)]


MODELS = {
    "smollm2": Model(),
    "qwen3": Model(tuple(range(36)), 32, 150_000),
    "hybrid": Model(tuple(range(3, 48, 4)), 32, 150_000),  # a layer of four has attention
}


@pytest.mark.parametrize("workload", ALL, ids=range(len(ALL)))
@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
def test_workloads(workload, model):
    """As many requests, steered ones, tokens and heads as the table says."""
    batch = workload.batch(1, model)
    assert len(batch) == workload.requests
    steered = [item for item in batch if item["emphasis"]]
    assert len(steered) == round(workload.steered * workload.requests)
    for item in batch:
        assert len(item["ids"]) <= workload.prompt_tokens
        if not workload.mixed:
            assert len(item["ids"]) == workload.prompt_tokens
    for item in steered:
        ((start, end),) = item["emphasis"]["spans"]
        assert 0 < start < end <= len(item["ids"])
        assert end - start == workload.emphasised_tokens or workload.mixed
        heads = item["emphasis"]["heads"]
        wanted = max(1, workload.heads * len(model.layers) * model.heads)
        assert wanted * 0.85 <= sum(len(h) for h in heads.values()) <= wanted + 1
        assert all(int(i) in model.layers and max(h) < model.heads for i, h in heads.items())
    if workload.distinct:
        assert len({str(item["emphasis"]) for item in steered}) == len(steered)
