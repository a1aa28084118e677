"""The log-sum-exp of plain attention, from FlashAttention, whose backend does not ask for it.

With it a steered head costs attention over the emphasised and generated tokens alone; without it,
over all (``kernels.triton``). Asked for only around the forward of a layer that is to be steered.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from vllm_pasta.integration.patching import Patch

VERSIONS = (2, 3)
"""Of FlashAttention, whose log-sum-exp vLLM's own decode context parallelism relies on."""


class Answer(threading.local):
    """What the last call gave.

    Attributes:
        is_wanted: Whether the next call is to give it.
        lse: float32 ``[num_heads, num_tokens]``; natural logarithm.
    """

    is_wanted = False
    lse: torch.Tensor | None = None

    def take(self, lse: torch.Tensor) -> None:
        """Called with it."""
        self.lse = lse

    def of(self, query: torch.Tensor) -> torch.Tensor | None:
        """As ``[num_tokens, num_heads]``, once, so that its memory is free when it was read; None
        where it was not given, or is of another form."""
        lse, self.lse = self.lse, None
        if lse is None or lse.shape != query.shape[1::-1] or lse.dtype != torch.float32:
            return None
        return lse.t()


_answer = Answer()


def is_given(impl: Any) -> bool:
    """Whether this layer's kernel can give it, in the form that the kernels here want.

    Not with sinks, nor over an fp8 cache: what it covers there is not documented.
    """
    return (
        getattr(impl, "vllm_flash_attn_version", None) in VERSIONS
        and impl.sinks is None
        and not impl.kv_cache_dtype.startswith("fp8")
    )


@contextmanager
def asking(impl: Any) -> Iterator[Answer]:
    """Within, an impl whose kernel can give it is asked for it; the answer then holds what came.

    Both ways: a vLLM with our diff calls ``on_softmax_lse``, another's function is wrapped.
    """
    _answer.is_wanted, _answer.lse = is_given(impl), None
    impl.on_softmax_lse = _answer.take if _answer.is_wanted else None
    try:
        yield _answer
    finally:
        _answer.is_wanted, impl.on_softmax_lse = False, None


def _flash_attention(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Wraps vLLM's one call of FlashAttention for decoder layers."""
    if not _answer.is_wanted:
        return original(*args, **kwargs)
    output, lse, *_ = original(*args, **{**kwargs, "return_softmax_lse": True})
    _answer.take(lse)
    return output


PATCHES = (
    Patch(
        "vllm.v1.attention.backends.flash_attn:FA4DenseAttentionKernel.kernel",
        _flash_attention,
        "c5faf0462409",
        "vllm.v1.attention.backend:AttentionImpl.on_softmax_lse",
        backend="FLASH_ATTN",
    ),
)
