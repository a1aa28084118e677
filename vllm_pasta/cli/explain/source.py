"""What the model sees: its tokenizer, and messages as its chat template renders them."""

import json
from typing import Any

from vllm_pasta.errors import EmphasisError, PastaError
from vllm_pasta.request.chat import Chat
from vllm_pasta.request.shape import ModelShape


def load_tokenizer(model: str) -> Any:
    """The model's tokenizer, loaded by transformers.

    Raises:
        PastaError: the model has none.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(model)
    except (OSError, ValueError) as e:
        raise PastaError(f"--model {model}: no tokenizer there: {str(e).splitlines()[0]}") from e


def load_shape(model: str) -> ModelShape | None:
    """The model's layers and heads; None where there is a tokenizer alone, or a configuration that
    does not say them."""
    from transformers import AutoConfig

    try:
        return ModelShape.of(AutoConfig.from_pretrained(model).get_text_config())
    except (OSError, ValueError, AttributeError):
        return None


def load_chat(tokenizer: Any, text: str) -> Chat:
    """Messages, as JSON, and how the tokenizer's chat template renders them.

    Raises:
        EmphasisError: the text is no list of messages.
    """
    try:
        messages = json.loads(text)
    except ValueError as e:
        raise EmphasisError(f"expected chat messages as JSON: {e}", field="--messages") from None
    if not isinstance(messages, list) or not all(isinstance(item, dict) for item in messages):
        raise EmphasisError('expected [{"role": …, "content": …}, …]', field="--messages")

    def render(messages: list[dict[str, Any]]) -> str:
        try:
            rendered = tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=True
            )
        except TypeError:  # a template for plain strings; vLLM joins the parts for it too
            rendered = tokenizer.apply_chat_template(
                [_joined(message) for message in messages],
                tokenize=False,
                add_generation_prompt=True,
            )
        return str(rendered)

    return Chat(messages, render)


def _joined(message: dict[str, Any]) -> dict[str, Any]:
    content = message.get("content")
    if not isinstance(content, list):
        return message
    texts = [part if isinstance(part, str) else part.get("text", "") for part in content]
    return {**message, "content": "\n".join(texts)}
