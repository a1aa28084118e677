"""How a function of vLLM is wrapped at run time. What is wrapped: ``upstream``."""

import hashlib
import importlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

_MARK = "_vllm_pasta_original"
_HOOKS = "vllm.plugins.hooks"


@dataclass(frozen=True)
class Patch:
    """One wrapped function.

    Attributes:
        target: ``module:qualified.name``.
        wrap: Original function to its replacement.
        digests: SHA-256 of the original's source, first 12 characters; several, separated by
            spaces, where the supported vLLMs differ.
        superseded_by: What a vLLM has that does not need the patch, thanks to one of our diffs: a
            hook point, or ``module:qualified.name``.
        frontend: Applied when a front end starts (it alone has the target's module loaded),
            not in every process.
        backend: The GPU attention backend with whose steered version it is applied, not before.
    """

    target: str
    wrap: Callable[[Callable[..., Any]], Callable[..., Any]]
    digests: str
    superseded_by: str
    frontend: bool = False
    backend: str | None = None

    @property
    def function(self) -> Callable[..., Any]:
        """The target as it is now, wrapped or not."""
        return _bare(inspect.getattr_static(*self._locate()))

    @property
    def is_needed(self) -> bool:
        """Whether the installed vLLM lacks what supersedes this patch."""
        module, _, qualname = self.superseded_by.rpartition(":")
        try:
            attrgetter(qualname)(importlib.import_module(module or _HOOKS))
        except (ImportError, AttributeError):
            return True
        return False

    @property
    def source_digest(self) -> str:
        """Digest of the target's source as upstream wrote it, whether or not it is wrapped."""
        source = inspect.getsource(getattr(self.function, _MARK, self.function))
        return hashlib.sha256(source.encode()).hexdigest()[:12]

    def apply(self) -> None:
        """Wraps the target, unless it is wrapped already or the patch is not needed."""
        if not self.is_needed or hasattr(function := self.function, _MARK):
            return
        owner, name = self._locate()
        static = inspect.getattr_static(owner, name)
        wrapped = self.wrap(function)
        setattr(wrapped, _MARK, function)
        kind = type(static) if isinstance(static, staticmethod | classmethod) else lambda f: f
        setattr(owner, name, kind(wrapped))

    def _locate(self) -> tuple[Any, str]:
        module, _, qualname = self.target.partition(":")
        *path, name = qualname.split(".")
        owner = importlib.import_module(module)
        for part in path:
            owner = getattr(owner, part)
        return owner, name


def _bare(static: Any) -> Callable[..., Any]:
    return static.__func__ if isinstance(static, staticmethod | classmethod) else static
