"""Exceptions of vllm-pasta.

PastaError
├── EmphasisError     (ValueError)    a request's emphasis cannot be honoured: HTTP 400
├── HeadSetError      (ValueError)    a head set or its file is malformed, or does not fit the model
├── ConfigError       (ValueError)    the engine's "pasta" configuration is malformed
├── UnsupportedError  (RuntimeError)  this engine cannot steer
└── KernelError       (RuntimeError)  the C++ kernel cannot be built or loaded on this machine
"""

from typing import Any


class PastaError(Exception):
    """Base of everything that vllm-pasta raises on purpose."""


class EmphasisError(PastaError, ValueError):
    """A request's emphasis is malformed, or does not fit its prompt or model.

    Args:
        message: What was expected, what came, and what to do.
        field: The field of the emphasis at fault, e.g. ``"emphasis.spans[0]"``.
    """

    def __init__(self, message: str, *, field: str | None = None) -> None:
        super().__init__(f"{field}: {message}" if field else message)
        self.message = message
        self.field = field


class HeadSetError(PastaError, ValueError):
    """A head set is malformed, or its file cannot be read, or it does not fit the model."""


class ConfigError(PastaError, ValueError):
    """The ``pasta`` part of the engine's ``additional_config`` is malformed."""


class UnsupportedError(PastaError, RuntimeError):
    """The engine is configured such that emphasis cannot be honoured."""


class KernelError(PastaError, RuntimeError):
    """The C++ kernel cannot be built or loaded on this machine."""


def show(value: Any) -> str:
    """Shortened ``repr`` of a rejected value, for error messages."""
    try:
        text = repr(value)
    except RecursionError:
        text = f"a deeply nested {type(value).__name__}"
    return text if len(text) <= 80 else f"{text[:77]}…"
