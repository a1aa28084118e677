"""Plain requests are untouched: by the plugin, and by their neighbours."""

import json
import os
import sys
from pathlib import Path

import prepared
import pytest
from models import random_ids
from vllm import SamplingParams

PROMPTS = [random_ids(n, n) for n in (5, 40, 90, 33)]
EMPHASIS = {"spans": [[2, 20]], "heads": {"0": [0, 1, 2, 3], "2": [1]}, "alpha": 0.01}

WITHOUT_PLUGIN = """
import json, sys
import conftest
from test_plain import EMPHASIS, PROMPTS, plain, run
llm = conftest.start(sys.argv[1], skip_tokenizer_init=True, block_size=32, additional_config={})
from vllm.v1.attention.backends.registry import AttentionBackendEnum
try:
    run(llm, [{"emphasis": EMPHASIS}] * 4)
    refused = ""
except Exception as e:
    refused = str(e)
print(json.dumps({
    "backend": AttentionBackendEnum.CPU_ATTN.get_class().__name__,
    "refused": refused,
    "outputs": run(llm, [None] * 4),
}))
"""


def run(llm, extra_args):
    """Tokens and log-probabilities of all four prompts in one batch."""
    params = [
        SamplingParams(
            temperature=0,
            max_tokens=20,
            ignore_eos=True,
            detokenize=False,
            logprobs=3,
            extra_args=extra,
        )
        for extra in extra_args
    ]
    outputs = llm.generate([{"prompt_token_ids": p} for p in PROMPTS], params, use_tqdm=False)
    return [plain(output.outputs[0]) for output in outputs]


def plain(output):
    rows = [{str(t): lp.logprob for t, lp in row.items()} for row in output.logprobs]
    return {"tokens": list(output.token_ids), "logprobs": rows}


@pytest.fixture(scope="module")
def llm(engine, tiny):
    return engine(tiny, skip_tokenizer_init=True, block_size=32, enable_prefix_caching=False)


@pytest.fixture(scope="module")
def without_plugin(tiny):
    """The same in a process where VLLM_PLUGINS names no plugin."""
    env = {
        **os.environ,
        "VLLM_PLUGINS": "",
        "PYTHONPATH": os.pathsep.join(
            str(Path(__file__).parent / folder) for folder in ("..", ".", "../support")
        ),
    }
    result = prepared.run([sys.executable, "-c", WITHOUT_PLUGIN, str(tiny)], env)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


def test_same_without_plugin(llm, without_plugin):
    """Bit for bit: the base's kernel computes the same numbers with the plugin and without."""
    assert without_plugin["backend"] == "CPUAttentionBackend"
    assert run(llm, [None] * 4) == without_plugin["outputs"]


def test_switched_off_is_not_silent(without_plugin):
    """VLLM_PLUGINS= leaves vLLM as it was, but emphasis is refused, not ignored."""
    assert "VLLM_PLUGINS" in without_plugin["refused"]


def test_neighbours_do_not_matter(llm):
    """Bit for bit: beside steered neighbours as beside the same neighbours unsteered."""
    alone = run(llm, [None] * 4)
    mixed = run(llm, [None, {"emphasis": EMPHASIS}, None, {"emphasis": EMPHASIS}])
    assert mixed[0] == alone[0]
    assert mixed[2] == alone[2]
    assert mixed[1]["logprobs"] != alone[1]["logprobs"]
    assert mixed[3]["logprobs"] != alone[3]["logprobs"]


def test_other_extra_args_pass(llm):
    """What other plugins put into extra_args is none of our business."""
    assert run(llm, [{"theirs": 1}] * 4) == run(llm, [None] * 4)
