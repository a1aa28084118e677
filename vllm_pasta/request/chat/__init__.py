"""Conversations: the markup in their messages, and where in a prompt their marked parts are."""

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
    "WHOLE",
    "Chat",
    "Place",
    "Placed",
    "Reading",
    "locate_messages",
    "missed",
    "read_messages",
    "read_text",
]
