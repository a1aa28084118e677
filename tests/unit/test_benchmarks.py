"""The benchmarks' own parts: the reference they race is right, workloads are what they say, and
what runs everything on a GPU knows its programs' options and goes on where one fails."""

import argparse
import importlib
import json
import sys

import pytest
from models import random_ids

from benchmarks import gpu
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


@pytest.mark.parametrize("dry", [False, True])
def test_steps_for_a_gpu(dry, tmp_path, monkeypatch):
    """Each program knows the options that it is given: else time on a GPU is lost."""
    programs = {"vllm_pasta.cli": "vllm_pasta.cli.main"}
    parse = argparse.ArgumentParser.parse_args

    class Parsed(Exception):
        pass

    def parse_args(self, *given):
        parse(self, *given)
        raise Parsed

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_args)
    steps = [step for phase in gpu.phases(tmp_path, dry) for step in phase]
    for step in steps:
        _, name, *options = step.command
        if name == "pytest":
            assert "tests/gpu" in options
            continue
        monkeypatch.setattr(sys, "argv", [name, *options])
        with pytest.raises(Parsed):
            importlib.import_module(programs.get(name, name)).main()
    assert [step.name for step in steps] == ["verify", "tests", "kernel", "engine"]


def test_steps_that_fail_or_hang_on_a_gpu(tmp_path, monkeypatch):
    """The others go on, and the summary says which."""

    def step(name, code, limit_s=60, stdout=None):
        return gpu.Step(name, ["-c", code], limit_s, stdout)

    hangs = "import time; print('on', flush=True); time.sleep(600)"
    first = [step("passes", "print(7)", stdout="seven"), step("fails", "raise SystemExit(3)")]
    last = [step("last", "")]
    phases = [first, [step("hangs", hangs, 1.5)], last]
    monkeypatch.setattr(gpu, "phases", lambda out, dry: phases)
    monkeypatch.setattr(sys, "argv", ["gpu", str(tmp_path / "out")])
    assert gpu.main() == 1
    steps = json.loads((tmp_path / "out" / "summary.json").read_text())["steps"]
    assert {name: result["status"] for name, result in steps.items()} == {
        "passes": 0, "fails": 3, "hangs": None, "last": 0
    }  # fmt: skip
    assert (tmp_path / "out" / "seven").read_text() == "7\n"
