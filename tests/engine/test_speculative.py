"""Speculative decoding: the target is steered, in every row that verifies a draft.

Broken by: losing the row tracker (vLLM drops logits-processor plugins here), steering the draft
model with the target's heads, scaling generated tokens when several are verified at once.
"""

import pytest
from test_exact import CASES, check, run
from test_exact import expected as expected  # a fixture

OPTIONS = {
    "skip_tokenizer_init": True,
    "block_size": 32,
    "max_num_seqs": 4,
    "max_num_batched_tokens": 64,
    "disable_log_stats": False,
}


@pytest.fixture(params=["draft model", "ngram"])
def llm(request, engine, tiny, monkeypatch):
    if request.param == "ngram":
        # In a process of its own: it imports numba, over which vLLM's next start there trips.
        monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
        config = {"method": "ngram", "prompt_lookup_min": 1, "prompt_lookup_max": 3}
    else:  # it drafts what the plain model would say: some of it is right, some is not
        config = {"method": "draft_model", "model": str(tiny)}
    return engine(tiny, speculative_config={**config, "num_speculative_tokens": 3}, **OPTIONS)


def spec_metrics(llm):
    return {
        m.name.removeprefix("vllm:spec_decode_num_"): m.value
        for m in llm.get_metrics()
        if m.name.startswith("vllm:spec_decode_num_") and hasattr(m, "value")
    }


def test_equals_the_oracle(llm, expected):
    before = spec_metrics(llm)
    for name, output in zip(CASES, run(llm, list(CASES.values())), strict=True):
        check(output, expected[name])
    after = spec_metrics(llm)
    drafted, accepted = (after[n] - before[n] for n in ("draft_tokens", "accepted_tokens"))
    assert 0 < accepted < drafted
