"""The HTTP surface that vLLM's request models leave no room for.

An ASGI middleware, added through vLLM's own ``--middleware``:

- ``"emphasis": …`` and ``"return_emphasis": true`` at the top level of a request's body move into
  ``vllm_xargs``, in a form that it can carry;
- with ``return_emphasis``, the response has a header ``x-emphasis``: what was emphasised, as JSON;
- an endpoint that has no ``vllm_xargs`` would drop both without a word: refused there.
"""

import json
from http import HTTPStatus
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.middleware.exceptions import ExceptionMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from vllm_pasta.errors import EmphasisError, show
from vllm_pasta.integration.frontend import metrics
from vllm_pasta.request.emphasis import OFF, RETURN_KEY, is_nothing, is_ours
from vllm_pasta.request.resolution import KEY

PATHS = (
    *(
        f"/v1/{name}{suffix}"
        for name in ("completions", "chat/completions", "responses", "messages")
        for suffix in ("", "/render")
    ),
    "/invocations",
)
"""Endpoints whose request models have ``vllm_xargs``."""

GENERATE = "/inference/v1/generate"
"""Takes vLLM's sampling params as they are; ``sampling_params.extra_args`` carries emphasis."""

OURS = "/v1/emphasis/"
"""The plugin's own routes read bodies themselves."""

HEADER = "x-emphasis"
HEADER_LIMIT_BYTES = 6_000
"""Clients and proxies refuse headers from 8 KiB on; texts are shortened to fit."""


class EmphasisMiddleware:
    """A pure ASGI middleware, for streams and ContextVars pass through those alone.

    vLLM adds what ``--middleware`` names around its own middlewares, its check of API keys among
    them. This one puts itself inside all others, so that no body is read before the door.

    Args:
        app: What this one calls: the whole of the server, in layers.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app
        outer: Any = None
        inner: Any = app
        while not isinstance(inner, ExceptionMiddleware) and hasattr(inner, "app"):
            outer, inner = inner, inner.app
        if isinstance(inner, ExceptionMiddleware) and outer is not None:
            outer.app = _Rewriting(inner)
        else:
            self.app = _Rewriting(app)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self.app(scope, receive, send)


class _Rewriting:
    """What `EmphasisMiddleware` does with a request. Bodies without its words pass as they are."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "POST":
            return await self.app(scope, receive, send)
        # As Starlette finds its routes: below --root-path, if a proxy left that in the path.
        path = scope["path"].removeprefix(scope.get("root_path", ""))
        known = path in PATHS
        if path.startswith(OURS) or not (
            known or "json" in Headers(scope=scope).get("content-type", "").lower()
        ):
            return await self.app(scope, receive, send)
        try:
            body = await Request(scope, receive).body()
        except ClientDisconnect:
            return None
        try:
            body, wanted = rewrite(body) if known else refuse(body, path)
        except EmphasisError as e:
            metrics.refused(e.field)
            return await refusal(e)(scope, receive, send)
        entries: list[dict[str, Any]] | None = [] if wanted else None
        scope = {**scope, "headers": list(scope["headers"])}
        headers = MutableHeaders(scope=scope)
        del headers["transfer-encoding"]
        headers["content-length"] = str(len(body))
        sent = False

        async def replay() -> Message:
            nonlocal sent
            if sent:
                return await receive()  # what comes now is the client's leaving
            sent = True
            return {"type": "http.request", "body": body, "more_body": False}

        async def send_with_header(message: Message) -> None:
            if message["type"] == "http.response.start" and entries:
                MutableHeaders(scope=message)[HEADER] = header(entries)
            await send(message)

        token = metrics.report_entries.set(entries)
        try:
            await self.app(scope, replay, send_with_header)
        finally:
            metrics.report_entries.reset(token)


def rewrite(body: bytes) -> tuple[bytes, bool]:
    """Moves the plugin's top-level fields of a JSON body into ``vllm_xargs``.

    Returns:
        The body, byte for byte where it has none, and whether the response shall say what was
        emphasised.

    Raises:
        EmphasisError: a field is given twice, or is of a type that means nothing.
    """
    request = read_object(body)
    xargs = (request.get("vllm_xargs") or {}) if request else {}
    if not request or not isinstance(xargs, dict):
        return body, False  # nothing of the plugin's, or vLLM says what is wrong with it
    ours = [key for key in request if is_ours(key)]
    changed = {key: _checked(value, key) for key, value in xargs.items()}
    if not ours and RETURN_KEY not in xargs and changed == xargs:
        return body, False
    for key in ours:
        value = request.pop(key)
        if value is None and key != KEY:
            continue
        if value is not None and xargs.get(key) is not None:
            raise EmphasisError("given twice, at the top level and in vllm_xargs", field=key)
        if value is not None or key not in xargs:
            changed[key] = _as_scalar(value, key)
    wanted = changed.pop(RETURN_KEY, None)
    if wanted is not None and (not isinstance(wanted, bool | int) or wanted not in (0, 1)):
        raise EmphasisError(f"expected true or false, got {show(wanted)}", field=RETURN_KEY)
    if changed or "vllm_xargs" in request:
        request["vllm_xargs"] = changed or None
    return dumps(request).encode(), bool(wanted)


def refuse(body: bytes, path: str) -> tuple[bytes, bool]:
    """Lets a body without the plugin's fields pass, to an endpoint that would drop them.

    Raises:
        EmphasisError: it has one.
    """
    request = read_object(body) or {}
    for name in ("", "vllm_xargs", "sampling_params"):
        fields = request.get(name) if name else request
        if not isinstance(fields, dict):
            continue
        if any(is_ours(key) and not is_nothing(value) for key, value in fields.items()):
            raise EmphasisError(
                f"{path} takes none in {name or 'the body'}: give it in sampling_params.extra_args"
                if path == GENERATE
                else f"{show(path)} takes no emphasis here; these do: {', '.join(PATHS)}",
                field=KEY,
            )
    return body, False


def refusal(error: Exception, status: HTTPStatus = HTTPStatus.BAD_REQUEST) -> JSONResponse:
    """A refusal in the shape of vLLM's own errors."""
    detail = {
        "message": str(error),
        "type": "BadRequestError" if status == HTTPStatus.BAD_REQUEST else status.phrase,
        "param": error.field if isinstance(error, EmphasisError) else None,
        "code": status.value,
    }
    return JSONResponse({"error": detail}, status_code=status)


def read_object(body: bytes) -> dict[str, Any] | None:
    """The body as an object, if it may hold one of our fields; else None."""
    # Keys may be written with escapes, and JSON in UTF-16.
    if not any(sign in body for sign in (KEY.encode(), b"\\u", b"\0")):
        return None
    try:
        request = json.loads(body)
    except (ValueError, RecursionError):
        return None  # vLLM says what is wrong with it
    return request if isinstance(request, dict) else None


def dumps(value: Any) -> str:
    """JSON of what came as JSON.

    Raises:
        EmphasisError: nested deeper than can be written again.
    """
    try:
        return json.dumps(value)
    except RecursionError:
        raise EmphasisError("nested too deeply", field=KEY) from None


def header(entries: list[dict[str, Any]]) -> str:
    """The report as ASCII JSON of at most `HEADER_LIMIT_BYTES`; says so if texts were cut."""
    longest = 10_000
    while True:
        cut = [
            {
                **entry,
                "emphasised": [
                    span
                    if len(span["text"]) <= longest
                    else {**span, "text": span["text"][:longest] + "…"}
                    for span in entry["emphasised"]
                ],
            }
            for entry in entries
        ]
        text = json.dumps(cut)
        if len(text) <= HEADER_LIMIT_BYTES:
            return text
        if longest == 0:
            count = sum(len(entry["emphasised"]) for entry in entries)
            return json.dumps({"error": f"too long for a header: {count} ranges"})
        longest //= 2


def _as_scalar(value: Any, key: str) -> Any:
    """What ``vllm_xargs`` can carry: scalars as they are, anything else as a JSON object.

    A string at the top level is text, also where it looks like JSON; in a list it stays text.
    """
    if key == RETURN_KEY:
        return value
    if key == KEY and (is_nothing(value)):
        return OFF
    if key == KEY and isinstance(value, str) and value.lstrip().startswith("{"):
        return [value]
    if isinstance(value, dict):
        return dumps(value)
    if isinstance(value, list) and not all(isinstance(item, str) for item in value):
        return dumps({"text": value} if key == KEY else value)
    if isinstance(value, bool):
        raise EmphasisError(f"expected an object, a string or a list, got {value}", field=key)
    return value


def _checked(value: Any, key: str) -> Any:
    """A value that came in ``vllm_xargs``: vLLM's own model takes scalars and flat lists there."""
    if not is_ours(key) or key == RETURN_KEY:
        return value
    if key == KEY and (is_nothing(value)):
        return OFF
    if isinstance(value, dict) or (
        isinstance(value, list) and not all(isinstance(item, str | int | float) for item in value)
    ):
        raise EmphasisError(
            "vllm_xargs carries scalars and flat lists: give an object at the top level of the "
            f'body, as "{key}": {{…}}, or as a JSON string here',
            field=f"vllm_xargs.{key}",
        )
    return value
