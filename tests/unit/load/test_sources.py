"""What the sources make of a server that is starting, stalls, refuses or lacks an endpoint."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from pytest_sglprof._errors import ServerRefused
from pytest_sglprof._load.samples import BalanceSample, LoadSample
from pytest_sglprof._load.sources import LoadsSource, MetricsSource, Sample, read_metrics

URL = "http://127.0.0.1:1"
LOAD = {"dp_rank": 0, "num_running_reqs": 3, "num_waiting_reqs": 2, "num_used_tokens": 70}
Answer = Callable[[httpx.Request], httpx.Response]


def polls(source: Any, count: int) -> tuple[list[list[Sample]], list[float]]:
    """The samples of so many polls, and the delay that each asked for."""

    async def run() -> tuple[list[list[Sample]], list[float]]:
        found, delays = [], []
        for _ in range(count):
            found.append(await source.poll())
            delays.append(source.delay)
        await source.close()
        return found, delays

    return asyncio.run(run())


def loads(answer: Answer, **options: Any) -> LoadsSource:
    return LoadsSource(
        URL, interval=0.5, clock=lambda: 12.5, transport=httpx.MockTransport(answer), **options
    )


def test_ranks_are_named_where_there_are_several() -> None:
    both = [LOAD, {**LOAD, "dp_rank": 1, "token_usage": 0.25, "gen_throughput": 40.5}]
    source = loads(lambda request: httpx.Response(200, json={"loads": both}))
    (((first, second),), _) = polls(source, 1)
    assert first == LoadSample(12.5, "DP0", 3, 2, 70, 0.0, 0.0, None, "loads")
    assert second == LoadSample(12.5, "DP1", 3, 2, 70, 0.25, 40.5, None, "loads")
    ((((only,),), _)) = polls(loads(lambda r: httpx.Response(200, json={"loads": [LOAD]})), 1)
    assert only.rank == ""


def test_a_server_that_does_not_answer_is_asked_less_often_until_it_does() -> None:
    answers: list[Any] = [
        httpx.Response(503),
        httpx.ReadTimeout("stalled by an export"),
        httpx.ConnectError("refused"),
        httpx.Response(200, text="<html>"),
        httpx.Response(200, json={"loads": [LOAD]}),
    ]

    def answer(request: httpx.Request) -> httpx.Response:
        found = answers.pop(0)
        if isinstance(found, Exception):
            raise found
        assert isinstance(found, httpx.Response)
        return found

    samples, delays = polls(loads(answer), 5)
    assert [len(found) for found in samples] == [0, 0, 0, 0, 1]
    assert delays == [1.0, 2.0, 4.0, 1.0, 0.5]  # a wrong answer is still an answer


def test_fault_3_a_server_that_stays_away_is_asked_for_ever() -> None:
    def answer(request: httpx.Request) -> httpx.Response:
        raise httpx.ConnectError("refused")

    for source in (
        loads(answer),
        MetricsSource(URL, interval=2.0, transport=httpx.MockTransport(answer)),
    ):
        source.failures = 10_000
        _, delays = polls(source, 3)
        assert delays == [5.0] * 3
        for _ in range(2_000):
            source.failed("refused")
        assert (source.failures, source.delay) == (12_003, 5.0)


@pytest.mark.parametrize("interval", [1e-3, 0.5, 30.0, 1e300])
def test_fault_3_the_wait_between_two_tries_only_grows_up_to_its_limit(interval: float) -> None:
    source = LoadsSource(URL, interval=interval)
    delays = []
    for _ in range(1_100):
        source.failed("refused")
        delays.append(source.delay)
    assert delays == sorted(delays)
    assert delays[-1] == max(5.0, interval)


def test_it_looks_closer_while_the_ranks_seem_unequal() -> None:
    answers = [(8, 7), *[(8, 2)] * 60, (8, 7), (8, 2), (2, 0), (0, 0)]

    def answer(request: httpx.Request) -> httpx.Response:
        both = [{**LOAD, "dp_rank": r, "num_running_reqs": n} for r, n in enumerate(answers.pop(0))]
        return httpx.Response(200, json={"loads": both})

    _, delays = polls(loads(answer), len(answers))
    assert delays == [0.5, *[0.1] * 50, *[0.5] * 10, 0.5, 0.1, 0.5, 0.5]


def test_requests_that_wait_deserve_it_too() -> None:
    both = [{**LOAD, "dp_rank": rank, "num_waiting_reqs": 9 * rank} for rank in (0, 1)]
    _, delays = polls(loads(lambda request: httpx.Response(200, json={"loads": both})), 1)
    assert delays == [0.1]


@pytest.mark.parametrize(("status", "hint"), [(401, "SGLPROF_API_KEY"), (404, "--follow")])
def test_what_will_not_get_better_is_an_error(status: int, hint: str) -> None:
    with pytest.raises(ServerRefused, match=hint) as raised:
        polls(loads(lambda request: httpx.Response(status)), 1)
    assert raised.value.status == status


def test_the_key_is_sent() -> None:
    def answer(request: httpx.Request) -> httpx.Response:
        assert request.headers["Authorization"] == "Bearer secret"
        assert request.url.query == b"include=core,disagg"
        return httpx.Response(200, json={"loads": []})

    assert polls(loads(answer, api_key="secret"), 1)[0] == [[]]


def metrics(total: float, count: float, balancedness: float = 0.0) -> str:
    return (
        f'sglang:dp_attention_token_imbalance_ratio_sum{{dp_rank="0"}} {total}\n'
        f'sglang:dp_attention_token_imbalance_ratio_bucket{{dp_rank="0",le="1.0"}} 7\n'
        f'sglang:dp_attention_token_imbalance_ratio_count{{dp_rank="0"}} {count}\n'
        f'sglang:eplb_balancedness_sum{{forward_mode="decode"}} {balancedness}\n'
        f'sglang:eplb_balancedness_count{{forward_mode="decode"}} {count}\n'
    )


def test_balances_are_means_of_the_steps_since_the_last_look() -> None:
    texts = [metrics(100, 100), metrics(130, 110, 5.0), metrics(130, 110, 5.0)]
    source = MetricsSource(
        URL,
        interval=2.0,
        clock=lambda: 3.0,
        transport=httpx.MockTransport(lambda request: httpx.Response(200, text=texts.pop(0))),
    )
    first, second, third = polls(source, 3)[0]
    assert first == third == []
    assert second == [
        BalanceSample(3.0, "", "dp_tokens", 3.0, source="metrics"),
        BalanceSample(3.0, "", "experts", 2.0, source="metrics"),
    ]


def test_real_metrics_are_read(shared_data: Any) -> None:
    text = (shared_data / "logs/dp2/metrics.txt").read_text()
    assert read_metrics(text) == {"dp_attention_token_imbalance_ratio": (0.0, 0.0)}
    assert read_metrics("# nothing\n") == {}
