"""The HTTP surface that vLLM's request models leave no room for.

An ASGI middleware, added through vLLM's own ``--middleware``:

- ``"emphasis": …`` and ``"return_emphasis": true`` at the top level of a request's body move into
  ``vllm_xargs``, in a form that it can carry;
- with ``return_emphasis``, the response has a header ``x-emphasis``: what was emphasised, as JSON;
- an endpoint that has no ``vllm_xargs`` would drop both without a word: refused there.
"""

import json
from collections.abc import Awaitable, Callable, MutableMapping
from http import HTTPStatus
from typing import Any

from vllm_pasta.errors import EmphasisError, show
from vllm_pasta.integration.frontend import metrics
from vllm_pasta.request.emphasis import RETURN_KEY, is_ours
from vllm_pasta.request.resolution import KEY

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

PATHS = (
    *(
        f"/v1/{name}{suffix}"
        for name in ("completions", "chat/completions", "responses", "messages")
        for suffix in ("", "/render")
    ),
    "/invocations",
)
"""Endpoints whose request models have ``vllm_xargs``."""

OURS = "/v1/emphasis/"
"""Our own routes read bodies themselves."""

HEADER = b"x-emphasis"
HEADER_LIMIT_BYTES = 6_000
"""Clients and proxies refuse headers from 8 KiB on; texts are shortened to fit."""


class EmphasisMiddleware:
    """See the module. Requests without either word in their body pass as they are."""

    def __init__(self, app: Callable[[Any, Receive, Send], Awaitable[None]]) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "POST":
            return await self.app(scope, receive, send)
        # As Starlette finds its routes: below --root-path, if a proxy left that in the path.
        path = scope["path"].removeprefix(scope.get("root_path", ""))
        known = path in PATHS
        if path.startswith(OURS) or not (known or _is_json(scope["headers"])):
            return await self.app(scope, receive, send)
        body, more = b"", True
        while more:
            message = await receive()
            if message["type"] != "http.request":
                return None  # the client is gone
            body += message.get("body", b"")
            more = message.get("more_body", False)
        try:
            body, wanted = rewrite(body) if known else refuse(body, path)
        except EmphasisError as e:
            metrics.refused(e.field)
            return await _refuse(send, e)
        entries: list[dict[str, Any]] | None = [] if wanted else None
        scope = {**scope, "headers": _with_length(scope["headers"], len(body))}
        sent = False

        async def replay() -> Message:
            nonlocal sent
            if sent:
                return await receive()  # what comes now is the client's leaving
            sent = True
            return {"type": "http.request", "body": body, "more_body": False}

        async def send_with_header(message: Message) -> None:
            if message["type"] == "http.response.start" and entries:
                message["headers"] = [*message.get("headers", ()), (HEADER, header(entries))]
            await send(message)

        token = metrics.report_entries.set(entries)
        try:
            await self.app(scope, replay, send_with_header)
        finally:
            metrics.report_entries.reset(token)


def rewrite(body: bytes) -> tuple[bytes, bool]:
    """Moves our top-level fields of a JSON body into ``vllm_xargs``.

    Returns:
        The body, byte for byte where it has none, and whether the response shall say what was
        emphasised.

    Raises:
        EmphasisError: a field is given twice, or is of a type that means nothing.
    """
    request = read_object(body)
    xargs = (request.get("vllm_xargs") or {}) if request else {}
    if not request or not isinstance(xargs, dict):
        return body, False  # nothing of ours, or vLLM says what is wrong with it
    ours = [key for key in request if is_ours(key)]
    if not ours and RETURN_KEY not in xargs:
        return body, False
    changed = dict(xargs)
    for key in ours:
        value = request.pop(key)
        if value is None:
            continue
        if xargs.get(key) is not None:
            raise EmphasisError("given twice, at the top level and in vllm_xargs", field=key)
        changed[key] = _as_scalar(value, key)
    wanted = changed.pop(RETURN_KEY, None)
    if wanted is not None and (not isinstance(wanted, bool | int) or wanted not in (0, 1)):
        raise EmphasisError(f"expected true or false, got {show(wanted)}", field=RETURN_KEY)
    if changed or "vllm_xargs" in request:
        request["vllm_xargs"] = changed or None
    return dumps(request).encode(), bool(wanted)


def refuse(body: bytes, path: str) -> tuple[bytes, bool]:
    """Lets a body without our fields pass, to an endpoint that would drop them.

    Raises:
        EmphasisError: it has one.
    """
    request = read_object(body) or {}
    xargs = request.get("vllm_xargs")
    for fields in (request, xargs if isinstance(xargs, dict) else {}):
        if any(is_ours(key) and value is not None for key, value in fields.items()):
            raise EmphasisError(
                f"{show(path)} takes no emphasis here; these do: {', '.join(PATHS)}", field=KEY
            )
    return body, False


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


def header(entries: list[dict[str, Any]]) -> bytes:
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
        text = json.dumps(cut).encode()
        if len(text) <= HEADER_LIMIT_BYTES:
            return text
        if longest == 0:
            count = sum(len(entry["emphasised"]) for entry in entries)
            return json.dumps({"error": f"too long for a header: {count} ranges"}).encode()
        longest //= 2


def _as_scalar(value: Any, key: str) -> Any:
    """What ``vllm_xargs`` can carry: scalars as they are, anything else as a JSON object."""
    if key == RETURN_KEY:
        return value
    if isinstance(value, dict):
        return dumps(value)
    if isinstance(value, list) and not all(isinstance(item, str) for item in value):
        return dumps({"text": value} if key == KEY else value)
    if isinstance(value, bool):
        raise EmphasisError(f"expected an object, a string or a list, got {value}", field=key)
    return value


def _is_json(headers: Any) -> bool:
    return any(k.lower() == b"content-type" and b"json" in v.lower() for k, v in headers)


def _with_length(headers: Any, length: int) -> list[tuple[bytes, bytes]]:
    kept = [
        (k, v) for k, v in headers if k.lower() not in (b"content-length", b"transfer-encoding")
    ]
    return [*kept, (b"content-length", str(length).encode())]


async def _refuse(send: Send, error: EmphasisError) -> None:
    """400 in the shape of vLLM's own errors."""
    detail = {
        "message": str(error),
        "type": "BadRequestError",
        "param": error.field,
        "code": HTTPStatus.BAD_REQUEST.value,
    }
    body = json.dumps({"error": detail}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": 400, "headers": headers})
    await send({"type": "http.response.body", "body": body})
