"""One engine of the throughput benchmark: it reads batches as JSON lines and answers with times."""

import json
import os
import sys
import time
from typing import Any

import psutil


def main() -> None:
    options = json.loads(sys.argv[1])
    from vllm import LLM, SamplingParams

    llm = LLM(
        options["model"],
        dtype=options["dtype"],
        enforce_eager=options["eager"],
        max_model_len=4096,
        gpu_memory_utilization=options["memory_utilization"],
        enable_prefix_caching=False,
        disable_log_stats=True,
        additional_config={"pasta": {}} if os.environ["VLLM_PLUGINS"] else {},
    )
    engine = llm.llm_engine
    answer({})
    for line in sys.stdin:
        request = json.loads(line)
        began = time.perf_counter()
        for i, item in enumerate(request["batch"]):
            params = SamplingParams(
                temperature=0,
                max_tokens=item["output_tokens"],
                ignore_eos=True,
                detokenize=False,
                extra_args=item["emphasis"] and {"emphasis": item["emphasis"]},
            )
            engine.add_request(str(i), {"prompt_token_ids": item["ids"]}, params)
        seconds: dict[str, float] = {}
        tokens: dict[str, list[int]] = {}
        while engine.has_unfinished_requests():
            for output in engine.step():
                if output.finished:
                    seconds[output.request_id] = time.perf_counter() - began
                    tokens[output.request_id] = list(output.outputs[0].token_ids)
        order = [str(i) for i in range(len(request["batch"]))]
        answer(
            {
                "seconds": [seconds[i] for i in order],
                "tokens": [tokens[i] for i in order],
                "peak_rss_mib": peak_rss_mib(),
            }
        )


def peak_rss_mib() -> float:
    """Peak resident memory of this process and its children together, in MiB."""
    me = psutil.Process()
    peak_kib = 0
    for process in [me, *me.children(recursive=True)]:
        with open(f"/proc/{process.pid}/status") as status:
            peak_kib += sum(int(line.split()[1]) for line in status if line.startswith("VmHWM"))
    return peak_kib / 1024


def answer(value: dict[str, Any]) -> None:
    print("ANSWER", json.dumps(value), flush=True)


if __name__ == "__main__":
    main()
