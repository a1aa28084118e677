"""What differs between the vLLM versions that the plugin supports: here, and nowhere else.

The digests of wrapped functions, which differ too, stand with their patches.
"""

from typing import Any

SUPPORTED_VLLM = ("0.32.", "0.33.")
"""Prefixes of the vLLM versions that the plugin starts with; README.md says what ran on each."""

_DRAFT_TAGS = ("eagle_head", "draft_model")


def is_being_drafted() -> bool:
    """Whether the model whose layers are being made at the moment drafts for another one.

    For Model Runner V1 before vLLM 0.33, which does not mark a draft's layers (``is_draft_layer``),
    but makes them under a tag of their own. A draft that has another tag counts as the target, and
    is refused where its layers are not the target's.
    """
    from vllm.compilation import backends

    return backends.model_tag in _DRAFT_TAGS


def is_draft(layer: Any) -> bool:
    """Whether an attention layer belongs to a draft model, which is not steered.

    vLLM says so from 0.33 on; before, Model Runner V1 does not, and the layer's impl was told by
    `is_being_drafted`.
    """
    return bool(layer.is_draft_layer or getattr(getattr(layer, "impl", None), "is_draft", False))
