"""Where a request enters the engine: how admission is attached to vLLM.

``InputProcessor.process_inputs`` is the one place that both `LLM` and the server pass with token
ids and sampling params. Two async generators around it must admit earlier: they run only after the
response to a streaming request has begun, and a refused request must be answered with 400.
"""

import inspect
from collections.abc import Callable
from typing import Any

from vllm_pasta.integration import patching
from vllm_pasta.integration.frontend import metrics
from vllm_pasta.integration.patching import Patch


def start_admission(input_processor: Any) -> Callable[..., Any]:
    """Creates a front end's `Admission`, as ``pasta_admission`` of vLLM's input processor, and
    applies the patches that front ends need. The renderer finds it there too.

    Returns:
        `Admission.admit`.

    Raises:
        UnsupportedError, ConfigError, HeadSetError: as `Admission`.
    """
    # Front ends alone need it, and it imports much of vLLM.
    from vllm_pasta.integration.frontend.admission import Admission

    patching.apply_frontend()
    metrics.counters()
    admission = Admission(
        input_processor.vllm_config,
        lambda: input_processor.tokenizer,
        lambda: getattr(input_processor, "renderer", None),
    )
    input_processor.pasta_admission = admission
    if (renderer := getattr(input_processor, "renderer", None)) is not None:
        renderer.pasta_admission = admission
    return admission.admit


def _init(
    original: Callable[..., Any], self: Any, vllm_config: Any, *args: Any, **kwargs: Any
) -> None:
    # First, so that an engine which cannot honour emphasis refuses to start at once.
    self.vllm_config = vllm_config
    start_admission(self)
    original(self, vllm_config, *args, **kwargs)
    self.renderer.pasta_admission = self.pasta_admission


def _process_inputs(
    original: Callable[..., Any],
    self: Any,
    request_id: str,
    prompt: Any,
    params: Any,
    *args: Any,
    **kwargs: Any,
) -> Any:
    if isinstance(prompt, dict) and "type" in prompt:
        params = self.pasta_admission.admit(
            params, prompt, resumable=kwargs.get("resumable", False)
        )
        return original(self, request_id, prompt, params, *args, **kwargs)
    # A raw prompt, which vLLM deprecates: only the original renders it, and markup is read after.
    request = original(self, request_id, prompt, params, *args, **kwargs)
    params = request.sampling_params or request.pooling_params
    text = prompt.get("prompt") if isinstance(prompt, dict) else prompt
    placeholders: dict[str, list[Any]] = {}
    for feature in request.mm_features or ():
        placeholders.setdefault(feature.modality, []).append(feature.mm_position)
    rendered = {
        "type": "token" if request.prompt_embeds is None else "embeds",
        "mm_placeholders": placeholders,
        "prompt_token_ids": request.prompt_token_ids,
        "prompt_embeds": request.prompt_embeds,
        "prompt": text if isinstance(text, str) else None,
    }
    admitted = self.pasta_admission.admit(params, rendered, resumable=request.resumable)
    if admitted is not params:
        request.sampling_params = admitted
        request.prompt_token_ids = rendered["prompt_token_ids"]
    return request


def _generate(
    original: Callable[..., Any],
    self: Any,
    prompt: Any,
    sampling_params: Any,
    *args: Any,
    **kwargs: Any,
) -> Any:
    if isinstance(prompt, dict) and "type" in prompt:
        sampling_params = self.input_processor.pasta_admission.admit(sampling_params, prompt)
    return original(self, prompt, sampling_params, *args, **kwargs)


def _generate_with_builtin_tools(
    original: Callable[..., Any], self: Any, *args: Any, **kwargs: Any
) -> Any:
    # Only checked here: every tool call makes another prompt, which resolves anew.
    bound = inspect.signature(original).bind(self, *args, **kwargs).arguments
    admission = self.engine_client.input_processor.pasta_admission
    resolution = admission.check(bound["sampling_params"], bound["engine_input"])
    if resolution is not None:
        metrics.reported(resolution, admission.locator.decode)
    return original(self, *args, **kwargs)


PATCHES = (
    Patch(
        "vllm.v1.engine.input_processor:InputProcessor.__init__",
        _init,
        "5137c92ffb92",
        "admission",
    ),
    Patch(
        "vllm.v1.engine.input_processor:InputProcessor.process_inputs",
        _process_inputs,
        "e22b5f772979",
        "admission",
    ),
    Patch(
        "vllm.v1.engine.async_llm:AsyncLLM.generate",
        _generate,
        "5bd0ee90459b f8205b7b520c",
        "admission",
        frontend=True,
    ),
    Patch(
        "vllm.entrypoints.openai.responses.serving:"
        "OpenAIServingResponses._generate_with_builtin_tools",
        _generate_with_builtin_tools,
        "82be6a64cb9c 93f3bf216f90",
        "admission",
        frontend=True,
    ),
)
HOOKS = {"admission": start_admission}
