"""Small random models, and the configurations of public models for engines with random weights."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from vllm_pasta.request.shape import attention_layers


@dataclass(frozen=True)
class Size:
    """What requests and memory depend on.

    Attributes:
        layers: Number of layers.
        attention_layers: Those that have heads; the others of a hybrid model have a recurrence.
        heads: Query heads of each layer.
        kv_heads: Key and value heads of each layer.
        head_size: Elements of a head.
        vocab: Number of token ids.
    """

    layers: int
    attention_layers: tuple[int, ...]
    heads: int
    kv_heads: int
    head_size: int
    vocab: int

    @classmethod
    def of(cls, model: str | Path) -> "Size":
        """Of a model's folder, or its name on the hub."""
        from transformers import AutoConfig

        config = AutoConfig.from_pretrained(model).get_text_config()
        heads = config.num_attention_heads
        return cls(
            config.num_hidden_layers,
            attention_layers(config, config.num_hidden_layers),
            heads,
            getattr(config, "num_key_value_heads", None) or heads,
            getattr(config, "head_dim", None) or config.hidden_size // heads,
            config.vocab_size,
        )

    def kv_bytes(self, tokens: int, element_bytes: int) -> int:
        """Memory that the keys and values of so many tokens take."""
        return tokens * 2 * self.layers * self.kv_heads * self.head_size * element_bytes


def tiny_llama(
    folder: Path,
    *,
    heads: int = 4,
    kv_heads: int = 2,
    head_size: int = 32,
    layers: int = 4,
    dtype: torch.dtype = torch.float32,
    vocab: int = 256,
    initializer_range: float = 0.15,
) -> Path:
    """Saves a random Llama whose greedy choices are clear and react to its context.

    Args:
        folder: Where it is saved.
        heads, kv_heads, head_size, layers, vocab: Its size.
        dtype: Of the saved weights.
        initializer_range: Standard deviation of the weights. Larger ones make choices clearer, and
            rounding errors larger too.

    Returns:
        ``folder``.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=heads * head_size,
        intermediate_size=128,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_size,
        max_position_embeddings=2048,
        initializer_range=initializer_range,
        tie_word_embeddings=False,
    )
    LlamaForCausalLM(config).to(dtype).save_pretrained(folder)
    return folder


def random_ids(n: int, seed: int = 0, vocab: int = 256) -> list[int]:
    """``n`` token ids; none of the special ones."""
    generator = torch.Generator().manual_seed(seed)
    ids: list[int] = torch.randint(10, vocab, (n,), generator=generator).tolist()
    return ids


_LLAMA = {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
_QWEN3 = {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "head_dim": 128}

SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {
        **_LLAMA, "hidden_size": 128, "intermediate_size": 128, "num_hidden_layers": 4,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "vocab_size": 1024,
    },
    "smollm2-135m": {
        **_LLAMA, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
        "num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 64, "vocab_size": 49152,
        "tie_word_embeddings": True,
    },
    "qwen3-0.6b": {
        **_QWEN3, "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28,
        "num_attention_heads": 16, "num_key_value_heads": 8, "vocab_size": 151936,
        "tie_word_embeddings": True,
    },
    "qwen3-8b": {
        **_QWEN3, "hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36,
        "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 151936,
    },
    "llama-3.1-8b": {
        **_LLAMA, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128,
        "vocab_size": 128256,
    },
}  # fmt: skip
"""Configurations by name. Engines fill them with random weights, so only their times are real."""


def save_shape(name: str, folder: Path) -> Path:
    """Saves one of `SHAPES` as a model folder without weights.

    vLLM makes the weights up with ``load_format="dummy"``.

    Returns:
        ``folder``.
    """
    from transformers import AutoConfig

    fields = {"max_position_embeddings": 40960, "tie_word_embeddings": False, **SHAPES[name]}
    kind = fields.pop("model_type")
    AutoConfig.for_model(kind, **fields).save_pretrained(folder)
    return folder
