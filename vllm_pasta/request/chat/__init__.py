"""Conversations: the markup in their messages, and where in a prompt their marked parts are; and
the images of a prompt."""

from vllm_pasta.request.chat.images import IMAGE_PARTS, Images, is_image
from vllm_pasta.request.chat.messages import (
    WHOLE,
    Chat,
    Place,
    Placed,
    Reading,
    missed,
    read_messages,
    read_text,
)
from vllm_pasta.request.chat.places import locate_messages

__all__ = [
    "IMAGE_PARTS",
    "WHOLE",
    "Chat",
    "Images",
    "Place",
    "Placed",
    "Reading",
    "is_image",
    "locate_messages",
    "missed",
    "read_messages",
    "read_text",
]
