"""Every change made to vLLM at run time, gathered from the features that own them.

A feature's file holds its patches, its hooks and what they do. The ledger is patches/README.md: a
test holds the two together, and another fails when vLLM changes a patched function. Every process
loads this module, so the features must not import what front ends or workers alone need.
"""

from collections.abc import Callable
from typing import Any

from vllm_pasta.integration import registry
from vllm_pasta.integration.frontend import (
    batch_file,
    beam_search,
    conversation,
    entry,
    flags,
    metrics,
)
from vllm_pasta.integration.patching import Patch
from vllm_pasta.integration.scheduler import cache_keys, connectors
from vllm_pasta.integration.worker import lse, rows, triton_lse

PATCHES: tuple[Patch, ...] = (
    *entry.PATCHES,
    *conversation.PATCHES,
    *flags.PATCHES,
    *batch_file.PATCHES,
    *beam_search.PATCHES,
    *metrics.PATCHES,
    *cache_keys.PATCHES,
    *connectors.PATCHES,
    *rows.PATCHES,
    *lse.PATCHES,
    *triton_lse.PATCHES,
)

HOOKS: dict[str, Callable[..., Any]] = {
    **entry.HOOKS,
    **conversation.HOOKS,
    **flags.HOOKS,
    **batch_file.HOOKS,
    **metrics.HOOKS,
    **cache_keys.HOOKS,
    **connectors.HOOKS,
    **registry.HOOKS,
    **rows.HOOKS,
}
"""By hook point, as its documentation in ``vllm.plugins.hooks`` wants them."""
