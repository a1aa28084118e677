"""What becomes of every generation architecture of the installed vLLM: accepted or refused.

The refusals themselves decide (`vllm_pasta.integration.refusals`). They read an engine, so this
makes one of each architecture without a model: vLLM's own account of the class (`_ModelInfo`), the
default configuration of its model type where transformers or vLLM has one, and the classes of
layers that the source of the model refers to. No model is instantiated, so what only a loaded layer
shows (`LAYER`, but for the kind of layer) is not counted.
"""

import functools
import importlib
import inspect
import multiprocessing
import types
import warnings
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from typing import Any

import vllm
from transformers import CONFIG_MAPPING, PreTrainedConfig
from transformers.models.auto import modeling_auto
from vllm.config import ModelConfig, VllmConfig
from vllm.model_executor.layers.attention import (
    CrossAttention,
    EncoderOnlyAttention,
    MLAAttention,
)
from vllm.model_executor.layers.attention.rswa_attention import RSWAAttention
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.model_executor.layers.mamba.abstract import MambaBase
from vllm.model_executor.models import registry
from vllm.transformers_utils.config import _CONFIG_REGISTRY
from vllm.transformers_utils.model_arch_config_convertor import (
    MODEL_ARCH_CONFIG_CONVERTORS,
    ModelArchConfigConvertorBase,
)

from vllm_pasta.integration.refusals import ENGINE, LAYER, MLA_LAYER, Engine, Layer

MAPS = {
    "text": registry._TEXT_GENERATION_MODELS,
    "multimodal models": registry._MULTIMODAL_MODELS,
    "Transformers backend": registry._TRANSFORMERS_SUPPORTED_MODELS,
}
"""vLLM's lists of generation architectures, by kind."""

ACCEPTED, NOT_READ = "accepted", "not read"

_MLA = "multi-head latent attention (MLA)"

_MODULES = ("vllm.model_executor.models.", "vllm.models.", "vllm.model_executor.layers.mla")
"""Where the source of models is; other modules are not followed."""


_TESTS = {
    "decoders": "tests/engine/test_attention_kinds.py::test_mixed_batch",
    f"decoders, {_MLA}": "tests/engine/test_mla.py::test_mixed_batch",
    "hybrid models": "tests/engine/test_hybrid.py::test_mixed_batch",
    "hybrid models with MLA": "tests/engine/test_admission.py::test_model_that_cannot_be_steered",
    "multimodal models": "tests/engine/test_multimodal.py::test_mixed_batch",
    "Transformers backend": "tests/engine/test_attention_kinds.py::test_mixed_batch",
}
"""A test of each kind of model, in the order of the table."""


@dataclass(frozen=True)
class Verdict:
    """What becomes of an architecture.

    Attributes:
        reason: `ACCEPTED`; the id of the first refusal; or `NOT_READ` where the class cannot be
            imported here, as a package is missing that the model needs.
        layers: Names of the classes of layers with a KV cache or a state that the source refers to,
            as far as the configuration does not rule them out. Empty where the language model is
            whatever the checkpoint says.
        is_hybrid: Whether it can have recurrences or convolutions beside attention.
        uses_mla: Whether its attention is multi-head latent attention.
    """

    reason: str
    layers: frozenset[str] = frozenset()
    is_hybrid: bool = False
    uses_mla: bool = False


@functools.cache
def verdicts() -> dict[str, Verdict]:
    """Of every generation architecture, by name.

    They are found in a process of its own: vLLM 0.32 starts no engine on a CPU in one that has
    imported every model, since one of them imports numba (`triton_utils/dispatcher.py`).
    """
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        return process.submit(_verdicts).result()


def _verdicts() -> dict[str, Verdict]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of default configurations, which nobody runs
        return {name: _verdict(name) for names in MAPS.values() for name in names}


def table() -> str:
    """How many architectures of which kind are accepted, and what refuses the others."""
    kinds: dict[str, list[Verdict]] = {kind: [] for kind in _TESTS}
    for name, verdict in verdicts().items():
        kinds[_kind(name, verdict)].append(verdict)
    accepted = sum(verdict.reason == ACCEPTED for verdict in verdicts().values())
    version = ".".join(vllm.__version__.split(".")[:2])
    lines = [
        f"Of the {len(verdicts())} generation architectures of vLLM {version}, {accepted} are "
        "accepted:",
        "",
        "| kind | most frequent layers | accepted | others, by what refuses them | test |",
        "|---|---|---|---|---|",
    ]
    for kind, found in kinds.items():
        reasons = Counter(verdict.reason for verdict in found)
        count = reasons.pop(ACCEPTED, 0)
        others = ", ".join(f"{n} {reason}" for reason, n in reasons.most_common())
        layers = Counter(layer for verdict in found for layer in sorted(verdict.layers))
        named = ", ".join(f"`{layer}`" for layer, n in layers.most_common(3) if n > len(found) / 8)
        lines.append(
            f"| {kind} | {named} | {count} of {len(found)} | {others} | `{_TESTS[kind]}` |"
        )
    return "\n".join(lines)


def _kind(name: str, verdict: Verdict) -> str:
    """The row of the table in which an architecture is counted."""
    kind = next(kind for kind, names in MAPS.items() if name in names)
    if kind == "text":
        kind = "hybrid models" if verdict.is_hybrid else "decoders"
        if verdict.uses_mla:
            kind = "hybrid models with MLA" if verdict.is_hybrid else f"{kind}, {_MLA}"
    return kind


def _verdict(name: str) -> Verdict:
    try:
        model_class = _load(name)
    except ImportError:
        return Verdict(NOT_READ)
    info = registry._ModelInfo.from_model_cls(model_class)
    config = _default_config(name)
    kinds = _layer_classes(model_class)
    engine = _engine(info, config, kinds)
    layers = {layer for layer in kinds if _is_built(layer, engine, config)}
    reasons = [refusal.id for refusal in ENGINE if refusal.device is None and refusal.holds(engine)]
    kinds_of_layers = {refusal.id: refusal for refusal in (*LAYER, *MLA_LAYER)}
    for layer in layers:
        is_latent = issubclass(layer, MLAAttention)
        refusal = kinds_of_layers["mla-layer-kind" if is_latent else "layer-kind"]
        if not issubclass(layer, MambaBase) and refusal.holds(Layer(object.__new__(layer))):
            reasons.append(refusal.id)
    if any(_gives_values_a_size(item) for item in _source(model_class)):
        reasons.append(kinds_of_layers["layer-value-size"].id)
    return Verdict(
        reasons[0] if reasons else ACCEPTED,
        frozenset(layer.__name__ for layer in layers),
        info.is_hybrid,
        # Kimi's has a class of its own, and vLLM's configuration does not count it.
        engine.model.use_mla or any("LatentAttention" in layer.__name__ for layer in layers),
    )


def _load(name: str) -> type:
    module, class_name = next(names[name] for names in MAPS.values() if name in names)
    path = module if "." in module else f"vllm.model_executor.models.{module}"
    return getattr(importlib.import_module(path), class_name)


def _engine(info: registry._ModelInfo, config: PreTrainedConfig | None, kinds: set[type]) -> Engine:
    """An engine of the model, as far as refusals read it."""
    known = config is not None
    config = config or PreTrainedConfig(is_encoder_decoder=CrossAttention in kinds)
    text = config.get_text_config()
    model: Any = object.__new__(ModelConfig)
    model._model_info = info
    model.hf_config, model.hf_text_config = config, text
    model.runner_type, model.runner, model.model_impl = "generate", "generate", "auto"
    model.enable_sleep_mode = False
    model.multimodal_config = None
    convertor = MODEL_ARCH_CONFIG_CONVERTORS.get(config.model_type, ModelArchConfigConvertorBase)
    # Without a configuration, what the source can build tells.
    by_source = not known and MLAAttention in kinds
    model.model_arch_config = types.SimpleNamespace(
        is_deepseek_mla=by_source or convertor(config, text).is_deepseek_mla(),
        rswa_window=convertor(config, text).rswa_window(),
    )
    by_transformers = info.architecture.startswith("Transformers")
    model.using_transformers_backend = lambda: by_transformers
    engine = _default_engine()
    engine.model_config = model
    return Engine(engine)


@functools.cache
def _default_engine() -> VllmConfig:
    return VllmConfig()


def _is_built(layer: type, engine: Engine, config: PreTrainedConfig | None) -> bool:
    """Whether a model of this configuration builds a kind of layer that its source refers to."""
    if issubclass(layer, EncoderOnlyAttention | CrossAttention):
        return False  # in encoders alone, which `Engine` tells
    if issubclass(layer, MLAAttention):
        return engine.model.use_mla
    if issubclass(layer, RSWAAttention):
        return engine.model.rswa_window is not None
    if "Indexer" in layer.__name__:  # which checkpoints with one say, of whatever architecture
        return config is not None and hasattr(config.get_text_config(), "index_topk")
    return True


@functools.cache
def _model_types() -> dict[str, str]:
    """Model types by architecture, as transformers lists them."""
    return {
        name: model_type
        for variable, mapping in vars(modeling_auto).items()
        if variable.endswith("_MAPPING_NAMES")
        for model_type, names in mapping.items()
        for name in ([names] if isinstance(names, str) else names)
    }


def _default_config(name: str) -> PreTrainedConfig | None:
    """The default configuration of an architecture's model type; None where there is none."""
    model_type = _model_types().get(name)
    if model_type is None:
        return None
    # vLLM reads some types with a class of its own, or with that of another type, which has the
    # checkpoint's fields then, but not their defaults.
    known = _CONFIG_REGISTRY if model_type in _CONFIG_REGISTRY else CONFIG_MAPPING
    config = known[model_type]()
    if config.model_type != model_type and model_type in CONFIG_MAPPING:
        config = CONFIG_MAPPING[model_type]()
    return config


def _layer_classes(model_class: type) -> set[type]:
    """The classes of attention layers that the source of a model refers to."""
    return {i for i in _source(model_class) if _is_layer(i) and not inspect.isabstract(i)}


def _source(model_class: type) -> set[Any]:
    """The classes and functions that the source of a model refers to, directly or by those that it
    calls."""
    seen: set[Any] = set()
    todo: list[Any] = [model_class]
    while todo:
        item = todo.pop()
        if item in seen:
            continue
        seen.add(item)
        if _is_of_models(item):
            todo += _references(item)
    return seen


def _is_layer(item: Any) -> bool:
    return isinstance(item, type) and issubclass(item, AttentionLayerBase)


def _is_of_models(item: Any) -> bool:
    is_plain = _is_layer(item) and item.__module__.startswith("vllm.model_executor.layers.")
    return item.__module__.startswith(_MODULES) and not is_plain


def _gives_values_a_size(item: Any) -> bool:
    """Whether a class of a model builds attention with values of a size of their own."""
    if not (isinstance(item, type) and _is_of_models(item)):
        return False
    functions = (f for value in vars(item).values() for f in _functions(value))
    return any(
        isinstance(names, tuple) and "head_size_v" in names
        for function in functions
        for code in _codes(function.__code__)
        for names in code.co_consts  # the names of keyword arguments
    )


@functools.cache
def _references(item: Any) -> frozenset[Any]:
    """Classes and functions of vLLM that the source of a class or function names."""
    found: set[Any] = set()
    if isinstance(item, type):
        found.update(base for base in item.__mro__[1:] if base is not object)
        found.update(value for value in vars(item).values() if isinstance(value, type))
        functions = [f for value in vars(item).values() for f in _functions(value)]
    else:
        functions = [item]
    for function in functions:
        found.update(_named_by(function))
    return frozenset(each for each in found if each.__module__.startswith("vllm."))


def _functions(value: Any) -> Iterator[types.FunctionType]:
    if isinstance(value, staticmethod | classmethod):
        value = value.__func__
    if isinstance(value, property):
        value = value.fget
    if isinstance(value, types.FunctionType):
        yield value


def _named_by(function: types.FunctionType) -> Iterator[Any]:
    values = [*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()]
    # A decorator of vLLM keeps the function that it wraps in its closure.
    for cell in function.__closure__ or ():
        try:
            values.append(cell.cell_contents)
        except ValueError:  # not filled
            continue
    for code in _codes(function.__code__):
        values += [function.__globals__[n] for n in code.co_names if n in function.__globals__]
        for constant in code.co_consts:
            words = constant if isinstance(constant, tuple) else (constant,)
            # ``init_vllm_registered_model(architectures=["…"])``
            values += [_or_none(word) for word in words if isinstance(word, str)]
    for value in values:
        items = value.values() if isinstance(value, dict) else (value,)
        for item in items:
            if isinstance(item, type | types.FunctionType):
                yield item


@functools.cache
def _or_none(name: str) -> type | None:
    """The class of an architecture; None where the word is none."""
    if not any(name in names for names in MAPS.values()):
        return None
    try:
        return _load(name)
    except ImportError:
        return None


def _codes(code: types.CodeType) -> Iterator[types.CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _codes(constant)
