"""Speculative decoding: the target is steered, in every row that verifies a draft.

Broken by: losing the row tracker (vLLM drops logits-processor plugins here), taking a draft's layer
for one of the target's, whose names are alike, scaling generated tokens when several are verified
at once.
"""

from itertools import pairwise

import drafts
import pytest
from models import tiny_model
from test_exact import CASES, check, run
from test_exact import expected as expected  # a fixture
from vllm.config import get_layers_from_vllm_config
from vllm.model_executor.layers.attention import Attention

from vllm_pasta.verify.oracle import Oracle

OPTIONS = {
    "skip_tokenizer_init": True,
    "block_size": 32,
    "max_num_seqs": 4,
    "max_num_batched_tokens": 64,
    "disable_log_stats": False,
}
FEW = (
    "plain", "span at the first token", "span at the last token", "alpha 20", "one head",
    "span across a chunk's edge", "long generation", "strengths: overlapping",
)  # fmt: skip
"""Cases for drafts that are seldom right, so that each takes its time."""


@pytest.fixture(scope="module")
def mimo(tmp_path_factory):
    """A random Qwen 2 with an MTP layer, and what it is to say to `FEW`."""
    model = drafts.with_mtp(tiny_model(tmp_path_factory.mktemp("mimo"), "qwen2"))
    oracle = Oracle(model)
    cases = {name: CASES[name] for name in FEW}
    return model, {
        name: oracle.generate(case.prompt, case.max_tokens, case.steering)
        for name, case in cases.items()
    }


@pytest.fixture(params=["draft model", "ngram", "eagle", "eagle3", "mtp"])
def drafted(request, engine, tiny, expected, tmp_path_factory):
    """An engine, and what it is to say to some of the cases."""
    model, answers, config = tiny, expected, {"method": request.param}
    match request.param:
        case "ngram":
            config |= {"prompt_lookup_min": 1, "prompt_lookup_max": 3}
        case "draft model":  # says what the plain model would: some is right, some is not
            config = {"method": "draft_model", "model": str(tiny)}
        case "eagle" | "eagle3":
            config["model"] = str(
                getattr(drafts, request.param)(tiny, tmp_path_factory.mktemp("draft"))
            )
            answers = {name: expected[name] for name in FEW}
        case "mtp":
            model, answers = request.getfixturevalue("mimo")
    speculative = {**config, "num_speculative_tokens": 3}
    return engine(model, speculative_config=speculative, **OPTIONS), answers


def metrics(llm):
    return {m.name.removeprefix("vllm:"): m.value for m in llm.get_metrics() if hasattr(m, "value")}


def test_equals_the_oracle(drafted):
    """Twice: the second time from the prefix cache, whose blocks hold the draft's KV too."""
    llm, expected = drafted
    counts = [metrics(llm)]
    for _ in range(2):
        for name, output in zip(expected, run(llm, [CASES[n] for n in expected]), strict=True):
            check(output, expected[name])
        counts.append(metrics(llm))
    proposed, accepted, hits = (
        [after[name] - before[name] for before, after in pairwise(counts)]
        for name in (
            "spec_decode_num_draft_tokens", "spec_decode_num_accepted_tokens", "prefix_cache_hits"
        )
    )  # fmt: skip
    assert 0 < accepted[0] < proposed[0]
    assert hits[1] > hits[0]
    check_layers(llm)


def check_layers(llm):
    """The draft's layers are not steered, though they may be named as if they were the target's."""
    config = llm.llm_engine.vllm_config
    layers = get_layers_from_vllm_config(config, Attention)
    steered = [name for name, layer in layers.items() if layer.impl.layer_index is not None]
    total = config.model_config.get_total_num_hidden_layers()
    assert len(steered) == total
    assert (len(layers) > total) == (config.speculative_config.method != "ngram")  # has no model
