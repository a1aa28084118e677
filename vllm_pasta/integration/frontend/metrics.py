"""What became of requests, for those who watch: Prometheus metrics and the response's report.

The counters are in vLLM's own /metrics. Their names do not hold "vllm": vLLM drops metrics that do
when an engine starts.
"""

import re
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

from prometheus_client import Counter

from vllm_pasta.request.resolution import KEY

if TYPE_CHECKING:
    from vllm_pasta.integration.frontend.admission import Resolution

STEERED = Counter("pasta_requests_steered", "Requests admitted with emphasis.")
REFUSED = Counter("pasta_requests_refused", "Requests refused for their emphasis.", ["reason"])
EMPHASISED = Counter("pasta_emphasised_tokens", "Prompt tokens emphasised, over all requests.")
ROWS = Counter(
    "pasta_step_rows",
    "Rows of the batch that yielded tokens, over all steps, by kind: steered or plain.",
    ["kind"],
)
_STEERED_ROWS, _PLAIN_ROWS = ROWS.labels("steered"), ROWS.labels("plain")

_REASON = re.compile(
    r"emphasis([._](alpha|chars|heads|keep_marks|markup|spans|text)(\.[a-z]+)?)?"
    r"|return_emphasis|markup"
)

report: ContextVar[list[dict[str, Any]] | None] = ContextVar("report", default=None)
"""Where the current HTTP request collects what was emphasised, one entry per prompt; None where
nobody asked."""


def resolved(resolution: "Resolution", decode: Callable[[list[int]], str]) -> None:
    """Counts an admitted request, and reports it where that is asked for."""
    if not resolution.emphasis.is_plain:
        STEERED.inc()
        EMPHASISED.inc(sum(end - start for start, end in resolution.emphasis.spans))
    entries = report.get()
    if entries is not None:
        _append(entries, resolution, decode)


def reported(resolution: "Resolution", decode: Callable[[list[int]], str]) -> None:
    """Reports a request that will be admitted only after its response has begun."""
    entries = report.get()
    if entries is not None:
        _append(entries, resolution, decode)
        report.set(None)  # once is enough


def _append(
    entries: list[dict[str, Any]], resolution: "Resolution", decode: Callable[[list[int]], str]
) -> None:
    entries.append({"prompt": len(entries), "emphasised": resolution.report(decode)})


def rows(steered: Sequence[bool]) -> None:
    """Counts the rows of one step's outputs, given which were steered.

    Counters, since with several API servers each sees its own requests alone: sums over them are
    right, and so is the share, a quotient of rates. A mean of their shares would not be.
    """
    if steered:
        count = sum(steered)
        _STEERED_ROWS.inc(count)
        _PLAIN_ROWS.inc(len(steered) - count)


def refused(field: str | None) -> None:
    """Counts a refused request by the field at fault, without its indices."""
    reason = re.sub(r"\[\d+\]", "", field or KEY)
    # A client's own words are no label: there would be one time series for each.
    REFUSED.labels(reason if _REASON.fullmatch(reason) else KEY).inc()
