"""FlashAttention 2 and FlashInfer, as far as vLLM's backends for them can tell, in plain torch."""

import math
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType

import torch

LSE_CALLS = []  # shapes of what FlashAttention and FlashInfer were asked for


def attend(query, keys, values, scale):
    """Causal attention of the last rows of one request.

    Args:
        query: ``[rows, heads, head_size]``.
        keys, values: ``[n, kv_heads, head_size]``.

    Returns:
        Output, and log-sum-exp ``[heads, rows]``.
    """
    n, group = len(keys), query.shape[1] // keys.shape[1]
    keys, values = (x.repeat_interleave(group, 1) for x in (keys, values))
    logits = torch.einsum("qhd,khd->hqk", query, keys) * scale
    rows = torch.arange(n - len(query), n)
    logits[:, rows[:, None] < torch.arange(n)] = float("-inf")
    return torch.einsum("hqk,khd->qhd", logits.softmax(-1), values), logits.logsumexp(-1)


def write_cache(key, value, key_cache, value_cache, slots, *_):
    """As vLLM's ``reshape_and_cache_flash``."""
    block, place = slots // key_cache.shape[1], slots % key_cache.shape[1]
    key_cache[block, place] = key[: len(slots)]
    value_cache[block, place] = value[: len(slots)]


def flash_attention(
    q, k, v, *, out, cu_seqlens_q, seqused_k, softmax_scale, causal, block_table, window_size,
    return_softmax_lse=False, **_,
):  # fmt: skip
    """As FlashAttention's of that name, over paged keys: ``out``, and the log-sum-exp
    ``[num_heads, num_tokens]`` if asked for."""
    assert causal
    assert window_size[0] == -1
    lse = torch.full(q.shape[1::-1], float("inf"))
    for r, table in enumerate(block_table):
        begin, end, n = int(cu_seqlens_q[r]), int(cu_seqlens_q[r + 1]), int(seqused_k[r])
        cached = (cache[table.long()].flatten(0, 1)[:n] for cache in (k, v))
        out[begin:end], lse[:, begin:end] = attend(q[begin:end], *cached, softmax_scale)
    if return_softmax_lse:
        LSE_CALLS.append(list(lse.shape))
    return (out, lse) if return_softmax_lse else out


def stand_in_for_flash_attention():
    from vllm.v1.attention.backends import fa_utils

    fa_utils.get_flash_attn_version = lambda *_, **__: 2
    from vllm.v1.attention.backends import flash_attn

    flash_attn.flash_attn_varlen_func = flash_attention
    flash_attn.reshape_and_cache_flash = write_cache


class PagedWrapper:
    """As FlashInfer's wrappers: a step is planned once, and run by each layer."""

    is_cuda_graph_enabled = False

    def __init__(self, workspace, layout, **_):
        self.is_hnd = layout == "HND"

    def _plan(self, starts, indptr, indices, last_page_len, page_size, sm_scale, window_left):
        assert window_left == -1
        self._window_left, self._logits_soft_cap, self._sm_scale = -1, 0.0, sm_scale
        self._causal = True
        pages = [indices[indptr[r] : indptr[r + 1]].long() for r in range(len(indptr) - 1)]
        lens = [(len(p) - 1) * page_size + int(last_page_len[r]) for r, p in enumerate(pages)]
        self._requests = list(zip(starts, starts[1:], pages, lens, strict=False))

    def run(self, query, caches, *, out, lse=None, return_lse=False, **_):
        if self.is_hnd:
            caches = [cache.transpose(1, 2) for cache in caches]
        for begin, end, pages, n in self._requests:
            cached = (cache[pages].flatten(0, 1)[:n] for cache in caches)
            out[begin:end], sums = attend(query[begin:end], *cached, self._sm_scale)
            if return_lse:
                lse[begin:end] = sums.t() / math.log(2)  # FlashInfer's are in base 2
        if return_lse:
            LSE_CALLS.append(list(lse.shape))
        return (out, lse) if return_lse else out


class PrefillWrapper(PagedWrapper):
    def plan(
        self, *, qo_indptr, paged_kv_indptr, paged_kv_indices, paged_kv_last_page_len, page_size,
        causal, sm_scale, window_left, **_,
    ):  # fmt: skip
        assert causal
        self._plan(
            qo_indptr.tolist(), paged_kv_indptr, paged_kv_indices, paged_kv_last_page_len,
            page_size, sm_scale, window_left,
        )  # fmt: skip


class DecodeWrapper(PagedWrapper):
    def plan(self, *, indptr, indices, last_page_len, page_size, sm_scale, window_left, **_):
        rows = list(range(len(indptr)))
        self._plan(rows, indptr, indices, last_page_len, page_size, sm_scale, window_left)


def stand_in_for_flashinfer():
    """Its native paths, as on a GPU before Blackwell."""
    names = {
        "flashinfer": (
            "BatchAttentionWithAttentionSinkWrapper", "BatchPrefillWithRaggedKVCacheWrapper",
            "nvfp4_quantize_append_paged_kv_cache_with_slot_mapping",
        ),
        "flashinfer.decode": ("fast_decode_plan", "trtllm_batch_decode_with_kv_cache"),
        "flashinfer.prefill": ("trtllm_batch_context_with_kv_cache",),
        "flashinfer.utils": ("FP4Tensor",),
    }  # fmt: skip
    for module, unused in names.items():
        sys.modules[module] = made = ModuleType(module)
        made.__spec__ = ModuleSpec(module, None)
        for name in unused:
            setattr(made, name, type(name, (), {}))
    flashinfer = sys.modules["flashinfer"]
    flashinfer.BatchPrefillWithPagedKVCacheWrapper = PrefillWrapper
    flashinfer.BatchDecodeWithPagedKVCacheWrapper = DecodeWrapper
    flashinfer.get_seq_lens = lambda indptr, last, size: (
        (indptr[1:] - indptr[:-1] - 1) * size + last
    )
    torch.ops._C_cache_ops.reshape_and_cache_flash = write_cache


def write_latents(latent, rotated, cache, slots, kv_cache_dtype, scale):
    """As vLLM's ``concat_and_cache_mla``, which its CPU build lacks."""
    assert kv_cache_dtype == "auto"
    known = slots >= 0
    cache.view(-1, cache.shape[-1])[slots[known]] = torch.cat([latent, rotated], -1)[known]


def stand_in_for_mla():
    """vLLM's Triton kernel is the real one."""
    from vllm import _custom_ops

    _custom_ops.concat_and_cache_mla = write_latents


STAND_INS = {
    "FLASH_ATTN": stand_in_for_flash_attention,
    "FLASHINFER": stand_in_for_flashinfer,
    "TRITON_MLA": stand_in_for_mla,
}
