"""How many drafted tokens a steered target accepts: ``python -m benchmarks.acceptance``.

The draft is the very same model, which is not steered: without emphasis every token is accepted, so
what is missing with emphasis is what steering alone costs, and the most that a steered draft could
win back.
"""

import argparse
import json
import os

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # read when vllm is imported

from vllm import LLM, SamplingParams

from vllm_pasta.cli.demo.cases import load_cases
from vllm_pasta.cli.demo.command import as_seen
from vllm_pasta.cli.smollm2 import model_path

DRAFTED = "vllm:spec_decode_num_draft_tokens"
ACCEPTED = "vllm:spec_decode_num_accepted_tokens"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=3, help="drafted at a time")
    parser.add_argument("--max-tokens", type=int, default=64, help="of an answer")
    parser.add_argument("--alphas", type=float, nargs="*", default=[0.1, 0.01])
    args = parser.parse_args()
    model = str(model_path())
    llm = LLM(
        model,
        dtype="float32",
        enforce_eager=True,
        max_model_len=1024,
        gpu_memory_utilization=0.05,
        kv_cache_memory_bytes=2**29,
        disable_log_stats=False,
        speculative_config={
            "method": "draft_model", "model": model, "num_speculative_tokens": args.tokens,
        },
        additional_config={"pasta": {"heads": "smollm2-135m-instruct"}},
    )  # fmt: skip
    cases = [case for case in load_cases(None) if case.task == "json"]
    prompts = [as_seen(case, llm.get_tokenizer()) for case in cases]

    def counts() -> dict[str, int]:
        return {m.name: m.value for m in llm.get_metrics() if m.name in (DRAFTED, ACCEPTED)}

    for alpha in (None, *args.alphas):
        before = counts()
        params = [
            SamplingParams(
                temperature=0,
                max_tokens=args.max_tokens,
                extra_args=alpha and {"emphasis": {"text": case.emphasis, "alpha": alpha}},
            )
            for case in cases
        ]
        llm.generate(prompts, params, use_tqdm=False)
        after = counts()
        drafted, accepted = (after[n] - before[n] for n in (DRAFTED, ACCEPTED))
        print(json.dumps({
            "alpha": alpha, "requests": len(cases), "drafted": drafted, "accepted": accepted,
            "acceptance rate": round(accepted / drafted, 3),
        }))  # fmt: skip


if __name__ == "__main__":
    main()
