"""The GPU's backends, as far as they go without one: what they are made of, and what they tell the
kernels. `test_gpu_engine` runs them.

Broken by: a base whose methods take other parameters; a slot that keeps its last request's
steering; a graph that is captured with a request's data; metadata that does not tell its rows.
"""

import ast
import inspect
from copy import copy
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from vllm import SamplingParams, envs
from vllm.config import CUDAGraphMode, get_layers_from_vllm_config
from vllm.model_executor.layers.attention import Attention
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.kv_cache_interface import FullAttentionSpec

from tools.check_upstream import _GPU as BASES
from vllm_pasta.errors import ConfigError, UnsupportedError
from vllm_pasta.integration import plugin, registry, support
from vllm_pasta.integration.worker import gpu, rows
from vllm_pasta.integration.worker.backend import SteeringImpl, layer_attention
from vllm_pasta.request.heads import HeadSet
from vllm_pasta.request.resolution import WIRE_KEY, ResolvedEmphasis
from vllm_pasta.steering.plan import LayerAttention
from vllm_pasta.steering.slots import FIRST, PLAIN, SLOT

CPU = torch.device("cpu")
INSTALLED = Path(find_spec("vllm").origin).parent
ABLE = ("FLASH_ATTN", "TRITON_ATTN")  # FlashInfer's imports need its package, which needs CUDA


def params(spans=((2, 4),), heads=None, alpha=0.01, prompt_len=8):
    """As admission leaves them; ``spans`` None: a plain request's."""
    if spans is None:
        return SamplingParams()
    emphasis = ResolvedEmphasis(spans, alpha, HeadSet.from_json(heads or {"1": [0]}), prompt_len)
    return SamplingParams(extra_args={WIRE_KEY: emphasis.to_wire()})


def common(num_reqs=2, query_len=1, **options):
    """A step's metadata as a model runner makes it; every request has 8 tokens."""
    start = torch.arange(num_reqs + 1, dtype=torch.int32) * query_len
    return CommonAttentionMetadata(
        **{
            "query_start_loc": start,
            "query_start_loc_cpu": start,
            "seq_lens": torch.full((num_reqs,), 8, dtype=torch.int32),
            "num_reqs": num_reqs,
            "num_actual_tokens": num_reqs * query_len,
            "max_query_len": query_len,
            "max_seq_len": 8,
            "block_table_tensor": torch.zeros(num_reqs, 4, dtype=torch.int32),
            "slot_mapping": torch.zeros(num_reqs * query_len, dtype=torch.int64),
            "seq_lens_cpu_upper_bound": torch.full((num_reqs,), 8, dtype=torch.int32),
            "req_idx": np.arange(num_reqs),
            **options,
        }
    )


@pytest.fixture
def config(small_batches, monkeypatch):
    """An engine's, as if it ran on a GPU with Model Runner V2."""
    config = copy(small_batches.llm_engine.vllm_config)
    config.additional_config = {"pasta": {}}
    monkeypatch.setattr(support, "is_gpu", lambda: True)
    monkeypatch.setattr(type(config), "use_v2_model_runner", True)
    return config


@pytest.fixture
def v2(config):
    """Whose slot is whose, as Model Runner V2 tells it."""
    return rows.EmphasisRows(config, None)


def builder(config, name="TRITON_ATTN"):
    names = list(get_layers_from_vllm_config(config, Attention))
    spec = FullAttentionSpec(block_size=16, num_kv_heads=2, head_size=32, dtype=torch.float32)
    return getattr(gpu, name).get_builder_cls()(spec, names, config, CPU)


def source(module, name):
    """The class, from the text of the installed vLLM: FlashInfer's cannot be imported here."""
    tree = ast.parse((INSTALLED / f"{module.replace('.', '/')}.py").read_text(encoding="utf-8"))
    return next(n for n in tree.body if isinstance(n, ast.ClassDef) and n.name == name)


def parameters(node, method):
    (function,) = [n for n in node.body if getattr(n, "name", "") == method]
    return [a.arg for a in (*function.args.args, *function.args.kwonlyargs)]


@pytest.mark.parametrize("base", BASES, ids=lambda base: base[0].rpartition(".")[2])
def test_bases_take_what_ours_pass(base):
    module, builder_name, impl_name = base
    module = module.removeprefix("vllm.")
    forward = parameters(source(module, impl_name), "forward")
    assert forward == list(inspect.signature(gpu.GPUSteeringImpl.forward).parameters)
    assert parameters(source(module, builder_name), "build")[:3] == [
        "self", "common_prefix_len", "common_attn_metadata",
    ]  # fmt: skip
    assert parameters(source(module, builder_name), "__init__")[:5] == [
        "self", "kv_cache_spec", "layer_names", "vllm_config", "device",
    ]  # fmt: skip
    text = ast.unparse(source(module, impl_name))
    for attribute in ("scale", "sliding_window", "logits_soft_cap", "alibi_slopes", "sinks",
                      "num_heads", "head_size", "kv_cache_dtype"):  # fmt: skip
        assert f"self.{attribute} = " in text or f"self.{attribute}: " in text, attribute


@pytest.mark.parametrize("name", ABLE)
def test_made_of(name):
    """To vLLM it is the base, but for its builder and impl, which are the base's and ours."""
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    steered = getattr(gpu, name)
    (base,) = steered.__bases__
    assert f"{base.__module__}.{base.__qualname__}" == AttentionBackendEnum[name].value
    assert steered.get_name() == name
    assert getattr(gpu, name) is steered
    for ours, theirs in (
        (steered.get_builder_cls(), base.get_builder_cls()),
        (steered.get_impl_cls(), base.get_impl_cls()),
    ):
        assert issubclass(ours, theirs)
        for attribute, value in vars(theirs).items():
            if not callable(value) and not isinstance(value, staticmethod | classmethod):
                assert getattr(ours, attribute) == value or attribute.startswith(("__", "_abc_"))
    made, plain = steered.get_builder_cls(), base.get_builder_cls()
    assert made.get_cudagraph_support(None, None) == plain.get_cudagraph_support(None, None)


def test_registered_on_cuda_alone(monkeypatch):
    from vllm.platforms import current_platform
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    backends = [AttentionBackendEnum[name] for name in registry.GPU_BACKENDS]
    assert not any(backend.is_overridden() for backend in backends)
    try:
        with monkeypatch.context() as cuda:
            cuda.setattr(type(current_platform), "is_cuda", lambda _: True)
            plugin.register()
        paths = [backend.get_path() for backend in backends]
        assert paths == [f"{gpu.__name__}.{name}" for name in registry.GPU_BACKENDS]
        assert AttentionBackendEnum.TRITON_ATTN.get_class() is gpu.TRITON_ATTN
    finally:
        for backend in backends:
            backend.clear_override()
    with pytest.raises(AttributeError, match="FLEX"):
        _ = gpu.FLEX_ATTENTION


@pytest.mark.parametrize("name", ABLE)
def test_step(name, config, v2):
    """Rows are found by their slots; nothing is copied of what the model runner keeps."""
    made = builder(config, name)
    v2.add_request(2, params(heads={"1": [3]}))
    v2.add_request(1, params(None))
    step = common(3, req_idx=np.array([1, 2]))  # the last row is padding
    steering = made.build(0, step).steering
    assert steering.is_steered
    assert not steering.must_launch
    assert steering.buffers.records[:3, SLOT].tolist() == [PLAIN, 2, PLAIN]
    assert steering.batch.query_start is step.query_start_loc
    assert steering.batch.seq_lens is step.seq_lens
    assert steering.batch.block_table is step.block_table_tensor
    assert not made.build(0, common(1, req_idx=np.array([1]))).steering.is_steered
    assert steering.buffers.records[:3, SLOT].tolist() == [PLAIN] * 3


def test_slots_are_used_again(config, v2):
    """V2 tells no one when a request leaves; who comes into its slot is as if it had been new."""
    made = builder(config)
    for later, slots, first in (
        (params(None), [PLAIN], None), (params(spans=((5, 6),)), [0], 5), (params(None), [PLAIN], 5)
    ):  # fmt: skip
        v2.add_request(0, params())
        assert made.build(0, common(1)).steering.is_steered
        v2.add_request(0, later)
        steering = made.build(0, common(1)).steering
        assert steering.buffers.records[:1, SLOT].tolist() == slots
        if slots == [0]:
            assert steering.buffers.records[0, FIRST] == first


def test_slots_of_a_stage_without_a_sampler(config, monkeypatch):
    """Of pipeline stages the last alone has logits processors: elsewhere the model runner tells."""
    from vllm.v1.worker.gpu.model_runner import GPUModelRunner

    monkeypatch.setattr(rows, "_has_sampler", lambda: False)
    rows.add_request(config, 0, params(None))
    with pytest.raises(UnsupportedError, match="the attention backend is not vllm-pasta's"):
        rows.add_request(config, 0, params())
    made = builder(config)
    for given, is_steered in ((params(), True), (params(None), False), (params(), True)):
        rows.add_request(config, 0, given)
        assert made.build(0, common(1)).steering.is_steered is is_steered
    assert GPUModelRunner.add_requests.__wrapped__.__module__ == GPUModelRunner.__module__
    monkeypatch.setattr(rows, "_has_sampler", lambda: True)
    rows.add_request(config, 0, params(None))  # the sampler tells
    assert made.build(0, common(1)).steering.is_steered


def test_groups_share_slots(config, v2):
    """Builders of several groups, made before or after the first request."""
    first = builder(config)
    v2.add_request(0, params())
    second = builder(config)
    assert first.build(0, common(1)).steering.buffers is second.build(0, common(1)).steering.buffers
    assert second.build(0, common(1)).steering.is_steered


@pytest.mark.parametrize("name", ABLE)
def test_another_groups_block_table(name, config, v2):
    """vLLM may reuse a step's metadata for another group, with that one's block table."""
    made = builder(config, name)
    if not made.supports_update_block_table:
        pytest.skip("the base never does")
    v2.add_request(0, params())
    metadata = made.build(0, common(1))
    table = torch.ones(1, 4, dtype=torch.int32)
    other = made.update_block_table(metadata, table, torch.zeros(1))
    assert other.steering.batch.block_table is table
    assert other.steering.is_steered
    assert metadata.steering.batch.block_table is not table


@pytest.mark.parametrize("name", ABLE)
def test_capture(name, config, v2, monkeypatch):
    """A graph is captured as if there were no requests, and with what is launched for any."""
    made = builder(config, name)
    v2.add_request(0, params())
    before = made.build(0, common(2)).steering
    for mode, max_query_len in (
        (CUDAGraphMode.FULL_AND_PIECEWISE, 1), (CUDAGraphMode.FULL_DECODE_ONLY, 1),
        (CUDAGraphMode.FULL, 2),
    ):  # fmt: skip
        compilation = copy(config.compilation_config)
        compilation.cudagraph_mode = mode
        monkeypatch.setattr(config, "compilation_config", compilation)
        steering = made.build_for_cudagraph_capture(common(2)).steering
        assert steering.must_launch
        assert not steering.is_steered
        assert not (steering.buffers.records[:, SLOT] != PLAIN).any()
        assert steering.batch.max_query_len == max_query_len
    after = made.build(0, common(2)).steering
    assert after.is_steered
    assert not after.must_launch
    for tensor in ("records", "groups"):
        assert getattr(after.buffers, tensor) is getattr(before.buffers, tensor)


def test_metadata_that_does_not_tell(config, v2):
    made = builder(config)
    with pytest.raises(UnsupportedError, match="does not say which request each row belongs to"):
        made.build(0, common(req_idx=None))
    with pytest.raises(UnsupportedError, match="not causal"):
        made.build(0, common(causal=False))


def test_draft_steps(config, v2):
    """A draft model's own steps say nothing of rows; no steered layer may run in one."""
    made = builder(config)
    v2.add_request(0, params())
    metadata = made.build_for_drafting(common(req_idx=None), 0)
    assert metadata.steering is None
    assert made.build(0, common()).steering.is_steered  # steps after it are as ever
    impl = gpu.GPUSteeringImpl.__new__(gpu.GPUSteeringImpl)
    impl.layer_index = 1
    with pytest.raises(UnsupportedError, match="draft model's step"):
        impl.forward(*[None] * 5, metadata, None)
    with pytest.raises(UnsupportedError, match="not built by vllm-pasta"):
        impl.forward(*[None] * 5, SimpleNamespace(), None)
    with pytest.raises(UnsupportedError, match="quantised"):
        impl.forward(*[None] * 5, metadata, None, output_scale=torch.ones(1))


def test_v1_rows(config, monkeypatch):
    """V1 moves rows, and a row is its own slot."""
    from vllm.v1.sample.logits_processor import BatchUpdate
    from vllm.v1.sample.logits_processor.interface import MoveDirectionality

    monkeypatch.setattr(type(config), "use_v2_model_runner", False)
    v1 = rows.EmphasisRows(config)
    made = builder(config)

    def slots(removed=(), added=(), moved=()):
        v1.update_state(BatchUpdate(4, list(removed), list(added), list(moved)))
        steering = made.build(0, common(3, req_idx=None)).steering
        shown = steering.buffers.records[:3, SLOT].tolist()
        records = steering.buffers.records
        firsts = [int(records[i, FIRST]) if s != PLAIN else None for i, s in enumerate(shown)]
        assert all(s in (PLAIN, row) for row, s in enumerate(shown))
        return firsts

    def new(row, *args):
        return (row, params(*args), [1] * 8, [])

    two, five = ((2, 4),), ((5, 6),)
    assert slots(added=[new(0, two), new(1, None), new(2, five)]) == [2, None, 5]
    assert slots(moved=[(2, 1, MoveDirectionality.UNIDIRECTIONAL)]) == [2, 5, None]
    assert slots(moved=[(0, 1, MoveDirectionality.SWAP)]) == [5, 2, None]
    assert slots(removed=[0], added=[new(2, five)]) == [None, 2, 5]
    assert slots(removed=[1, 2]) == [None, None, None]


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("Own", "Own, which is not vllm-pasta's.*FLASH_ATTN"),
        ("TritonAttentionDiffKVImpl", "for values of another size than keys"),
    ],
)
def test_layers_of_other_backends(kind, words, config):
    """Found when the model is loaded, wherever the backend comes from."""
    layers = get_layers_from_vllm_config(config, Attention)
    name, layer = next(iter(layers.items()))
    other = copy(layer)
    other.impl = type(kind, (), {})()
    compilation = copy(config.compilation_config)
    compilation.static_forward_context = {**compilation.static_forward_context, name: other}
    config.compilation_config = compilation
    with pytest.raises(UnsupportedError, match=f"layer {name} has .*{words}"):
        rows.EmphasisRows(config, None)


REFUSED = {
    "MLA attention, which on a GPU is steered over the attention backend TRITON_MLA": {
        "model_config": {"model_arch_config": {"is_deepseek_mla": True}}
    },
    "the attention backend is FLEX_ATTENTION": {"attention_config": {"backend": "FLEX"}},
    "context parallel": {"parallel_config": {"decode_context_parallel_size": 2}},
    "split into microbatches": {"parallel_config": {"enable_dbo": True}},
    "sleep mode has the backend criu, not cumem": {
        "model_config": {"enable_sleep_mode": True, "sleep_mode_backend": "criu"}
    },
    "the KV cache is nvfp4": {"cache_config": {"cache_dtype": "nvfp4"}},
    "the KV cache is bfloat16": {"cache_config": {"cache_dtype": "bfloat16"}},
    "KV cache is sparse": {"attention_config": {"hisparse_config": SimpleNamespace()}},
    "verifies adaptively": {
        "speculative_config": SimpleNamespace(method="ngram", enable_adaptive_verification=True)
    },
    "reference sliding windows": {"model_config": {"model_arch_config": {"rswa_window": 64}}},
}


def change(value, changes):
    """A copy with other attributes, of whatever depth."""
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    if not isinstance(changes, dict):
        return AttentionBackendEnum.FLEX_ATTENTION if changes == "FLEX" else changes
    value = copy(value)
    for attribute, new in changes.items():
        object.__setattr__(value, attribute, change(getattr(value, attribute), new))
    return value


@pytest.mark.parametrize("reason", REFUSED)
def test_refused(reason, config):
    support.check_engine(config)
    for field, changes in REFUSED[reason].items():
        setattr(config, field, change(getattr(config, field), changes))
    with pytest.raises(UnsupportedError, match=reason):
        support.check_engine(config)


@pytest.mark.parametrize("is_set", [False, True])
def test_batch_invariance(is_set, config, v2, monkeypatch):
    """The kernels are told, which then keep it (`test_triton.test_batch_invariance`)."""
    envs.disable_envs_cache()  # an attribute set here would stay, and hide the variable
    monkeypatch.setenv("VLLM_BATCH_INVARIANT", str(int(is_set)))
    support.check_engine(config)
    (workspace,) = builder(config)._workspaces.values()
    assert workspace.is_invariant is is_set


@pytest.mark.parametrize("cache_dtype", ["auto", "float32", "fp8", "fp8_e4m3", "fp8_e5m2"])
def test_cache_dtypes(cache_dtype, config):
    config.cache_config = copy(config.cache_config)
    config.cache_config.cache_dtype = cache_dtype
    support.check_engine(config)


def test_option():
    from vllm_pasta.integration.config import PastaConfig

    """A GPU was to be asked for once: who still does is told that this need not be."""
    with pytest.raises(ConfigError, match="unknown field 'gpu': leave it out, a GPU need not"):
        PastaConfig.parse({"gpu": "experimental"})


@pytest.mark.parametrize(
    ("where", "attribute", "value", "reason"),
    [
        ("layer", "head_size", 576, "head size 576, above 512"),
        ("layer", "_k_scale", torch.ones(2), "fp8 scales of its own for each head"),
        ("impl", "kv_cache_dtype", "int8_per_token_head", "has a KV cache of int8_per_token_head"),
        ("impl", "use_alibi_sqrt", True, "ALiBi with square roots"),
        ("impl", "chunk_lookback", 2, "chunked attention"),
        ("impl", "attn_type", "encoder_only", "has attention of type encoder_only"),
    ],
)
def test_layer_that_cannot_be_steered(where, attribute, value, reason, config):
    layer = copy(next(iter(get_layers_from_vllm_config(config, Attention).values())))
    layer.impl = copy(layer.impl)
    support.check_layer("layers.0", layer, 4)
    if attribute == "head_size":
        layer.head_size_v = value
    if attribute == "_k_scale":  # a buffer of the module
        layer._buffers = {**layer._buffers, attribute: value}
    else:
        setattr(layer if where == "layer" else layer.impl, attribute, value)
    with pytest.raises(UnsupportedError, match=f"layer layers.0 .*{reason}"):
        support.check_layer("layers.0", layer, 4)


@pytest.mark.parametrize(
    ("of_impl", "window"), [(None, None), ((-1, -1), None), ((39, 0), 40), ((0, 0), 1), (40, 40)]
)
def test_window(of_impl, window):
    """In keys, the row's own included; GPU backends have the keys before it, and after."""
    impl = SimpleNamespace(
        scale=0.5, sliding_window=of_impl, logits_soft_cap=0.0, alibi_slopes=None, sinks=None
    )
    attention = layer_attention(impl)
    assert (attention.scale, attention.window, attention.soft_cap) == (0.5, window, None)


def test_no_fused_quantisation(monkeypatch):
    """An output that the attention kernel quantises cannot be steered: not fused with emphasis."""

    class Base:
        def fused_output_quant_supported(self, quant_key):
            return True

    class Impl(SteeringImpl, Base):
        pass

    impl = Impl()
    for may_steer in (True, False):
        impl.may_steer = may_steer
        assert impl.fused_output_quant_supported(None) is not may_steer


class Plain:
    """In place of a base's impl: its output is 7 everywhere."""

    num_heads, head_size = 4, 32
    sinks = None

    def __init__(self, kv_cache_dtype="auto", version=None):
        self.kv_cache_dtype, self.vllm_flash_attn_version = kv_cache_dtype, version

    def forward(self, layer, query, key, value, kv_cache, attn_metadata, output, *_):
        return output.fill_(7)


class PlainImpl(gpu.GPUSteeringImpl, Plain):
    pass


@pytest.fixture
def impl(monkeypatch):
    """Makes a steered impl of layer 1; `calls` holds the arguments of every launch."""
    calls = []

    def make(*args):
        made = PlainImpl(*args)
        made.layer_index, made.attention = 1, LayerAttention(scale=1.0)
        return made

    kernel = gpu.steered_attention
    monkeypatch.setattr(gpu, "steered_attention", lambda *args: calls.append(args) or kernel(*args))
    make.calls = calls
    return make


def forward(impl, metadata, query, cache):
    layer = SimpleNamespace(
        _q_scale=torch.tensor(0.5), _k_scale=torch.tensor(0.25), _v_scale=torch.tensor(2.0)
    )
    output = torch.zeros(query.shape)
    impl.forward(layer, query, None, None, cache, metadata, output)
    return output


def step_of(made, num_tokens):
    """A step of one request with ``num_tokens`` query rows, in the cache's second block."""
    return made.build(0, common(1, num_tokens, block_table_tensor=torch.tensor([[1]]).int()))


def test_launched_where_needed(config, v2, impl, monkeypatch):
    """With steering, and within any graph."""
    made, layer = builder(config), impl()
    query, cache = torch.randn(4, 4, 32), torch.randn(2, 2, 16, 64)
    for num_tokens in (1, 4):
        assert (forward(layer, step_of(made, num_tokens), query, cache) == 7).all()
    assert len(impl.calls) == 0
    v2.add_request(0, params(heads={"1": [0]}))
    output = forward(layer, step_of(made, 4), query, cache)
    assert len(impl.calls) == 1
    assert (output[:, 1:] == 7).all()
    assert (output[:, 0] != 7).all()
    v2.add_request(0, params(None))
    assert (forward(layer, step_of(made, 4), query, cache) == 7).all()
    assert len(impl.calls) == 1
    forward(layer, made.build_for_cudagraph_capture(common(1)), query, cache)
    assert len(impl.calls) == 2
    assert (forward(layer, None, query, cache) == 7).all()  # memory profiling
    assert len(impl.calls) == 2
    for is_capturing in (False, True):  # a piecewise graph, captured by vLLM's own metadata
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda x=is_capturing: x)
        assert step_of(made, 4).steering.launches(is_cuda=True) is is_capturing


def test_padding(config, v2, impl):
    """Rows beyond the step's, which a graph may add, stay the base's."""
    made, layer = builder(config), impl()
    v2.add_request(0, params(heads={"1": [0, 1, 2, 3]}))
    query, cache = torch.randn(9, 4, 32), torch.randn(2, 2, 16, 64)
    output = forward(layer, step_of(made, 4), query, cache)
    assert (output[:4] != 7).all()
    assert (output[4:] == 7).all()


@pytest.mark.parametrize("cache_dtype", ["fp8", "fp8_e5m2"])
def test_fp8(cache_dtype, config, v2, impl):
    """vLLM keeps such a cache as bytes, and may quantise the query too: as without, on what the
    numbers stand for."""
    made, (layer, other) = builder(config), (impl(cache_dtype), impl())
    v2.add_request(0, params(heads={"1": [0, 1, 2, 3]}))
    dtype = gpu.FP8[cache_dtype]
    query, cache = torch.randn(4, 4, 32).to(dtype), torch.randn(2, 2, 16, 64).to(dtype)
    got = forward(layer, step_of(made, 4), query, cache.view(torch.uint8))
    scales = torch.cat([torch.full((32,), 0.25), torch.full((32,), 2.0)])
    wanted = forward(other, step_of(made, 4), query.float() * 0.5, cache.float() * scales)
    assert (wanted != 7).all()
    assert (got - wanted).abs().max() < 1e-5


def test_log_sum_exp_is_asked_for(config, v2, impl, monkeypatch):
    """Of FlashAttention 2 and 3, in both ways; what is of another form is not used."""
    from vllm_pasta.integration.worker import lse

    made = builder(config)
    v2.add_request(0, params())
    query, cache = torch.randn(4, 4, 32), torch.randn(2, 2, 16, 64)
    given = torch.randn(4, 4)

    def flash(**options):
        return ("output", given) if options.get("return_softmax_lse") else "output"

    (patch,) = lse.PATCHES

    def wrapped():
        return patch.wrapper(flash)

    assert wrapped() == "output"

    def by_wrapping(self, *args):
        assert wrapped() == "output"

    def by_diff(self, *args):
        if self.on_softmax_lse is not None:
            self.on_softmax_lse(flash(return_softmax_lse=True)[1])

    for way in (by_wrapping, by_diff):
        monkeypatch.setattr(Plain, "forward", way)
        for options, is_used in (
            (("auto", 2), True), (("auto", 3), True), (("auto", 4), False), (("fp8", 3), False),
            (("auto", None), False),
        ):  # fmt: skip
            layer = impl(*options)
            layer_cache = cache.to(torch.float8_e4m3fn) if options[0] == "fp8" else cache
            forward(layer, step_of(made, 4), query, layer_cache)
            used, in_base_2 = impl.calls[-1][-2:]
            assert (used is not None) == is_used, options
            assert not in_base_2
            assert not is_used or torch.equal(used, given.t())
        forward(impl("auto", 3), step_of(made, 4), torch.cat([query, query]), cache)  # padded
        assert torch.equal(impl.calls[-1][-2], given.t())
        assert lse._answer.given is None  # its memory is let go
        layer = impl("auto", 3)
        layer.sinks = torch.zeros(4)
        forward(layer, step_of(made, 4), query, cache)
        assert impl.calls[-1][-2] is None
    given = torch.randn(1, 4, 4)
    forward(impl("auto", 2), step_of(made, 4), query, cache)
    assert impl.calls[-1][-2] is None
    assert wrapped() == "output"  # not asked outside


class FlashInferImpl(Plain):
    """As vLLM's of that name: one wrapper for the rows that decode, and one for the others."""

    def forward(self, layer, query, key, value, kv_cache, attn_metadata, output, *_):
        count = attn_metadata.num_decode_tokens
        rows = {"decode": slice(0, count), "prefill": slice(count, None)}
        for name, part in (("decode", attn_metadata.decode), ("prefill", attn_metadata.prefill)):
            if part is not None and part.wrapper is not None:
                part.wrapper.run(query[rows[name]], out=output[rows[name]])
        return output


class Wrapper:
    """As FlashInfer's; its log-sum-exp is the query's first numbers."""

    def run(self, query, *, out, lse=None, return_lse=False):
        out.fill_(7)
        if return_lse:
            lse.copy_(query[..., 0])
        return (out, lse) if return_lse else out


@pytest.mark.parametrize("counts", [(4, 0), (0, 4), (1, 3)])
def test_log_sum_exp_of_flashinfer(counts, config, v2, monkeypatch):
    """Each wrapper stores its rows'; with another kernel for some rows, none is asked."""
    calls = []
    monkeypatch.setattr(gpu, "steered_attention", lambda *args: calls.append(args))
    made = builder(config)
    v2.add_request(0, params())
    layer = type("Steered", (gpu.GPUSteeringImpl, FlashInferImpl), {})()
    layer.layer_index, layer.attention = 1, LayerAttention(scale=1.0)
    query, cache = torch.randn(4, 4, 32), torch.randn(2, 2, 16, 64)
    metadata = step_of(made, 4)
    metadata.num_decode_tokens, metadata.num_prefill_tokens = counts
    metadata.decode, metadata.prefill = (
        SimpleNamespace(wrapper=Wrapper()) if count else None for count in counts
    )
    forward(layer, metadata, query, cache)
    values, in_base_2 = calls[-1][-2:]
    assert torch.equal(values, query[..., 0])
    assert in_base_2
    for part in (metadata.decode, metadata.prefill):
        if part is not None:
            assert "run" not in vars(part.wrapper)  # as it was
            part.wrapper = None  # as where vLLM runs TensorRT-LLM's kernel
    forward(layer, metadata, query, cache)
    assert calls[-1][-2:] == (None, False)


def test_all_kernels_are_compiled_at_start(config, v2, impl, monkeypatch):
    """What a builder launches when it is made has the constants of what steps launch later."""
    from vllm_pasta.kernels.gpu import steer

    kinds = set()

    class Recorder:
        def __getitem__(self, grid):
            def launch(*args, **options):
                shown = [getattr(a, "dtype", None if a is None else type(a)) for a in args]
                kinds.add(repr((shown, sorted(options.items()))))

            return launch

    monkeypatch.setattr(steer, "steer", Recorder())
    made = builder(config)
    at_start = set(kinds)
    assert at_start
    v2.add_request(0, params())
    real = next(iter(get_layers_from_vllm_config(config, Attention).values())).impl
    layer, size = impl(), real.head_size
    layer.attention, layer.head_size = layer_attention(real), size
    heads = config.model_config.get_num_attention_heads(config.parallel_config)
    kv_heads = config.model_config.get_num_kv_heads(config.parallel_config)
    for nhd in (False, True):
        cache = torch.zeros(2, kv_heads, 16, 2 * size)
        if nhd:
            cache = torch.zeros(2, 16, kv_heads, 2 * size).transpose(1, 2)
        for num_tokens in (1, 4):
            fused = torch.zeros(num_tokens, (heads + 2 * kv_heads) * size)
            query = fused[:, : heads * size].view(num_tokens, heads, size)
            forward(layer, step_of(made, num_tokens), query, cache)
    assert kinds == at_start
