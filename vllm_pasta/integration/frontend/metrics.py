"""What became of requests, for those who watch: Prometheus metrics and the response's report.

The counters are in vLLM's own /metrics. Their names do not hold "vllm": vLLM drops metrics that do
when an engine starts.
"""

import functools
import re
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from typing import Any

from prometheus_client import Counter

from vllm_pasta.integration.patching import Patch
from vllm_pasta.request.resolution import KEY, Resolution, wire_of


class Counters:
    """The counters, registered with Prometheus when this is created."""

    def __init__(self) -> None:
        self.steered = Counter("pasta_requests_steered", "Requests admitted with emphasis.")
        self.refused = Counter(
            "pasta_requests_refused", "Requests refused for their emphasis.", ["reason"]
        )
        self.emphasised = Counter(
            "pasta_emphasised_tokens", "Prompt tokens emphasised, over all requests."
        )
        rows = Counter(
            "pasta_step_rows",
            "Rows of the batch that yielded tokens, over all steps, by kind: steered or plain.",
            ["kind"],
        )
        self.steered_rows, self.plain_rows = rows.labels("steered"), rows.labels("plain")


@functools.cache
def counters() -> Counters:
    """The counters of this process. Front ends create them when they start; other processes load
    this module too, and shall not report counters of their own."""
    return Counters()


_REASON = re.compile(
    r"emphasis([._](alpha|chars|heads|keep_marks|markup|prompts|share|spans|text)(\.[a-z]+)?)?"
    r"|return_emphasis|markup"
)

report_entries: ContextVar[list[dict[str, Any]] | None] = ContextVar("report_entries", default=None)
"""Where the current HTTP request collects what was emphasised, one entry per prompt; None where
the client did not ask for it."""


def resolved(resolution: Resolution, decode: Callable[[list[int]], str]) -> None:
    """Counts an admitted request, and reports it where that is asked for."""
    if not resolution.emphasis.is_plain:
        counters().steered.inc()
        counters().emphasised.inc(sum(end - start for start, end in resolution.emphasis.spans))
    entries = report_entries.get()
    if entries is not None:
        _append(entries, resolution, decode)


def reported(resolution: Resolution, decode: Callable[[list[int]], str]) -> None:
    """Reports a request that will be admitted only after its response has begun."""
    entries = report_entries.get()
    if entries is not None:
        _append(entries, resolution, decode)
        report_entries.set(None)  # once is enough


def _append(
    entries: list[dict[str, Any]], resolution: Resolution, decode: Callable[[list[int]], str]
) -> None:
    entries.append({"prompt": resolution.prompt, "emphasised": resolution.report(decode)})


def refused(field: str | None) -> None:
    """Counts a refused request by the field at fault, without its indices."""
    reason = re.sub(r"\[\d+\]", "", field or KEY)
    # A client's own words are no label: there would be one time series for each.
    counters().refused.labels(reason if _REASON.fullmatch(reason) else KEY).inc()


def count_rows(step: Sequence[tuple[Any, Any]]) -> None:
    """Counts the rows of one step's outputs by whether they were steered.

    Counters, since with several API servers each sees its own requests alone: sums over them are
    right, and so is the share, a quotient of rates. A mean of their shares would not be.

    Args:
        step: Each request's sampling params (None for a pooling request) and output.
    """
    steered = [wire_of(params) is not None for params, output in step if output.new_token_ids]
    if steered:
        counters().steered_rows.inc(sum(steered))
        counters().plain_rows.inc(len(steered) - sum(steered))


def _add_request(
    original: Callable[..., Any], self: Any, request: Any, *args: Any, **kwargs: Any
) -> None:
    """Keeps a request's sampling params in the front end's state of it, for `_process_outputs`."""
    original(self, request, *args, **kwargs)
    if (state := self.request_states.get(request.request_id)) is not None:
        state.sampling_params = request.sampling_params


def _process_outputs(
    original: Callable[..., Any], self: Any, engine_core_outputs: Any, *args: Any, **kwargs: Any
) -> Any:
    if self.log_stats:
        count_rows(
            [
                (state.sampling_params, output)
                for output in engine_core_outputs
                if (state := self.request_states.get(output.request_id)) is not None
            ]
        )
    return original(self, engine_core_outputs, *args, **kwargs)


PATCHES = (
    Patch(
        "vllm.v1.engine.output_processor:OutputProcessor.add_request",
        _add_request,
        "8e0315ddb4d6",
        "step_outputs",
        frontend=True,
    ),
    Patch(
        "vllm.v1.engine.output_processor:OutputProcessor.process_outputs",
        _process_outputs,
        "9e116796002e 06811284749d",
        "step_outputs",
        frontend=True,
    ),
)
HOOKS = {"step_outputs": count_rows}
