"""HTTP routes: what is known, a dry run, and the playground's page.

vLLM loads them as the endpoint plugin ``pasta`` where ``VLLM_PLUGINS`` names that. ``vllm serve
--pasta-playground`` brings them too.

- ``GET /v1/emphasis/head_sets``: the head sets that fit this model, by name, with provenance; its
  sizes.
- ``POST /v1/emphasis/resolve``: a body as for completions or chat completions; answers what would
  be emphasised, without generating. With ``?tokens=true`` also the text of each of the prompt's
  tokens.
- ``GET /playground`` and ``POST /v1/emphasis/attention``, with ``--pasta-playground`` alone: a
  page, and where a prompt's attention goes.
"""

import json
from argparse import Namespace
from collections.abc import Awaitable, Callable, Collection
from functools import partial
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from starlette.datastructures import State
from starlette.types import ASGIApp, Receive, Scope, Send

from vllm_pasta.errors import EmphasisError
from vllm_pasta.integration.config import PastaConfig
from vllm_pasta.integration.frontend.admission import Admission
from vllm_pasta.integration.frontend.middleware import refusal, rewrite
from vllm_pasta.integration.frontend.routes import playground
from vllm_pasta.integration.frontend.routes.attention import look
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
        if getattr(getattr(app.state, "args", None), "pasta_playground", False):
            app.add_api_route("/v1/emphasis/attention", look_inside, methods=["POST"])
            playground.attach(app)

    async def init_state(self, engine_client: Any, state: State, args: Namespace) -> None:
        state.pasta_admission = engine_client.input_processor.pasta_admission
        state.pasta_is_looking = False


class AttachRoutes:
    """A middleware that attaches `EmphasisRoutes` at the server's start, unless vLLM did, and has
    no part in any request.

    vLLM loads endpoint plugins only where ``VLLM_PLUGINS`` names them; and to set that for the sake
    of ``--pasta-playground`` would unload every other plugin.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            app: FastAPI = scope["app"]
            if not hasattr(app.state, "pasta_admission"):
                routes = EmphasisRoutes()
                routes.attach_router(app)
                await routes.init_state(app.state.engine_client, app.state, app.state.args)
        await self.app(scope, receive, send)


async def head_sets(request: Request) -> dict[str, Any]:
    """The default heads, and the head sets that fit the served model, for requests to name."""
    admission: Admission = request.app.state.pasta_admission
    config = admission.config
    assert config is not None  # the routes are loaded where VLLM_PLUGINS switches emphasis on
    shape = admission.shape
    return {
        "model": {
            "layers": shape.num_layers,
            "query_heads": shape.num_heads,
            "attention_layers": list(shape.attention_layers),
            "query_heads_of_layers": {
                str(layer): shape.heads_of(layer) for layer in shape.attention_layers
            },
        },
        "default": config.heads and _describe(config, config.heads),
        "head_sets": {name: _describe(config, config.head_sets[name]) for name in admission.known},
    }


async def resolve(request: Request) -> JSONResponse:
    """Renders the body's prompt or messages as vLLM would, and resolves its emphasis."""
    admission: Admission = request.app.state.pasta_admission
    tokens = request.query_params.get("tokens") in ("1", "true")

    async def dry_run(_: Any, params: Any, prompts: list[Any]) -> dict[str, Any]:
        return {"prompts": [_dry_run(admission, params, p, tokens) for p in prompts]}

    return await _answer(request, dry_run)


async def look_inside(request: Request) -> JSONResponse:
    """Tells where the attention of the body's prompt goes, plain and emphasised."""
    state = request.app.state
    if state.pasta_is_looking:
        error = EmphasisError("another prompt is being looked into: try again when it is done")
        return refusal(error, HTTPStatus.TOO_MANY_REQUESTS)
    state.pasta_is_looking = True
    try:
        return await _answer(request, partial(_look, request))
    finally:
        state.pasta_is_looking = False


async def _look(request: Request, asked: Any, params: Any, prompts: list[Any]) -> dict[str, Any]:
    state, at = request.app.state, request.query_params
    if asked.model and not state.openai_serving_models.is_base_model(asked.model):
        raise EmphasisError(f"expected the base model to look into, got {asked.model!r:.80}")
    if len(prompts) != 1:
        raise EmphasisError(f"expected one prompt to look into, got {len(prompts)}")
    if prompts[0].get("type") != "token":
        raise EmphasisError(f"expected a prompt of text, got one of type {prompts[0].get('type')}")
    if not all(at.get(name, "0").isdecimal() for name in ("layer", "head")):
        raise EmphasisError("expected numbers as ?layer= and &head=")
    head = (int(at["layer"]), int(at["head"])) if {"layer", "head"} <= at.keys() else None
    resolution = state.pasta_admission.resolve(params, _asked_for(params), prompts[0])
    return await look(state.engine_client, resolution, head)


async def _answer(
    request: Request, answer: Callable[[Any, Any, list[Any]], Awaitable[dict[str, Any]]]
) -> JSONResponse:
    """Renders the prompts of a body as for a completion or a chat completion, as vLLM would.

    Args:
        request: With that body.
        answer: Makes the answer of the body, its sampling params and its rendered prompts.
    """
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
    from vllm.entrypoints.openai.completion.protocol import CompletionRequest
    from vllm.exceptions import VLLMClientError

    state = request.app.state
    try:
        body, _ = rewrite(await request.body())
        asked: Any
        if "messages" in _keys(body):
            asked = ChatCompletionRequest.model_validate_json(body)
            rendered = await state.openai_serving_chat.render_chat_request(asked)
            prompts = rendered[1] if isinstance(rendered, tuple) else rendered
        else:
            asked = CompletionRequest.model_validate_json(body)
            prompts = await state.openai_serving_completion.render_completion_request(asked)
        if not isinstance(prompts, list):  # vLLM's ErrorResponse
            return JSONResponse(prompts.model_dump(), status_code=prompts.error.code)
        try:
            return JSONResponse(await answer(asked, asked.to_sampling_params(1, {}), prompts))
        finally:
            for prompt in prompts:
                state.pasta_admission.forget(prompt)
    except (ValueError, VLLMClientError) as e:
        return refusal(e)


def _dry_run(
    admission: Admission, params: Any, prompt: dict[str, Any], tokens: bool
) -> dict[str, Any]:
    resolution = admission.resolve(params, _asked_for(params), prompt)
    if resolution is None:
        ids, text = prompt["prompt_token_ids"], prompt.get("prompt")
    else:
        ids, text = resolution.token_ids, resolution.text or prompt.get("prompt")
    pieces = {"tokens": admission.locator.pieces(ids, text)} if tokens else {}
    if resolution is None:
        return {"prompt_tokens": len(ids), "emphasised": [], **pieces}
    emphasis = resolution.emphasis
    return {
        **pieces,
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


def _asked_for(params: Any) -> dict[str, Any]:
    return {k: v for k, v in (params.extra_args or {}).items() if k != RETURN_KEY}


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
