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
    Qwen2_5_VLProcessor,
    Qwen2VLImageProcessor,
    Qwen2VLVideoProcessor,
)

TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{% if m.content is string %}{{ m.content }}{% else %}"
    "{% for part in m.content %}{% if part.type == 'text' %}{{ part.text }}{% else %}IMAGE"
    "{% endif %}{% endfor %}{% endif %}\n{% endfor %}<assistant>"
)
IMAGE = {  # model type -> what a prompt says where an image is
    "qwen2_5_vl": "<|vision_start|><|image_pad|><|vision_end|>",
    "gemma3": "<start_of_image>",
}


def save_processor(folder, model_type):
    """Saves a tokenizer, and the processor of images of a model of ``models.MULTIMODAL``, for
    pictures of a few patches."""
    template = TEMPLATE.replace("IMAGE", IMAGE[model_type])
    if model_type == "qwen2_5_vl":
        byte_tokenizer(folder, {5: "<|image_pad|>", 6: "<|video_pad|>", 7: "<|vision_start|>",
                                8: "<|vision_end|>"})  # fmt: skip
        sizes = {"min_pixels": 28 * 28, "max_pixels": 28 * 28 * 12}
        processor = Qwen2_5_VLProcessor(
            Qwen2VLImageProcessor(**sizes),
            AutoTokenizer.from_pretrained(folder),
            Qwen2VLVideoProcessor(**sizes),
            chat_template=template,
        )
    else:
        lines = {13: "\n", 9: "\n\n", 10: "\n\n\n", 11: "\n\n\n\n"}  # as Gemma's tokenizer has them
        tokens = {"image_token": "<image_soft_token>", "boi_token": "<start_of_image>",
                  "eoi_token": "<end_of_image>"}  # fmt: skip
        byte_tokenizer(
            folder,
            lines | dict(zip((5, 7, 8), tokens.values(), strict=True)),
            extra_special_tokens=tokens,
        )
        processor = Gemma3Processor(
            Gemma3ImageProcessor(size={"height": 56, "width": 56}),
            AutoTokenizer.from_pretrained(folder),
            chat_template=template,
            image_seq_length=4,
        )
    processor.save_pretrained(folder)
    processor.tokenizer.chat_template = template
    processor.tokenizer.save_pretrained(folder)
    return processor


def picture(seed, width=84, height=56):
    """A picture of random pixels."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def data_url(image):
    """A picture as a ``data:`` URL, without loss."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
