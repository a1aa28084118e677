"""Entry point of the group ``vllm.general_plugins``: vLLM calls it in each of its processes."""

from vllm_pasta.errors import UnsupportedError

SUPPORTED_VLLM = ("0.31.", "0.32.")
"""Prefixes of the vLLM versions on which everything here was tested."""

CPU_BACKEND = "vllm_pasta.integration.worker.cpu.SteeredCPUAttentionBackend"
GPU_MODULE = "vllm_pasta.integration.worker.gpu"
GPU_BACKENDS = ("FLASH_ATTN", "FLASHINFER", "TRITON_ATTN")
"""vLLM's attention backends that have a steered version on a GPU, in that module."""


def register() -> None:
    """Registers the attention backends and applies the run-time patches. Idempotent.

    Raises:
        UnsupportedError: another vLLM than the supported ones. Nothing would be sure there, so
            vLLM does not start; ``VLLM_PLUGINS`` without ``pasta`` starts it without us.
    """
    import vllm

    if not vllm.__version__.startswith(SUPPORTED_VLLM):
        raise UnsupportedError(
            f"vllm-pasta supports vLLM {', '.join(v + 'x' for v in SUPPORTED_VLLM)}, this is "
            f"{vllm.__version__}. Install a supported one, or set VLLM_PLUGINS= to start without"
        )
    from vllm.platforms import current_platform
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    from vllm_pasta.integration import hooks, upstream

    if current_platform.is_cuda():
        for name in GPU_BACKENDS:
            register_backend(AttentionBackendEnum[name], f"{GPU_MODULE}.{name}")
    else:
        # Stock vLLM's CPU platform ignores CUSTOM, so ours takes the place of its own there.
        custom = hooks.takes_custom_backend()
        backend = AttentionBackendEnum.CUSTOM if custom else AttentionBackendEnum.CPU_ATTN
        register_backend(backend, CPU_BACKEND)
    upstream.apply()
