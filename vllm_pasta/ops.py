"""The one entry to steered attention; picks an implementation."""

from vllm_pasta.kernels.reference import steered_attention

__all__ = ["steered_attention"]
