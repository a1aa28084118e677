"""What `vllm-pasta verify` concludes, and the requests it asks, without an engine.

Broken by: an error that passes; a check that cannot see steering at all; requests that do not meet
what they are to meet.
"""

import json

import pytest
import torch
from models import tiny_llama

from vllm_pasta import Emphasis
from vllm_pasta.cli.verify import show
from vllm_pasta.verify import run
from vllm_pasta.verify.exactness import Judge
from vllm_pasta.verify.models import SHAPES, Size, save_shape
from vllm_pasta.verify.oracle import Oracle
from vllm_pasta.verify.requests import mixed
from vllm_pasta.verify.throughput import KINDS, Row, Workload


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_llama(tmp_path_factory.mktemp("llama"), layers=2)


@pytest.fixture(scope="module")
def requests(model):
    return mixed(Size.of(model), count=8, longest=60, max_tokens=6)


def answers(model, requests, dtype=torch.float32, is_steered=True):
    """What an engine of that dtype would say; without steering, if so told."""
    oracle = Oracle(model, dtype)
    outputs = []
    for request in requests:
        steering = request.steering if is_steered else None
        tokens, rows = oracle.generate(request.prompt, request.max_tokens, steering)
        values = [
            {str(int(i)): float(v) for v, i in zip(*row.topk(20), strict=True)} for row in rows
        ]
        outputs.append({"tokens": [tokens], "logprobs": [values], "cached": 0})
    return outputs


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_exact_answers_pass(dtype, model, requests):
    outputs = answers(model, requests, getattr(torch, dtype))
    comparison = Judge(model, dtype).compare(requests, outputs)
    assert comparison.problems() == []
    assert comparison.steered.tokens == 36
    assert comparison.plain.tokens == 12


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_unsteered_answers_do_not(dtype, model, requests):
    outputs = answers(model, requests, getattr(torch, dtype), is_steered=False)
    problems = Judge(model, dtype).compare(requests, outputs).problems()
    assert any(problem.startswith("steered: mean error") for problem in problems)
    if dtype == "float32":
        assert "tokens are equal" in problems[0]


def test_another_requests_steering_does_not(model, requests):
    """As if two rows of a batch were taken for each other."""
    outputs = answers(model, requests)
    outputs[1], outputs[2] = outputs[2], outputs[1]
    assert Judge(model, "float32").compare(requests, outputs).problems()


def test_steering_that_changes_nothing_proves_nothing(model, requests):
    alpha = {"alpha": 0.9999, "share": None, "spans": [[3, 6]]}
    weak = [
        type(r)(r.prompt, r.max_tokens, r.emphasis and {**r.emphasis, **alpha}) for r in requests
    ]
    (problem,) = Judge(model, "float32").compare(weak, answers(model, weak)).problems()
    assert "would hide" in problem


def test_sampled_tokens_need_not_be_first_choices(model, requests):
    outputs = answers(model, requests)
    ids = list(map(int, outputs[0]["logprobs"][0][-1]))
    outputs[0]["tokens"][0][-1] = ids[1]
    judge = Judge(model, "float32")
    assert "11 of 12" in judge.compare(requests, outputs).problems()[0]
    assert judge.compare(requests, outputs, is_greedy=False).problems() == []


def test_requests():
    """Steered and plain ones share prompts; some come in chunks; no two are steered alike, and
    every way of the kernels is met, by one strength and by several."""
    size = Size(4, tuple(range(4)), heads=8, kv_heads=2, head_size=64, vocab=256)
    requests = mixed(size)
    assert len(requests) > run.SLOTS
    assert [r.emphasis is None for r in requests] == [True, False, False, False] * 6
    assert requests[0].prompt == requests[1].prompt
    assert any(len(r.prompt) > run.CHUNK_TOKENS for r in requests)
    assert len({json.dumps(r.emphasis) for r in requests}) == 19
    met = set()
    for request in requests:
        if request.steering is None:
            continue
        assert all(0 <= start < end <= len(request.prompt) for start, end in request.steering.spans)
        asked = Emphasis.parse({"emphasis": request.emphasis})
        given = zip(asked.spans, asked.alphas or [1.0] * len(asked.spans), strict=True)
        assert list(given) == list(
            zip(request.steering.spans, request.steering.factors, strict=True)
        )
        if asked.share is not None:
            met.add("share")
            continue
        above = {factor > asked.alpha for factor in (1.0, *asked.alphas)}
        way = "direct" if len(above) > 1 else "adds" if True in above else "subtracts"
        met.add((way, "several" if len(set(asked.alphas)) > 1 else "one"))
    ways = {(way, "several") for way in ("direct", "adds", "subtracts")}
    assert met >= {"share", ("adds", "one"), ("subtracts", "one"), *ways}
    assert mixed(size) == requests


def test_configurations():
    """A GPU runs both model runners with graphs; a CPU runs bf16 only where that is fast."""
    gpu = run.configurations(run.Machine("", True, True))
    assert [env["VLLM_USE_V2_MODEL_RUNNER"] for _, env in gpu.values()] == ["1", "0"]
    assert not any(llm.get("enforce_eager") for llm, _ in gpu.values())
    assert list(run.configurations(run.Machine("", False, True))) == ["fp32", "bf16"]
    assert list(run.configurations(run.Machine("", False, False))) == ["fp32"]


def test_large_models_are_replaced(tmp_path):
    """The oracle checks what it has room for, and the report says which model that was."""
    cpu, small = run.Machine("", False, True), save_shape("tiny", tmp_path / "tiny")
    model, note = run.exact_model(run.Options(str(small)), cpu, tmp_path)
    assert (model, note) == (str(small), f"exactness: {small} itself")
    large = save_shape("qwen3-8b", tmp_path / "large")
    model, note = run.exact_model(run.Options(str(large)), cpu, tmp_path)
    assert model == tmp_path / "tiny-llama"
    assert "too large for the reference here" in note


@pytest.mark.parametrize(
    ("name", "parameters"), [("smollm2-135m", 135e6), ("qwen3-0.6b", 0.6e9), ("qwen3-8b", 8.2e9)]
)
def test_shapes(name, parameters, tmp_path):
    save_shape(name, tmp_path)
    assert run.num_parameters(str(tmp_path)) == pytest.approx(parameters, rel=0.02)
    assert Size.of(tmp_path).layers == SHAPES[name]["num_hidden_layers"]


def test_workload():
    """Steered and plain batches of one seed have the same prompts; the emphasis is as asked."""
    size = Size(10, tuple(range(10)), heads=10, kv_heads=2, head_size=64, vocab=256)
    workload = Workload("", 4, 100, 2, emphasised_tokens=20)
    plain, steered = (workload.batch(3, size, is_steered) for is_steered in (False, True))
    assert [r.prompt for r in plain] == [r.prompt for r in steered]
    assert all(r.emphasis is None for r in plain)
    emphasis = steered[0].emphasis
    assert [len(heads) for heads in emphasis["heads"].values()] == [1, 1, 1]
    assert len({json.dumps(r.emphasis) for r in steered}) == 1
    distinct = Workload("", 4, 100, 2, is_distinct=True).batch(3, size, True)
    assert len({json.dumps(r.emphasis) for r in distinct}) == 4


def test_report(capsys):
    row = Row(Workload("some heads", 2, 10, 5), {key: [1.0, 3.0, 2.0] for key in KINDS}, 1.0, 0.5)
    report = run.Report("a device", {"vllm": "0.32.0"}, rows=[row])
    report.engines["one"] = {
        "runner": "V1", "backends": ["CPU_ATTN"], "dtype": "float32", "graphs": "NONE",
        "compile": "NONE", "start_s": 3.0,
    }  # fmt: skip
    report.checks.append(run.Check("what holds", True, "figures"))
    assert report.is_ok
    report.checks.append(run.Check("what does not", False, "[why]"))
    assert not report.is_ok
    show(json.loads(json.dumps(report.to_json())))
    shown = capsys.readouterr().out
    for words in ("✓  what holds", "✗  what does not  [why]", "NOT everything holds", "CPU_ATTN"):
        assert words in " ".join(shown.split(" "))
    assert report.to_json()["throughput"][0]["ratio_steered"] == 1.0
