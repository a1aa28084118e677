"""The attention backends of the plugin by name, and how vLLM comes to choose them."""

from typing import TYPE_CHECKING

from vllm_pasta.errors import UnsupportedError
from vllm_pasta.integration.config import is_enabled

if TYPE_CHECKING:
    from vllm.config import VllmConfig

CPU_BACKEND = "vllm_pasta.integration.worker.cpu.SteeredCPUAttentionBackend"
CPU_MLA_MODULE = "vllm_pasta.integration.worker.mla"
CPU_MLA_BACKENDS = ("CPU_MLA", "AMX_MLA")
"""vLLM's attention backends for MLA that have a steered version on a CPU, in that module."""
GPU_MODULE = "vllm_pasta.integration.worker.gpu"
GPU_BACKENDS = ("FLASH_ATTN", "FLASHINFER", "TRITON_ATTN")
"""vLLM's attention backends that have a steered version on a GPU, in that module."""
GPU_MLA_MODULE = "vllm_pasta.integration.worker.gpu_mla"
GPU_MLA_BACKENDS = ("TRITON_MLA",)
"""The same for MLA."""


def register_backends() -> None:
    """Registers the steered attention backends with vLLM. Idempotent.

    On a GPU, and for MLA on a CPU, each takes the place of the vLLM backend whose name it has.
    vLLM's CPU platform ignores the backend CUSTOM, so there the steered one takes the place of
    CPU_ATTN, unless this vLLM has the diff of ``patches/`` with which the platform honours CUSTOM.
    """
    from vllm.platforms import current_platform
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    if current_platform.is_cuda():
        for name in GPU_BACKENDS:
            register_backend(AttentionBackendEnum[name], f"{GPU_MODULE}.{name}")
        for name in GPU_MLA_BACKENDS:
            register_backend(AttentionBackendEnum[name], f"{GPU_MLA_MODULE}.{name}")
    else:
        custom = takes_custom_backend()
        backend = AttentionBackendEnum.CUSTOM if custom else AttentionBackendEnum.CPU_ATTN
        register_backend(backend, CPU_BACKEND)
        for name in CPU_MLA_BACKENDS:
            register_backend(AttentionBackendEnum[name], f"{CPU_MLA_MODULE}.{name}")


def takes_custom_backend() -> bool:
    """Whether this is a CPU platform that honours the attention backend CUSTOM, on a vLLM in which
    a plugin can select it. Stock vLLM is neither; the diffs of ``patches/`` make it so."""
    try:
        from vllm.plugins.hooks import vllm_config  # noqa: F401
    except ImportError:
        return False
    import torch
    from vllm.platforms import current_platform
    from vllm.v1.attention.backends.registry import AttentionBackendEnum
    from vllm.v1.attention.selector import AttentionSelectorConfig

    if not current_platform.is_cpu():
        return False
    config = AttentionSelectorConfig(128, torch.float32, None, None)
    try:
        path = current_platform.get_attn_backend_cls(AttentionBackendEnum.CUSTOM, config)
    except ValueError:  # nothing is registered as CUSTOM yet
        return True
    return bool(path != AttentionBackendEnum.CPU_ATTN.get_path())


def select_backend(vllm_config: "VllmConfig") -> None:
    """Selects the attention backend CUSTOM where emphasis is on and `CPU_BACKEND` is that, but
    for MLA, whose backends keep their names.

    Raises:
        UnsupportedError: the user asked for another one.
    """
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    custom, attention = AttentionBackendEnum.CUSTOM, vllm_config.attention_config
    is_registered = custom.is_overridden() and custom.get_path() == CPU_BACKEND
    if not is_registered or not is_enabled(vllm_config) or vllm_config.model_config.use_mla:
        return
    if attention.backend not in (None, custom, AttentionBackendEnum.CPU_ATTN):
        raise UnsupportedError(
            f"emphasis needs the attention backend CUSTOM, this engine has {attention.backend.name}"
        )
    attention.backend = custom


HOOKS = {"vllm_config": select_backend}
