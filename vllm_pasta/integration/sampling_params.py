"""vLLM's ``SamplingParams`` with one field more."""

from typing import Any

from vllm import SamplingParams as VllmSamplingParams


class SamplingParams(VllmSamplingParams):
    """vLLM's own, which also accepts ``extra``: the same as its ``extra_args``, shorter to write.

    ``SamplingParams(extra={"emphasis": …})`` equals ``SamplingParams(extra_args={"emphasis": …})``.

    Raises:
        ValueError: a key stands in both.
    """

    extra: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        if self.extra is not None:
            extra_args: dict[str, Any] = self.extra_args or {}  # type: ignore[has-type]
            if both := extra_args.keys() & self.extra.keys():
                raise ValueError(f"extra and extra_args both give {', '.join(sorted(both))}")
            self.extra_args = {**extra_args, **self.extra}
            self.extra = None  # a field at its default is left out between vLLM's processes
        super().__post_init__()
