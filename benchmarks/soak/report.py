"""The verdict of a run, its figures as JSON, and a chart of them over time."""

import statistics
from pathlib import Path
from typing import Any

from benchmarks.soak.client import Counts
from benchmarks.soak.judge import Judge
from benchmarks.soak.watch import METRICS, Watch
from vllm_pasta.profiling.report.plots import pyplot


def figures(counts: Counts, judge: Judge, watch: Watch) -> dict[str, Any]:
    """All that was counted, as JSON has it."""
    latencies = [seconds for _, seconds in counts.latencies]
    half = len(latencies) // 2
    last = watch.samples[-1] if watch.samples else {"files": None}
    return {
        "requests": sum(counts.kinds.values()),
        "answered": counts.answered,
        "refused_as_expected": sum(counts.refused.values()),
        "server_errors": counts.server_errors,
        "faults": counts.fault_count,
        "first_faults": counts.faults,
        "judged": judge.judged,
        "judged_steered": judge.judged_steered,
        "judged_tokens": judge.tokens,
        "not_judged_for_want_of_time": judge.too_many,
        "wrong_answers": len(judge.wrong),
        "first_wrong_answers": judge.wrong[:5],
        "largest_error": round(judge.largest, 6),
        "median_effect_of_steering": round(statistics.median(judge.effects or [0.0]), 4),
        "held_back": counts.held_back,
        "median_latency_s": {
            "first half": round(statistics.median(latencies[:half] or [0.0]), 3),
            "second half": round(statistics.median(latencies[half:] or [0.0]), 3),
        },
        "kinds": dict(counts.kinds.most_common()),
        "refused": dict(counts.refused.most_common()),
        "server": {name: last.get(name) for name in METRICS.values()},
        "mib_an_hour": watch.slopes(),
        "open_files": [watch.samples[0]["files"] if watch.samples else None, last["files"]],
        "samples": watch.samples,
    }


def problems(result: dict[str, Any]) -> list[str]:
    """Why the run failed; empty if it did not."""
    found = []
    if result["wrong_answers"]:
        found.append(f"{result['wrong_answers']} answers are not the oracle's")
    if result["faults"]:
        found.append(f"{result['faults']} requests did not end as they should")
    if not result["judged_steered"]:
        found.append("no steered answer was judged")
    return found


def text(result: dict[str, Any]) -> str:
    """For people: the figures that matter, a line each."""
    latency = result["median_latency_s"]
    lines = [
        f"{result['requests']} requests: {result['answered']} answered, "
        f"{result['refused_as_expected']} refused as expected, "
        f"{result['server_errors']} times 5xx, {result['faults']} faults",
        f"{result['judged']} answers judged ({result['judged_steered']} steered, "
        f"{result['judged_tokens']} tokens): {result['wrong_answers']} wrong; largest error "
        f"{result['largest_error']:.2g}, median effect of steering "
        f"{result['median_effect_of_steering']:.2g}",
        f"median latency {latency['first half']} s, then {latency['second half']} s",
        *(f"{name}: {value:g}" for name, value in result["server"].items() if value is not None),
        *(f"{name}: {slope:+g} MiB an hour" for name, slope in result["mib_an_hour"].items()),
        f"open files: {result['open_files'][0]}, then {result['open_files'][1]}",
        *result["first_faults"],
        *result["first_wrong_answers"],
    ]
    return "\n".join(lines)


def draw(counts: Counts, result: dict[str, Any], path: Path) -> None:
    """Draws latency, memory and the KV cache in use over time."""
    plt = pyplot()
    samples = result["samples"]
    minutes = [sample["seconds"] / 60 for sample in samples]
    figure, (latency, memory, cache) = plt.subplots(3, 1, figsize=(8, 7), sharex=True)
    latency.plot(
        [begin / 60 for begin, _ in counts.latencies], [s for _, s in counts.latencies], ".",
        markersize=2,
    )  # fmt: skip
    latency.set_ylabel("seconds to the\nlast token")
    for name in samples[-1]["mib"]:
        memory.plot(minutes, [sample["mib"].get(name) for sample in samples], label=name)
    memory.set_ylabel("resident MiB")
    memory.legend(fontsize=7)
    in_use = METRICS["vllm:kv_cache_usage_perc"]
    cache.plot(minutes, [100 * sample.get(in_use, 0.0) for sample in samples])
    cache.set_ylabel("KV cache in use, %")
    cache.set_xlabel("minutes")
    figure.suptitle(
        f"{result['requests']} requests, {result['judged']} judged, "
        f"{result['wrong_answers']} wrong, {result['server_errors']} times 5xx",
        fontsize=10,
    )
    figure.tight_layout()
    figure.savefig(path, dpi=120)
