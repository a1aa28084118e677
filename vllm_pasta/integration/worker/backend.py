"""A version of any attention backend of vLLM that honours emphasis.

The base computes plain attention, by whatever kernel; the steered (row, head) pairs of its output
are overwritten. So nothing of the base is replaced: ``steer`` puts two mixins before its metadata
builder and its impl. Their subclasses in ``cpu`` and ``gpu`` decide what is computed, and from
which tensors.
"""

import functools
import importlib
from typing import Any

from vllm.config import VllmConfig, get_current_vllm_config_or_none, get_layers_from_vllm_config
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.v1.attention.backend import AttentionBackend, CommonAttentionMetadata
from vllm.v1.attention.backends.registry import AttentionBackendEnum

from vllm_pasta.errors import UnsupportedError
from vllm_pasta.integration import patching, support
from vllm_pasta.integration.config import is_enabled
from vllm_pasta.integration.versions import is_being_drafted, is_draft
from vllm_pasta.integration.worker.rows import EmphasisRows, rows_of
from vllm_pasta.steering.plan import LayerAttention


class SteeringBuilder:
    """Mixin for a vLLM metadata builder: adds ``metadata.steering`` to what the base builds.

    An engine has one builder per group of layers whose KV cache is managed alike. All take their
    rows from the same `EmphasisRows`; block tables are the group's own.

    Raises:
        UnsupportedError: emphasis is on, and a layer of this group cannot honour it.
    """

    _rows: EmphasisRows | None = None
    """None where emphasis is off, or this group has none but a draft model's layers."""

    def __init__(
        self, kv_cache_spec: Any, layer_names: list[str], vllm_config: VllmConfig, *args: Any,
        **kwargs: Any,
    ) -> None:  # fmt: skip
        super().__init__(kv_cache_spec, layer_names, vllm_config, *args, **kwargs)  # type: ignore[call-arg]
        layers = get_layers_from_vllm_config(vllm_config, AttentionLayerBase, layer_names)
        names = [name for name, layer in layers.items() if not is_draft(layer)]
        if not names or not is_enabled(vllm_config):
            return
        support.check_engine(vllm_config)
        support.check_layers(vllm_config)
        local = support.local_heads(vllm_config, 0)
        for name in names:
            support.check_layer(name, layers[name], len(local[support.layer_index(name)]))
            self._describe(layers[name])
            layers[name].impl.layer_index = support.layer_index(name)
        self._rows = rows_of(vllm_config)
        self._prepare(self._rows, [layers[name].impl for name in names])

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        metadata = super().build(common_prefix_len, common_attn_metadata, *args, **kwargs)  # type: ignore[misc]
        metadata.steering = (
            None
            if self._rows is None
            else self._steering(self._rows, common_attn_metadata, metadata)
        )
        return metadata

    def _describe(self, layer: Any) -> None:
        """Gives a layer's impl what it needs to know of its layer."""
        layer.impl.attention = layer_attention(layer.impl)

    def _prepare(self, rows: EmphasisRows, impls: list[Any]) -> None:
        """Makes what steered steps of these layers will need, at start."""

    def _steering(self, rows: EmphasisRows, common: CommonAttentionMetadata, metadata: Any) -> Any:
        """What the impls of this group need to know of a step."""
        raise NotImplementedError


class SteeringImpl:
    """Mixin for a vLLM attention impl: ``forward`` also steers, where emphasis is on."""

    layer_index: int | None = None
    """Over the whole model; set by the builder where emphasis is on. None in a draft model."""
    attention: LayerAttention
    """What the layer computes; set with ``layer_index``."""
    may_steer: bool
    """Whether emphasis is on, so far as is known when the layer is made."""
    is_draft: bool
    """Whether the layer is a draft model's, so far as is known when it is made."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        config = get_current_vllm_config_or_none()
        self.may_steer = config is None or is_enabled(config)
        self.is_draft = is_being_drafted()

    def fused_output_quant_supported(self, quant_key: Any) -> bool:
        """Not with emphasis: there is nothing to steer in an output that is quantised already."""
        return not self.may_steer and super().fused_output_quant_supported(quant_key)  # type: ignore[misc]

    def _steering_of(self, metadata: Any, output_scale: Any) -> Any:
        """This step's steering for this layer; None where nothing is to be steered.

        Raises:
            UnsupportedError: nobody knows whether there is.
        """
        if self.layer_index is None or metadata is None:
            return None
        if output_scale is not None:
            raise UnsupportedError("the attention output is quantised by the attention kernel")
        try:
            return metadata.steering
        except AttributeError:
            raise UnsupportedError(
                f"attention metadata of {type(metadata).__name__} was not built by vllm-pasta's "
                "attention backend, so nobody knows which of its rows are steered"
            ) from None


def steer(
    base: type[AttentionBackend], builder: type[SteeringBuilder], impl: type[SteeringImpl]
) -> type[AttentionBackend]:
    """A subclass of ``base``, of the same name to vLLM, that honours emphasis.

    Args:
        base: The backend that computes plain attention.
        builder: The mixin for its metadata builder.
        impl: The mixin for its impl.
    """
    bases = {"builder": (builder, base.get_builder_cls()), "impl": (impl, base.get_impl_cls())}
    module = {"__module__": builder.__module__}
    made = {key: type(f"Steered{b[1].__name__}", b, dict(module)) for key, b in bases.items()}
    return type(
        f"Steered{base.__name__}",
        (base,),
        {
            **module,
            "get_builder_cls": staticmethod(lambda: made["builder"]),
            "get_impl_cls": staticmethod(lambda: made["impl"]),
        },
    )


@functools.cache
def steered_backend(
    name: str, builder: type[SteeringBuilder], impl: type[SteeringImpl]
) -> type[AttentionBackend]:
    """The steered version of vLLM's own backend of that name, which is imported for it.

    For the ``__getattr__`` of the builder's module: vLLM's selector names a class by
    ``full_cls_name``, and looks that name up in the class's module.
    """
    module, _, class_name = AttentionBackendEnum[name].value.rpartition(".")
    made = steer(getattr(importlib.import_module(module), class_name), builder, impl)
    made.__qualname__ = name
    patching.apply_part(name)
    return made


def layer_attention(impl: Any) -> LayerAttention:
    """What the base's kernel computes for this layer."""
    window = impl.sliding_window  # CPU: as many keys; GPU: (keys before the row's own, 0)
    if window is not None:
        window = window[0] + 1 if isinstance(window, tuple) else window
    return LayerAttention(
        scale=impl.scale,
        window=window if window and window > 0 else None,
        soft_cap=impl.logits_soft_cap or None,
        alibi_slopes=impl.alibi_slopes,
        sinks=impl.sinks,
    )
