"""How emphasis goes through vLLM's beam search: wrappers for `upstream.PATCHES`.

vLLM runs every step of every beam as a request of its own, whose prompt is the original prompt and
what the beam has generated. So emphasis is resolved once, against the original prompt, and every
such request's prompt carries the resolved form, which knows where the original prompt ends. It
travels in the prompts themselves: beam searches that run side by side cannot mix theirs up.
"""

import functools
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

_admit: ContextVar[Callable[[Any], Any] | None] = ContextVar("admit", default=None)
"""Admits a prompt of the ``LLM.beam_search`` that is being called; its prompts are made within."""


def to_params(original: Callable[..., Any]) -> Callable[..., Any]:
    """What ``vllm_xargs`` asks for goes along; ``BeamSearchParams`` has no field for it."""

    @functools.wraps(original)
    def to_beam_search_params(self: Any, *args: Any, **kwargs: Any) -> Any:
        params = original(self, *args, **kwargs)
        params.extra_args = self.vllm_xargs
        return params

    return to_beam_search_params


def online(original: Callable[..., Any]) -> Callable[..., Any]:
    """Admits when called: the original, an async generator, starts after that."""

    @functools.wraps(original)
    def beam_search(
        self: Any, prompt: Any, request_id: str, params: Any, *args: Any, **kwargs: Any
    ) -> Any:
        admission = self.engine_client.input_processor.pasta_admission
        prompt = admission.admit_beams(params, prompt)
        return original(self, prompt, request_id, params, *args, **kwargs)

    return beam_search


def offline(original: Callable[..., Any]) -> Callable[..., Any]:
    """Says to `instance` which engine and params its prompt is for."""

    @functools.wraps(original)
    def beam_search(self: Any, prompts: Any, params: Any, *args: Any, **kwargs: Any) -> Any:
        admission = self.llm_engine.input_processor.pasta_admission
        token = _admit.set(functools.partial(admission.admit_beams, params))
        try:
            return original(self, prompts, params, *args, **kwargs)
        finally:
            _admit.reset(token)

    return beam_search


def instance(original: Callable[..., Any]) -> Callable[..., Any]:
    """Admits one prompt of ``LLM.beam_search``, before anything runs."""

    @functools.wraps(original)
    def __init__(self: Any, prompt: Any, *args: Any, **kwargs: Any) -> None:
        admit = _admit.get()
        original(self, prompt if admit is None else admit(prompt), *args, **kwargs)

    return __init__


def beam_prompt(original: Callable[..., Any]) -> Callable[..., Any]:
    """Hands the resolved emphasis to each beam's prompt (`BeamSearchSequence.get_prompt`)."""
    from vllm_pasta.request.resolution import WIRE_KEY

    @functools.wraps(original)
    def get_prompt(self: Any) -> Any:
        prompt = original(self)
        if WIRE_KEY in self.orig_prompt:
            prompt[WIRE_KEY] = self.orig_prompt[WIRE_KEY]
        return prompt

    return get_prompt
