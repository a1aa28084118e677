"""vLLM's real engine with our version of its real Triton attention, on a CPU: Triton interprets.

``gpu_job.py MODEL TRITON_ATTN|TRITON_MLA|FLASH_ATTN|FLASHINFER [EAGLE|pipeline]``. FlashAttention
and FlashInfer do not run here: what they compute is written anew in torch (`gpu_stand_ins`), so of
these backends it is vLLM's Python that runs.
Prints ``REPORT`` and JSON: greedy tokens of `CASES`, also by speculative decoding (V1: n-gram,
V2: the model itself, or an EAGLE draft), or in two pipeline stages, each a process of its own; and
after the engine has slept; and what the last token of a prompt attends to. Told otherwise than they
are, beside what `gpu_ground` says: that this is a GPU when `support` asks, and what allocates
(`sleeping`).
"""

import gc
import json
import os
import sys

import gpu_ground as gpu_ground
import interpreter
import sleeping
from gpu_stand_ins import LSE_CALLS, STAND_INS
from models import random_ids

WATCHED = {"spans": [[10, 20], [55, 57]], "heads": {"0": [2], "1": [0, 3]}, "alpha": 0.1}
SHORT, LONG = random_ids(20, 1), random_ids(60, 2)
ALL_HEADS = {str(layer): [0, 1, 2, 3] for layer in range(2)}
CASES = [  # prompt, new tokens, emphasis
    (SHORT, 5, None),
    (LONG, 4, {"spans": [[10, 20], [55, 57]], "heads": {"1": [0, 3]}}),
    (SHORT, 3, {"spans": [[2, 9]], "heads": ALL_HEADS, "alpha": 0.001}),
    (LONG, 3, {"spans": [[30, 58]], "heads": {"0": [1], "1": [2]}, "alpha": 20.0}),
    (SHORT, 4, None),
    (LONG, 3, {"spans": [[30, 58]], "heads": ALL_HEADS, "alpha": 0.5}),
    (SHORT, 5, {"spans": [[0, 3]], "heads": {"0": [0, 1, 2, 3]}}),
]

NGRAM = {"method": "ngram", "prompt_lookup_max": 2, "prompt_lookup_min": 1}


def pretend(backend):
    """In every process of an engine: attention is ``backend``, as on a GPU."""
    from vllm.plugins import load_general_plugins
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    from vllm_pasta.integration import support

    support.is_gpu = lambda: True
    load_general_plugins()
    if backend in STAND_INS:
        STAND_INS[backend]()
    worker = "vllm_pasta.integration.worker"
    register_backend(AttentionBackendEnum.CPU_ATTN, f"{worker}.gpu.{backend}")
    if backend == "TRITON_MLA":
        for name in ("CPU_MLA", "AMX_MLA"):  # by whether the machine has AMX
            register_backend(AttentionBackendEnum[name], f"{worker}.gpu_mla.{backend}")


def what_runs(worker):
    """The module of a worker's model runner, and its attention backends; in the worker."""
    runner = worker.model_runner
    groups = [group for groups in runner.attn_groups for group in groups]
    return type(runner).__module__, sorted({group.backend.get_name() for group in groups})


def pools(worker, allocator):
    """In which pools the KV cache and the plugin's memory are; in the worker."""
    from vllm_pasta.integration.worker.rows import rows_of

    rows = rows_of(worker.vllm_config)
    buffers = rows.buffers_on(worker.device)
    own = [buffers.records, buffers.groups]
    for workspace in rows.workspaces.values():
        own += [workspace.sums, workspace.counters]
    caches = worker.model_runner.kv_caches
    return [sorted({str(allocator.tag_of(t)) for t in tensors}) for tensors in (caches, own)]


def main(model, backend, other=None):
    from vllm import LLM, SamplingParams

    from vllm_pasta.integration.frontend.flags import WATCHER
    from vllm_pasta.integration.frontend.routes.attention import look_offline

    pretend(backend)
    allocator = sleeping.lend()
    options = {}
    if backend == "TRITON_MLA":
        options["attention_config"] = {"backend": backend}
    if other == "pipeline":
        options["pipeline_parallel_size"] = 2
        os.sched_setaffinity(0, range(os.cpu_count()))  # two processes, which wait busily
        cores = sorted(os.sched_getaffinity(0))
        os.environ["VLLM_CPU_OMP_THREADS_BIND"] = f"{cores[0]}|{cores[-1]}"

    interpreter.few_programs()

    def start(speculative=None):
        gc.freeze()  # else vLLM looks for garbage among all that was imported, ten times a start
        return LLM(
            model,
            dtype="float32",
            enforce_eager=True,
            disable_log_stats=False,
            gpu_memory_utilization=0.05,
            kv_cache_memory_bytes=2**24,
            max_model_len=128,
            skip_tokenizer_init=True,
            block_size=16,
            max_num_seqs=3,  # fewer than there are requests: slots are used again
            max_num_batched_tokens=48,  # long prompts are cut
            speculative_config=speculative,
            additional_config={"pasta": {}},
            worker_extension_cls=WATCHER,
            **options,
        )

    def run(llm, cases):
        params = [
            SamplingParams(
                temperature=0, max_tokens=n, ignore_eos=True, detokenize=False,
                extra_args=emphasis and {"emphasis": emphasis},
            )
            for _, n, emphasis in cases
        ]  # fmt: skip
        prompts = [{"prompt_token_ids": ids} for ids, _, _ in cases]
        outputs = llm.generate(prompts, params, use_tqdm=False)
        return [list(output.outputs[0].token_ids) for output in outputs]

    llm = start()
    runners, backends = zip(*llm.collective_rpc(what_runs), strict=True)
    report = {
        "runners": runners,
        "backends": backends,
        "plain": run(llm, CASES[:1]),
        "asked before": len(LSE_CALLS),
        "mixed": run(llm, CASES),
        "again": run(llm, CASES[:3]),  # with prefix hits, and slots that others had
    }
    report["asked"] = len(LSE_CALLS)
    if other != "pipeline":
        report["seen"] = look_offline(llm, WATCHED, LONG, (1, 3))
        report["pools"] = llm.collective_rpc(pools, args=(allocator,))[0]
        report["slept"] = []
        for level in (1, 2):
            llm.sleep(level)
            llm.wake_up()
            report["slept"].append(run(llm, CASES[:3]))
    del llm
    # vLLM takes a draft model of DeepSeek's for one of method mtp.
    if backend == "TRITON_MLA" or other == "pipeline":
        print("REPORT", json.dumps(report))
        return
    is_v2 = os.environ["VLLM_USE_V2_MODEL_RUNNER"] == "1"
    draft = NGRAM
    if is_v2:
        method = "eagle" if other else "draft_model"
        draft = {"method": method, "model": other or model}
    llm = start({**draft, "num_speculative_tokens": 2})
    report["drafted"] = run(llm, CASES[3:])
    report["drafts"] = {
        m.name.removeprefix("vllm:spec_decode_num_"): m.value
        for m in llm.get_metrics()
        if m.name.startswith("vllm:spec_decode_num_") and hasattr(m, "value")
    }
    print("REPORT", json.dumps(report))


if __name__ == "__mp_main__":  # in a worker's process
    pretend(sys.argv[2])
if __name__ == "__main__":
    main(*sys.argv[1:])
