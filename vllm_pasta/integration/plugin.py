"""Entry point of the group ``vllm.general_plugins``: vLLM calls it in each of its processes."""

from vllm_pasta.errors import UnsupportedError
from vllm_pasta.integration.versions import SUPPORTED_VLLM


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
    from vllm_pasta.integration import attach, patching, registry

    registry.register_backends()
    patching.apply(attach.PATCHES, attach.HOOKS)
