"""KV is never shared between differently steered requests, and shared as far as it may be."""

import pytest
from models import random_ids
from vllm import SamplingParams

from vllm_pasta import HeadSet, ResolvedEmphasis
from vllm_pasta.integration.frontend.admission import Admitted
from vllm_pasta.integration.scheduler.cache_keys import block_key
from vllm_pasta.request.resolution import WIRE_KEY, strongest
from vllm_pasta.verify.oracle import Steering

PROMPT = random_ids(200, 9)
BLOCK = 32
HEADS = {"1": [0, 1], "2": [3]}
DIGEST = "a1269ab512a9868eef6d6c8f0fc22091"  # of HEADS and alpha 0.01; must never change
STEERED = {"spans": [[70, 75]], "heads": HEADS, "alpha": 0.01}


def extra_args(emphasis, prompt_len, factors):
    """The request, with a factor for each span if there are any."""
    if factors is None:
        without = "alpha" if "share" in emphasis else "share"
        return {"emphasis": {key: emphasis[key] for key in emphasis.keys() - {without}}}
    marks = zip(map(tuple, emphasis["spans"]), factors, strict=True)
    spans, factors = strongest(marks, emphasis["alpha"])
    heads = HeadSet.from_json(emphasis["heads"])
    resolved = ResolvedEmphasis(spans, emphasis["alpha"], heads, prompt_len, factors)
    return {WIRE_KEY: Admitted(resolved.to_wire())}


@pytest.fixture
def ask(small_batches, tiny_oracle):
    """Runs one request on an engine with an empty prefix cache; checks its tokens; counts hits."""
    small_batches.reset_prefix_cache()

    def run(emphasis, prompt=PROMPT, max_tokens=4, factors=None):
        params = SamplingParams(
            temperature=0,
            max_tokens=max_tokens,
            ignore_eos=True,
            detokenize=False,
            extra_args=emphasis and extra_args(emphasis, len(prompt), factors),
        )
        (request,) = small_batches.generate({"prompt_token_ids": prompt}, params, use_tqdm=False)
        steering = emphasis and Steering(
            emphasis["spans"],
            {int(layer): heads for layer, heads in emphasis["heads"].items()},
            emphasis["alpha"],
            len(prompt),
            factors,
            emphasis.get("share"),
        )
        tokens = list(request.outputs[0].token_ids)
        assert tokens == tiny_oracle.generate(prompt, max_tokens, steering)[0]
        run.tokens = tokens
        return request.num_cached_tokens

    return run


def test_after_plain(ask):
    """Exactly the blocks before the first emphasised token."""
    assert ask(None) == 0
    assert ask(STEERED) == 2 * BLOCK
    assert ask(None) == 6 * BLOCK


def test_plain_after_steered(ask):
    assert ask(STEERED) == 0
    assert ask(None) == 2 * BLOCK


def test_after_equal(ask):
    """Everything, also where the same emphasis is written otherwise."""
    assert ask(STEERED) == 0
    assert ask(STEERED) == 6 * BLOCK
    other_words = {
        "spans": [[72, 75], [70, 73]],
        "heads": {"2": [3], "1": [1, 0]},
        "alpha": 0.01,
    }
    assert ask(other_words) == 6 * BLOCK


@pytest.mark.parametrize(
    ("change", "shared_blocks"),
    [
        ({"alpha": 0.02}, 2),
        ({"heads": {"1": [0, 1]}}, 2),
        ({"heads": {"1": [0, 1], "3": [3]}}, 2),
        ({"spans": [[100, 110]]}, 2),
        ({"spans": [[70, 76]]}, 2),
        ({"spans": [[64, 69]]}, 2),
        ({"spans": [[40, 45], [70, 75]]}, 1),
        ({"spans": [[70, 75], [150, 160]]}, 4),  # alike up to the second span's block
        ({"alpha": 1}, 2),  # plain
        ({"share": 0.3}, 2),
    ],
)
def test_after_different(change, shared_blocks, ask):
    """Only the blocks before both, or before the first difference."""
    assert ask(STEERED) == 0
    assert ask({**STEERED, **change}) == shared_blocks * BLOCK


def test_after_other_strengths(ask):
    """A span's factor is part of what may be shared: equal factors share everything."""
    two = {**STEERED, "spans": [[70, 75], [150, 160]]}
    assert ask(two, factors=[0.5, 1.0]) == 0
    assert ask(two, factors=[0.5, 1.0]) == 6 * BLOCK
    assert ask(two, factors=[0.5, 0.1]) == 4 * BLOCK
    assert ask(two, factors=[0.6, 1.0]) == 2 * BLOCK
    assert ask(two) == 2 * BLOCK
    # The same spans and strengths from marks that overlap; of one that is as weak as no mark.
    again = {**STEERED, "spans": [[70, 75], [71, 73], [150, 160], [10, 20]]}
    assert ask(again, factors=[0.5, 0.1, 1.0, 0.01]) == 6 * BLOCK
    assert ask(two, factors=[1.0, 1.0]) == 6 * BLOCK  # as without factors


def test_after_other_shares(ask):
    """A share is part of what may be shared, and never taken for the alpha that bounds it."""
    assert ask({**STEERED, "share": 0.3}) == 0
    assert ask({**STEERED, "share": 0.3}) == 6 * BLOCK
    assert ask({**STEERED, "share": 0.4}) == 2 * BLOCK
    assert ask({**STEERED, "alpha": 1e-4}) == 2 * BLOCK


def test_next_turn(ask):
    """Tokens generated in one turn are prompt in the next, and scaled: their blocks are not reused.

    A plain conversation reuses them.
    """
    ask(STEERED, max_tokens=80)
    following = PROMPT + ask.tokens + random_ids(20, 4)
    assert ask(STEERED, following) == 6 * BLOCK
    ask(None, max_tokens=80)
    following = PROMPT + ask.tokens + random_ids(20, 4)
    assert ask(None, following) == 8 * BLOCK


def test_next_turn_at_a_block_edge(ask):
    """The same where the prompt fills its last block."""
    prompt = PROMPT[: 5 * BLOCK]
    ask(STEERED, prompt, max_tokens=80)
    following = prompt + ask.tokens + random_ids(20, 4)
    assert ask(STEERED, following) == 5 * BLOCK


def test_preemption(engine, tiny, tiny_oracle):
    """A KV cache too small for the batch: requests are recomputed, and come out the same."""
    llm = engine(
        tiny,
        skip_tokenizer_init=True,
        block_size=32,
        num_gpu_blocks_override=13,
        max_model_len=320,
        enable_prefix_caching=False,
        disable_log_stats=False,
    )
    prompts = [random_ids(60 + 10 * i, i) for i in range(4)]
    spans = [(20, 30), None, (5, 8), (80, 89)]
    outputs = llm.generate(
        [{"prompt_token_ids": prompt} for prompt in prompts],
        [
            SamplingParams(
                temperature=0,
                max_tokens=120,
                ignore_eos=True,
                detokenize=False,
                extra_args=span and {"emphasis": {**STEERED, "spans": [span]}},
            )
            for span in spans
        ],
        use_tqdm=False,
    )
    preemptions = [m.value for m in llm.get_metrics() if m.name == "vllm:num_preemptions"]
    assert sum(preemptions) > 0
    heads = {int(layer): h for layer, h in HEADS.items()}
    for prompt, span, output in zip(prompts, spans, outputs, strict=True):
        steering = span and Steering([span], heads, 0.01, len(prompt))
        assert list(output.outputs[0].token_ids) == tiny_oracle.generate(prompt, 120, steering)[0]


def key(start, end, spans=((70, 75),), alpha=0.01, heads=HEADS, prompt_len=200, factors=()):
    heads = HeadSet.from_json(heads)
    return block_key(ResolvedEmphasis(tuple(spans), alpha, heads, prompt_len, factors), start, end)


def test_keys():
    """A key only where the block overlaps a range or reaches past the prompt; stable digests."""
    assert key(0, 32) is key(32, 64) is key(96, 128) is key(160, 192) is None
    assert key(64, 96) == ("pasta", (DIGEST, ((6, 11),), None))
    assert key(192, 224) == ("pasta", (None, (), 8))
    assert key(224, 256) == ("pasta", (None, (), 0))
    assert key(168, 200) is None
    assert key(64, 96, factors=(0.5,)) == ("pasta", (DIGEST, ((6, 11, 0.5),), None))
    touching = {"spans": ((70, 75), (75, 120)), "factors": (0.5, 1.0)}
    assert key(64, 96, **touching) == ("pasta", (DIGEST, ((6, 11, 0.5), (11, 32)), None))
