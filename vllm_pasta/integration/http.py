"""The HTTP surface that vLLM's request models leave no room for.

An ASGI middleware, added through vLLM's own ``--middleware``:

- ``"emphasis": …`` and ``"return_emphasis": true`` at the top level of a request's body move into
  ``vllm_xargs``, in a form that it can carry;
- with ``return_emphasis``, the response has a header ``x-emphasis``: what was emphasised, as JSON.
"""

import json
from collections.abc import Awaitable, Callable, MutableMapping
from http import HTTPStatus
from typing import Any

from vllm_pasta.emphasis import KEY, RETURN_KEY
from vllm_pasta.errors import EmphasisError, show
from vllm_pasta.integration import observe

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

PATHS = ("/v1/completions", "/v1/chat/completions", "/v1/responses", "/v1/messages")
HEADER = b"x-emphasis"
HEADER_LIMIT_BYTES = 6_000
"""Clients and proxies refuse headers from 8 KiB on; texts are shortened to fit."""


class EmphasisMiddleware:
    """See the module. Requests without either word in their body pass as they are."""

    def __init__(self, app: Callable[[Any, Receive, Send], Awaitable[None]]) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "POST" or scope["path"] not in PATHS:
            return await self.app(scope, receive, send)
        body, more = b"", True
        while more:
            message = await receive()
            if message["type"] != "http.request":
                return None  # the client is gone
            body += message.get("body", b"")
            more = message.get("more_body", False)
        try:
            body, wanted = rewrite(body)
        except EmphasisError as e:
            observe.refused(e.field)
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

        token = observe.report.set(entries)
        try:
            await self.app(scope, replay, send_with_header)
        finally:
            observe.report.reset(token)


def rewrite(body: bytes) -> tuple[bytes, bool]:
    """Moves our top-level fields of a JSON body into ``vllm_xargs``.

    Returns:
        The body, and whether the response shall say what was emphasised.

    Raises:
        EmphasisError: a field is given twice, or is of a type that means nothing.
    """
    if f'{KEY}"'.encode() not in body:
        return body, False
    try:
        request = json.loads(body)
    except (ValueError, RecursionError):
        return body, False  # vLLM says what is wrong with it
    if not isinstance(request, dict):
        return body, False
    xargs = request.get("vllm_xargs") or {}
    if not isinstance(xargs, dict):
        return body, False
    changed = dict(xargs)
    if (emphasis := request.pop(KEY, None)) is not None:
        if xargs.get(KEY) is not None:
            raise EmphasisError("given twice, at the top level and in vllm_xargs", field=KEY)
        changed[KEY] = _as_scalar(emphasis)
    wanted = request.pop(RETURN_KEY, None)
    inner = changed.pop(RETURN_KEY, None)
    wanted = inner if wanted is None else wanted
    if wanted is not None and (not isinstance(wanted, bool | int) or wanted not in (0, 1)):
        raise EmphasisError(f"expected true or false, got {show(wanted)}", field=RETURN_KEY)
    if changed or "vllm_xargs" in request:
        request["vllm_xargs"] = changed or None
    return json.dumps(request).encode(), bool(wanted)


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


def _as_scalar(emphasis: Any) -> Any:
    """What ``vllm_xargs`` can carry: scalars as they are, anything else as a JSON object."""
    if isinstance(emphasis, dict):
        return json.dumps(emphasis)
    if isinstance(emphasis, list) and not all(isinstance(item, str) for item in emphasis):
        return json.dumps({"text": emphasis})
    if isinstance(emphasis, bool):
        raise EmphasisError(f"expected an object, a string or a list, got {emphasis}", field=KEY)
    return emphasis


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
