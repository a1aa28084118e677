"""What an engine is refused for by its configuration, before its model is loaded."""

from vllm import envs

from vllm_pasta.integration.refusals.gpu_engine import GPU_ENGINE
from vllm_pasta.integration.refusals.refusal import ADMISSION_TESTS, shown_by
from vllm_pasta.integration.scheduler import connectors

SPECULATIVE_METHODS = ("ngram", "draft_model", "eagle", "eagle3", "mtp")
"""Ways of drafting that were tested. The draft itself is not steered."""

ENGINE = (
    *shown_by(
        f"{ADMISSION_TESTS}test_engine_that_cannot_steer_does_not_start",
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
    *shown_by(
        f"{ADMISSION_TESTS}test_environment_that_cannot_steer",
        (
            "rust-front-end",
            "the Rust front end is in use, which passes no admission",
            lambda e: envs.VLLM_USE_RUST_FRONTEND,
        ),
    ),
    *shown_by(
        f"{ADMISSION_TESTS}test_environment_that_cannot_steer",
        (
            "batch-invariant",
            "VLLM_BATCH_INVARIANT is set, which vLLM's own attention on a CPU does not keep",
            lambda e: envs.VLLM_BATCH_INVARIANT,
        ),
        device="cpu",
    ),
    *shown_by(
        f"{ADMISSION_TESTS}test_model_that_cannot_be_steered",
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
    *shown_by(
        "tests/server/test_disaggregated.py::test_engine_does_not_start",
        (
            "kv-connector",
            "KV connector {0.unknown_connectors} is not known to keep differently steered "
            f"requests apart (known are {', '.join(connectors.CONNECTORS)})",
            lambda e: e.unknown_connectors,
        ),
        (
            "kv-connector-unsalted",
            "KV connector {0.unsalted_connectors} finds KV by token ids: a fingerprint of the "
            "emphasis would have to be among its keys, as it is with ExampleConnector, and no test "
            "shows that",
            lambda e: e.unsalted_connectors,
        ),
        (
            "kv-connector-gpu",
            "KV connector {0.gpu_connectors} copies the KV of GPUs, and this engine has none",
            lambda e: e.gpu_connectors,
        ),
    ),
    *shown_by(
        f"{ADMISSION_TESTS}test_hybrid_with_what_nothing_shows",
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
    *shown_by(
        f"{ADMISSION_TESTS}test_other_platform_and_model_runner_v2",
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
    *shown_by(
        f"{ADMISSION_TESTS}test_engine_that_cannot_steer_does_not_start",
        (
            "kv-cache-dtype",
            "the KV cache is {0.cache.cache_dtype}, not auto",
            lambda e: e.cache.cache_dtype != "auto",
        ),
        device="cpu",
    ),
    *GPU_ENGINE,
)
