"""What a record keeps of a load."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest

from pytest_sglprof._baselines.load import load_figures, queue_grows
from pytest_sglprof._bench_serving.command import DETAILS, LoadResult, parse_result

RATE = ("python", "-m", "driver", "--num-prompts", "90", "--request-rate", "5")


def result(*command: str, requested: int = 90, ttfts: list[float] | None = None) -> LoadResult:
    """Of a record with known figures. ttfts: s, as the driver writes them."""
    record: dict[str, Any] = {
        "completed": 88,
        "duration": 10.0,
        "mean_ttft_ms": 12.5,
        "p99_ttft_ms": 80.0,
        "median_tpot_ms": 7.25,
        "p95_itl_ms": 9.0,
        "mean_itl_ms": 0.0,  # the driver writes 0 for what it has no value of
        "p90_itl_ms": float("inf"),
        "output_throughput": 1234.5,
        "request_goodput": 4.25,
        "accept_length": 2.75,
    }
    if ttfts is not None:
        record |= {"ttfts": ttfts, "itls": [[0.1]], "errors": [""] * len(ttfts)}
    return parse_result(json.dumps(record), requested=requested, command=command, drop=DETAILS)


def test_the_figures_have_the_names_of_metrics() -> None:
    found = load_figures(result(*RATE))
    assert found.figures == {
        "ttft_mean": 12.5,
        "ttft_p99": 80.0,
        "tpot_median": 7.25,
        "itl_p95": 9.0,
        "output_throughput": 1234.5,
        "goodput": 4.25,
        "accept_length": 2.75,
    }
    assert (found.requested, found.completed) == (90, 88)


def test_a_driver_that_knows_little_gives_little() -> None:
    plain = parse_result('{"completed": 3, "duration": 2.0, "accept_length": null}', requested=3)
    assert load_figures(plain).figures == {}


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--request-rate", "5"], "rate"),
        (["--request-rate=0.5", "--max-concurrency", "8"], "rate"),
        (["--request-rate", "inf"], "unlimited"),
        (["--max-concurrency", "8"], "concurrency"),
        (["--request-rate", "inf", "--max-concurrency", "8"], "concurrency"),
        (["--max-concurrency", "90"], "unlimited"),  # all are sent at once
        (["--request-rate", "5", "--use-trace-timestamps"], "unlimited"),
        ([], "unlimited"),
        (["--batch-size", "1", "8"], "concurrency"),
    ],
)
def test_how_it_was_driven_is_read_from_the_command(words: list[str], expected: str) -> None:
    assert load_figures(result("python", "-m", "driver", *words)).driven == expected


def growing(seed: int, *, slope: float, count: int = 90) -> list[float]:
    """TTFTs in s: 50 ms, exponential noise, and `slope` s more with each request."""
    rng = random.Random(seed)
    return [0.05 * (0.8 + rng.expovariate(5)) + slope * number for number in range(count)]


def test_a_queue_that_grows_is_told_from_one_that_does_not() -> None:
    assert all(queue_grows(result(*RATE, ttfts=growing(seed, slope=0.001))) for seed in range(50))
    steady = [queue_grows(result(*RATE, ttfts=growing(seed, slope=0.0))) for seed in range(300)]
    assert sum(bool(each) for each in steady) <= 1
    assert None not in steady


def test_a_trend_without_weight_is_none() -> None:
    assert queue_grows(result(*RATE, ttfts=growing(1, slope=0.00005))) is False


def test_a_single_burst_is_no_growth() -> None:
    waits = growing(2, slope=0.0)
    waits[40:55] = [2.0] * 15
    assert queue_grows(result(*RATE, ttfts=waits)) is False


def test_what_cannot_be_known_is_none() -> None:
    assert queue_grows(result(*RATE)) is None  # no TTFTs
    assert queue_grows(result(*RATE, ttfts=growing(1, slope=1.0, count=29))) is None
    failed = [0.0] * 70 + growing(1, slope=1.0, count=20)  # the driver writes 0 for failed ones
    assert queue_grows(result(*RATE, ttfts=failed)) is None


def test_nobody_waits_longer_and_longer_at_a_fixed_concurrency() -> None:
    assert queue_grows(result("driver", "--max-concurrency", "8")) is False


def test_details_of_each_request_are_not_kept() -> None:
    found = result(*RATE, ttfts=[0.01, 0.0, 0.02])
    assert found.ttfts == (10.0, 20.0)
    assert not set(found.raw) & set(DETAILS)
