"""HTTP routes of the group ``vllm.endpoint_plugins``: what is known, and a dry run.

vLLM loads them only where ``VLLM_PLUGINS`` names ``pasta``.

- ``GET /v1/emphasis/head_sets``: the head sets that fit this model, by name, with provenance; its
  sizes.
- ``POST /v1/emphasis/resolve``: a body as for completions or chat completions; answers what would
  be emphasised, without generating.
"""

import json
from argparse import Namespace
from collections.abc import Collection
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from starlette.datastructures import State

from vllm_pasta.integration.config import PastaConfig
from vllm_pasta.integration.frontend.admission import Admission
from vllm_pasta.integration.frontend.middleware import refusal, rewrite
from vllm_pasta.request.emphasis import RETURN_KEY, Emphasis
from vllm_pasta.request.heads import HeadSet
from vllm_pasta.request.resolution import LEAST_FACTOR


class EmphasisRoutes:
    """vLLM's ``EndpointPlugin`` protocol."""

    name = "pasta"
    required_tasks = ("generate",)

    def attach_router(self, app: FastAPI) -> None:
        app.add_api_route("/v1/emphasis/head_sets", head_sets, methods=["GET"])
        app.add_api_route("/v1/emphasis/resolve", resolve, methods=["POST"])

    async def init_state(self, engine_client: Any, state: State, args: Namespace) -> None:
        state.pasta_admission = engine_client.input_processor.pasta_admission


async def head_sets(request: Request) -> dict[str, Any]:
    """The default heads, and the head sets that fit the served model, for requests to name."""
    admission: Admission = request.app.state.pasta_admission
    config = admission.config
    assert config is not None  # the routes are loaded where VLLM_PLUGINS switches emphasis on
    return {
        "model": {
            "layers": admission.shape.num_layers,
            "query_heads": admission.shape.num_heads,
            "attention_layers": list(admission.shape.attention_layers),
        },
        "default": config.heads and _describe(config, config.heads),
        "head_sets": {name: _describe(config, config.head_sets[name]) for name in admission.known},
    }


async def resolve(request: Request) -> JSONResponse:
    """Renders the body's prompt or messages as vLLM would, and resolves its emphasis."""
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
    from vllm.entrypoints.openai.completion.protocol import CompletionRequest
    from vllm.exceptions import VLLMClientError

    state = request.app.state
    admission: Admission = state.pasta_admission
    try:
        body, _ = rewrite(await request.body())
        if "messages" in _keys(body):
            chat = ChatCompletionRequest.model_validate_json(body)
            rendered = await state.openai_serving_chat.render_chat_request(chat)
            prompts = rendered[1] if isinstance(rendered, tuple) else rendered
            params = chat.to_sampling_params(1, {})
        else:
            completion = CompletionRequest.model_validate_json(body)
            prompts = await state.openai_serving_completion.render_completion_request(completion)
            params = completion.to_sampling_params(1, {})
        if not isinstance(prompts, list):  # vLLM's ErrorResponse
            return JSONResponse(prompts.model_dump(), status_code=prompts.error.code)
        try:
            return JSONResponse({"prompts": [_dry_run(admission, params, p) for p in prompts]})
        finally:
            for prompt in prompts:
                admission.forget(prompt)
    except (ValueError, VLLMClientError) as e:
        return refusal(e)


def _dry_run(admission: Admission, params: Any, prompt: dict[str, Any]) -> dict[str, Any]:
    extra_args = {k: v for k, v in (params.extra_args or {}).items() if k != RETURN_KEY}
    resolution = admission.resolve(params, extra_args, prompt)
    if resolution is None:
        return {"prompt_tokens": len(prompt["prompt_token_ids"]), "emphasised": []}
    emphasis = resolution.emphasis
    return {
        "prompt_tokens": emphasis.prompt_len,
        "emphasised": resolution.report(admission.locator.decode),
        **_strength(emphasis.alpha, emphasis.share, resolution.strength_from),
        "heads": emphasis.heads.to_json(),
    }


def _strength(alpha: float, share: float | None, given_by: str) -> dict[str, Any]:
    """Whichever of the two is in force, and who gives it."""
    if share is not None:
        return {"share": share, "share_from": given_by}
    return {"alpha": alpha, "alpha_from": given_by}


def _keys(body: bytes) -> Collection[str]:
    try:
        request = json.loads(body)
    except RecursionError:
        raise ValueError("the body is nested too deeply") from None
    return request if isinstance(request, dict) else ()


def _describe(config: PastaConfig, heads: HeadSet) -> dict[str, Any]:
    share, given_by = config.share_of(Emphasis())
    if share is None:
        alpha, given_by = config.alpha_of(heads, None)
    else:
        alpha = LEAST_FACTOR
    return {
        "name": heads.name,
        "count": len(heads),
        **_strength(alpha, share, given_by),  # of requests that steer these heads and give none
        "heads": heads.to_json(),
        "provenance": dict(heads.provenance),
    }
