"""One model on several workers: heads and layers are numbered over the whole model, not per worker.

Broken by: numbering heads per tensor-parallel rank or layers per pipeline stage.
"""

import pytest
from test_exact import CASES, check, run
from test_exact import expected as expected  # a fixture
from vllm.config import CompilationMode

SPLITS = {
    "tensor": {"tensor_parallel_size": 2},
    # Eagerly, plain vLLM 0.32 fails on CPU: the second stage's buffers are made by the warm-up
    # that only a compiled model gets.
    # What compiles it does not matter here: torch's tracer alone is quicker than Inductor.
    "pipeline": {
        "pipeline_parallel_size": 2,
        "enforce_eager": False,
        "compilation_config": {"mode": CompilationMode.DYNAMO_TRACE_ONCE, "backend": "eager"},
    },
}
FEW = (
    "plain", "one span", "all heads", "only the last layer", "span across a chunk's edge",
    "strengths: overlapping", "share: of all heads",
)  # fmt: skip
"""A step of two processes that wait for each other takes its time."""


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.usefixtures("two_ranks")
def test_equals_the_oracle(split, engine, tiny, expected):
    llm = engine(
        tiny, skip_tokenizer_init=True, block_size=32, max_num_batched_tokens=64, **SPLITS[split]
    )
    for name, output in zip(FEW, run(llm, [CASES[name] for name in FEW]), strict=True):
        check(output, expected[name])
    llm.llm_engine.engine_core.shutdown()
