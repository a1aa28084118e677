"""Steered attention on the CPU: loads and calls the kernel in ``kernel.cpp``.

`build` compiles it. It knows nothing of Python and torch: tensors are passed as addresses and
strides.
"""

import ctypes
import functools
from collections.abc import Callable
from typing import Any

import torch

from vllm_pasta.errors import KernelError
from vllm_pasta.kernels.cpu import build
from vllm_pasta.steering.plan import LayerAttention, LayerHeads, StepPlan

UNBOUNDED = 2**62  # a window that holds any context

FORMATS = {  # (dtype, layout) -> Format in kernel.cpp
    (torch.float32, "vec"): 0,
    (torch.float32, "vec16"): 0,
    (torch.bfloat16, "vec"): 1,
    (torch.bfloat16, "vec16"): 1,
    (torch.float16, "vec"): 2,
    (torch.float16, "vec16"): 2,
    (torch.bfloat16, "amx"): 3,
}

STATUS = {  # Status in kernel.cpp
    1: "the kernel does not know this format",
    2: "a steered head lies outside the query's heads",
    3: "the block table is shorter than the context, or names a block outside the KV cache",
    4: "a steered request's query rows lie outside the query",
}
NO_MEMORY = 5


def covers(query: torch.Tensor, layout: str) -> bool:
    """Whether the kernel computes on this device, in this dtype, with this KV cache layout."""
    return query.is_cpu and (query.dtype, layout) in FORMATS


def steered_attention(
    query: torch.Tensor,
    kv_cache: torch.Tensor,
    output: torch.Tensor,
    plan: StepPlan,
    layer_heads: LayerHeads,
    attention: LayerAttention,
    layout: str,
    whole: bool = False,
) -> None:
    """Overwrites the steered (row, head) pairs of ``output``; touches nothing else.

    Arguments are those of `vllm_pasta.kernels.reference.steered_attention`, with one more demand:
    unless ``whole``, the steered pairs of ``output`` must hold the plain attention, as they are
    read where alpha is below 1 or there is a share (see ``kernel.cpp``). ``query`` and ``output``
    may be strided in all dimensions but the last.

    Raises:
        ValueError: a tensor is not as expected, or the plan does not fit the tensors.
        KernelError: the kernel cannot be built or loaded here.
        MemoryError: there is no memory for its buffers.
    """
    kernel = load()
    if not query.dtype == kv_cache.dtype == output.dtype or query.shape != output.shape:
        raise ValueError(
            "expected query, kv_cache and output of one dtype, and output shaped as query; got "
            f"{query.dtype}, {kv_cache.dtype}, {output.dtype}; "
            f"{tuple(query.shape)}, {tuple(output.shape)}"
        )
    shape = _shape(
        query.device, query.dtype, query.shape[1:], query.stride(),
        kv_cache.shape[1:], kv_cache.stride(), output.stride(),
        attention.scale, attention.window, attention.soft_cap, layout,
    )  # fmt: skip
    slopes = _per_head("alibi_slopes", attention.alibi_slopes, query.shape[1])
    sinks = _per_head("sinks", attention.sinks, query.shape[1])
    layer = _Layer(
        _address("layer_heads.offsets", layer_heads.offsets),
        _address("layer_heads.heads", layer_heads.heads),
        query.data_ptr(),
        kv_cache.data_ptr(),
        output.data_ptr(),
        query.shape[0],
        kv_cache.shape[0],
        whole,
        None if slopes is None else slopes.data_ptr(),
        None if sinks is None else sinks.data_ptr(),
    )
    status = kernel(_batch(plan), shape, layer)
    if status == NO_MEMORY:
        raise MemoryError("steered attention: not enough memory for the kernel's buffers")
    if status:
        raise ValueError(f"steered attention: {STATUS[status]}")


# ---- Arguments: the structs mirror those in kernel.cpp -------------------------------------------


def _fields(ctype: Any, names: str) -> list[tuple[str, Any]]:
    return [(name, ctype) for name in names.split()]


class _Batch(ctypes.Structure):
    _fields_ = [
        *_fields(ctypes.c_int64, "num_requests max_blocks"),
        *_fields(ctypes.c_void_p, "query_start query_len seq_len block_table"),
        *_fields(ctypes.c_void_p, "first segment_offsets ends biases merge_weights merge_bases"),
        *_fields(ctypes.c_void_p, "odds"),
    ]


class _Shape(ctypes.Structure):
    _fields_ = [
        *_fields(ctypes.c_int64, "num_heads num_kv_heads head_size block_size"),
        *_fields(ctypes.c_int64, "query_row query_head output_row output_head kv_block kv_head"),
        *_fields(ctypes.c_int64, "format window"),
        *_fields(ctypes.c_float, "scale soft_cap"),
    ]


class _Layer(ctypes.Structure):
    _fields_ = [
        *_fields(ctypes.c_void_p, "head_offsets heads query kv_cache output"),
        *_fields(ctypes.c_int64, "num_tokens num_blocks whole"),
        *_fields(ctypes.c_void_p, "alibi_slopes sinks"),
    ]


@functools.lru_cache(maxsize=16)  # holds the plan, so that the addresses stay good
def _batch(plan: StepPlan) -> _Batch:
    """The plan's addresses: made once a step and group of layers, which share a plan."""
    static = plan.static
    return _Batch(
        len(static.batch_rows),
        plan.block_table.shape[1],
        *(
            _address(name, getattr(plan, name))
            for name in ("query_start", "query_len", "seq_len", "block_table")
        ),
        *(_address(name, getattr(static, name)) for name in ("first", "segment_offsets", "ends")),
        *(
            _address(name, getattr(static, name), torch.float32)
            for name in ("biases", "merge_weights", "merge_bases", "odds")
        ),
    )


@functools.lru_cache(maxsize=64)
def _shape(
    device: torch.device,
    dtype: torch.dtype,
    heads: tuple[int, int],
    query_stride: tuple[int, ...],
    cache: tuple[int, int, int],
    cache_stride: tuple[int, ...],
    output_stride: tuple[int, ...],
    scale: float,
    window: int | None,
    soft_cap: float | None,
    layout: str,
) -> _Shape:
    """Checks what all calls of a layer have in common, once.

    Raises:
        ValueError: says what was expected and what came.
    """
    num_heads, head_size = heads
    num_kv_heads, block_size, width = cache
    expected = {
        f"a dtype and layout among {sorted((str(d), x) for d, x in FORMATS)} on the CPU": (
            device.type == "cpu" and (dtype, layout) in FORMATS
        ),
        "a head size that is a multiple of 16 (of 32 in layout amx)": (
            head_size % (32 if layout == "amx" else 16) == 0 < head_size
        ),
        "a block size that is a multiple of 16 (of 32 in layout amx)": (
            block_size % (32 if layout == "amx" else 16) == 0 < block_size
        ),
        "kv_cache [num_blocks, num_kv_heads, block_size, 2 * head_size]": width == 2 * head_size,
        "a number of heads that is a multiple of the KV heads": num_heads % num_kv_heads == 0,
        "query and output contiguous in the last dimension": (
            query_stride[2] == output_stride[2] == 1
        ),
        "each KV cache block contiguous": cache_stride[2:] == (width, 1),
        "scale, window and soft_cap above 0": (
            scale > 0 and (window is None or window > 0) and (soft_cap is None or soft_cap > 0)
        ),
    }
    if missing := [text for text, holds in expected.items() if not holds]:
        raise ValueError(
            f"steered attention: expected {'; '.join(missing)}; got device {device}, {dtype}, "
            f"layout {layout!r}, query [*, {num_heads}, {head_size}] with strides {query_stride}, "
            f"kv_cache [*, {', '.join(map(str, cache))}] with strides {cache_stride}, "
            f"output with strides {output_stride}, scale {scale}, window {window}, "
            f"soft_cap {soft_cap}"
        )
    return _Shape(
        num_heads, num_kv_heads, head_size, block_size,
        *query_stride[:2], *output_stride[:2], *cache_stride[:2],
        FORMATS[dtype, layout], UNBOUNDED if window is None else window, scale, soft_cap or 0.0,
    )  # fmt: skip


def _per_head(name: str, values: torch.Tensor | None, num_heads: int) -> torch.Tensor | None:
    """One float32 per query head, whatever dtype a model keeps them in."""
    if values is not None and (values.shape != (num_heads,) or not values.is_cpu):
        raise ValueError(
            f"steered attention: expected {name} [{num_heads}] on the CPU, got "
            f"{tuple(values.shape)} on {values.device}"
        )
    return None if values is None else values.detach().float().contiguous()


def _address(name: str, tensor: torch.Tensor, dtype: torch.dtype = torch.int32) -> int:
    if tensor.dtype != dtype or not tensor.is_contiguous() or not tensor.is_cpu:
        raise ValueError(
            f"steered attention: expected {name} as contiguous {dtype} on the CPU, got "
            f"{tensor.dtype} on {tensor.device} with strides {tensor.stride()}"
        )
    address: int = tensor.data_ptr()
    return address


@functools.cache
def load() -> Callable[[_Batch, _Shape, _Layer], int]:
    """The compiled kernel; compiles it if it is not in the cache folder.

    Raises:
        KernelError: no compiler, or compiling or loading failed.
    """
    try:
        library = ctypes.CDLL(str(build.build()))
    except OSError as e:
        raise KernelError(f"cannot build or load the C++ kernel: {e}") from e
    function = library.vllm_pasta_steered_attention
    function.argtypes = [ctypes.POINTER(_Batch), ctypes.POINTER(_Shape), ctypes.POINTER(_Layer)]
    function.restype = ctypes.c_int
    return function
