"""vLLM's ``SamplingParams`` and ``BeamSearchParams`` with one field more."""

from typing import TYPE_CHECKING, Any

from vllm import SamplingParams as VllmSamplingParams
from vllm.sampling_params import BeamSearchParams as VllmBeamSearchParams


def _merged(
    extra_args: dict[str, Any] | None, extra: dict[str, Any] | None
) -> dict[str, Any] | None:
    if extra is None:
        return extra_args
    if both := (extra_args or {}).keys() & extra.keys():
        raise ValueError(f"extra and extra_args both give {', '.join(sorted(both))}")
    return {**(extra_args or {}), **extra}


class SamplingParams(VllmSamplingParams):
    """vLLM's own, which also accepts ``extra``: the same as its ``extra_args``, shorter to write.

    ``SamplingParams(extra={"emphasis": …})`` equals ``SamplingParams(extra_args={"emphasis": …})``.

    Raises:
        ValueError: a key stands in both.
    """

    extra: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        self.extra_args = _merged(self.extra_args, self.extra)  # type: ignore[has-type]
        self.extra = None  # a field at its default is left out between vLLM's processes
        super().__post_init__()


class BeamSearchParams(VllmBeamSearchParams):
    """vLLM's own for ``LLM.beam_search``, which also accepts ``extra`` (or ``extra_args``, the
    same): ``BeamSearchParams(beam_width=4, max_tokens=64, extra={"emphasis": …})``.

    Raises:
        ValueError: a key stands in both.
    """

    extra_args: dict[str, Any] | None = None
    extra: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        self.extra_args = _merged(self.extra_args, self.extra)
        self.extra = None
        super().__post_init__()


if not TYPE_CHECKING:  # a vLLM with the diffs of patches/ has these fields itself
    if hasattr(VllmSamplingParams, "extra"):
        SamplingParams = VllmSamplingParams
    if hasattr(VllmBeamSearchParams, "extra"):
        BeamSearchParams = VllmBeamSearchParams
