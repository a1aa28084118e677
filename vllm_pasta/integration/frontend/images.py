"""Images in rendered prompts: where vLLM put them, and a conversation rendered without loading."""

from collections.abc import Mapping, Sequence
from typing import Any

from vllm_pasta.errors import EmphasisError
from vllm_pasta.request.chat import Images, is_image
from vllm_pasta.request.resolution import KEY

_PIXEL = (
    "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR4nGNgYGBgAAAABQAB"
    "h6FO1AAAAABJRU5ErkJggg=="
)
"""One transparent pixel."""


def images_of(prompt: Mapping[str, Any], model_config: Any, *, is_gpu: bool) -> Images:
    """Where a rendered prompt holds images.

    Args:
        prompt: vLLM's ``EngineInput`` of type "token" or "multimodal".
        model_config: vLLM's.
        is_gpu: Whether the engine runs on a GPU.

    Raises:
        EmphasisError: it holds something else, or images that cannot be steered there.
    """
    placeholders = prompt.get("mm_placeholders") or {}
    if others := sorted(kind for kind in placeholders if kind != "image" and placeholders[kind]):
        raise EmphasisError(
            f"expected a prompt of text and images, got one with {', '.join(others)}", field=KEY
        )
    found = placeholders.get("image") or ()
    both_ways = bool(found and model_config.is_mm_prefix_lm)
    if both_ways and is_gpu:
        raise EmphasisError(
            "the image tokens of this model attend both ways, which steered attention on a GPU "
            "does not know; a prompt with images cannot be emphasised here",
            field=KEY,
        )
    return Images(
        held=tuple((item.offset, item.offset + item.length) for item in found),
        features=tuple(
            tuple((start, last + 1) for start, last in item.extract_embeds_range())
            for item in found
        ),
        both_ways=both_ways,
    )


def without_images(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Copies of messages whose images need no loading, for the template's text alone: it has the
    same placeholders for them."""
    return [
        {**message, "content": [_light(part) for part in content]}
        if isinstance(content := message.get("content"), list)
        else dict(message)
        for message in messages
    ]


def _light(part: Any) -> Any:
    if not is_image(part) or not part.get("image_url"):
        return part
    url = part["image_url"]
    return {**part, "image_url": {**url, "url": _PIXEL} if isinstance(url, Mapping) else _PIXEL}


def forget(renderer: Any, prompt: Mapping[str, Any]) -> None:
    """Takes a prompt's images out of vLLM's cache of processed ones, as the engine core will never
    see them: else it is not sent what it lacks when another prompt holds the same images."""
    cache = getattr(renderer, "mm_processor_cache", None)
    if cache is None:
        return
    for hashes in (prompt.get("mm_hashes") or {}).values():
        for mm_hash in hashes:
            cache.invalidate(mm_hash)
