"""The log-sum-exp of vLLM's Triton attention: its kernels, with one more store at their end.

Each keeps a row's largest logit and sum of weights, of which the log-sum-exp is one plus the
logarithm of the other, and drops both. There is nothing to wrap inside a compiled kernel, so the
plugin compiles a second version from vLLM's own source with the store put in, and launches that
one where it wants the log-sum-exp. vLLM's is launched everywhere else. Where vLLM's source is not
the one that was read (its digest tells), nothing is put in, and steering goes the direct way.
"""

import functools
import hashlib
import inspect
import linecache
import sys
from collections.abc import Callable
from typing import Any

from vllm.logger import init_logger

from vllm_pasta.integration.patching import Patch
from vllm_pasta.integration.worker import lse

logger = init_logger(__name__)

DIGESTS = {
    "kernel_unified_attention": "2361d13d50e1",
    "reduce_segments": "9dbdcf2d73d0 ea5c7a7d1441",
}
"""SHA-256 of the source of each of vLLM's kernels, first 12 characters; several, separated by
spaces, where the supported vLLMs differ."""

_EDITS = {
    "kernel_unified_attention": (
        ("    MM_PREFIX_CLAMP_SW: tl.constexpr = False,\n):", 1),
        (
            "        acc = acc / L[:, None]\n",
            "        if pasta_lse is not None:\n"
            "            tl.store(\n"
            "                pasta_lse + query_offset_0 * num_query_heads + query_offset_1,\n"
            "                M + tl.log(L), mask=query_mask_0 & query_mask_1,\n"
            "            )\n",
        ),
    ),
    "reduce_segments": (
        ("    FP8_MAX: tl.constexpr = float8_info.max,\n):", 1),
        (
            "    # load, rescale, and add segment attention outputs\n",
            "    if pasta_lse is not None:\n"
            "        tl.store(\n"
            "            pasta_lse + query_token_idx * num_query_heads + query_head_idx,\n"
            "            overall_max + tl.log(overall_expsum),\n"
            "        )\n",
        ),
    ),
}
"""For each kernel the end of its parameters, and the line before which the store goes."""


def source_digest(kernel: Any) -> str:
    """Digest of a Triton kernel's source as it stands in vLLM."""
    return hashlib.sha256(inspect.getsource(kernel.fn).encode()).hexdigest()[:12]


def _unified_attention(original: Callable[..., None], *args: Any, **kwargs: Any) -> None:
    """Wraps vLLM's one call of its Triton attention for decoder layers."""
    _asked.append(lse.wanted_room(kwargs["q"]) if _choose(original.__module__) else None)
    try:
        original(*args, **kwargs)
    finally:
        _asked.pop()


@functools.cache
def _choose(name: str) -> bool:
    """Puts a `_Chosen` in place of each kernel of vLLM's module of that name, once; returns
    whether they are there."""
    module = sys.modules[name]
    kernels = {name: getattr(module, name) for name in DIGESTS}
    unknown = [
        name
        for name, kernel in kernels.items()
        if source_digest(kernel) not in DIGESTS[name].split()
    ]
    if unknown:
        logger.warning(
            "vllm-pasta: this vLLM's Triton kernels (%s) are not those it knows, so a steered head "
            "costs attention over all keys",
            ", ".join(unknown),
        )
        return False
    for name, kernel in kernels.items():
        setattr(module, name, _Chosen(kernel, _edited(name, kernel)))
    return True


_asked: list[Any] = [None]


class _Chosen:
    """In place of a kernel: which of its two versions is launched."""

    def __init__(self, plain: Any, storing: Any) -> None:
        self.plain, self.storing = plain, storing
        self.fn = plain.fn

    def __getitem__(self, grid: Any) -> Callable[..., Any]:
        room = _asked[-1]
        if room is None:
            return self.plain[grid]  # type: ignore[no-any-return]
        return functools.partial(self.storing[grid], pasta_lse=room)


def _edited(name: str, kernel: Any) -> Any:
    """A kernel that also stores its log-sum-exp, float32 ``[num_tokens, num_heads]``, at
    ``pasta_lse``."""
    source = inspect.getsource(kernel.fn)
    (parameters, _), (before, store) = _EDITS[name]
    for text, edited in (
        (parameters, parameters.removesuffix("):") + "    pasta_lse=None,\n):"),
        (before, store + before),
    ):
        if source.count(text) != 1:
            raise RuntimeError(f"expected {text!r} once in vLLM's {name}")
        source = source.replace(text, edited)
    # Triton reads a kernel's source from its file; this one has a file in Python's line cache.
    file = f"<vllm_pasta {name}>"
    linecache.cache[file] = (len(source), None, source.splitlines(keepends=True), file)
    made: dict[str, Any] = {}
    exec(compile(source, file, "exec"), kernel.fn.__globals__, made)
    return made[name]


PATCHES = (
    Patch(
        "vllm.v1.attention.backends.triton_attn:unified_attention",
        _unified_attention,
        "7f622e55ccdb 222093c6a015",
        "vllm.v1.attention.backend:AttentionImpl.on_softmax_lse",
        part="TRITON_ATTN",
    ),
)
