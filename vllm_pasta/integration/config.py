"""The engine's configuration: ``additional_config["pasta"]``, and whether emphasis is on at all."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from vllm import envs

from vllm_pasta.errors import ConfigError
from vllm_pasta.request.emphasis import Emphasis
from vllm_pasta.request.head_sets import auto
from vllm_pasta.request.head_sets.library import Model, bundled, chosen_for, find, names
from vllm_pasta.request.heads import DEFAULT_ALPHA, HeadSet
from vllm_pasta.request.marks import parse_alpha, parse_share
from vllm_pasta.request.markup import MARKUPS, ROLES, Markup

if TYPE_CHECKING:
    from vllm.config import VllmConfig

KEY = "pasta"


@dataclass(frozen=True)
class PastaConfig:
    """What the server knows before any request comes.

    Attributes:
        heads: Head set of requests that name none; None means that each must bring its own.
        alpha: Scale factor of requests that give none; None means that of the head set.
        head_sets: Head sets that requests may name.
        origin: Why these are the ``heads``, for the log.
        markup: Markup of requests that choose none; off unless configured.
        share: In place of ``alpha``, the share of requests that give neither; None means that
            ``alpha`` is in force.
    """

    heads: HeadSet | None
    alpha: float | None
    head_sets: Mapping[str, HeadSet]
    markup: Markup = field(default_factory=Markup)
    origin: str = "the configuration names them"
    share: float | None = None

    def share_of(self, emphasis: Emphasis) -> tuple[float | None, str]:
        """The share of a request, and who gives it: ``"request"`` or ``"server"``; None where
        `alpha_of` tells its strength."""
        if emphasis.share is not None or emphasis.alpha is not None:
            return emphasis.share, "request"
        return self.share, "server"

    def alpha_of(self, heads: HeadSet, asked: float | None) -> tuple[float, str]:
        """The scale factor of a request, and who gives it.

        Args:
            heads: The request's heads.
            asked: The factor that the request itself gives, if any.

        Returns:
            The factor; and ``"request"``, ``"server"``, ``"head set"`` or ``"default"``, of which
            the first that gives one decides.
        """
        given = {"request": asked, "server": self.alpha, "head set": heads.alpha}
        return next(
            ((alpha, source) for source, alpha in given.items() if alpha is not None),
            (DEFAULT_ALPHA, "default"),
        )

    @classmethod
    def parse(
        cls, value: Any, model: Model | None = None, engine: Mapping[str, Any] | None = None
    ) -> "PastaConfig":
        """Reads the ``pasta`` section; every field may be absent.

        ``{"heads": …, "alpha": …, "share": …, "head_sets": {name: path}, "markup": …,
        "markup_roles": [role], "tag": …, "keep_marks": …}``. ``heads`` is the path of a head set
        file, the name of a head set, ``"auto"``, or ``{"layer": [heads]}``.

        Args:
            value: The section.
            model: The model that is served, without which there is no ``"auto"``, and no set is
                chosen for the model where the section names none.
            engine: For ``"auto"``, see `auto.ensure`.

        Raises:
            ConfigError: unknown field or wrong type.
            HeadSetError: a file is missing or malformed; ``"auto"`` found no heads.
        """
        if not isinstance(value, Mapping):
            raise ConfigError(f"additional_config[{KEY!r}]: expected an object, got {value!r:.80}")
        known = (
            "heads", "alpha", "head_sets", "markup", "markup_roles", "tag", "keep_marks", "share",
        )  # fmt: skip
        if unknown := [key for key in value if key not in known]:
            hint = ": leave it out, a GPU need not be asked for" if unknown[0] == "gpu" else ""
            raise ConfigError(
                f"additional_config[{KEY!r}]: unknown field {unknown[0]!r}{hint}; "
                f"known are {', '.join(known)}"
            )
        head_sets = bundled()
        paths = value.get("head_sets") or {}
        if not isinstance(paths, Mapping):
            raise ConfigError(f"head_sets: expected {{name: path}}, got {paths!r:.80}")
        for name, path in paths.items():
            if name == auto.AUTO:
                raise ConfigError(f"head_sets: {name!r} is the name of what a search finds")
            head_sets[name] = _head_set(path, head_sets)
        alpha, share = value.get("alpha"), value.get("share")
        if alpha is not None and share is not None:
            raise ConfigError(f"expected alpha or share, got both: {alpha!r:.20} and {share!r:.20}")
        try:
            alpha = None if alpha is None else parse_alpha(alpha)
        except ValueError as e:
            raise ConfigError(f"alpha: {e}") from None
        try:
            share = None if share is None else parse_share(share)
        except ValueError as e:
            raise ConfigError(f"share: {e}") from None
        markup = _markup(value)
        wanted, origin = value.get("heads"), cls.origin
        if wanted == auto.AUTO:
            if model is None:
                raise ConfigError('heads: "auto" needs to know the model')
            head_sets[auto.AUTO] = auto.ensure(model.name, model.revision, engine or {})
            origin = "a search found them for this model"
        heads = None if wanted is None else _head_set(wanted, head_sets)
        if wanted is None and model is not None:
            heads = chosen_for(model, head_sets)
            origin = f"no heads are configured, and the model is called {model.short_name}"
        return cls(heads, alpha, head_sets, markup, origin, share)

    def names(self, model: Model) -> list[str]:
        """The names of the head sets that fit a model."""
        return list(names(self.head_sets, model))

    @classmethod
    def of(cls, vllm_config: "VllmConfig", model: Model) -> "PastaConfig":
        """The configuration of an engine on which emphasis is switched on.

        Args:
            vllm_config: The engine's.
            model: The model that it serves.
        """
        return cls.parse(
            section_of(vllm_config.additional_config) or {},
            model,
            engine_options(vllm_config.model_config, vllm_config.parallel_config),
        )


def is_enabled(vllm_config: "VllmConfig") -> bool:
    """Whether the engine was asked to honour emphasis: by its config, or by ``VLLM_PLUGINS``."""
    return section_of(vllm_config.additional_config) is not None or KEY in (envs.VLLM_PLUGINS or ())


def section_of(additional_config: Any) -> Any:
    """The ``pasta`` section of an engine's ``additional_config``; None where there is none."""
    return additional_config.get(KEY) if isinstance(additional_config, Mapping) else None


_ENGINE = (
    "tokenizer", "revision", "tokenizer_revision", "code_revision", "trust_remote_code", "dtype",
    "quantization", "load_format", "hf_overrides", "tensor_parallel_size", "pipeline_parallel_size",
)  # fmt: skip
"""Arguments of an engine without which another could not load its model."""


def engine_options(*sources: Any) -> dict[str, Any]:
    """The arguments of ``vllm.LLM`` with which another engine can load the same model.

    Args:
        sources: vLLM's engine arguments, or the parts of a `VllmConfig` that have them.
    """
    found = {name: getattr(s, name) for s in sources for name in _ENGINE if hasattr(s, name)}
    given = {name: _json(value) for name, value in found.items()}
    return {name: value for name, value in given.items() if value not in (None, {}, False)}


def _json(value: Any) -> Any:
    """A setting as a JSON value: a dtype by its name; None where there is no such value."""
    if value is None or isinstance(value, bool | int | str | dict):
        return value
    text = str(value)
    return text.removeprefix("torch.") if text.startswith("torch.") else None


def _markup(section: Mapping[str, Any]) -> Markup:
    given = {key: value for key, value in section.items() if value is not None}
    kind, tag = given.get("markup", "off"), given.get("tag", "emphasis")
    keep_marks, roles = given.get("keep_marks", True), given.get("markup_roles", ROLES)
    if kind not in MARKUPS:
        raise ConfigError(f"markup: expected one of {', '.join(MARKUPS)}, got {kind!r:.80}")
    if not isinstance(tag, str) or not re.fullmatch(r"[A-Za-z][\w.-]*", tag):
        raise ConfigError(f"tag: expected a name such as emphasis, got {tag!r:.80}")
    if not isinstance(keep_marks, bool):
        raise ConfigError(f"keep_marks: expected true or false, got {keep_marks!r:.80}")
    if not isinstance(roles, list | tuple) or not all(isinstance(role, str) for role in roles):
        raise ConfigError(f"markup_roles: expected a list of roles, got {roles!r:.80}")
    return Markup(kind, tag, keep_marks, tuple(roles))


def _head_set(value: Any, known: Mapping[str, HeadSet]) -> HeadSet:
    if isinstance(value, Mapping):
        return HeadSet.from_json(value)
    if not isinstance(value, str):
        raise ConfigError(f"expected a head set's path, name or object, got {value!r:.80}")
    return find(value, known)
