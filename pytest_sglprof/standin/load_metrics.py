"""From what each request saw to the fields of SGLang's load driver."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Outcome:
    """One request. Times in seconds; start on the clock of `time.perf_counter`."""

    prompt_len: int
    output_len: int
    success: bool = False
    start: float = 0.0
    latency: float = 0.0
    ttft: float = 0.0
    itl: list[float] = field(default_factory=list)
    text: str = ""
    error: str = ""


def measure(outcomes: Sequence[Outcome], duration: float) -> dict[str, Any]:
    """Throughputs and latency statistics, in the driver's own names and order."""
    good = [outcome for outcome in outcomes if outcome.success]
    inputs = sum(outcome.prompt_len for outcome in good)
    outputs = sum(outcome.output_len for outcome in good)
    latencies = [outcome.latency for outcome in good]
    peak_tokens, peak_requests = _peaks(good)
    return {
        "duration": duration,
        "completed": len(good),
        "total_input_tokens": inputs,
        "total_input_text_tokens": inputs,
        "total_input_vision_tokens": 0,
        "total_output_tokens": outputs,
        "total_output_tokens_retokenized": outputs,
        "request_throughput": len(good) / duration,
        "input_throughput": inputs / duration,
        "output_throughput": outputs / duration,
        "total_throughput": (inputs + outputs) / duration,
        **_statistics("e2e_latency", latencies),
        **_statistics("ttft", [outcome.ttft for outcome in good]),
        **_statistics("tpot", [_tpot(o) for o in good if o.output_len > 1]),
        **_statistics("itl", [gap for outcome in good for gap in outcome.itl]),
        "concurrency": sum(latencies) / duration,
        "accept_length": None,
        "max_output_tokens_per_s": peak_tokens,
        "max_concurrent_requests": peak_requests,
    }


def percentile(values: Sequence[float], percent: float) -> float:
    """Linear interpolation between the two nearest, as numpy's default."""
    ordered = sorted(values)
    place = (len(ordered) - 1) * percent / 100
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def _statistics(name: str, seconds: Sequence[float]) -> dict[str, float]:
    values = [value * 1000 for value in seconds] or [0.0]
    return {
        f"mean_{name}_ms": statistics.fmean(values),
        f"median_{name}_ms": statistics.median(values),
        f"std_{name}_ms": statistics.pstdev(values),
        **{f"p{p}_{name}_ms": percentile(values, p) for p in (90, 95, 99)},
    }


def _tpot(outcome: Outcome) -> float:
    return (outcome.latency - outcome.ttft) / (outcome.output_len - 1)


def _peaks(good: Sequence[Outcome]) -> tuple[float, int]:
    """Most tokens, and most requests in flight, in any second since the first start."""
    if not good:
        return 0.0, 0
    first = min(outcome.start for outcome in good)
    last = max(outcome.start + outcome.latency for outcome in good)
    tokens = [0] * (math.ceil(last - first) + 1)
    flying = list(tokens)
    for outcome in good:
        moment = outcome.start + outcome.ttft - first
        for gap in (0.0, *outcome.itl):
            moment += gap
            if 0 <= int(moment) < len(tokens):
                tokens[int(moment)] += 1
        begin, end = int(outcome.start - first), int(outcome.start + outcome.latency - first)
        for second in range(begin, min(end + 1, len(flying))):
            flying[second] += 1
    return float(max(tokens)), max(flying)
