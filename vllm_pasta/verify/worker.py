"""vLLM in a process of its own: reads questions as JSON lines, answers as JSON lines.

``python -m vllm_pasta.verify.worker '{"model": …, …}'`` starts ``vllm.LLM`` with these arguments.
What vLLM prints goes to stderr, so that stdout has the answers alone. `engine` is the parent's
half.
"""

import ctypes
import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from typing import Any, TextIO


def main() -> None:
    """Starts the engine, says what it is, and answers until stdin ends."""
    end_with_parent()
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    from vllm import LLM

    began = time.perf_counter()
    llm = LLM(**json.loads(sys.argv[1]))
    _say(answers, {**describe(llm), "start_s": round(time.perf_counter() - began, 1)})
    operations: dict[str, Callable[..., dict[str, Any]]] = {
        "generate": generate,
        "metrics": metrics,
    }
    for line in sys.stdin:
        question = json.loads(line)
        try:
            _say(answers, operations[question.pop("operation")](llm, **question))
        except Exception as e:
            traceback.print_exc()
            _say(answers, {"error": f"{type(e).__name__}: {e}"})


def end_with_parent() -> None:
    """Ends this process and all that it started when its parent is killed.

    They may be stopped just then, outside their turns, and would stay so for ever. So the kernel is
    told to wake this one when the thread that started it ends. Only for a process that leads a
    group of its own.
    """
    if sys.platform != "linux" or os.getpgrp() != os.getpid():
        return
    parent = os.getppid()

    def woken(*_: Any) -> None:
        if os.getppid() != parent:
            os.killpg(0, signal.SIGKILL)

    signal.signal(signal.SIGCONT, woken)
    PR_SET_PDEATHSIG = 1
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGCONT)


def describe(llm: Any) -> dict[str, Any]:
    """What the engine runs: its runner, attention backends, dtypes, graphs."""
    config = llm.llm_engine.vllm_config
    compilation = config.compilation_config
    graphs, mode = compilation.cudagraph_mode, compilation.mode
    about = {
        "runner": "V2" if config.use_v2_model_runner else "V1",
        "dtype": str(config.model_config.dtype).removeprefix("torch."),
        "kv_cache": config.cache_config.cache_dtype,
        "block_size": config.cache_config.block_size,
        "graphs": getattr(graphs, "name", str(graphs)),
        "compile": getattr(mode, "name", str(mode)),
        "backends": [],
    }
    executor = getattr(llm.llm_engine, "model_executor", None)
    if executor is not None:  # only where the engine is in this process
        runner = executor.driver_worker.worker.model_runner
        about["backends"] = sorted({g.backend.get_name() for gs in runner.attn_groups for g in gs})
    return about


def generate(
    llm: Any,
    requests: list[dict[str, Any]],
    reset: bool = False,
    abort: dict[str, list[int]] | None = None,
) -> dict[str, Any]:
    """Answers requests, all at once.

    Args:
        llm: The engine.
        requests: Each with ``prompt`` (token ids), ``max_tokens`` and ``emphasis``, and maybe
            ``logprobs`` (how many for each token), ``n``, ``temperature``, ``seed``, and ``lora``
            as ``[name, id, folder]``.
        reset: Whether the prefix cache is emptied first.
        abort: By number of the step after which they leave: indices of requests.

    Returns:
        ``seconds`` for all, and for each of ``requests`` an output (None for one that left):
        ``tokens`` and ``logprobs`` (``{id: value}`` for each token) of each of its samples,
        ``cached`` (prompt tokens found in the prefix cache) and ``done_s``.
    """
    from vllm import SamplingParams
    from vllm.lora.request import LoRARequest
    from vllm.sampling_params import RequestOutputKind

    engine = llm.llm_engine
    if reset:
        llm.reset_prefix_cache()
    prepared = [
        (
            {"prompt_token_ids": request["prompt"]},
            SamplingParams(
                temperature=request.get("temperature", 0.0),
                n=request.get("n", 1),
                seed=request.get("seed"),
                max_tokens=request["max_tokens"],
                ignore_eos=True,
                detokenize=False,
                logprobs=request.get("logprobs"),
                output_kind=RequestOutputKind.FINAL_ONLY,  # as LLM.generate; all samples at once
                extra_args=request["emphasis"] and {"emphasis": request["emphasis"]},
            ),
            LoRARequest(*request["lora"]) if request.get("lora") else None,
        )
        for request in requests
    ]
    began, steps = time.perf_counter(), 0
    for i, (prompt, params, lora) in enumerate(prepared):
        engine.add_request(str(i), prompt, params, lora_request=lora)
    outputs: list[dict[str, Any] | None] = [None] * len(requests)
    while engine.has_unfinished_requests():
        for output in engine.step():
            if output.finished:
                outputs[int(output.request_id)] = {
                    "done_s": time.perf_counter() - began,
                    "cached": output.num_cached_tokens,
                    "tokens": [list(sample.token_ids) for sample in output.outputs],
                    "logprobs": [_values(sample.logprobs) for sample in output.outputs],
                }
        steps += 1
        left = (abort or {}).get(str(steps), [])
        if left:
            engine.abort_request([str(i) for i in left])
            for i in left:
                outputs[i] = None
    return {"seconds": time.perf_counter() - began, "steps": steps, "outputs": outputs}


def metrics(llm: Any) -> dict[str, Any]:
    """vLLM's counters by name, where ``disable_log_stats`` is False."""
    counted: dict[str, Any] = {}
    for metric in llm.get_metrics():
        if hasattr(metric, "value"):
            counted[metric.name] = counted.get(metric.name, 0) + metric.value
    return counted


def _values(rows: Any) -> list[dict[int, float]]:
    return [{token: entry.logprob for token, entry in row.items()} for row in rows or ()]


def _say(stream: TextIO, value: dict[str, Any]) -> None:
    stream.write(json.dumps(value) + "\n")
    stream.flush()


if __name__ == "__main__":
    main()
