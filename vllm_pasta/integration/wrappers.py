"""Wrappers for `upstream.PATCHES`: original function to its replacement, which calls it.

What they do for us is in ``hooks``, where it can be registered as well.
"""

import functools
import inspect
from collections.abc import Callable
from typing import Any

from vllm_pasta.integration import hooks
from vllm_pasta.integration.frontend import flags


def input_processor_init(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def __init__(self: Any, vllm_config: Any, *args: Any, **kwargs: Any) -> None:
        # First, so that an engine which cannot honour emphasis refuses to start at once.
        self.vllm_config = vllm_config
        hooks.start_admission(self)
        original(self, vllm_config, *args, **kwargs)

    return __init__


def process_inputs(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def process_inputs(
        self: Any, request_id: str, prompt: Any, params: Any, *args: Any, **kwargs: Any
    ) -> Any:
        if isinstance(prompt, dict) and "type" in prompt:
            params = self.pasta_admission.admit(
                params, prompt, resumable=kwargs.get("resumable", False)
            )
            return original(self, request_id, prompt, params, *args, **kwargs)
        # A raw prompt, vLLM's deprecated way: what it became is known afterwards.
        request = original(self, request_id, prompt, params, *args, **kwargs)
        params = request.sampling_params or request.pooling_params
        text = prompt.get("prompt") if isinstance(prompt, dict) else prompt
        rendered = {
            "type": "token" if request.prompt_embeds is None else "embeds",
            "prompt_token_ids": request.prompt_token_ids,
            "prompt": text if isinstance(text, str) else None,
        }
        admitted = self.pasta_admission.admit(params, rendered, resumable=request.resumable)
        if admitted is not params:
            request.sampling_params = admitted
            request.prompt_token_ids = rendered["prompt_token_ids"]
        return request

    return process_inputs


def generate(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def generate(self: Any, prompt: Any, sampling_params: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(prompt, dict) and "type" in prompt:
            sampling_params = self.input_processor.pasta_admission.admit(sampling_params, prompt)
        return original(self, prompt, sampling_params, *args, **kwargs)

    return generate


def generate_with_builtin_tools(original: Callable[..., Any]) -> Callable[..., Any]:
    from vllm_pasta.integration.frontend import metrics

    @functools.wraps(original)
    def generate_with_builtin_tools(self: Any, *args: Any, **kwargs: Any) -> Any:
        # Only checked here: every tool call makes another prompt, which resolves anew.
        bound = inspect.signature(original).bind(self, *args, **kwargs).arguments
        admission = self.engine_client.input_processor.pasta_admission
        resolution = admission.check(bound["sampling_params"], bound["engine_input"])
        if resolution is not None:
            metrics.reported(resolution, admission.locator.decode)
        return original(self, *args, **kwargs)

    return generate_with_builtin_tools


def render_chat(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def render_chat(
        self: Any, conversations: Any, chat_params: Any, *args: Any, **kwargs: Any
    ) -> Any:
        rendered, prompts = original(self, conversations, chat_params, *args, **kwargs)
        for messages, prompt in zip(conversations, prompts, strict=True):
            hooks.keep_conversation(self, messages, chat_params, prompt)
        return rendered, prompts

    return render_chat


def render_chat_async(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    async def render_chat_async(
        self: Any, conversations: Any, chat_params: Any, *args: Any, **kwargs: Any
    ) -> Any:
        rendered, prompts = await original(self, conversations, chat_params, *args, **kwargs)
        for messages, prompt in zip(conversations, prompts, strict=True):
            hooks.keep_conversation(self, messages, chat_params, prompt)
        return rendered, prompts

    return render_chat_async


def block_hash_extra_keys(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def generate_block_hash_extra_keys(
        request: Any, start_token_idx: int, end_token_idx: int, start_mm_idx: int
    ) -> tuple[tuple[Any, ...] | None, int]:
        keys, mm_idx = original(request, start_token_idx, end_token_idx, start_mm_idx)
        key = hooks.block_hash_key(request, start_token_idx, end_token_idx)
        return keys if key is None else (*(keys or ()), key), mm_idx

    return generate_block_hash_extra_keys


def build_logitsprocs(original: Callable[..., Any]) -> Callable[..., Any]:
    from vllm_pasta.integration.config import is_enabled

    @functools.wraps(original)
    def build_logitsprocs(vllm_config: Any, *args: Any, **kwargs: Any) -> Any:
        processors = original(vllm_config, *args, **kwargs)
        if vllm_config.speculative_config is not None and is_enabled(vllm_config):
            from vllm_pasta.integration.worker.rows import EmphasisRows

            processors.argmax_invariant.append(EmphasisRows(vllm_config))
        return processors

    return build_logitsprocs


def get_connector_class(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def get_connector_class(cls: Any, kv_transfer_config: Any) -> Any:
        return hooks.connector_class(original(cls, kv_transfer_config), kv_transfer_config)

    return get_connector_class


def add_request(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def add_request(self: Any, request: Any, *args: Any, **kwargs: Any) -> None:
        original(self, request, *args, **kwargs)
        if (state := self.request_states.get(request.request_id)) is not None:
            state.sampling_params = request.sampling_params

    return add_request


def process_outputs(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def process_outputs(self: Any, engine_core_outputs: Any, *args: Any, **kwargs: Any) -> Any:
        if self.log_stats:
            step = [
                (state.sampling_params, output)
                for output in engine_core_outputs
                if (state := self.request_states.get(output.request_id)) is not None
            ]
            hooks.count_rows(step)
        return original(self, engine_core_outputs, *args, **kwargs)

    return process_outputs


def batch_request(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def model_validate_json(cls: Any, json_data: Any, *args: Any, **kwargs: Any) -> Any:
        return original(cls, hooks.batch_line(json_data), *args, **kwargs)

    return model_validate_json


def add_cli_args(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def add_cli_args(parser: Any, *args: Any, **kwargs: Any) -> Any:
        parser = original(parser, *args, **kwargs)
        flags.add_plugin_flag(parser)
        flags.add_flags(parser)
        return parser

    return add_cli_args


def from_cli_args(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def from_cli_args(cls: Any, args: Any) -> Any:
        engine_args = original(cls, args)
        flags.apply_flags(args, engine_args)
        return engine_args

    return from_cli_args
