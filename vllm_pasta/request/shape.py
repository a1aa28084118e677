"""A model's layers and query heads: what a head set may name."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from vllm_pasta.request.heads import HeadSet


@dataclass(frozen=True)
class ModelShape:
    """A model's layers and query heads.

    Attributes:
        num_layers: Layers of the whole model, whatever they hold.
        num_heads: Query heads of a layer with attention, over all tensor-parallel ranks; the most,
            where layers differ.
        attention_layers: Indices of the layers that have attention heads, in order. In a hybrid
            model the others hold a recurrence (Mamba, linear attention), a short convolution or
            an MLP alone, and there is nothing in them to steer.
        layer_heads: Query heads of each layer, where layers differ; empty where they do not.
    """

    num_layers: int
    num_heads: int
    attention_layers: tuple[int, ...]
    layer_heads: tuple[int, ...] = ()

    @classmethod
    def of(cls, text_config: Any) -> "ModelShape":
        """By the configuration of the language model, as transformers reads it."""
        count = text_config.num_hidden_layers
        heads = layer_heads(text_config, count)
        most = max(heads, default=text_config.num_attention_heads)
        return cls(count, most, attention_layers(text_config, count), heads)

    @property
    def is_hybrid(self) -> bool:
        """Whether some of its layers have no attention heads."""
        return len(self.attention_layers) < self.num_layers

    def heads_of(self, layer: int) -> int:
        """Query heads of one layer, if it has attention."""
        return self.layer_heads[layer] if self.layer_heads else self.num_heads

    def check(self, heads: HeadSet) -> None:
        """Checks that the model has every head of a head set.

        Raises:
            HeadSetError: names the head, and the layers and heads that there are.
        """
        heads.check(self.num_layers, self.layer_heads or self.num_heads, self.attention_layers)

    def __str__(self) -> str:
        fewest = min(self.layer_heads, default=self.num_heads)
        heads = f"{fewest} to " * (fewest < self.num_heads) + str(self.num_heads)
        text = f"{self.num_layers} layers of {heads} query heads"
        if self.is_hybrid:
            text += f", {len(self.attention_layers)} of them with attention"
        return text


def attention_layers(text_config: Any, num_layers: int) -> tuple[int, ...]:
    """The layers that have attention heads, by a model's configuration.

    Hybrid models say for each layer what it holds, in one of three fields; see vLLM's
    ``ModelConfig.get_num_layers_by_block_type``, which counts them and does not name them.

    Args:
        text_config: The configuration of the language model, as transformers reads it.
        num_layers: Layers of the model.
    """
    if blocks := getattr(text_config, "block_configs", None):  # DeciLM leaves out attention
        return tuple(i for i, block in enumerate(blocks) if not _no_op(block))
    kinds: Sequence[Any] = (
        getattr(text_config, "layers_block_type", None)
        or getattr(text_config, "attn_type_list", None)  # MiniMax: 1 is attention, 0 is linear
        or getattr(text_config, "layer_types", None)
        or ()
    )
    return tuple(i for i in range(num_layers) if i >= len(kinds) or _has_heads(kinds[i]))


def layer_heads(text_config: Any, num_layers: int) -> tuple[int, ...]:
    """Query heads of each layer by a model's configuration; empty where layers do not differ.

    Args:
        text_config: The configuration of the language model, as transformers reads it.
        num_layers: Layers of the model.
    """
    if counts := getattr(text_config, "num_attention_heads_per_layer", None):  # Laguna
        return tuple(counts)
    own = getattr(text_config, "attention_other_setting", None)  # Step 3.5: of one kind of layer
    if own and (kinds := getattr(text_config, "layer_types", None)):
        others = (text_config.num_attention_heads, own["num_attention_heads"])
        return tuple(others[kind == own["attention_type"]] for kind in kinds[:num_layers])
    if getattr(text_config, "is_heterogeneous", False):  # a configuration for each layer
        configs = text_config.per_layer_config
        return tuple(configs[layer].num_attention_heads for layer in range(num_layers))
    return ()


def _has_heads(kind: Any) -> bool:
    if isinstance(kind, str):
        return kind == "hybrid" or (kind.endswith("attention") and kind != "linear_attention")
    return bool(kind)


def _no_op(block: Any) -> bool:
    attention = block["attention"] if isinstance(block, dict) else block.attention
    return bool(attention["no_op"] if isinstance(attention, dict) else attention.no_op)
