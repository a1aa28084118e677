"""Batch files (``vllm run-batch``), whose lines pass no HTTP middleware."""

import json
from collections.abc import Callable
from typing import Any

from vllm_pasta.integration.frontend.middleware import dumps, read_object, rewrite
from vllm_pasta.integration.patching import Patch


def rewrite_batch_line(line: str | bytes) -> str | bytes:
    """Does for a line of a batch file, whose ``body`` is a request's, what the middleware does.

    Raises:
        EmphasisError: as `rewrite`.
    """
    request = read_object(line.encode() if isinstance(line, str) else line)
    if request is None or not isinstance(request.get("body"), dict):
        return line
    body, _ = rewrite(dumps(request["body"]).encode())
    return dumps({**request, "body": json.loads(body)})


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
