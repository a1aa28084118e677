"""Why an engine cannot honour emphasis, as data: what docs/features.md lists and `support` checks.

What is not known to work is refused.
"""

from vllm_pasta.integration.refusals.engine import ENGINE
from vllm_pasta.integration.refusals.layer import BACKEND, LAYER, LAYERS, RECURRENCE
from vllm_pasta.integration.refusals.mla_layer import MLA_LAYER
from vllm_pasta.integration.refusals.refusal import Engine, Layer, Layers, Refusal

__all__ = [
    "BACKEND", "ENGINE", "LAYER", "LAYERS", "MLA_LAYER", "RECURRENCE",
    "Engine", "Layer", "Layers", "Refusal",
]  # fmt: skip
