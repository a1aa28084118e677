"""LoRA adapters and emphasis in one batch; the oracle runs each adapter's merged weights.

Broken by: a row that takes its neighbour's emphasis or adapter; KV shared between adapters, or
between emphases of one adapter.
"""

import pytest
from models import lora_adapter, random_ids
from vllm import SamplingParams
from vllm.lora.request import LoRARequest

from vllm_pasta.verify.oracle import Oracle, Steering

PROMPT, SHORT = random_ids(200, 9), random_ids(40, 8)
BLOCK = 32
HEADS = {1: [0, 1], 2: [3]}
ADAPTERS = ("none", "first", "second")
SPANS = (None, [(70, 75)], [(100, 130), (150, 151)])


@pytest.fixture(scope="module")
def llm(engine, tiny):
    """At most 4 requests and 64 tokens a step, two adapters at once.

    And a slot that stays empty: in vLLM 0.32 on CPU, plain or not, a request without an adapter is
    run with the last slot's (index -1, `lora/ops/torch_ops/lora_ops.py`).
    """
    return engine(
        tiny,
        skip_tokenizer_init=True,
        block_size=BLOCK,
        max_num_seqs=4,
        max_num_batched_tokens=64,
        enable_lora=True,
        max_loras=3,
        max_lora_rank=8,
    )


@pytest.fixture(scope="module")
def adapters(tiny, tiny_oracle, tmp_path_factory):
    """Name -> (vLLM's request, the oracle of the merged weights)."""
    known = {"none": (None, tiny_oracle)}
    for i, name in enumerate(ADAPTERS[1:], start=1):
        adapter, merged = lora_adapter(tiny, tmp_path_factory.mktemp(name), seed=i)
        known[name] = (LoRARequest(name, i, str(adapter)), Oracle(merged))
    return known


def params(spans, max_tokens):
    emphasis = spans and {
        "spans": spans,
        "heads": {str(layer): heads for layer, heads in HEADS.items()},
        "alpha": 0.01,
    }
    return SamplingParams(
        temperature=0,
        max_tokens=max_tokens,
        ignore_eos=True,
        detokenize=False,
        extra_args=emphasis and {"emphasis": emphasis},
    )


def expected(oracle, prompt, spans, max_tokens):
    steering = spans and Steering(spans, HEADS, 0.01, len(prompt))
    return oracle.generate(prompt, max_tokens, steering)[0]


def test_one_batch(llm, adapters):
    """Every adapter with every emphasis, long and short, three times the batch's size."""
    short = (None, [(3, 9)])
    cases = [(PROMPT, a, s) for s in SPANS for a in ADAPTERS]
    cases += [(SHORT, a, s) for a in ADAPTERS for s in short]
    outputs = llm.generate(
        [{"prompt_token_ids": prompt} for prompt, *_ in cases],
        [params(spans, 12) for *_, spans in cases],
        lora_request=[adapters[adapter][0] for _, adapter, _ in cases],
        use_tqdm=False,
    )
    found = [list(output.outputs[0].token_ids) for output in outputs]
    for (prompt, adapter, spans), tokens in zip(cases, found, strict=True):
        assert tokens == expected(adapters[adapter][1], prompt, spans, 12), (adapter, spans)
    assert len({tuple(tokens) for tokens in found}) == len(cases)


def test_prefix_cache(llm, adapters):
    """Blocks are shared within an adapter, by the rules of emphasis, and never across."""
    llm.reset_prefix_cache()

    def ask(adapter, spans):
        request, oracle = adapters[adapter]
        (output,) = llm.generate(
            {"prompt_token_ids": PROMPT}, params(spans, 4), lora_request=request, use_tqdm=False
        )
        assert list(output.outputs[0].token_ids) == expected(oracle, PROMPT, spans, 4)
        return output.num_cached_tokens

    assert ask("first", SPANS[1]) == 0
    assert ask("second", SPANS[1]) == 0
    assert ask("none", SPANS[1]) == 0
    assert ask("first", SPANS[1]) == 6 * BLOCK
    assert ask("first", None) == 2 * BLOCK
    assert ask("first", SPANS[2]) == 3 * BLOCK
    assert ask("second", SPANS[2]) == 2 * BLOCK
