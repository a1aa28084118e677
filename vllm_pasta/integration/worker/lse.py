"""The log-sum-exp of plain attention, from kernels that compute it and drop it.

With it a steered head costs attention over the emphasised and generated tokens alone; without it,
over all keys (``kernels.gpu.launch``). It is asked for only around the forward of a layer that is
to be steered.

- **FlashAttention 2 and 3** return it when told to (natural logarithm).
- **FlashInfer**'s wrappers do (base 2); vLLM's own decode context parallelism relies on that. Its
  TensorRT-LLM and XQA kernels do not.
- **vLLM's Triton kernel** ends with both numbers that it follows from: see `triton_lse`.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch

from vllm_pasta.integration.patching import Patch

FLASH_ATTENTION = (2, 3)
"""Versions whose log-sum-exp vLLM's own decode context parallelism relies on."""


class LogSumExp(NamedTuple):
    """Logarithm of the plain attention's sum of weights.

    Attributes:
        values: float32 ``[num_tokens, num_heads]``, in any strides.
        is_base_2: Whether it is the logarithm in base 2, and not the natural one.
    """

    values: torch.Tensor
    is_base_2: bool = False


class Answer(threading.local):
    """What the kernels of one forward gave.

    Attributes:
        is_wanted: Whether they are to give it.
        given: What came; None where nothing did.
    """

    is_wanted = False
    given: LogSumExp | None = None

    def take(self, lse: torch.Tensor) -> None:
        """Stores FlashAttention's, ``[num_heads, num_tokens]``."""
        self.given = LogSumExp(lse.t()) if lse.dim() == 2 else None

    def room(self, query: torch.Tensor) -> torch.Tensor:
        """Where a kernel may store it: ``[num_tokens, num_heads]``, of this query's rows."""
        self.given = LogSumExp(query.new_empty(query.shape[:2], dtype=torch.float32))
        return self.given.values

    def of(self, query: torch.Tensor) -> LogSumExp | None:
        """What came, once, so that its memory is free when it was read; None where nothing came,
        or it is of another form than the query asks for."""
        given, self.given = self.given, None
        if given is None or given.values.shape != query.shape[:2]:
            return None
        return given if given.values.dtype == torch.float32 else None


_answer = Answer()


def is_given(impl: Any) -> bool:
    """Whether this layer's kernel can give it, in the form that the kernels here want.

    Not with sinks, nor over an fp8 cache: what it covers there is not documented.
    """
    able = (
        getattr(impl, "vllm_flash_attn_version", None) in FLASH_ATTENTION
        or is_flashinfer(impl)
        or _is(impl, "TritonAttentionImpl")
    )
    return able and impl.sinks is None and not impl.kv_cache_dtype.startswith("fp8")


def is_flashinfer(impl: Any) -> bool:
    """Whether the layer's backend is FlashInfer, whose log-sum-exp is in base 2."""
    return _is(impl, "FlashInferImpl")


def _is(impl: Any, name: str) -> bool:
    return any(base.__name__ == name for base in type(impl).__mro__)


@contextmanager
def asking(impl: Any, metadata: Any, query: torch.Tensor) -> Iterator[Answer]:
    """Within, an impl whose kernel can give it is asked for it; the answer then holds what came.

    Both ways: a vLLM with our diff calls ``on_softmax_lse``, another's functions are wrapped.

    Args:
        impl: The layer's.
        metadata: The base's, of this step.
        query: ``[num_tokens, num_heads, head_size]``; the step's rows, padding left out.
    """
    _answer.is_wanted, _answer.given = is_given(impl), None
    impl.on_softmax_lse = _answer.take if _answer.is_wanted else None
    asked = []
    if _answer.is_wanted and is_flashinfer(impl):
        asked = _ask_flashinfer(metadata, query)
    try:
        yield _answer
    finally:
        _answer.is_wanted, impl.on_softmax_lse = False, None
        for wrapper in asked:
            del wrapper.run


def wanted_room(query: torch.Tensor) -> torch.Tensor | None:
    """Where a kernel of vLLM's that computes these rows is to store it; None: nowhere."""
    return _answer.room(query) if _answer.is_wanted else None


def _flash_attention(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Wraps vLLM's one call of FlashAttention for decoder layers."""
    if not _answer.is_wanted:
        return original(*args, **kwargs)
    output, lse, *_ = original(*args, **{**kwargs, "return_softmax_lse": True})
    _answer.take(lse)
    return output


def _ask_flashinfer(metadata: Any, query: torch.Tensor) -> list[Any]:
    """Has FlashInfer's wrappers of this step store it; returns those that were asked.

    vLLM runs one for the rows of requests that decode, which come first, and one for the others.
    None is asked where one of the two kinds of rows has another kernel: then it would be known for
    some rows alone.
    """
    decodes = metadata.num_decode_tokens
    wanted = [
        (part, rows)
        for part, rows, count in (
            (metadata.decode, slice(0, decodes), decodes),
            (metadata.prefill, slice(decodes, None), metadata.num_prefill_tokens),
        )
        if count > 0
    ]
    wrappers: list[Any] = [getattr(part, "wrapper", None) for part, _ in wanted]
    if any(getattr(wrapper, "run", None) is None for wrapper in wrappers):
        return []
    values = query.new_empty(query.shape[:2], dtype=torch.float32)
    for wrapper, (_, rows) in zip(wrappers, wanted, strict=True):
        wrapper.run = _storing(wrapper.run, values[rows])
    _answer.given = LogSumExp(values, is_base_2=True)
    return wrappers


def _storing(run: Callable[..., Any], values: torch.Tensor) -> Callable[..., Any]:
    def storing(*args: Any, **kwargs: Any) -> Any:
        output, _ = run(*args, **kwargs, lse=values, return_lse=True)
        return output

    return storing


PATCHES = (
    Patch(
        "vllm.v1.attention.backends.flash_attn:FA4DenseAttentionKernel.kernel",
        _flash_attention,
        "c5faf0462409",
        "vllm.v1.attention.backend:AttentionImpl.on_softmax_lse",
        part="FLASH_ATTN",
    ),
)
