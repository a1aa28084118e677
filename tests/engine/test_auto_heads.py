"""`"heads": "auto"`: found once by a process of its own, kept, and served; and a set's own alpha.

One engine starts in the process that searches, and one that serves what it found.
"""

import gc
import os

import pytest
import torch
import vllm
from models import MULTIMODAL, random_ids, tiny_model, tiny_multimodal, worded_llama

import vllm_pasta
from vllm_pasta import HeadSet, cli
from vllm_pasta.errors import HeadSetError, PastaError
from vllm_pasta.profiling import auto as search
from vllm_pasta.profiling.prompts import Prompt
from vllm_pasta.profiling.search import gradients
from vllm_pasta.profiling.search.gradients import GradientModel
from vllm_pasta.request.head_sets import auto
from vllm_pasta.tasks import load
from vllm_pasta.verify.oracle import Oracle, Steering


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """A tiny random Llama that knows the words of the search's tasks; nobody profiled it."""
    texts = []
    for task in map(load, search.TASKS):
        texts += [f"{p.text} {p.target}" for e in list(task.make())[:200] for p in task.probes(e)]
    return worded_llama(tmp_path_factory.mktemp("auto") / "model", texts)


@pytest.fixture(scope="module")
def found(served, tmp_path_factory):
    """A fresh cache folder, and the engine that is started on it with heads "auto"."""
    from conftest import start

    folder = tmp_path_factory.mktemp("cache")
    before = os.environ.get("VLLM_PASTA_CACHE")
    os.environ["VLLM_PASTA_CACHE"] = str(folder)
    try:
        llm = start(served, additional_config={"pasta": {"heads": "auto"}})
        yield llm, auto.load(str(served))
        del llm
        gc.collect()
    finally:
        del os.environ["VLLM_PASTA_CACHE"]
        if before is not None:
            os.environ["VLLM_PASTA_CACHE"] = before


def admission(llm):
    return llm.llm_engine.input_processor.pasta_admission


def test_the_set_that_was_found_is_served(found, served):
    """Requests without heads steer it, with its own alpha: token for token the oracle's."""
    llm, kept = found
    info = kept.provenance
    ranking = info["profiles"]["all"]["ranking"]
    assert 0 < len(kept) == info["top_k"] < 16
    assert sorted(ranking) == sorted(f"{a}.{b}" for a in range(4) for b in range(4))
    assert {f"{a}.{b}" for a, heads in kept.layers for b in heads} == set(ranking[: info["top_k"]])
    config = admission(llm).config
    assert config.heads == config.head_sets["auto"] == kept
    assert config.alpha_of(kept, None) == (kept.alpha, "head set")
    ids, spans = random_ids(60, 3), [(20, 30)]
    extra = {"emphasis": {"spans": [list(span) for span in spans]}}
    params = vllm.SamplingParams(temperature=0, max_tokens=8, extra_args=extra)
    (output,) = llm.generate({"prompt_token_ids": ids}, params, use_tqdm=False)
    steering = Steering(spans, {a: list(b) for a, b in kept.layers}, kept.alpha, len(ids))
    expected, _ = Oracle(served).generate(ids, 8, steering)
    assert list(output.outputs[0].token_ids) == expected


def test_later_starts_search_nothing(found, served, monkeypatch, capsys):
    """Neither a server nor the command, which shows what is kept."""
    _, kept = found
    monkeypatch.setattr("subprocess.Popen", lambda *args, **options: pytest.fail("searched"))
    monkeypatch.setattr(search, "find", lambda *args: pytest.fail("searched"))
    assert auto.ensure(str(served), None, {}) == kept
    assert cli.main(["profile", str(served), "--auto"]) == 0
    printed = capsys.readouterr().out
    assert f"{len(kept)} of 16 heads, α {kept.alpha:g}" in printed
    assert printed.count("(chosen)") == 1


def test_a_model_without_plain_attention(tmp_path):
    """Soft caps, sinks: refused, not ranked by estimates of another model."""
    tiny_model(tmp_path, "gemma2")
    prompt = Prompt(random_ids(24, 1), ((4, 9),), [], [5, 6], [])
    with pytest.raises(PastaError, match=r"plain softmax attention alone.*search full or halving"):
        GradientModel(str(tmp_path)).estimate([prompt], 0.1)


@pytest.mark.parametrize("kind", ["granitemoehybrid", "deepseek_v3", "qwen2_5_vl"])
def test_estimates_for_other_kinds_of_models(kind, tmp_path):
    """Hybrid ones, MLA and multimodal ones: for weak steering, what steering really does."""
    (tiny_multimodal if kind in MULTIMODAL else tiny_model)(tmp_path, kind)
    prompt = Prompt(random_ids(40, 1), ((5, 12),), [3, 4], [3], [4])
    estimates = GradientModel(str(tmp_path)).estimate([prompt], 0.99)
    layers = (1, 3) if kind == "granitemoehybrid" else range(4)
    assert list(estimates) == [(layer, head) for layer in layers for head in range(4)]
    oracle = Oracle(tmp_path)

    def margin(steering=None):
        row = oracle.prompt_logprobs(prompt.ids, steering)[-1]
        return float(row[3] - row[4])

    plain = margin()
    for head in range(4):
        steering = Steering([(5, 12)], {1: [head]}, 0.99, len(prompt.ids))
        assert estimates[1, head] == pytest.approx(margin(steering) - plain, rel=0.1, abs=5e-5)
    assert max(abs(estimates[1, head]) for head in range(4)) > 2e-4


def test_estimates_in_bf16(tmp_path, monkeypatch):
    """Where bf16 is quick the model stays in it: nearly the estimates of fp32."""
    tiny_model(tmp_path, "qwen3", torch.bfloat16)
    prompts = [Prompt(random_ids(n, n), ((4, 9),), [], [5, 6], []) for n in (24, 30)]
    estimates = []
    for quick, dtype in ((False, torch.float32), (True, torch.bfloat16)):
        monkeypatch.setattr(gradients, "own_dtype", lambda quick=quick: quick)
        model = GradientModel(str(tmp_path))
        assert model._model.dtype == dtype
        estimates.append(model.estimate(prompts, 0.1))
    expected, found = estimates
    assert found == pytest.approx(expected, abs=0.2 * max(map(abs, expected.values())))


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU keeps fp16")
def test_fp16_is_computed_in_fp32(tmp_path, monkeypatch):
    """On a CPU fp16 is slow, and small gradients vanish in it, even where bf16 is quick."""
    tiny_model(tmp_path, "qwen3", torch.float16)
    monkeypatch.setattr(gradients, "own_dtype", lambda: True)
    assert GradientModel(str(tmp_path))._model.dtype == torch.float32


def test_several_tasks_together():
    """A head that hurts one task counts against those it helps; each task counts as much."""
    estimates = {"a": {(0, 0): 8.0, (0, 1): 4.0, (1, 0): 0.0}, "b": {(0, 0): -0.1, (0, 1): 0.1}}
    estimates["b"][1, 0] = 0.05
    assert search.combined(estimates) == {(0, 0): 0.0, (0, 1): 0.75, (1, 0): 0.25}


@pytest.mark.parametrize(
    ("change", "taken"),
    [
        ({}, True),
        ({"names": ["another"]}, False),
        ({"layers": 5}, False),
        ({"hidden_size": 1}, False),
    ],
)
def test_the_set_for_the_served_model_is_taken(engine, tiny, monkeypatch, change, taken):
    """Where no heads are configured and the model is that very one; else there is no default."""
    from vllm_pasta.integration.frontend.admission import Admission

    llm = engine(tiny, skip_tokenizer_init=True, additional_config={"pasta": {}})
    vllm_config = llm.llm_engine.vllm_config
    made_for = {
        "names": [tiny.name.upper()], "model_type": "llama", "layers": 4, "query_heads": 4,
        "hidden_size": vllm_config.model_config.get_hidden_size(), **change,
    }  # fmt: skip
    given = {"heads": {"1": [2]}, "for": made_for, "chosen": True}
    sets = {"mine": HeadSet.from_json(given, "mine"), "other": HeadSet.from_json({"30": [0]})}
    monkeypatch.setattr("vllm_pasta.integration.config.bundled", lambda: sets)
    started = Admission(vllm_config, lambda: None)
    assert started.config.heads == (sets["mine"] if taken else None)
    assert started.known == (["mine"] if taken or "names" in change else [])
    assert not taken or tiny.name in started.config.origin


HEADS = {"heads": {"1": [0, 2]}, "alpha": 0.2}


class TestOwnAlpha:
    """The request's, else the server's, else the set's own, else 0.01."""

    @pytest.mark.parametrize(
        ("config", "emphasis", "expected"),
        [
            ({"heads": HEADS}, {}, (0.2, "head set")),
            ({"heads": HEADS, "alpha": 0.5}, {}, (0.5, "server")),
            ({"heads": HEADS, "alpha": 0.5}, {"alpha": 0.7}, (0.7, "request")),
            ({"heads": {"1": [0]}}, {}, (0.01, "default")),
            ({"heads": {"1": [0]}}, {"heads": HEADS}, (0.2, "head set")),
            ({}, {"heads": "smollm2-135m-json"}, (0.1, "head set")),
        ],
    )
    def test_order(self, config, emphasis, expected):
        from vllm_pasta.integration.config import PastaConfig

        parsed = PastaConfig.parse(config)
        asked = vllm_pasta.Emphasis.parse({"emphasis": {"text": "a", **emphasis}})
        heads = asked.heads or parsed.heads
        heads = parsed.head_sets[heads] if isinstance(heads, str) else heads
        assert parsed.alpha_of(heads, asked.alpha) == expected

    def test_in_force(self, engine, tiny, tiny_oracle):
        """What is not said is the set's: the same tokens as where the request says it."""
        llm = engine(tiny, skip_tokenizer_init=True, additional_config={"pasta": {}})
        ids = random_ids(50, 7)
        tokens = []
        for emphasis in (
            {"heads": HEADS},
            {"heads": {"1": [0, 2]}, "alpha": 0.2},
            {"heads": {"1": [0, 2]}},
        ):
            params = vllm.SamplingParams(
                temperature=0, max_tokens=6, logprobs=0, detokenize=False,
                extra_args={"emphasis": {"spans": [[10, 20]], **emphasis}},
            )  # fmt: skip
            (output,) = llm.generate({"prompt_token_ids": ids}, params, use_tqdm=False)
            (of,) = output.outputs
            tokens.append((list(of.token_ids), of.cumulative_logprob))
        assert tokens[0] == tokens[1]
        assert tokens[0][1] != tokens[2][1]


def test_head_sets_keep_their_alpha_in_a_file(tmp_path):
    HeadSet.from_json(HEADS).save(tmp_path / "a.json")
    assert HeadSet.load(tmp_path / "a.json").alpha == 0.2


def test_a_search_that_fails(tmp_path, monkeypatch):
    """The error has the reason, and what to do instead."""
    monkeypatch.setenv("VLLM_PASTA_CACHE", str(tmp_path / "cache"))
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "config.json").write_text("{}")
    (broken / "model.safetensors").write_bytes(b"weights")
    with pytest.raises(HeadSetError, match=r"no heads were found.*Name a head set.*status 1") as e:
        auto.ensure(str(broken), None, {})
    assert "no message" not in str(e.value)
