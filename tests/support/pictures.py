"""Processors of images for tiny multimodal models, and pictures."""

import base64
import io

import numpy as np
from models import byte_tokenizer
from PIL import Image
from transformers import (
    AutoTokenizer,
    Gemma3ImageProcessor,
    Gemma3Processor,
    Gemma4AudioFeatureExtractor,
    Gemma4ImageProcessor,
    Gemma4Processor,
    Gemma4VideoProcessor,
    PixtralImageProcessor,
    PixtralProcessor,
    Qwen2_5_VLProcessor,
    Qwen2VLImageProcessor,
    Qwen2VLVideoProcessor,
    Qwen3VLProcessor,
    Qwen3VLVideoProcessor,
)

TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{% if m.content is string %}{{ m.content }}{% else %}"
    "{% for part in m.content %}{% if part.type == 'text' %}{{ part.text }}{% else %}IMAGE"
    "{% endif %}{% endfor %}{% endif %}\n{% endfor %}<assistant>"
)
IMAGE = {  # model type -> what a prompt says where an image is
    "qwen2_5_vl": "<|vision_start|><|image_pad|><|vision_end|>",
    "qwen3_vl": "<|vision_start|><|image_pad|><|vision_end|>",
    "qwen3_5": "<|vision_start|><|image_pad|><|vision_end|>",
    "gemma3": "<start_of_image>",
    "gemma4": "<|image|>",
    "mistral3": "[IMG]",
}
AROUND = {  # model type -> tokens that the processor puts before and after those of an image
    "qwen2_5_vl": (1, 1),
    "qwen3_vl": (1, 1),
    "gemma3": (2, 2),
    "gemma4": (1, 1),
    "mistral3": (0, 1),
}
_QWEN = {5: "<|image_pad|>", 6: "<|video_pad|>", 7: "<|vision_start|>", 8: "<|vision_end|>"}
BREAK_TOKEN = 12
"""Mistral's, between the rows of an image."""


def save_processor(folder, model_type):
    """Saves a tokenizer, and the processor of images of a model of ``models.MULTIMODAL``, for
    pictures of a few patches."""
    template = TEMPLATE.replace("IMAGE", IMAGE[model_type])
    processor = _PROCESSORS[model_type](folder, template)
    processor.save_pretrained(folder)
    processor.tokenizer.chat_template = template
    processor.tokenizer.save_pretrained(folder)
    return processor


def _qwen2_5_vl(folder, template):
    sizes = {"min_pixels": 28 * 28, "max_pixels": 28 * 28 * 12}
    return Qwen2_5_VLProcessor(
        Qwen2VLImageProcessor(**sizes),
        _tokenizer(folder, _QWEN),
        Qwen2VLVideoProcessor(**sizes),
        chat_template=template,
    )


def _qwen3_vl(folder, template):
    sizes = {
        "size": {"shortest_edge": 28 * 28, "longest_edge": 28 * 28 * 12},
        "patch_size": 14,
    }
    return Qwen3VLProcessor(
        Qwen2VLImageProcessor(**sizes),
        _tokenizer(folder, _QWEN),
        Qwen3VLVideoProcessor(**sizes),
        chat_template=template,
    )


def _gemma3(folder, template):
    lines = {13: "\n", 9: "\n\n", 10: "\n\n\n", 11: "\n\n\n\n"}  # as Gemma's tokenizer has them
    tokens = {"image_token": "<image_soft_token>", "boi_token": "<start_of_image>",
              "eoi_token": "<end_of_image>"}  # fmt: skip
    return Gemma3Processor(
        Gemma3ImageProcessor(size={"height": 56, "width": 56}),
        _tokenizer(
            folder,
            lines | dict(zip((5, 7, 8), tokens.values(), strict=True)),
            extra_special_tokens=tokens,
        ),
        chat_template=template,
        image_seq_length=4,
    )


def _gemma4(folder, template):
    tokens = {"image_token": "<|image|>", "boi_token": "<|image>", "eoi_token": "<image|>",
              "audio_token": "<|audio|>", "boa_token": "<|audio>",
              "eoa_token": "<audio|>"}  # fmt: skip
    added = dict(zip((5, 7, 8, 9, 10, 11), tokens.values(), strict=True)) | {6: "<|video|>"}
    sizes = {"patch_size": 4, "pooling_kernel_size": 3, "max_soft_tokens": 70}  # the fewest
    return Gemma4Processor(
        Gemma4AudioFeatureExtractor(),
        Gemma4ImageProcessor(**sizes),
        _tokenizer(folder, added, extra_special_tokens=tokens),
        Gemma4VideoProcessor(**sizes),
        chat_template=template,
        image_seq_length=70,
    )


def _mistral3(folder, template):
    return PixtralProcessor(
        PixtralImageProcessor(size={"longest_edge": 84}, patch_size=14),
        _tokenizer(folder, {5: "[IMG]", BREAK_TOKEN: "[IMG_BREAK]", 8: "[IMG_END]"}),
        patch_size=14,
        spatial_merge_size=2,
        chat_template=template,
    )


def _tokenizer(folder, added, **options):
    return AutoTokenizer.from_pretrained(byte_tokenizer(folder, added, **options))


_PROCESSORS = {
    "qwen2_5_vl": _qwen2_5_vl,
    "qwen3_vl": _qwen3_vl,
    "qwen3_5": _qwen3_vl,
    "gemma3": _gemma3,
    "gemma4": _gemma4,
    "mistral3": _mistral3,
}


def picture(seed, width=84, height=56):
    """A picture of random pixels."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def data_url(image):
    """A picture as a ``data:`` URL, without loss."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
