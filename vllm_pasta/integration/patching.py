"""How the plugin attaches to vLLM at run time: wrapped functions, and hook points.

Stock vLLM has no hook points. The diffs in ``patches/`` add them, one each, for upstream to take;
where an installed vLLM has one, the plugin registers with it, and the patches which it supersedes
are left out (``Patch.superseded_by``). Both ways end in the same functions.

This module does not know what is attached: `plugin.register` gives the lists to `apply`.
"""

import functools
import hashlib
import importlib
import inspect
from collections.abc import Callable, Mapping, Sequence
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
        wrapper: Called in its place: with the original, then the arguments of the call.
        digests: SHA-256 of the original's source, first 12 characters; several, separated by
            spaces, where the supported vLLMs differ.
        superseded_by: What a vLLM has that does not need the patch, thanks to a diff of
            ``patches/``: a hook point, or ``module:qualified.name``.
        frontend: Applied when a front end starts (it alone has the target's module loaded),
            not in every process.
        part: Of vLLM, with whose steered version it is applied, not before: a GPU attention
            backend, or `rows.MODEL_RUNNER_V2`.
    """

    target: str
    wrapper: Callable[..., Any]
    digests: str
    superseded_by: str
    frontend: bool = False
    part: str | None = None

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

        @functools.wraps(function)
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            return self.wrapper(function, *args, **kwargs)

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


_given: tuple[Patch, ...] | None = None
"""The patches that `apply` was given; None before."""


def apply(patches: Sequence[Patch], hooks: Mapping[str, Callable[..., Any]]) -> None:
    """Attaches the plugin to vLLM in this process. Idempotent.

    Args:
        patches: Those that every process needs are applied now; the rest by `apply_frontend` and
            `apply_part`.
        hooks: Functions by the name of their hook point in ``vllm.plugins.hooks``, whose
            documentation says what it calls them with. Names that this vLLM lacks are skipped.
    """
    global _given
    _register(hooks)
    for patch in patches:
        if not patch.frontend and patch.part is None:
            patch.apply()
    _given = tuple(patches)


def apply_frontend() -> None:
    """Applies the patches that front ends need."""
    for patch in _given or ():
        if patch.frontend:
            patch.apply()


def apply_part(name: str) -> None:
    """Applies the patches that the steered version of a part of vLLM needs."""
    for patch in _given or ():
        if patch.part == name:
            patch.apply()


def is_applied() -> bool:
    """Whether `apply` was called in this process."""
    return _given is not None


def _register(hooks: Mapping[str, Callable[..., Any]]) -> None:
    try:
        points = importlib.import_module(_HOOKS)
    except ImportError:
        return
    for name, function in hooks.items():
        if hasattr(points, name):
            getattr(points, name).register(function)
