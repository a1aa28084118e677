"""What happens before a prompt becomes tokens: its markup is read, and its conversation is kept.

Tags must go before vLLM counts, truncates or limits a prompt's tokens. And a mark of a chat message
(``{"message": 0, …}``, ``{"role": "system"}``) needs the conversation and its template. Both are
left in the rendered prompt, under keys that vLLM does not read, for `Admission` to find.

vLLM renders prompts in functions that do not know the request. The functions above them do: they
say which request's prompts are being rendered, in a ContextVar.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from vllm_pasta.integration.frontend.images import without_images
from vllm_pasta.integration.patching import Patch
from vllm_pasta.request.chat import Chat
from vllm_pasta.request.locate import CHAT_KEY, INDEX_KEY, READING_KEY

Index = tuple[int, int]
"""Which prompt of a request's list, from 0, and how many there are."""

Finish = Callable[[Sequence[dict[str, Any]]], None]


@dataclass(frozen=True)
class _Request:
    """The request whose prompts are being rendered.

    Attributes:
        extra_args: Its ``vllm_xargs``, or its sampling params' ``extra_args``.
        index: Which of its prompts, if it has more than one and they are rendered one by one.
    """

    extra_args: Mapping[str, Any]
    index: Index | None = None


_request: ContextVar[_Request | None] = ContextVar("request", default=None)


@contextmanager
def rendering(extra_args: Mapping[str, Any] | None, index: Index | None = None) -> Iterator[None]:
    """Within, prompts are rendered for a request with these ``extra_args``; None where it is not
    one that generates text."""
    token = _request.set(None if extra_args is None else _Request(extra_args, index))
    try:
        yield
    finally:
        _request.reset(token)


def start_rendering(
    renderer: Any,
    prompts: Sequence[Any],
    chat_params: Any,
    extra_args: Mapping[str, Any] | None,
    index: Index | None = None,
) -> tuple[Sequence[Any], Finish]:
    """Reads the markup of prompts, or of conversations, that are to be rendered.

    Args:
        renderer: vLLM's.
        prompts: vLLM's ``DictPrompt``s, or lists of messages; never changed.
        chat_params: How conversations are rendered; None for other prompts.
        extra_args: The request's; None where that is not known, or does not generate text. Then
            markup is read at admission.
        index: Which prompt of the request's list, where there is one prompt here.

    Returns:
        What to render in their place; and what puts notes into the rendered prompts.

    Raises:
        AdmissionError: the emphasis, or the markup, is malformed.
    """
    admission = getattr(renderer, "pasta_admission", None)
    many = len(prompts) > 1
    notes: list[dict[str, Any]] = []
    clean = list(prompts)
    for i, prompt in enumerate(prompts):
        place = (i, len(prompts)) if many else index
        notes.append({} if place is None else {INDEX_KEY: place})
        if admission is not None and extra_args is not None:
            read = admission.read(extra_args, prompt, is_chat=chat_params is not None, index=place)
            if read is not None:
                clean[i], notes[i][READING_KEY] = read
        if chat_params is not None:
            notes[i][CHAT_KEY] = _chat(renderer, clean[i], chat_params)

    def finish(rendered: Sequence[dict[str, Any]]) -> None:
        for prompt, note in zip(rendered, notes, strict=True):
            prompt.update(note)

    return clean, finish


def _chat(renderer: Any, messages: Any, chat_params: Any) -> Chat:
    def render(messages: Any) -> str | None:
        text = renderer.render_messages(without_images(messages), chat_params)[1].get("prompt")
        return text if isinstance(text, str) else None

    return Chat(messages, render)


def _started(
    renderer: Any, prompts: Sequence[Any], chat_params: Any = None
) -> tuple[Sequence[Any], Finish]:
    request = _request.get()
    extra_args, index = (None, None) if request is None else (request.extra_args, request.index)
    return start_rendering(renderer, prompts, chat_params, extra_args, index)


def _render_chat(
    original: Callable[..., Any],
    self: Any,
    conversations: Any,
    chat_params: Any,
    *args: Any,
    **kwargs: Any,
) -> Any:
    conversations, finish = _started(self, conversations, chat_params)
    rendered, prompts = original(self, conversations, chat_params, *args, **kwargs)
    finish(prompts)
    return rendered, prompts


async def _render_chat_async(
    original: Callable[..., Any],
    self: Any,
    conversations: Any,
    chat_params: Any,
    *args: Any,
    **kwargs: Any,
) -> Any:
    conversations, finish = _started(self, conversations, chat_params)
    rendered, prompts = await original(self, conversations, chat_params, *args, **kwargs)
    finish(prompts)
    return rendered, prompts


def _render_cmpl(
    original: Callable[..., Any], self: Any, prompts: Any, *args: Any, **kwargs: Any
) -> Any:
    prompts, finish = _started(self, prompts)
    rendered = original(self, prompts, *args, **kwargs)
    finish(rendered)
    return rendered


async def _render_cmpl_async(
    original: Callable[..., Any], self: Any, prompts: Any, *args: Any, **kwargs: Any
) -> Any:
    prompts, finish = _started(self, prompts)
    rendered = await original(self, prompts, *args, **kwargs)
    finish(rendered)
    return rendered


async def _preprocess(
    original: Callable[..., Any], self: Any, request: Any, *args: Any, **kwargs: Any
) -> Any:
    """Says whose prompts the server renders. Requests without ``vllm_xargs`` do not generate."""
    known = hasattr(request, "vllm_xargs")
    with rendering((request.vllm_xargs or {}) if known else None):
        return await original(self, request, *args, **kwargs)


def _render_and_add_requests(
    original: Callable[..., Any], self: Any, prompts: Iterable[Any], params: Any, **kwargs: Any
) -> Any:
    """Says whose prompts an `LLM` renders: they come from a generator, one by one."""

    def rendered() -> Iterator[Any]:
        source = iter(prompts)
        for i, own in enumerate(params):
            index = (i, len(params)) if len(params) > 1 else None
            with rendering(_extra_args(own), index):
                try:
                    prompt = next(source)
                except StopIteration:
                    return
            yield prompt

    return original(self, rendered(), params, **kwargs)


def _extra_args(params: Any) -> Mapping[str, Any] | None:
    """What sampling params carry; None for params of requests that do not generate."""
    return (params.extra_args or {}) if hasattr(params, "extra_args") else None


_HOOK = "prompts_rendering"

PATCHES = (
    Patch("vllm.renderers.base:BaseRenderer.render_chat", _render_chat, "85953b9757cd", _HOOK),
    Patch(
        "vllm.renderers.base:BaseRenderer.render_chat_async",
        _render_chat_async,
        "e2c5ef88107f",
        _HOOK,
    ),
    Patch("vllm.renderers.base:BaseRenderer.render_cmpl", _render_cmpl, "e4c3d67b2444", _HOOK),
    Patch(
        "vllm.renderers.base:BaseRenderer.render_cmpl_async",
        _render_cmpl_async,
        "4b16b59d7774",
        _HOOK,
    ),
    Patch(
        "vllm.renderers.online_renderer:OnlineRenderer.preprocess_chat",
        _preprocess,
        "6fbc03ba74af f4885ea9b147",
        _HOOK,
        frontend=True,
    ),
    Patch(
        "vllm.renderers.online_renderer:OnlineRenderer.preprocess_cmpl",
        _preprocess,
        "84ff6334efb4",
        _HOOK,
        frontend=True,
    ),
    Patch(
        "vllm.entrypoints.llm:LLM._render_and_add_requests",
        _render_and_add_requests,
        "db7f4c4ce584",
        _HOOK,
        frontend=True,
    ),
)
HOOKS = {_HOOK: start_rendering}
