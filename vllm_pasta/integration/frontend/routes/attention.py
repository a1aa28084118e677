"""Where a prompt's attention goes, plain and emphasised: for `POST /v1/emphasis/attention`, and
for ``vllm-pasta explain --attention``.

The front end has no weights, so it asks the engine: it runs the prompt twice as requests of its
own, each for one token, and has the workers keep what the prompt's last row attends to in each
layer (`vllm_pasta.integration.worker.watch`). That row is the one which the first token of the
answer comes from. Both requests are scheduled, batched and preempted as any other.
"""

import uuid
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from vllm.inputs import TokensPrompt
from vllm.platforms import current_platform
from vllm.sampling_params import SamplingParams

from vllm_pasta.errors import EmphasisError
from vllm_pasta.integration.frontend.admission import Admitted
from vllm_pasta.integration.frontend.flags import WATCHER
from vllm_pasta.request.heads import HeadSet
from vllm_pasta.request.resolution import KEY, WIRE_KEY, Resolution, ResolvedEmphasis

MOST_TOKENS = 2048
"""The longest prompt: the workers keep layers × heads × tokens numbers of it."""


def check(vllm_config: Any) -> None:
    """Checks that this engine's attention can be looked into.

    Raises:
        EmphasisError: it cannot.
    """
    parallel = vllm_config.parallel_config
    graphs = vllm_config.compilation_config.cudagraph_mode
    whole = not current_platform.is_cpu() and graphs.mixed_mode().has_full_cudagraphs()
    for wrong, why in (
        (whole, f"prompts run in whole CUDA graphs (cudagraph_mode {graphs.name})"),
        (parallel.data_parallel_size > 1, "it is data parallel"),
        (parallel.pipeline_parallel_size > 1, "its layers are in several pipeline stages"),
        (parallel.worker_extension_cls != WATCHER, "it has another worker_extension_cls"),
    ):
        if wrong:
            raise EmphasisError(f"this engine's attention cannot be looked into: {why}", field=KEY)


At = tuple[int, int] | None
"""Layer and head whose weights are told token by token; None means the steered head that attends
to the marks by how much more."""


async def look(engine: Any, resolution: Resolution | None, at: At) -> dict[str, Any]:
    """Runs the prompt plain and emphasised, and compares what its last row attends to.

    Args:
        engine: vLLM's ``EngineClient``.
        resolution: The request's.
        at: See `At`.

    Returns:
        See `_compared`.

    Raises:
        EmphasisError: nothing is emphasised, the prompt is too long, or there is no such head.
    """
    told = []
    for prompt, params, name in _requests(engine.vllm_config, resolution):
        async for _ in engine.generate(prompt, params, name):
            pass
        told.append(await engine.collective_rpc("pasta_attention", args=(name,)))
    assert resolution is not None
    return _compared(resolution.emphasis, told[0], told[1], at)


def look_offline(llm: Any, emphasis: Mapping[str, Any], ids: list[int], at: At) -> dict[str, Any]:
    """The same for ``vllm.LLM``, started with `WATCHER` as its ``worker_extension_cls``.

    Args:
        llm: The engine, with emphasis switched on.
        emphasis: As in a request.
        ids: The prompt's token ids.
        at: See `At`.

    Returns:
        See `_compared`; and ``alpha`` or ``share``, whichever is in force, with who gives it.

    Raises:
        EmphasisError: as `look`, and where the engine would refuse the request.
    """
    admission = llm.llm_engine.input_processor.pasta_admission
    prompt = {"type": "token", "prompt_token_ids": ids}
    resolution = admission.resolve(SamplingParams(), {KEY: emphasis}, prompt)
    told = []
    for prompt, params, name in _requests(llm.llm_engine.vllm_config, resolution):
        llm.generate(prompt, params, use_tqdm=False)
        told.append(llm.collective_rpc("pasta_attention", args=(name,)))
    which = "alpha" if resolution.emphasis.share is None else "share"
    return {
        which: getattr(resolution.emphasis, which),
        f"{which}_from": resolution.strength_from,
        **_compared(resolution.emphasis, told[0], told[1], at),
    }


def _requests(
    vllm_config: Any, resolution: Resolution | None
) -> list[tuple[TokensPrompt, SamplingParams, str]]:
    """The two that are watched, plain and emphasised: each with its name."""
    if resolution is None or resolution.emphasis.is_plain or not resolution.emphasis.heads.layers:
        raise EmphasisError("nothing is emphasised, so there is nothing to compare", field=KEY)
    emphasis = resolution.emphasis
    if emphasis.prompt_len > MOST_TOKENS:
        raise EmphasisError(
            f"expected a prompt of at most {MOST_TOKENS} tokens to look into, got "
            f"{emphasis.prompt_len}",
            field=KEY,
        )
    check(vllm_config)
    ids = resolution.token_ids
    # The first token "emphasised" in no head: it steers nothing, and is watched all the same.
    plain = ResolvedEmphasis(((0, 1),), 1.0, HeadSet(()), len(ids))
    result = []
    for one in (plain, emphasis):
        name = f"pasta-{uuid.uuid4()}"
        params = SamplingParams(
            max_tokens=1,
            temperature=0,
            detokenize=False,
            # On a GPU a step of one row, all else cached, may run in a graph: nothing is seen.
            skip_reading_prefix_cache=not current_platform.is_cpu(),
            extra_args={WIRE_KEY: Admitted({**one.to_wire(), "watch": name})},
        )
        result.append((TokensPrompt(prompt_token_ids=ids), params, name))
    return result


Told = Sequence[Sequence[tuple[int, int, bytes]]]
"""What `AttentionWatcher.pasta_attention` hands out, of each rank."""


def _compared(emphasis: ResolvedEmphasis, plain: Told, emphasised: Told, at: At) -> dict[str, Any]:
    """What the last row attends to, plain and emphasised.

    Args:
        emphasis: What steers.
        plain: What the plain request attended to.
        emphasised: The same of the other; each layer as if it were not steered (those before it
            are).
        at: See `At`.

    Returns:
        ``heads``: for each steered head the share of its attention that is on the marks;
        ``layer``, ``head`` and ``map``: the weights of that head, one for each token of the prompt.

    Raises:
        EmphasisError: there is no such head, or nothing was seen.
    """
    runs = {"plain": _weights(plain), "emphasised": steered(_weights(emphasised), emphasis)}
    marks = _is_marked(emphasis)
    heads: list[dict[str, Any]] = [
        {
            "layer": layer,
            "head": head,
            **{
                kind: _rounded(float(weights[layer][head][: len(marks)][marks].sum()))
                for kind, weights in runs.items()
            },
        }
        for layer, of in emphasis.heads.layers
        for head in of
    ]
    most: dict[str, Any] = max(heads, key=lambda told: told["emphasised"] - told["plain"])
    layer, head = at or (most["layer"], most["head"])
    if layer not in runs["plain"] or not 0 <= head < len(runs["plain"][layer]):
        raise EmphasisError(f"this model has no head {head} in layer {layer}", field=KEY)
    return {
        "heads": heads,
        "layer": layer,
        "head": head,
        "map": {
            kind: [_rounded(float(w)) for w in weights[layer][head][: len(marks)]]
            for kind, weights in runs.items()
        },
    }


def _weights(told: Told) -> dict[int, np.ndarray]:
    """By layer, float32 ``[heads, prompt_len]``: what a prompt's last row attended to."""
    parts: dict[int, list[np.ndarray]] = {}
    for rank in told:  # of one layer, those of lower ranks have the first heads
        for layer, count, data in rank:
            parts.setdefault(layer, []).append(np.frombuffer(data, np.float32).reshape(count, -1))
    if not parts:
        raise EmphasisError(
            "nothing was seen: on a GPU, the prompt's last token may have run in a CUDA graph, "
            "alone in its step: try again, or start vLLM with --enforce-eager",
            field=KEY,
        )
    return {layer: np.concatenate(of) for layer, of in parts.items()}


def steered(weights: Mapping[int, np.ndarray], emphasis: ResolvedEmphasis) -> dict[int, np.ndarray]:
    """The weights of a prompt's last row with the steered heads' factors, renormalised.

    Args:
        weights: By layer, as `row_weights` in `vllm_pasta.kernels.reference` gives them.
        emphasis: What steers.

    Returns:
        The same in float64.
    """
    marks = _is_marked(emphasis)
    factors = np.full(emphasis.prompt_len, emphasis.alpha)
    for (start, end), factor in zip(emphasis.spans, emphasis.span_factors, strict=True):
        factors[start:end] = factor
    result = {layer: of.astype(np.float64) for layer, of in weights.items()}
    for layer, heads in emphasis.heads.layers:
        for head in heads:
            row = result[layer][head]
            if emphasis.share is not None:  # the largest factor that gives the marks their share
                of_marks = row[: len(marks)][marks].sum()
                rest = row[: len(marks)][~marks].sum()
                enough = emphasis.odds * of_marks / max(rest, np.finfo(np.float64).tiny)
                factors[~marks] = np.clip(enough, emphasis.alpha, 1.0)
            row[: len(factors)] *= factors  # a sink is no token of the prompt: it is not scaled
            row /= row.sum()
    return result


def _is_marked(emphasis: ResolvedEmphasis) -> np.ndarray:
    """Which tokens of the prompt are: bool ``[prompt_len]``."""
    marked = np.zeros(emphasis.prompt_len, dtype=bool)
    for start, end in emphasis.spans:
        marked[start:end] = True
    return marked


def _rounded(weight: float) -> float:
    return round(weight, 6)
