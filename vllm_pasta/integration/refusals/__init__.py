"""Why an engine cannot honour emphasis, as data: what docs/features.md lists and `support` checks.

What is not known to work is refused.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import vllm
from vllm import envs
from vllm.model_executor.layers.attention import Attention, MLAAttention
from vllm.platforms import current_platform

from vllm_pasta.integration.registry import CPU_MLA_BACKENDS, GPU_BACKENDS, GPU_MLA_BACKENDS
from vllm_pasta.integration.scheduler import connectors
from vllm_pasta.integration.versions import GPU_VLLM
from vllm_pasta.request.heads import ranges

if TYPE_CHECKING:
    from vllm.config import VllmConfig

LAYOUTS = ("vec", "vec16", "amx")
"""KV cache layouts that the CPU kernels read."""

GPU_CACHE_DTYPES = ("auto", "fp8", "fp8_e4m3", "fp8_e5m2")
"""KV cache dtypes that the Triton kernels read, beside the model's own by name."""

MAX_GPU_HEAD_SIZE = 512

SPECULATIVE_METHODS = ("ngram", "draft_model", "eagle", "eagle3", "mtp")
"""Ways of drafting that were tested. The draft itself is not steered."""


@dataclass(frozen=True)
class Engine:
    """What refusals read of an engine, before its model is loaded."""

    config: "VllmConfig"

    def __getattr__(self, name: str) -> Any:
        """``model``, ``cache``, ``parallel``, …: vLLM's configuration of that name."""
        return getattr(self.config, f"{name}_config")

    @property
    def platform(self) -> Any:
        return current_platform

    @property
    def vllm_version(self) -> str:
        return str(vllm.__version__)

    @property
    def unknown_connectors(self) -> str:
        return ", ".join(connectors.unknown(self.config.kv_transfer_config))

    @property
    def gpu_connectors(self) -> str:
        return ", ".join(connectors.needing_gpu(self.config.kv_transfer_config))


@dataclass(frozen=True)
class Layer:
    """What refusals read of an attention layer, once the model is loaded.

    Attributes:
        layer: The layer.
        num_heads: Query heads of this rank; what requests may name is checked against them.
    """

    layer: Any
    num_heads: int = 0

    @property
    def impl(self) -> Any:
        return getattr(self.layer, "impl", self.layer)


@dataclass(frozen=True)
class Layers:
    """What refusals read of the layers of a worker, once the model is loaded.

    Attributes:
        found: Indices of those that have attention heads.
        expected: The same by the model's configuration, against which head sets are checked.
    """

    found: set[int]
    expected: set[int]

    def __getattr__(self, name: str) -> str:
        """``found_ranges``, ``expected_ranges``: for people."""
        return ranges(getattr(self, name.removesuffix("_ranges")))


@dataclass(frozen=True)
class Refusal:
    """One reason for which an engine does not start.

    Attributes:
        id: A short name that stays.
        sentence: What stands in the way, for people. ``{0.…}`` is read from the subject, an
            `Engine`, `Layers` or a `Layer`; the name of a layer is put before it.
        holds: Whether it stands in the way of the subject.
        test: The test that shows it, as ``path::name``.
        device: ``"cpu"`` or ``"gpu"`` where it concerns only one, else None.
    """

    id: str
    sentence: str
    holds: Callable[[Any], Any]
    test: str
    device: str | None = None

    @property
    def summary(self) -> str:
        """The sentence without an engine at hand."""
        return re.sub(r"\{0\.[^}]*\}", "…", self.sentence)


_Row = tuple[str, str, Callable[[Any], Any]]


def _shown_by(test: str, *rows: _Row, device: str | None = None) -> tuple[Refusal, ...]:
    return tuple(Refusal(*row, test, device) for row in rows)


_ADMISSION = "tests/engine/test_admission.py::"
_GPU = "tests/gpu/test_gpu_backends.py::"

ENGINE = (
    *_shown_by(
        f"{_ADMISSION}test_engine_that_cannot_steer_does_not_start",
        (
            "speculative-method",
            "speculative decoding is of method {0.speculative.method}, "
            f"not {', '.join(SPECULATIVE_METHODS)}",
            lambda e: e.speculative and e.speculative.method not in SPECULATIVE_METHODS,
        ),
        (
            "kv-sharing-fast-prefill",
            "kv_sharing_fast_prefill is on",
            lambda e: e.cache.kv_sharing_fast_prefill,
        ),
        (
            "runner",
            "the runner is {0.model.runner_type}, not generate",
            lambda e: e.model.runner_type != "generate",
        ),
    ),
    *_shown_by(
        f"{_ADMISSION}test_environment_that_cannot_steer",
        (
            "rust-front-end",
            "the Rust front end is in use, which passes no admission",
            lambda e: envs.VLLM_USE_RUST_FRONTEND,
        ),
    ),
    *_shown_by(
        f"{_ADMISSION}test_environment_that_cannot_steer",
        (
            "batch-invariant",
            "VLLM_BATCH_INVARIANT is set, which vLLM's own attention on a CPU does not keep",
            lambda e: envs.VLLM_BATCH_INVARIANT,
        ),
        device="cpu",
    ),
    *_shown_by(
        f"{_ADMISSION}test_model_that_cannot_be_steered",
        (
            "sparse-attention",
            "the model has sparse attention: an indexer chooses which keys count, whether they are "
            "emphasised or not",
            lambda e: getattr(e.model.hf_text_config, "index_topk", None) is not None,
        ),
        (
            "hybrid-mla",
            "the model mixes MLA with recurrences, which vLLM runs on GPUs alone, where it was not "
            "tested",
            lambda e: e.model.use_mla and e.model.is_hybrid,
        ),
        (
            "no-attention",
            "the model has no attention heads to steer",
            lambda e: e.model.is_attention_free,
        ),
        (
            "encoder-decoder",
            "the model is an encoder-decoder",
            lambda e: e.model.is_encoder_decoder,
        ),
        ("diffusion", "the model is a diffusion model", lambda e: e.model.is_diffusion),
    ),
    *_shown_by(
        "tests/server/test_disaggregated.py::test_engine_does_not_start",
        (
            "kv-connector",
            "KV connector {0.unknown_connectors} is not known to keep differently steered "
            f"requests apart (known are {', '.join(connectors.CONNECTORS)})",
            lambda e: e.unknown_connectors,
        ),
        (
            "kv-connector-gpu",
            "KV connector {0.gpu_connectors} copies the KV of GPUs, and this engine has none",
            lambda e: e.gpu_connectors,
        ),
    ),
    *_shown_by(
        f"{_ADMISSION}test_hybrid_with_what_nothing_shows",
        (  # vLLM's CPU backend cannot do it either: its rollback of states is a Triton kernel.
            "hybrid-speculative",
            "the model is hybrid, and no test shows that speculative decoding takes the states of "
            "rejected drafts back as steered requests need it",
            lambda e: e.model.is_hybrid and e.speculative,
        ),
        (
            "hybrid-kv-connector",
            "the model is hybrid, and no test shows that its KV connector keeps the states of "
            "differently steered requests apart",
            lambda e: e.model.is_hybrid and e.config.kv_transfer_config is not None,
        ),
        (
            "hybrid-pipeline",
            "the model is hybrid, and no test shows it steered in pipeline stages, which may have "
            "no attention layer",
            lambda e: e.model.is_hybrid and e.parallel.pipeline_parallel_size > 1,
        ),
    ),
    *_shown_by(
        f"{_ADMISSION}test_other_platform_and_model_runner_v2",
        (
            "platform",
            "the platform is {0.platform.device_type}, not cpu or cuda",
            lambda e: not e.platform.is_cpu(),
        ),
        (
            "model-runner-v2",
            "Model Runner V2 is in use",
            lambda e: e.config.use_v2_model_runner,
        ),
        device="cpu",
    ),
    *_shown_by(
        f"{_ADMISSION}test_engine_that_cannot_steer_does_not_start",
        (
            "kv-cache-dtype",
            "the KV cache is {0.cache.cache_dtype}, not auto",
            lambda e: e.cache.cache_dtype != "auto",
        ),
        device="cpu",
    ),
    *_shown_by(
        f"{_GPU}test_refused",
        (
            "gpu-mla",
            "the model has MLA attention, which on a GPU is steered over the attention backend "
            f"{' or '.join(GPU_MLA_BACKENDS)} alone: choose that (--attention-backend), or let "
            "VLLM_MLA_DISABLE=1 run the model with plain attention",
            lambda e: (
                e.model.use_mla
                and getattr(e.attention.backend, "name", None) not in GPU_MLA_BACKENDS
            ),
        ),
        (
            "gpu-vllm",
            f"on a GPU emphasis needs vLLM {'x or '.join(GPU_VLLM)}x, this is {{0.vllm_version}}",
            lambda e: not e.vllm_version.startswith(GPU_VLLM),
        ),
        (
            "attention-backend",
            "the attention backend is {0.attention.backend.name}, not "
            f"{', '.join((*GPU_BACKENDS, *GPU_MLA_BACKENDS))}",
            lambda e: (
                e.attention.backend
                and e.attention.backend.name not in (*GPU_BACKENDS, *GPU_MLA_BACKENDS)
            ),
        ),
        (
            "pipeline-v2",
            "pipeline parallel with Model Runner V2, which tells only the last stage whose the "
            "rows are (VLLM_USE_V2_MODEL_RUNNER=0 has another)",
            lambda e: e.parallel.pipeline_parallel_size > 1 and e.config.use_v2_model_runner,
        ),
        (
            "context-parallel",
            "context parallel, where each rank has a part of every request's keys: a steered "
            "head's sums over emphasised keys would have to be gathered as vLLM gathers its own",
            lambda e: (
                e.parallel.decode_context_parallel_size > 1
                or e.parallel.prefill_context_parallel_size > 1
            ),
        ),
        (
            "microbatches",
            "a step is split into microbatches (dual batch overlap)",
            lambda e: e.parallel.use_ubatching,
        ),
        (
            "adaptive-verification",
            "speculative decoding verifies adaptively",
            lambda e: e.speculative and e.speculative.enable_adaptive_verification,
        ),
        (
            "sleep-mode",
            "sleep mode is on, and no GPU run has shown that what steering keeps in GPU memory is "
            "there after waking up",
            lambda e: e.model.enable_sleep_mode,
        ),
        (
            "sparse-kv-cache",
            "the KV cache is sparse (HiSparse)",
            lambda e: e.attention.hisparse_config is not None,
        ),
        (
            "reference-windows",
            "the model has reference sliding windows",
            lambda e: e.model.rswa_window is not None,
        ),
        (
            "gpu-kv-cache-dtype",
            f"the KV cache is {{0.cache.cache_dtype}}, not {', '.join(GPU_CACHE_DTYPES)} or the "
            "model's own dtype",
            lambda e: (
                e.cache.cache_dtype
                not in (*GPU_CACHE_DTYPES, str(e.model.dtype).removeprefix("torch."))
            ),
        ),
        device="gpu",
    ),
)
"""What an engine's configuration says before its model is loaded."""

LAYERS = _shown_by(
    f"{_ADMISSION}test_layers_that_the_configuration_does_not_say",
    (
        "layers",
        "the model has attention heads in layers {0.found_ranges}, and its configuration says "
        "{0.expected_ranges}, so a head set could not be checked",
        lambda e: e.found != e.expected,
    ),
)
"""Of all layers of a worker."""


def _has_own_value_size(impl: Any) -> bool:
    return "DiffKV" in type(impl).__name__


_BACKENDS = tuple(
    Refusal(
        f"{device}-layer-backend",
        "has {0.impl.__class__.__name__}, which is not vllm-pasta's: let no other plugin replace "
        f"it, and choose one of {', '.join(backends)}",
        lambda e: not getattr(e.impl, "may_steer", False) and not _has_own_value_size(e.impl),
        f"{_GPU}test_layers_of_other_backends",
        device,
    )
    for device, backends in (
        ("cpu", ("CPU_ATTN", *CPU_MLA_BACKENDS)),
        ("gpu", (*GPU_BACKENDS, *GPU_MLA_BACKENDS)),
    )
)

BACKEND = (
    *_shown_by(
        f"{_GPU}test_layers_of_other_backends",
        (
            "layer-own-value-size",
            "has {0.impl.__class__.__name__}, for values of another size than keys, which the "
            "plugin has no version of",
            lambda e: _has_own_value_size(e.impl),
        ),
    ),
    *_BACKENDS,
)
"""Of a layer: its attention backend is not one of this plugin's."""

LAYER = (
    *_shown_by(
        "tests/engine/test_attention_kinds.py::test_chunked_local_attention_is_refused",
        (  # Other kinds have builders of their own, which may rearrange the batch's rows.
            "layer-kind",
            "is of kind {0.layer.__class__.__name__}, not Attention",
            lambda e: type(e.layer) is not Attention,
        ),
    ),
    *_shown_by(
        f"{_ADMISSION}test_layer_that_cannot_be_steered",
        (
            "layer-heads",
            "has {0.impl.num_heads} query heads, not {0.num_heads} as the configuration says",
            lambda e: e.impl.num_heads != e.num_heads,
        ),
        (
            "layer-value-size",
            "has values of another head size than its keys",
            lambda e: e.layer.head_size_v != e.layer.head_size,
        ),
    ),
    *_shown_by(
        f"{_ADMISSION}test_layer_that_cannot_be_steered",
        ("layer-fp8", "has an fp8 KV cache", lambda e: e.impl.is_fp8_kv_cache),
        (
            "layer-attention-type",
            "has attention of type {0.impl.attn_type}, not decoder",
            lambda e: e.impl.attn_type != "decoder",
        ),
        (
            "layer-layout",
            f"has KV cache layout {{0.layer.isa}}, not {', '.join(LAYOUTS)}",
            lambda e: e.layer.isa not in LAYOUTS,
        ),
        device="cpu",
    ),
    *_shown_by(
        f"{_GPU}test_layer_that_cannot_be_steered",
        (
            "gpu-layer-attention-type",
            "has attention of type {0.impl.attn_type}, not decoder",
            lambda e: getattr(e.impl, "attn_type", "decoder") != "decoder",
        ),
        (
            "gpu-layer-head-size",
            f"has head size {{0.layer.head_size}}, above {MAX_GPU_HEAD_SIZE}",
            lambda e: e.layer.head_size > MAX_GPU_HEAD_SIZE,
        ),
        (
            "gpu-layer-kv-cache-dtype",
            f"has a KV cache of {{0.impl.kv_cache_dtype}}, not {', '.join(GPU_CACHE_DTYPES)}, "
            "float16 or bfloat16",
            lambda e: e.impl.kv_cache_dtype not in (*GPU_CACHE_DTYPES, "float16", "bfloat16"),
        ),
        (
            "gpu-layer-fp8-scales",
            "has fp8 scales of its own for each head",
            lambda e: any(
                scale.numel() != 1
                for scale in (e.layer._q_scale, e.layer._k_scale, e.layer._v_scale)
            ),
        ),
        (
            "gpu-layer-alibi-sqrt",
            "has ALiBi with square roots",
            lambda e: getattr(e.impl, "use_alibi_sqrt", False),
        ),
        (
            "gpu-layer-chunks",
            "has chunked attention",
            lambda e: getattr(e.impl, "chunk_lookback", -1) != -1,
        ),
        device="gpu",
    ),
)
"""Of a layer that has an attention backend of this plugin, once the model is loaded."""

MLA_LAYER = _shown_by(
    "tests/engine/test_mla.py::test_layer_that_cannot_be_steered",
    (
        "mla-layer-kind",
        "is of kind {0.layer.__class__.__name__}, not MLAAttention",
        lambda e: type(e.layer) is not MLAAttention,
    ),
    (
        "mla-layer-heads",
        "has {0.impl.num_heads} query heads, not {0.num_heads} as the configuration says",
        lambda e: e.impl.num_heads != e.num_heads,
    ),
    (
        "mla-layer-padded",
        "has queries padded to {0.layer.q_pad_num_heads} heads",
        lambda e: e.layer.q_pad_num_heads is not None,
    ),
    (
        "mla-layer-kv-cache-dtype",
        "has a latent KV cache of {0.impl.kv_cache_dtype}, not auto, float16 or bfloat16",
        lambda e: e.impl.kv_cache_dtype not in ("auto", "float16", "bfloat16"),
    ),
    (
        "mla-layer-sparse",
        "takes only the keys that an indexer chooses",
        lambda e: e.impl.is_sparse or e.layer.use_sparse,
    ),
    (
        "mla-layer-window",
        "has a sliding window over a latent KV cache",
        lambda e: e.layer.sliding_window is not None,
    ),
    (
        "mla-layer-context-parallel",
        "has its latent KV cache spread over {0.impl.dcp_world_size} ranks",
        lambda e: e.impl.dcp_world_size > 1,
    ),
)
"""The same of a layer of multi-head latent attention (MLA)."""
