"""Every request is steered as asked or refused with a reason, before it runs."""

import itertools
import json
import math
import os
import random
from collections import Counter
from copy import copy

import pytest
import vllm
from pydantic import ValidationError
from specs import TEXTS, likely_spec, random_prompts, random_spec
from vllm.entrypoints.openai.completion.protocol import CompletionRequest
from vllm.exceptions import VLLMValidationError

import vllm_pasta
from vllm_pasta import EmphasisError, HeadSetError, UnsupportedError
from vllm_pasta.errors import ConfigError
from vllm_pasta.integration.config import PastaConfig
from vllm_pasta.integration.frontend.conversation import rendering
from vllm_pasta.integration.frontend.middleware import rewrite
from vllm_pasta.request.emphasis import Emphasis
from vllm_pasta.request.head_sets.library import bundled
from vllm_pasta.request.resolution import WIRE_KEY, ResolvedEmphasis
from vllm_pasta.verify.oracle import Steering

PROMPT = "Name three colours. Answer in JSON. Be brief."
MESSAGES = [{"role": "user", "content": PROMPT}]
HEADS = {layer: list(heads) for layer, heads in bundled()["smollm2-135m-instruct"].layers}
BUNDLED = ", ".join(sorted(bundled()))
FITTING = ", ".join(sorted(name for name in bundled() if name.startswith("smollm2")))


def params(emphasis=None, **options):
    extra_args = {"emphasis": emphasis} if emphasis is not None else None
    return vllm.SamplingParams(
        **{"temperature": 0, "max_tokens": 8, "extra_args": extra_args, **options}
    )


@pytest.fixture(scope="module")
def generate(smollm2_engine):
    def run(prompt, sampling_params):
        (request,) = smollm2_engine.generate(prompt, sampling_params, use_tqdm=False)
        return list(request.outputs[0].token_ids)

    return run


@pytest.fixture(scope="module")
def oracle_tokens(smollm2_oracle):
    def run(ids, spans, alpha=0.01, heads=HEADS):
        steering = Steering(spans, heads, alpha, len(ids))
        return smollm2_oracle.generate(ids, 8, steering, stop_ids=(2,))[0]

    return run


@pytest.fixture(scope="module")
def tokenizer(smollm2_engine):
    return smollm2_engine.get_tokenizer()


def span_of(tokenizer, text, part):
    """Token range of ``part`` in ``text``, by what each token decodes to."""
    ids = tokenizer(text).input_ids
    ends = [len(tokenizer.decode(ids[: i + 1])) for i in range(len(ids))]
    start = text.index(part)
    inside = [
        i for i, end in enumerate(ends) if end > start and (i and ends[i - 1]) < start + len(part)
    ]
    return inside[0], inside[-1] + 1


def test_every_way_to_ask(generate, oracle_tokens, tokenizer):
    """extra= and extra_args=, string, list, object, JSON string, flat keys: the same steering."""
    ids = tokenizer(PROMPT).input_ids
    span = span_of(tokenizer, PROMPT, "Answer in JSON.")
    expected = oracle_tokens(ids, [span])
    assert expected != generate(PROMPT, params())
    part = "Answer in JSON."
    for emphasis in (part, [part], {"text": part}, {"text": [part]}, {"spans": [span]},
                     json.dumps({"text": part}), {"text": part, "alpha": 0.01},
                     {"text": part, "heads": "smollm2-135m-instruct"},
                     {"text": part, "heads": {str(k): v for k, v in HEADS.items()}}):  # fmt: skip
        assert generate(PROMPT, params(emphasis)) == expected, emphasis
    ours = vllm_pasta.SamplingParams(temperature=0, max_tokens=8, extra={"emphasis": part})
    assert isinstance(ours, vllm.SamplingParams)
    assert generate(PROMPT, ours) == expected
    assert generate({"prompt_token_ids": ids}, params(part)) == expected
    flat = {"emphasis": part, "emphasis_alpha": 0.5, "emphasis_heads": json.dumps({"22": [1, 2]})}
    assert generate(PROMPT, params(extra_args=flat)) == oracle_tokens(
        ids, [span], 0.5, {22: [1, 2]}
    )


def test_params_are_not_changed(generate):
    """One object for many prompts: each prompt's tokens are found anew."""
    shared = params("JSON")
    generate("JSON it is.", shared)
    assert shared.extra_args == {"emphasis": "JSON"}
    generate("It is in the end always JSON.", shared)


def test_chat(smollm2_engine, tokenizer, oracle_tokens):
    """Text is searched after the chat template; the first occurrence counts."""
    text = tokenizer.apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=True)
    ids = tokenizer(text, add_special_tokens=False).input_ids
    (request,) = smollm2_engine.chat(MESSAGES, params("Answer in JSON."), use_tqdm=False)
    assert request.prompt_token_ids == ids
    span = span_of(tokenizer, text, "Answer in JSON.")
    assert list(request.outputs[0].token_ids) == oracle_tokens(ids, [span])


REFUSED = {
    "text not in the prompt": ("Answer in XML.", r"'Answer in XML.' is not in the prompt; closest"),
    "span past the prompt": ({"spans": [[0, 99]]}, r"spans\[0\]: expected an end of at most \d+"),
    "negative index": ({"spans": [[-3, -1]]}, r"spans\[0\].*got \[-3, -1\]"),
    "reversed span": ({"spans": [[4, 2]]}, r"spans\[0\].*got \[4, 2\]"),
    "unknown field": ({"txt": "JSON"}, r"unknown field 'txt'"),
    "alpha": ({"text": "JSON", "alpha": -1}, r"emphasis.alpha.*got -1"),
    "share": ({"text": "JSON", "share": 1}, r"emphasis.share.*above 0 and below 1, got 1"),
    "share and alpha": ({"text": "JSON", "share": 0.3, "alpha": 0.1}, r"expected `alpha` or"),
    "share and a mark's strength": (
        {"text": {"text": "JSON", "alpha": 0.1}, "share": 0.3},
        r"a mark has a strength of its own.*the request's share 0.3: give the request an",
    ),
    "unknown head set": (
        {"text": "JSON", "heads": "nope"},
        rf"'nope'; known head sets that fit: {FITTING}; this model has 30 layers of 9 ",
    ),
    "layer out of range": ({"text": "JSON", "heads": {"30": [0]}}, r"30 layers \(0 to 29\)"),
    "head out of range": ({"text": "JSON", "heads": {"3": [9]}}, r"9 query heads \(0 to 8\)"),
    "resolved form from outside": (None, r"reserved"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case, generate):
    """A ValueError, and the engine goes on."""
    emphasis, words = REFUSED[case]
    request = params(emphasis) if emphasis else params(extra_args={WIRE_KEY: {"spans": [[0, 1]]}})
    with pytest.raises(ValueError, match=words) as refused:
        generate(PROMPT, request)
    assert isinstance(refused.value, EmphasisError)
    assert isinstance(refused.value, vllm.exceptions.VLLMClientError)
    assert generate("One, two,", params())


def test_no_head_set(small_batches):
    """Neither in the request nor configured."""
    with pytest.raises(ValueError, match=r"no head set.*4 layers of 4 query heads"):
        small_batches.generate(
            {"prompt_token_ids": [1, 2, 3]}, params({"spans": [[0, 1]]}), use_tqdm=False
        )


def test_no_tokenizer(small_batches):
    with pytest.raises(ValueError, match="without a tokenizer"):
        small_batches.generate(
            {"prompt_token_ids": [1, 2, 3]},
            params({"text": "x", "heads": {"0": [0]}}),
            use_tqdm=False,
        )


def test_not_switched_on(engine, tiny):
    """Installed, but the engine was not asked to honour emphasis: refused, and plain is served."""
    llm = engine(tiny, skip_tokenizer_init=True, additional_config={})
    prompt = {"prompt_token_ids": [1, 2, 3]}
    with pytest.raises(ValueError, match="--plugin pasta"):
        llm.generate(prompt, params({"spans": [[0, 1]]}), use_tqdm=False)
    assert llm.generate(prompt, params(detokenize=False), use_tqdm=False)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"speculative_config": {"method": "ngram_gpu", "num_speculative_tokens": 2}},
         "method ngram_gpu, not ngram, draft_model, eagle, eagle3, mtp"),
        ({"kv_cache_dtype": "fp8"}, "the KV cache is fp8"),
        ({"kv_sharing_fast_prefill": True}, "kv_sharing_fast_prefill"),
        ({"runner": "pooling"}, "the runner is pooling"),
    ],
)  # fmt: skip
def test_engine_that_cannot_steer_does_not_start(options, reason, tiny):
    from conftest import start

    with pytest.raises(UnsupportedError, match=reason):
        start(tiny, skip_tokenizer_init=True, **options)


@pytest.mark.parametrize(
    ("variable", "reason"),
    [("VLLM_BATCH_INVARIANT", "BATCH_INVARIANT"), ("VLLM_USE_RUST_FRONTEND", "Rust front end")],
)
def test_environment_that_cannot_steer(variable, reason, tiny, monkeypatch):
    from conftest import start

    monkeypatch.setenv(variable, "1")
    with pytest.raises(UnsupportedError, match=reason):
        start(tiny, skip_tokenizer_init=True)


MODELS = {
    "sparse attention: an indexer": ("deepseek_v32", "DeepseekV32ForCausalLM"),
    "mixes MLA with recurrences": ("deepseek_v2", "DeepseekV2ForCausalLM"),
    "no attention heads to steer": ("mamba", "MambaForCausalLM"),
    "an encoder-decoder": ("whisper", "WhisperForConditionalGeneration"),
    "runner is pooling": ("bert", "BertModel"),
    "a diffusion model": ("llama", "LlamaForCausalLM"),
}


@pytest.mark.parametrize("reason", MODELS)
def test_model_that_cannot_be_steered(reason, tmp_path, monkeypatch):
    """Its configuration tells, before weights are read: there are none."""
    from transformers import AutoConfig
    from vllm import EngineArgs

    from vllm_pasta.integration import support

    model_type, architecture = MODELS[reason]
    AutoConfig.for_model(model_type, architectures=[architecture]).save_pretrained(tmp_path)
    config = EngineArgs(str(tmp_path), skip_tokenizer_init=True).create_engine_config()
    if "diffusion" in reason:  # which vLLM itself refuses, but on Model Runner V2
        config.model_config.is_diffusion = True
    if "recurrences" in reason:  # vLLM's classes of such models import what only GPUs have
        monkeypatch.setattr(type(config.model_config), "is_hybrid", True)
    with pytest.raises(UnsupportedError, match=reason):
        support.check_engine(config)


def test_hybrid_class_with_attention_alone(tmp_path):
    """As Granite 4 Micro: nothing that hybrid models are refused for, and heads in all layers."""
    from models import tiny_model
    from vllm import EngineArgs

    from vllm_pasta.integration import support

    model = str(tiny_model(tmp_path, "granitemoehybrid", layer_types=["attention"] * 4))
    ngram = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3}
    args = EngineArgs(model, skip_tokenizer_init=True, speculative_config=ngram)
    config = args.create_engine_config()
    support.check_engine(config)
    assert support.shape_of(config).attention_layers == (0, 1, 2, 3)


def test_recurrence_that_vllm_cannot_run(tmp_path):
    """Mamba 1: plain vLLM starts, and ends with the first request."""
    from conftest import start
    from models import tiny_model

    with pytest.raises(
        UnsupportedError, match="is Mamba 1, for which vLLM has no operator on a CPU"
    ):
        start(tiny_model(tmp_path, "jamba"), skip_tokenizer_init=True)


@pytest.mark.parametrize(
    ("reason", "options"),
    [
        (
            "hybrid, and no test shows that its KV connector keeps the states",
            {"kv_transfer_config": {"kv_connector": "NixlConnector", "kv_role": "kv_both"}},
        ),
        (
            "hybrid, and no test shows that speculative decoding takes the states",
            {
                "speculative_config": {
                    "method": "ngram",
                    "num_speculative_tokens": 3,
                    "prompt_lookup_max": 3,
                }
            },
        ),
        (
            "hybrid, and no test shows it steered in pipeline stages",
            {"pipeline_parallel_size": 2, "distributed_executor_backend": "mp"},
        ),
    ],
)
def test_hybrid_with_what_nothing_shows(reason, options, tmp_path):
    """What other models may have, and a hybrid one alone is not refused for."""
    from models import tiny_model
    from vllm import EngineArgs

    from vllm_pasta.integration import support

    model = str(tiny_model(tmp_path, "granitemoehybrid"))
    config = EngineArgs(model, skip_tokenizer_init=True, **options).create_engine_config()
    with pytest.raises(UnsupportedError, match=reason):
        support.check_engine(config)
    support.check_engine(EngineArgs(model, skip_tokenizer_init=True).create_engine_config())


def test_other_platform_and_model_runner_v2(small_batches, monkeypatch):
    """Not reached on a CPU, so what vLLM says of itself is changed."""
    from types import SimpleNamespace

    from vllm_pasta.integration import support
    from vllm_pasta.integration.refusals import refusal

    config = small_batches.llm_engine.vllm_config
    rocm = SimpleNamespace(is_cpu=lambda: False, is_cuda=lambda: False, device_type="rocm")
    monkeypatch.setattr(refusal, "current_platform", rocm)
    monkeypatch.setattr(type(config), "use_v2_model_runner", True)
    reasons = "the platform is rocm, not cpu or cuda; Model Runner V2 is in use"
    with pytest.raises(UnsupportedError, match=reasons):
        support.check_engine(config)


def test_requests_that_cannot_be_steered(small_batches):
    """A prompt that arrives in parts, and pooling: refused; the first is admitted without."""
    processor = small_batches.llm_engine.input_processor
    prompt = {"type": "token", "prompt_token_ids": [5, 6, 7]}
    emphasis = {"spans": [[0, 1]], "heads": {"0": [0]}}

    def process(sampling_params, **options):
        return processor.process_inputs(
            "0", dict(prompt), sampling_params, supported_tasks=("generate", "embed"), **options
        )

    assert process(params(detokenize=False), resumable=True).resumable
    with pytest.raises(EmphasisError, match="a prompt that arrives in parts"):
        process(params(emphasis), resumable=True)
    pooling = vllm.PoolingParams(task="embed", extra_kwargs={"emphasis": emphasis})
    with pytest.raises(EmphasisError, match="got a pooling request"):
        process(pooling)


def test_layers_that_the_configuration_does_not_say(small_batches, monkeypatch):
    """A head set could not be checked against them; nor where a layer's name has no number."""
    from vllm_pasta.integration import support
    from vllm_pasta.request.shape import ModelShape

    config = small_batches.llm_engine.vllm_config
    support.check_layers(config)
    monkeypatch.setattr(support, "shape_of", lambda config: ModelShape(4, 4, (0, 2)))
    reason = "has attention heads in layers 0-3, and its configuration says 0, 2, so a head set"
    with pytest.raises(UnsupportedError, match=reason):
        support.check_layers(config)
    for name in ("model.attention", "model.0.layers.1.attention"):
        with pytest.raises(UnsupportedError, match=f"layer {name} .* by one number"):
            support.layer_index(name)


@pytest.mark.parametrize(
    ("where", "attribute", "value", "reason"),
    [
        ("impl", "is_fp8_kv_cache", True, "has an fp8 KV cache"),
        ("impl", "attn_type", "encoder", "has attention of type encoder"),
        ("impl", "num_heads", 2, "has 2 query heads, not 4"),
        ("layer", "head_size_v", 16, "values of another head size"),
        ("layer", "isa", "neon", "has KV cache layout neon"),
    ],
)
def test_layer_that_cannot_be_steered(where, attribute, value, reason, small_batches):
    """Found in the worker, once the layers are there."""
    from vllm.config import get_layers_from_vllm_config
    from vllm.model_executor.layers.attention import Attention

    from vllm_pasta.integration.support import check_layer

    config = small_batches.llm_engine.vllm_config
    layer = copy(next(iter(get_layers_from_vllm_config(config, Attention).values())))
    layer.impl = copy(layer.impl)
    check_layer("layers.0", layer, 4)
    setattr(layer if where == "layer" else layer.impl, attribute, value)
    with pytest.raises(UnsupportedError, match=f"layer layers.0 .*{reason}"):
        check_layer("layers.0", layer, 4)


@pytest.mark.parametrize(
    ("config", "error", "words"),
    [
        ({"heads": "/no/such/file.json"}, HeadSetError, "file.json: cannot be read"),
        ({"heads": "{}"}, HeadSetError, f"known by name: {BUNDLED}$"),
        ({"heads": {"x": [1]}}, HeadSetError, "layer"),
        ({"heads": 3}, ConfigError, "got 3"),
        ({"alpha": 0}, ConfigError, "alpha: expected a finite number above 0"),
        ({"heads": {"heads": {"1": [0]}, "alpha": 0}}, HeadSetError, "alpha of the head set"),
        ({"head_sets": {"auto": "a.json"}}, ConfigError, "'auto' is the name of what a search"),
        ({"share": 1}, ConfigError, "share: expected a number above 0 and below 1, got 1"),
        ({"share": 0.3, "alpha": 0.1}, ConfigError, "expected alpha or share, got both"),
        ({"markup_roles": "user"}, ConfigError, "markup_roles: expected a list of roles"),
        ({"markup": "html"}, ConfigError, "markup: expected one of tag, markdown, stars, off"),
        ({"beta": 1}, ConfigError, "unknown field 'beta'; known are heads, alpha, head_sets"),
        ({"head_sets": ["a"]}, ConfigError, "name: path"),
        ("heads.json", ConfigError, "expected an object"),
    ],
)
def test_bad_configuration(config, error, words):
    """The server does not start, and says why."""
    with pytest.raises(error, match=words):
        PastaConfig.parse(config)


def test_head_set_that_does_not_fit(tiny):
    from conftest import start

    with pytest.raises(HeadSetError, match="this model has 4 layers"):
        start(
            tiny,
            skip_tokenizer_init=True,
            additional_config={"pasta": {"heads": "smollm2-135m-instruct"}},
        )


def test_configured_names(tmp_path):
    (tmp_path / "a.json").write_text('{"1": [0]}')
    config = PastaConfig.parse({"head_sets": {"mine": str(tmp_path / "a.json")}, "heads": "mine"})
    assert config.heads == config.head_sets["mine"] == vllm_pasta.HeadSet.from_json({"1": [0]})
    assert config.alpha is None
    assert config.alpha_of(config.heads, None) == (0.01, "default")


@pytest.mark.parametrize(
    ("config", "emphasis", "share"),
    [
        ({"share": 0.3}, Emphasis(), (0.3, "server")),
        ({"share": 0.3}, Emphasis(share=0.4), (0.4, "request")),
        ({"share": 0.3}, Emphasis(alpha=0.1), (None, "request")),
        ({"alpha": 0.3}, Emphasis(share=0.4), (0.4, "request")),
        ({"alpha": 0.3}, Emphasis(), (None, "server")),
    ],
)
def test_whose_share(config, emphasis, share):
    """What the request says, share or alpha, goes before what the server says."""
    assert PastaConfig.parse(config).share_of(emphasis) == share


def test_extra_and_extra_args():
    both = vllm_pasta.SamplingParams(extra={"emphasis": "a"}, extra_args={"theirs": 1})
    assert both.extra_args == {"emphasis": "a", "theirs": 1}
    assert both.extra is None
    with pytest.raises(ValueError, match="emphasis"):
        vllm_pasta.SamplingParams(extra={"emphasis": "a"}, extra_args={"emphasis": "b"})


def test_fuzz(smollm2_engine):
    """Random bodies, by the way that a server's go but for HTTP: resolved such that a kernel can
    take it, or refused; VLLM_PASTA_FUZZ says how many."""
    count = int(os.environ.get("VLLM_PASTA_FUZZ", "1500"))
    rng = random.Random(int(os.environ.get("VLLM_PASTA_FUZZ_SEED", "0")))
    processor = smollm2_engine.llm_engine.input_processor
    admission, renderer = processor.pasta_admission, processor.renderer
    outcomes = Counter()
    for _ in range(count):
        if rng.random() < 0.4:
            prompt, emphasis = random_prompts(rng)
            xargs = {"emphasis": emphasis}
        else:
            prompt, spec = rng.choice(TEXTS), rng.choice((random_spec, likely_spec))(rng)
            xargs = rng.choice(({"emphasis": spec}, {"emphasis": "Ann", "emphasis_heads": spec},
                                {"vllm_xargs": {"emphasis": json.dumps(spec)}}))  # fmt: skip
        body = json.dumps({"model": "m", "prompt": prompt, **xargs}).encode()
        try:
            request = CompletionRequest.model_validate_json(rewrite(body)[0])
            sampling = request.to_sampling_params(4, {})
            texts = prompt if isinstance(prompt, list) else [prompt]
            with rendering(request.vllm_xargs or {}):
                prompts = renderer.render_cmpl(
                    [{"prompt": text} for text in texts], renderer.default_cmpl_tok_params
                )
            wires = [(p, admission.admit(copy(sampling), p).extra_args or {}) for p in prompts]
        except (EmphasisError, ValidationError, VLLMValidationError):  # all are 400
            outcomes["refused"] += 1
            continue
        assert len(wires) == len(texts)
        for rendered, extra in wires:
            wire = extra.get(WIRE_KEY)
            outcomes["steered" if wire else "plain"] += 1
            if wire:
                assert not any(key.startswith("emphasis") for key in extra), body
                resolved = ResolvedEmphasis.from_wire(wire)
                length = len(rendered["prompt_token_ids"])
                ends = [0, *itertools.chain(*resolved.spans)]
                assert all(a <= b for a, b in itertools.pairwise(ends)), body
                assert ends[-1] <= resolved.prompt_len == length, body
                assert all(0 < factor < math.inf for factor in resolved.factors), body
                assert 0 < resolved.alpha < math.inf, body
                admission.shape.check(resolved.heads)
    assert min(outcomes["steered"], outcomes["refused"]) > count / 10
    print(f"fuzz in process: {count} bodies, {dict(outcomes)}")
