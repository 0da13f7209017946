"""What a record keeps of a load: its figures, how it was driven, and whether its queue grew."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from pytest_sglprof._baselines.records import Driven, LoadFigures
from pytest_sglprof._bench_serving.command import STATISTICS, LoadResult
from pytest_sglprof._server.arguments import option

LATENCIES = ("ttft", "tpot", "itl")
LEAST_REQUESTS = 30  # of which a growing queue can be told
GROWTH = 1.5  # a queue grows if the last third waits this many times longer than the first …
SURE = 3.09  # … and that is no chance: standard errors of the rank sum, one-sided 0.1 %


def load_figures(result: LoadResult) -> LoadFigures:
    """The figures of a load that is over; those that its driver did not measure are missing.

    Of a batch of fixed shape the driver knows the first token of its last request alone, so only
    a batch of one has TTFT and TPOT.
    """
    return LoadFigures(
        figures=dict(_figures(result)),
        driven=driven(result),
        requested=result.requested,
        completed=result.completed,
        queue_grows=queue_grows(result),
    )


def _figures(result: LoadResult) -> Iterator[tuple[str, float]]:
    """By name; a driver writes 0 for what it has no value of, such as gaps without streaming."""
    for name in LATENCIES:
        of_statistic = getattr(result, name)
        for statistic in STATISTICS:
            yield from _known(f"{name}_{statistic}", of_statistic.get(statistic))
    yield from _known("output_throughput", result.output_throughput)
    # Not before SGLang 0.5.23, and only with the option --goodput.
    yield from _known("goodput", result.raw.get("request_goodput"))
    # A mean over the server's life so far; only of speculative decoding.
    lengths = (result.raw.get(name) for name in ("accept_length", "acc_length"))
    yield from _known("accept_length", next((each for each in lengths if each is not None), None))


def _known(name: str, value: Any) -> Iterator[tuple[str, float]]:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if is_number and 0 < value < math.inf:
        yield name, float(value)


def driven(result: LoadResult) -> Driven:
    """How the load was driven, from its command.

    A limit of concurrency that all requests fit into is none: they are sent at once, and the
    figures say how long that queue was. The batch of a fixed shape is what it asks for.
    """
    command = result.command
    if option(command, "--batch-size") is not None:
        return "concurrency"
    if "--use-trace-timestamps" in command:
        return "unlimited"
    rate = _number(option(command, "--request-rate"))
    if rate is not None and math.isfinite(rate):
        return "rate"
    limit = _number(option(command, "--max-concurrency"))
    return "concurrency" if limit is not None and limit < result.requested else "unlimited"


def _number(text: str | None) -> float | None:
    try:
        return float(text) if text is not None else None
    except ValueError:
        return None


def queue_grows(result: LoadResult) -> bool | None:
    """Whether requests waited longer and longer for their first token; None if it is not known.

    Only a fixed rate can ask for more than the server does: at a fixed concurrency nobody waits
    outside of it, and requests that are sent at once wait by their number, which is no trend. At
    a fixed rate TTFTs of the last third of the requests, in the order in which they were sent,
    are compared with the first third: the queue grows if their median is 1.5 times longer and the
    rank sum of Mann and Whitney is surely larger.
    """
    if driven(result) != "rate":
        return False
    count = len(result.ttfts)
    if count < LEAST_REQUESTS:
        return None
    first, last = result.ttfts[: count // 3], result.ttfts[-(count // 3) :]
    is_longer = float(np.median(last)) > GROWTH * float(np.median(first))
    return is_longer and rank_sum(first, last) > SURE


def rank_sum(first: Sequence[float], last: Sequence[float]) -> float:
    """Mann and Whitney's statistic in standard errors; above 0 where `last` is larger."""
    left, right = np.sort(np.asarray(first, float)), np.asarray(last, float)
    below = np.searchsorted(left, right, "left") + np.searchsorted(left, right, "right")
    n, m = len(left), len(right)
    error = math.sqrt(n * m * (n + m + 1) / 12)
    return (float(below.sum()) / 2 - n * m / 2) / error
