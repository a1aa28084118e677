"""Every change made to vLLM at run time. The ledger is patches/README.md; a test holds the two
together, and another fails when upstream changes a target.

Each patch wraps one function and calls the original. ``apply`` is idempotent.
"""

import functools
import hashlib
import importlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from vllm_pasta.integration import beam_search


@dataclass(frozen=True)
class Patch:
    """One wrapped function.

    Attributes:
        target: ``module:qualified.name``.
        wrap: Original function to its replacement.
        sha256: Digest of the original's source in the supported vLLM, first 12 characters.
        frontend: Applied when a front end starts (it alone has the target's module loaded),
            not in every process.
    """

    target: str
    wrap: Callable[[Callable[..., Any]], Callable[..., Any]]
    sha256: str
    frontend: bool = False


def _input_processor_init(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def __init__(self: Any, vllm_config: Any, *args: Any, **kwargs: Any) -> None:
        from vllm_pasta.integration.admission import Admission

        _apply([patch for patch in PATCHES if patch.frontend])
        # First, so that an engine which cannot honour emphasis refuses to start at once.
        self.pasta_admission = Admission(vllm_config, lambda: self.tokenizer)
        original(self, vllm_config, *args, **kwargs)

    return __init__


def _process_inputs(original: Callable[..., Any]) -> Callable[..., Any]:
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


def _generate(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def generate(self: Any, prompt: Any, sampling_params: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(prompt, dict) and "type" in prompt:
            sampling_params = self.input_processor.pasta_admission.admit(sampling_params, prompt)
        return original(self, prompt, sampling_params, *args, **kwargs)

    return generate


def _generate_with_builtin_tools(original: Callable[..., Any]) -> Callable[..., Any]:
    from vllm_pasta.integration import observe

    @functools.wraps(original)
    def generate_with_builtin_tools(self: Any, *args: Any, **kwargs: Any) -> Any:
        # Only checked here: every tool call makes another prompt, which resolves anew.
        bound = inspect.signature(original).bind(self, *args, **kwargs).arguments
        admission = self.engine_client.input_processor.pasta_admission
        resolution = admission.check(bound["sampling_params"], bound["engine_input"])
        if resolution is not None:
            observe.reported(resolution, admission.locator.decode)
        return original(self, *args, **kwargs)

    return generate_with_builtin_tools


def _render_chat(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def render_chat(
        self: Any, conversations: Any, chat_params: Any, *args: Any, **kwargs: Any
    ) -> Any:
        rendered, prompts = original(self, conversations, chat_params, *args, **kwargs)
        _keep_conversations(self, conversations, chat_params, prompts)
        return rendered, prompts

    return render_chat


def _render_chat_async(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    async def render_chat_async(
        self: Any, conversations: Any, chat_params: Any, *args: Any, **kwargs: Any
    ) -> Any:
        rendered, prompts = await original(self, conversations, chat_params, *args, **kwargs)
        _keep_conversations(self, conversations, chat_params, prompts)
        return rendered, prompts

    return render_chat_async


def _keep_conversations(renderer: Any, conversations: Any, chat_params: Any, prompts: Any) -> None:
    from vllm_pasta.chat import Chat
    from vllm_pasta.locate import CHAT_KEY

    def render(messages: Any) -> str | None:
        text = renderer.render_messages(messages, chat_params)[1].get("prompt")
        return text if isinstance(text, str) else None

    for messages, prompt in zip(conversations, prompts, strict=True):
        prompt[CHAT_KEY] = Chat(messages, render)


def _block_hash_extra_keys(original: Callable[..., Any]) -> Callable[..., Any]:
    from vllm_pasta.integration.cache_keys import block_key, request_emphasis

    @functools.wraps(original)
    def generate_block_hash_extra_keys(
        request: Any, start_token_idx: int, end_token_idx: int, start_mm_idx: int
    ) -> tuple[tuple[Any, ...] | None, int]:
        keys, mm_idx = original(request, start_token_idx, end_token_idx, start_mm_idx)
        emphasis = request_emphasis(request)
        if emphasis is not None:
            key = block_key(emphasis, start_token_idx, end_token_idx)
            if key is not None:
                keys = (*(keys or ()), key)
        return keys, mm_idx

    return generate_block_hash_extra_keys


def _build_logitsprocs(original: Callable[..., Any]) -> Callable[..., Any]:
    from vllm_pasta.integration.config import is_enabled

    @functools.wraps(original)
    def build_logitsprocs(vllm_config: Any, *args: Any, **kwargs: Any) -> Any:
        processors = original(vllm_config, *args, **kwargs)
        if vllm_config.speculative_config is not None and is_enabled(vllm_config):
            from vllm_pasta.integration.rows import EmphasisRows

            processors.argmax_invariant.append(EmphasisRows(vllm_config))
        return processors

    return build_logitsprocs


def _get_connector_class(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def get_connector_class(cls: Any, kv_transfer_config: Any) -> Any:
        from vllm_pasta.integration.connectors import honouring

        return honouring(original(cls, kv_transfer_config), kv_transfer_config)

    return get_connector_class


def _add_request(original: Callable[..., Any]) -> Callable[..., Any]:
    from vllm_pasta.emphasis import WIRE_KEY

    @functools.wraps(original)
    def add_request(self: Any, request: Any, *args: Any, **kwargs: Any) -> None:
        original(self, request, *args, **kwargs)
        extra_args = getattr(request.sampling_params, "extra_args", None)
        if extra_args and extra_args.get(WIRE_KEY):
            self.request_states[request.request_id].pasta_steered = True

    return add_request


def _process_outputs(original: Callable[..., Any]) -> Callable[..., Any]:
    from vllm_pasta.integration import observe

    @functools.wraps(original)
    def process_outputs(self: Any, engine_core_outputs: Any, *args: Any, **kwargs: Any) -> Any:
        if self.log_stats:
            states = [
                self.request_states.get(output.request_id)
                for output in engine_core_outputs
                if output.new_token_ids
            ]
            observe.rows([hasattr(s, "pasta_steered") for s in states if s is not None])
        return original(self, engine_core_outputs, *args, **kwargs)

    return process_outputs


def _batch_request(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def model_validate_json(cls: Any, json_data: Any, *args: Any, **kwargs: Any) -> Any:
        from vllm_pasta.integration.http import rewrite_batch_line

        return original(cls, rewrite_batch_line(json_data), *args, **kwargs)

    return model_validate_json


def _add_cli_args(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def add_cli_args(parser: Any, *args: Any, **kwargs: Any) -> Any:
        from vllm_pasta.integration.cli_args import add_flags

        parser = original(parser, *args, **kwargs)
        add_flags(parser)
        return parser

    return add_cli_args


def _from_cli_args(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def from_cli_args(cls: Any, args: Any) -> Any:
        from vllm_pasta.integration.cli_args import add_middleware, merge_flags

        add_middleware(args)  # the API server builds its app after its engine
        engine_args = original(cls, args)
        engine_args.additional_config = merge_flags(args, engine_args.additional_config)
        # Further API servers start from these, in processes that load plugins only after this.
        args.additional_config = engine_args.additional_config
        return engine_args

    return from_cli_args


_PROTOCOLS = "vllm.entrypoints.openai"
_SPEECH = "vllm.entrypoints.speech_to_text"
_BEAM_SEARCH = "vllm.entrypoints.generate.beam_search"

PATCHES = (
    Patch(
        "vllm.v1.engine.input_processor:InputProcessor.__init__",
        _input_processor_init,
        "5137c92ffb92",
    ),
    Patch(
        "vllm.v1.engine.input_processor:InputProcessor.process_inputs",
        _process_inputs,
        "e22b5f772979",
    ),
    Patch(
        "vllm.v1.core.kv_cache_utils:generate_block_hash_extra_keys",
        _block_hash_extra_keys,
        "fabb6e4b928a",
    ),
    Patch(
        "vllm.v1.sample.logits_processor:build_logitsprocs",
        _build_logitsprocs,
        "82609dd72304",
    ),
    Patch(  # imported there by name, for KV cache events
        "vllm.v1.core.block_pool:generate_block_hash_extra_keys",
        _block_hash_extra_keys,
        "fabb6e4b928a",
    ),
    Patch(
        "vllm.distributed.kv_transfer.kv_connector.factory:KVConnectorFactory.get_connector_class",
        _get_connector_class,
        "006f844582d8",
    ),
    Patch(
        "vllm.v1.engine.output_processor:OutputProcessor.add_request",
        _add_request,
        "8e0315ddb4d6",
        frontend=True,
    ),
    Patch(
        "vllm.v1.engine.output_processor:OutputProcessor.process_outputs",
        _process_outputs,
        "9e116796002e",
        frontend=True,
    ),
    Patch(
        "vllm.entrypoints.launchers.run_batch:BatchRequestInput.model_validate_json",
        _batch_request,
        "3233ae5b1d33",
        frontend=True,
    ),
    Patch("vllm.engine.arg_utils:EngineArgs.add_cli_args", _add_cli_args, "0b7444570415"),
    Patch("vllm.engine.arg_utils:EngineArgs.from_cli_args", _from_cli_args, "51a013f61829"),
    Patch("vllm.renderers.base:BaseRenderer.render_chat", _render_chat, "85953b9757cd"),
    Patch("vllm.renderers.base:BaseRenderer.render_chat_async", _render_chat_async, "e2c5ef88107f"),
    Patch("vllm.v1.engine.async_llm:AsyncLLM.generate", _generate, "5bd0ee90459b", frontend=True),
    Patch(
        f"{_PROTOCOLS}.responses.serving:OpenAIServingResponses._generate_with_builtin_tools",
        _generate_with_builtin_tools,
        "82be6a64cb9c",
        frontend=True,
    ),
    *(
        Patch(
            f"{protocol}:{request}.to_beam_search_params",
            beam_search.to_params,
            sha256,
            frontend=True,
        )
        for protocol, request, sha256 in (
            (f"{_PROTOCOLS}.completion.protocol", "CompletionRequest", "a1d956e4e6f9"),
            (f"{_PROTOCOLS}.chat_completion.protocol", "ChatCompletionRequest", "811f6b3777f9"),
            (f"{_SPEECH}.transcription.protocol", "TranscriptionRequest", "cb30285d6c09"),
            (f"{_SPEECH}.translation.protocol", "TranslationRequest", "cb30285d6c09"),
        )
    ),
    Patch(
        f"{_BEAM_SEARCH}.online:BeamSearchOnlineMixin.beam_search",
        beam_search.online,
        "e2e6d1893a8f",
        frontend=True,
    ),
    Patch(
        f"{_BEAM_SEARCH}.offline:BeamSearchOfflineMixin.beam_search",
        beam_search.offline,
        "b4b93229fd76",
        frontend=True,
    ),
    Patch(
        f"{_BEAM_SEARCH}.utils:BeamSearchInstance.__init__",
        beam_search.instance,
        "a5587f260df0",
        frontend=True,
    ),
    Patch(
        f"{_BEAM_SEARCH}.utils:BeamSearchSequence.get_prompt",
        beam_search.beam_prompt,
        "fe68246d5121",
        frontend=True,
    ),
)

_MARK = "_vllm_pasta_original"


def apply() -> None:
    """Applies the patches that every process needs."""
    _apply([patch for patch in PATCHES if not patch.frontend])


def is_applied() -> bool:
    """Whether `apply` was called in this process."""
    owner, name = _locate(PATCHES[0])
    return hasattr(_function(owner, name), _MARK)


def source_digest(patch: Patch) -> str:
    """Digest of the target's source as upstream wrote it, whether or not it is wrapped by now."""
    function = _function(*_locate(patch))
    source = inspect.getsource(getattr(function, _MARK, function))
    return hashlib.sha256(source.encode()).hexdigest()[:12]


def _apply(patches: list[Patch]) -> None:
    for patch in patches:
        owner, name = _locate(patch)
        static = inspect.getattr_static(owner, name)
        function = _function(owner, name)
        if hasattr(function, _MARK):
            continue
        wrapped = patch.wrap(function)
        setattr(wrapped, _MARK, function)
        kind = type(static) if isinstance(static, staticmethod | classmethod) else lambda f: f
        setattr(owner, name, kind(wrapped))


def _locate(patch: Patch) -> tuple[Any, str]:
    module, _, qualname = patch.target.partition(":")
    *path, name = qualname.split(".")
    owner = importlib.import_module(module)
    for part in path:
        owner = getattr(owner, part)
    return owner, name


def _function(owner: Any, name: str) -> Callable[..., Any]:
    static = inspect.getattr_static(owner, name)
    return static.__func__ if isinstance(static, staticmethod | classmethod) else static
