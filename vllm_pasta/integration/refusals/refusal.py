"""What a refusal is, and what it reads: of an engine, of all its layers, of one layer."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vllm.platforms import current_platform

from vllm_pasta.integration.scheduler import connectors
from vllm_pasta.request.heads import ranges

if TYPE_CHECKING:
    from vllm.config import VllmConfig

ADMISSION_TESTS = "tests/engine/test_admission.py::"
GPU_TESTS = "tests/gpu/test_gpu_backends.py::"


@dataclass(frozen=True)
class Engine:
    """What refusals read of an engine, before its model is loaded."""

    config: "VllmConfig"

    def __getattr__(self, name: str) -> Any:
        """``model``, ``cache``, ``parallel``, …: vLLM's configuration of that name."""
        return getattr(self.config, f"{name}_config")

    @property
    def platform(self) -> Any:
        return current_platform

    @property
    def unknown_connectors(self) -> str:
        return ", ".join(connectors.unknown(self.config.kv_transfer_config))

    @property
    def unsalted_connectors(self) -> str:
        return ", ".join(connectors.unsalted(self.config.kv_transfer_config))

    @property
    def gpu_connectors(self) -> str:
        return ", ".join(connectors.needing_gpu(self.config.kv_transfer_config))


@dataclass(frozen=True)
class Layer:
    """What refusals read of an attention layer, once the model is loaded.

    Attributes:
        layer: The layer.
        num_heads: Query heads of this rank; what requests may name is checked against them.
    """

    layer: Any
    num_heads: int = 0

    @property
    def impl(self) -> Any:
        return getattr(self.layer, "impl", self.layer)


@dataclass(frozen=True)
class Layers:
    """What refusals read of the layers of a worker, once the model is loaded.

    Attributes:
        found: Indices of those that have attention heads.
        expected: The same by the model's configuration, against which head sets are checked.
    """

    found: set[int]
    expected: set[int]

    def __getattr__(self, name: str) -> str:
        """``found_ranges``, ``expected_ranges``: for people."""
        return ranges(getattr(self, name.removesuffix("_ranges")))


@dataclass(frozen=True)
class Refusal:
    """One reason for which an engine does not start.

    Attributes:
        id: A short name that stays.
        sentence: What stands in the way, for people. ``{0.…}`` is read from the subject, an
            `Engine`, `Layers` or a `Layer`; the name of a layer is put before it.
        holds: Whether it stands in the way of the subject.
        test: The test that shows it, as ``path::name``.
        device: ``"cpu"`` or ``"gpu"`` where it concerns only one, else None.
    """

    id: str
    sentence: str
    holds: Callable[[Any], Any]
    test: str
    device: str | None = None

    @property
    def summary(self) -> str:
        """The sentence without an engine at hand."""
        return re.sub(r"\{0\.[^}]*\}", "…", self.sentence)


Row = tuple[str, str, Callable[[Any], Any]]


def shown_by(test: str, *rows: Row, device: str | None = None) -> tuple[Refusal, ...]:
    """Refusals that one test shows, each by its id, its sentence and when it holds."""
    return tuple(Refusal(*row, test, device) for row in rows)
