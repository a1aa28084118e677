"""What an engine on a GPU is refused for, by its configuration."""

from vllm_pasta.integration.refusals.refusal import GPU_TESTS, shown_by
from vllm_pasta.integration.registry import GPU_BACKENDS, GPU_MLA_BACKENDS

GPU_CACHE_DTYPES = ("auto", "fp8", "fp8_e4m3", "fp8_e5m2")
"""KV cache dtypes that the Triton kernels read, beside the model's own by name."""

GPU_ENGINE = shown_by(
    f"{GPU_TESTS}test_refused",
    (
        "gpu-mla",
        "the model has MLA attention, which on a GPU is steered over the attention backend "
        f"{' or '.join(GPU_MLA_BACKENDS)} alone: choose that (--attention-backend), or let "
        "VLLM_MLA_DISABLE=1 run the model with plain attention",
        lambda e: (
            e.model.use_mla and getattr(e.attention.backend, "name", None) not in GPU_MLA_BACKENDS
        ),
    ),
    (
        "attention-backend",
        "the attention backend is {0.attention.backend.name}, not "
        f"{', '.join((*GPU_BACKENDS, *GPU_MLA_BACKENDS))}",
        lambda e: (
            e.attention.backend
            and e.attention.backend.name not in (*GPU_BACKENDS, *GPU_MLA_BACKENDS)
        ),
    ),
    (
        "context-parallel",
        "context parallel, where each rank has a part of every request's keys: a steered "
        "head's sums over emphasised keys would have to be gathered as vLLM gathers its own",
        lambda e: (
            e.parallel.decode_context_parallel_size > 1
            or e.parallel.prefill_context_parallel_size > 1
        ),
    ),
    (
        "microbatches",
        "a step is split into microbatches (dual batch overlap)",
        lambda e: e.parallel.use_ubatching,
    ),
    (
        "adaptive-verification",
        "speculative decoding verifies adaptively",
        lambda e: e.speculative and e.speculative.enable_adaptive_verification,
    ),
    (
        "sleep-mode-backend",
        "sleep mode has the backend {0.model.sleep_mode_backend}, not cumem, which keeps what "
        "steering has in GPU memory",
        lambda e: e.model.enable_sleep_mode and e.model.sleep_mode_backend != "cumem",
    ),
    (
        "sparse-kv-cache",
        "the KV cache is sparse (HiSparse)",
        lambda e: e.attention.hisparse_config is not None,
    ),
    (
        "reference-windows",
        "the model has reference sliding windows",
        lambda e: e.model.rswa_window is not None,
    ),
    (
        "gpu-kv-cache-dtype",
        f"the KV cache is {{0.cache.cache_dtype}}, not {', '.join(GPU_CACHE_DTYPES)} or the "
        "model's own dtype",
        lambda e: (
            e.cache.cache_dtype
            not in (*GPU_CACHE_DTYPES, str(e.model.dtype).removeprefix("torch."))
        ),
    ),
    device="gpu",
)
