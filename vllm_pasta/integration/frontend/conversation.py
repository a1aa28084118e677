"""Keeps a conversation beside its rendered prompt, so that admission can find marks in messages.

A mark of a chat message (``{"message": 0, …}``, ``{"role": "system"}``) needs the conversation and
its template; a rendered prompt holds neither.
"""

from collections.abc import Callable
from typing import Any

from vllm_pasta.integration.patching import Patch
from vllm_pasta.request.chat import Chat
from vllm_pasta.request.locate import CHAT_KEY


def keep_conversation(renderer: Any, messages: Any, chat_params: Any, prompt: Any) -> None:
    """Puts a `Chat` into a rendered prompt, under a key that vLLM does not read."""

    def render(messages: Any) -> str | None:
        text = renderer.render_messages(messages, chat_params)[1].get("prompt")
        return text if isinstance(text, str) else None

    prompt[CHAT_KEY] = Chat(messages, render)


def _render_chat(
    original: Callable[..., Any],
    self: Any,
    conversations: Any,
    chat_params: Any,
    *args: Any,
    **kwargs: Any,
) -> Any:
    rendered, prompts = original(self, conversations, chat_params, *args, **kwargs)
    for messages, prompt in zip(conversations, prompts, strict=True):
        keep_conversation(self, messages, chat_params, prompt)
    return rendered, prompts


async def _render_chat_async(
    original: Callable[..., Any],
    self: Any,
    conversations: Any,
    chat_params: Any,
    *args: Any,
    **kwargs: Any,
) -> Any:
    rendered, prompts = await original(self, conversations, chat_params, *args, **kwargs)
    for messages, prompt in zip(conversations, prompts, strict=True):
        keep_conversation(self, messages, chat_params, prompt)
    return rendered, prompts


PATCHES = (
    Patch(
        "vllm.renderers.base:BaseRenderer.render_chat",
        _render_chat,
        "85953b9757cd",
        "chat_rendered",
    ),
    Patch(
        "vllm.renderers.base:BaseRenderer.render_chat_async",
        _render_chat_async,
        "e2c5ef88107f",
        "chat_rendered",
    ),
)
HOOKS = {"chat_rendered": keep_conversation}
