"""Batch files (``vllm run-batch``), whose lines pass no HTTP middleware."""

import json
from collections.abc import Callable
from typing import Any

from vllm_pasta.errors import EmphasisError
from vllm_pasta.integration.frontend.middleware import dumps, read_object, rewrite
from vllm_pasta.integration.patching import Patch
from vllm_pasta.request.emphasis import REFUSED_KEY, RETURN_KEY, is_ours


def rewrite_batch_line(line: str | bytes) -> str | bytes:
    """Does for a line of a batch file, whose ``body`` is a request's, what the middleware does.

    A line that is refused must not end the whole batch: it goes on without emphasis, but with what
    is wrong with it, which `Admission` raises when the line's turn comes.
    """
    request = read_object(line.encode() if isinstance(line, str) else line)
    if request is None or not isinstance(body := request.get("body"), dict):
        return line
    try:
        rewritten, wanted = rewrite(dumps(body).encode())
        if wanted:
            raise EmphasisError(
                "the report is a header of an HTTP response, which a line of a batch has not; "
                "POST /v1/emphasis/resolve answers the same",
                field=RETURN_KEY,
            )
        return dumps({**request, "body": json.loads(rewritten)})
    except EmphasisError as e:
        plain = {key: value for key, value in body.items() if not is_ours(key)}
        xargs = {k: v for k, v in (body.get("vllm_xargs") or {}).items() if not is_ours(k)}
        plain["vllm_xargs"] = {**xargs, REFUSED_KEY: str(e)}
        return json.dumps({**request, "body": plain})


def _model_validate_json(
    original: Callable[..., Any], cls: Any, json_data: Any, *args: Any, **kwargs: Any
) -> Any:
    return original(cls, rewrite_batch_line(json_data), *args, **kwargs)


PATCHES = (
    Patch(
        "vllm.entrypoints.launchers.run_batch:BatchRequestInput.model_validate_json",
        _model_validate_json,
        "3233ae5b1d33",
        "batch_line",
        frontend=True,
    ),
)
HOOKS = {"batch_line": rewrite_batch_line}
