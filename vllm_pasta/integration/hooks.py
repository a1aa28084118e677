"""What we register with a vLLM that has hook points, in place of run-time patches.

Stock vLLM has none. The diffs in ``patches/`` add them, one each, for upstream to take; where an
installed vLLM has one, the run-time patches which it supersedes are left out
(``Patch.superseded_by``). Both ways end in the same functions.
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from vllm_pasta.errors import UnsupportedError
from vllm_pasta.integration.frontend import flags
from vllm_pasta.request.resolution import WIRE_KEY

if TYPE_CHECKING:
    from vllm.config import VllmConfig


def register() -> None:
    """Registers with every hook point of the installed vLLM. Idempotent."""
    try:
        from vllm.plugins import hooks
    except ImportError:
        return
    for name, function in FUNCTIONS.items():
        if hasattr(hooks, name):
            getattr(hooks, name).register(function)


def start_admission(input_processor: Any) -> Callable[..., Any]:
    """Makes a front end's `Admission`, which may refuse the engine; gives what admits a request."""
    from vllm_pasta.integration import upstream
    from vllm_pasta.integration.frontend.admission import Admission

    upstream.apply_frontend()
    admission = Admission(input_processor.vllm_config, lambda: input_processor.tokenizer)
    input_processor.pasta_admission = admission
    return admission.admit


def keep_conversation(renderer: Any, messages: Any, chat_params: Any, prompt: Any) -> None:
    """Puts a conversation and its template beside its rendered prompt, for admission to find."""
    from vllm_pasta.request.chat import Chat
    from vllm_pasta.request.locate import CHAT_KEY

    def render(messages: Any) -> str | None:
        text = renderer.render_messages(messages, chat_params)[1].get("prompt")
        return text if isinstance(text, str) else None

    prompt[CHAT_KEY] = Chat(messages, render)


def block_hash_key(request: Any, start: int, end: int) -> tuple[Any, ...] | None:
    """The key of a request's KV block of tokens ``[start, end)``, or None."""
    from vllm_pasta.integration.scheduler.cache_keys import block_key, request_emphasis

    emphasis = request_emphasis(request)
    return None if emphasis is None else block_key(emphasis, start, end)


def connector_class(connector: type, kv_transfer_config: Any) -> type:
    """The class to use in a KV connector's place."""
    from vllm_pasta.integration.scheduler.connectors import honouring

    return honouring(connector, kv_transfer_config)


def count_rows(step: Sequence[tuple[Any, Any]]) -> None:
    """Counts a step's rows, given each request's sampling params and output, for /metrics."""
    from vllm_pasta.integration.frontend import metrics

    metrics.rows(
        [
            bool(((params and params.extra_args) or {}).get(WIRE_KEY))
            for params, output in step
            if output.new_token_ids
        ]
    )


def batch_line(line: str | bytes) -> str | bytes:
    """A line of a batch file with our fields where vLLM's request models have room for them."""
    from vllm_pasta.integration.frontend.middleware import rewrite_batch_line

    return rewrite_batch_line(line)


def takes_custom_backend() -> bool:
    """Whether this is a CPU platform that honours the attention backend CUSTOM, as with our diff,
    on a vLLM where a plugin can select it."""
    try:
        from vllm.plugins.hooks import vllm_config  # noqa: F401
    except ImportError:
        return False
    import torch
    from vllm.platforms import current_platform
    from vllm.v1.attention.backends.registry import AttentionBackendEnum
    from vllm.v1.attention.selector import AttentionSelectorConfig

    if not current_platform.is_cpu():
        return False
    config = AttentionSelectorConfig(128, torch.float32, None, None)
    try:
        path = current_platform.get_attn_backend_cls(AttentionBackendEnum.CUSTOM, config)
    except ValueError:  # nothing is registered as CUSTOM yet
        return True
    return bool(path != AttentionBackendEnum.CPU_ATTN.get_path())


def select_backend(vllm_config: "VllmConfig") -> None:
    """Selects the attention backend CUSTOM where emphasis is on, and ours is registered as that.

    Raises:
        UnsupportedError: another one was asked for.
    """
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    from vllm_pasta.integration.config import is_enabled
    from vllm_pasta.integration.plugin import CPU_BACKEND

    custom, attention = AttentionBackendEnum.CUSTOM, vllm_config.attention_config
    ours = custom.is_overridden() and custom.get_path() == CPU_BACKEND
    if not ours or not is_enabled(vllm_config):
        return
    if attention.backend not in (None, custom, AttentionBackendEnum.CPU_ATTN):
        raise UnsupportedError(
            f"emphasis needs the attention backend CUSTOM, this engine has {attention.backend.name}"
        )
    attention.backend = custom


FUNCTIONS: dict[str, Callable[..., Any]] = {
    "admission": start_admission,
    "chat_rendered": keep_conversation,
    "block_hash_keys": block_hash_key,
    "cli_args": flags.add_flags,
    "cli_parsed": flags.apply_flags,
    "vllm_config": select_backend,
    "kv_connector_class": connector_class,
    "step_outputs": count_rows,
    "batch_line": batch_line,
}
"""By hook point, as its documentation in ``vllm.plugins.hooks`` wants them."""
