"""The engine's configuration: ``additional_config["pasta"]``, and whether emphasis is on at all."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from vllm import envs

from vllm_pasta.errors import ConfigError
from vllm_pasta.request.emphasis import MARKUPS, parse_alpha
from vllm_pasta.request.heads import HeadSet, bundled, find
from vllm_pasta.request.markup import Markup

if TYPE_CHECKING:
    from vllm.config import VllmConfig

KEY = "pasta"
DEFAULT_ALPHA = 0.01
"""The paper's. Results are not sensitive to it (section 5.3)."""


@dataclass(frozen=True)
class PastaConfig:
    """What the server knows before any request comes.

    Attributes:
        heads: Head set of requests that name none; None means that each must bring its own.
        alpha: Scale factor of requests that give none.
        head_sets: Head sets that requests may name.
        markup: Markup of requests that choose none; off unless configured.
    """

    heads: HeadSet | None
    alpha: float
    head_sets: Mapping[str, HeadSet]
    markup: Markup = field(default_factory=Markup)

    @classmethod
    def parse(cls, value: Any) -> "PastaConfig":
        """Reads the ``pasta`` section; every field may be absent.

        ``{"heads": …, "alpha": …, "head_sets": {name: path}, "markup": …, "tag": …,
        "keep_marks": …}``. ``heads`` is the path of a head set file, the name of a head set, or
        ``{"layer": [heads]}``.

        Raises:
            ConfigError: unknown field or wrong type.
            HeadSetError: a file is missing or malformed.
        """
        if not isinstance(value, Mapping):
            raise ConfigError(f"additional_config[{KEY!r}]: expected an object, got {value!r:.80}")
        known = ("heads", "alpha", "head_sets", "markup", "tag", "keep_marks")
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
            head_sets[name] = _head_set(path, head_sets)
        heads = value.get("heads")
        alpha = value.get("alpha")
        try:
            alpha = DEFAULT_ALPHA if alpha is None else parse_alpha(alpha)
        except ValueError as e:
            raise ConfigError(f"alpha: {e}") from None
        return cls(
            None if heads is None else _head_set(heads, head_sets),
            alpha,
            head_sets,
            _markup(value.get("markup"), value.get("tag"), value.get("keep_marks")),
        )

    @classmethod
    def of(cls, vllm_config: "VllmConfig") -> "PastaConfig | None":
        """The configuration of an engine, or None where emphasis is not switched on."""
        if not is_enabled(vllm_config):
            return None
        return cls.parse(_section(vllm_config) or {})


def is_enabled(vllm_config: "VllmConfig") -> bool:
    """Whether the engine was asked to honour emphasis: by its config, or by ``VLLM_PLUGINS``."""
    return _section(vllm_config) is not None or KEY in (envs.VLLM_PLUGINS or ())


def _section(vllm_config: "VllmConfig") -> Any:
    config = vllm_config.additional_config
    return config.get(KEY) if isinstance(config, Mapping) else None


def _markup(kind: Any, tag: Any, keep_marks: Any) -> Markup:
    kind = "off" if kind is None else kind
    tag = "emphasis" if tag is None else tag
    keep_marks = True if keep_marks is None else keep_marks
    if kind not in MARKUPS:
        raise ConfigError(f"markup: expected one of {', '.join(MARKUPS)}, got {kind!r:.80}")
    if not isinstance(tag, str) or not re.fullmatch(r"[A-Za-z][\w.-]*", tag):
        raise ConfigError(f"tag: expected a name such as emphasis, got {tag!r:.80}")
    if not isinstance(keep_marks, bool):
        raise ConfigError(f"keep_marks: expected true or false, got {keep_marks!r:.80}")
    return Markup(kind, tag, keep_marks)


def _head_set(value: Any, known: Mapping[str, HeadSet]) -> HeadSet:
    if isinstance(value, Mapping):
        return HeadSet.from_json(value)
    if not isinstance(value, str):
        raise ConfigError(f"expected a head set's path, name or object, got {value!r:.80}")
    return find(value, known)
