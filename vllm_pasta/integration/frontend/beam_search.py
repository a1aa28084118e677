"""How emphasis goes through vLLM's beam search.

vLLM runs every step of every beam as a request of its own, whose prompt is the original prompt and
what the beam has generated. So emphasis is resolved once, against the original prompt, and every
such request's prompt carries the resolved form, which knows where the original prompt ends. It
travels in the prompts themselves: beam searches that run side by side cannot mix theirs up.
"""

import functools
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

from vllm_pasta.integration.frontend.conversation import rendering
from vllm_pasta.integration.patching import Patch
from vllm_pasta.request.resolution import WIRE_KEY

_admit: ContextVar[Callable[[Any], Any] | None] = ContextVar("admit", default=None)
"""Admits a prompt of the ``LLM.beam_search`` that is being called; its prompts are made within."""


def _to_params(original: Callable[..., Any], self: Any, *args: Any, **kwargs: Any) -> Any:
    """Puts ``vllm_xargs`` into the params; ``BeamSearchParams`` has no field for them."""
    params = original(self, *args, **kwargs)
    params.extra_args = self.vllm_xargs
    return params


def _online(
    original: Callable[..., Any],
    self: Any,
    prompt: Any,
    request_id: str,
    params: Any,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """Admits when called: the original, an async generator, starts after that."""
    admission = self.engine_client.input_processor.pasta_admission
    prompt = admission.admit_beams(params, prompt)
    return original(self, prompt, request_id, params, *args, **kwargs)


def _offline(
    original: Callable[..., Any], self: Any, prompts: Any, params: Any, *args: Any, **kwargs: Any
) -> Any:
    """Says to `_instance` which engine and params its prompt is for."""
    admission = self.llm_engine.input_processor.pasta_admission
    token = _admit.set(functools.partial(admission.admit_beams, params))
    try:
        with rendering(getattr(params, "extra_args", None) or {}):
            return original(self, prompts, params, *args, **kwargs)
    finally:
        _admit.reset(token)


def _instance(
    original: Callable[..., Any], self: Any, prompt: Any, *args: Any, **kwargs: Any
) -> None:
    """Admits one prompt of ``LLM.beam_search``, before anything runs."""
    admit = _admit.get()
    original(self, prompt if admit is None else admit(prompt), *args, **kwargs)


def _beam_prompt(original: Callable[..., Any], self: Any) -> Any:
    """Hands the resolved emphasis to each beam's prompt (`BeamSearchSequence.get_prompt`)."""
    prompt = original(self)
    if WIRE_KEY in self.orig_prompt:
        prompt[WIRE_KEY] = self.orig_prompt[WIRE_KEY]
    return prompt


def _patch(target: str, wrapper: Callable[..., Any], digests: str) -> Patch:
    superseded_by = "vllm.sampling_params:BeamSearchParams.extra_args"
    return Patch(f"vllm.entrypoints.{target}", wrapper, digests, superseded_by, frontend=True)


PATCHES = (
    _patch(
        "openai.completion.protocol:CompletionRequest.to_beam_search_params",
        _to_params,
        "a1d956e4e6f9 04e60c232945",
    ),
    _patch(
        "openai.chat_completion.protocol:ChatCompletionRequest.to_beam_search_params",
        _to_params,
        "811f6b3777f9 ed917a41b8a9",
    ),
    _patch(
        "speech_to_text.transcription.protocol:TranscriptionRequest.to_beam_search_params",
        _to_params,
        "cb30285d6c09",
    ),
    _patch(
        "speech_to_text.translation.protocol:TranslationRequest.to_beam_search_params",
        _to_params,
        "cb30285d6c09",
    ),
    _patch(
        "generate.beam_search.online:BeamSearchOnlineMixin.beam_search",
        _online,
        "e2e6d1893a8f 9944b62f623c",
    ),
    _patch(
        "generate.beam_search.offline:BeamSearchOfflineMixin.beam_search",
        _offline,
        "b4b93229fd76 b26ce80f2170",
    ),
    _patch(
        "generate.beam_search.utils:BeamSearchInstance.__init__",
        _instance,
        "a5587f260df0 e30babc0de63",
    ),
    _patch(
        "generate.beam_search.utils:BeamSearchSequence.get_prompt",
        _beam_prompt,
        "fe68246d5121",
    ),
)
