"""Every change made to vLLM at run time. The ledger is patches/README.md; a test holds the two
together, and another fails when upstream changes a target.

Each patch wraps one function and calls the original. A patch is left out where the installed vLLM
has what makes it superfluous (see ``hooks``). `plugin.register` gives them to `patching.apply`.
"""

from vllm_pasta.integration import wrappers
from vllm_pasta.integration.frontend import beam_search
from vllm_pasta.integration.patching import Patch
from vllm_pasta.integration.worker import lse

_PROTOCOLS = "vllm.entrypoints.openai"
_SPEECH = "vllm.entrypoints.speech_to_text"
_BEAM_SEARCH = "vllm.entrypoints.generate.beam_search"

_BEAM_PARAMS = "vllm.sampling_params:BeamSearchParams.extra_args"

PATCHES = (
    Patch(
        "vllm.v1.engine.input_processor:InputProcessor.__init__",
        wrappers.input_processor_init,
        "5137c92ffb92",
        "admission",
    ),
    Patch(
        "vllm.v1.engine.input_processor:InputProcessor.process_inputs",
        wrappers.process_inputs,
        "e22b5f772979 65a1db8ef773",
        "admission",
    ),
    Patch(
        "vllm.v1.core.kv_cache_utils:generate_block_hash_extra_keys",
        wrappers.block_hash_extra_keys,
        "fabb6e4b928a",
        "block_hash_keys",
    ),
    Patch(
        "vllm.v1.sample.logits_processor:build_logitsprocs",
        wrappers.build_logitsprocs,
        "82609dd72304",
        "vllm.v1.attention.backend:CommonAttentionMetadata.get_sampling_params",
    ),
    Patch(
        "vllm.v1.attention.backends.flash_attn:FA4DenseAttentionKernel.kernel",
        lse.flash_attention,
        "c5faf0462409",
        "vllm.v1.attention.backend:AttentionImpl.on_softmax_lse",
        backend="FLASH_ATTN",
    ),
    Patch(  # imported there by name, for KV cache events
        "vllm.v1.core.block_pool:generate_block_hash_extra_keys",
        wrappers.block_hash_extra_keys,
        "fabb6e4b928a",
        "block_hash_keys",
    ),
    Patch(
        "vllm.distributed.kv_transfer.kv_connector.factory:KVConnectorFactory.get_connector_class",
        wrappers.get_connector_class,
        "006f844582d8",
        "kv_connector_class",
    ),
    Patch(
        "vllm.v1.engine.output_processor:OutputProcessor.add_request",
        wrappers.add_request,
        "8e0315ddb4d6",
        "step_outputs",
        frontend=True,
    ),
    Patch(
        "vllm.v1.engine.output_processor:OutputProcessor.process_outputs",
        wrappers.process_outputs,
        "9e116796002e c2ecb854b1e3",
        "step_outputs",
        frontend=True,
    ),
    Patch(
        "vllm.entrypoints.launchers.run_batch:BatchRequestInput.model_validate_json",
        wrappers.batch_request,
        "3233ae5b1d33",
        "batch_line",
        frontend=True,
    ),
    Patch(
        "vllm.engine.arg_utils:EngineArgs.add_cli_args",
        wrappers.add_cli_args,
        "0b7444570415 eb63de155f31",
        "cli_args",
    ),
    Patch(
        "vllm.engine.arg_utils:EngineArgs.from_cli_args",
        wrappers.from_cli_args,
        "51a013f61829",
        "cli_parsed",
    ),
    Patch(
        "vllm.renderers.base:BaseRenderer.render_chat",
        wrappers.render_chat,
        "85953b9757cd",
        "chat_rendered",
    ),
    Patch(
        "vllm.renderers.base:BaseRenderer.render_chat_async",
        wrappers.render_chat_async,
        "e2c5ef88107f",
        "chat_rendered",
    ),
    Patch(
        "vllm.v1.engine.async_llm:AsyncLLM.generate",
        wrappers.generate,
        "5bd0ee90459b",
        "admission",
        frontend=True,
    ),
    Patch(
        f"{_PROTOCOLS}.responses.serving:OpenAIServingResponses._generate_with_builtin_tools",
        wrappers.generate_with_builtin_tools,
        "82be6a64cb9c ee94ab646588",
        "admission",
        frontend=True,
    ),
    *(
        Patch(
            f"{protocol}:{request}.to_beam_search_params",
            beam_search.to_params,
            digests,
            _BEAM_PARAMS,
            frontend=True,
        )
        for protocol, request, digests in (
            (f"{_PROTOCOLS}.completion.protocol", "CompletionRequest", "a1d956e4e6f9 8aea3604dafb"),
            (
                f"{_PROTOCOLS}.chat_completion.protocol",
                "ChatCompletionRequest",
                "811f6b3777f9 31617f201a06",
            ),
            (
                f"{_SPEECH}.transcription.protocol",
                "TranscriptionRequest",
                "cb30285d6c09 cfe80cd2024d",
            ),
            (f"{_SPEECH}.translation.protocol", "TranslationRequest", "cb30285d6c09 cfe80cd2024d"),
        )
    ),
    Patch(
        f"{_BEAM_SEARCH}.online:BeamSearchOnlineMixin.beam_search",
        beam_search.online,
        "e2e6d1893a8f 6e6156350d02",
        _BEAM_PARAMS,
        frontend=True,
    ),
    Patch(
        f"{_BEAM_SEARCH}.offline:BeamSearchOfflineMixin.beam_search",
        beam_search.offline,
        "b4b93229fd76 c07c81870da3",
        _BEAM_PARAMS,
        frontend=True,
    ),
    Patch(
        f"{_BEAM_SEARCH}.utils:BeamSearchInstance.__init__",
        beam_search.instance,
        "a5587f260df0",
        _BEAM_PARAMS,
        frontend=True,
    ),
    Patch(
        f"{_BEAM_SEARCH}.utils:BeamSearchSequence.get_prompt",
        beam_search.beam_prompt,
        "fe68246d5121",
        _BEAM_PARAMS,
        frontend=True,
    ),
)
