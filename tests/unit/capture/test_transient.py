"""A failure of a moment is a miss wherever a server is asked again and again; what stays wrong
is told at once. All on a real HTTP server."""

from __future__ import annotations

import asyncio
import itertools
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from pytest_sglprof._bench_serving import bench
from pytest_sglprof._capture.recording import in_thread
from pytest_sglprof._config.load import Settings
from pytest_sglprof._config.model import WindowSpec
from pytest_sglprof._errors import ServerRefused, ServerUnreachable
from pytest_sglprof._load.sources import LoadsSource, MetricsSource
from pytest_sglprof._run.opening import LoadState, open_in_time, steady_load
from pytest_sglprof._run.window import Window
from pytest_sglprof._server import client as transient
from pytest_sglprof._server import launch as servers
from pytest_sglprof._server.client import SglangClient

OF_A_MOMENT: list[int | str] = [
    *(500, 502, 503, 504, 408, 425, 429),
    *("reset", "half", "<html>", "[1, 2]", '{"loads": [3]}', '{"loads": "none"}'),
]
FOR_GOOD = [400, 401, 403, 404, 405, 410]
WITHOUT_LOADS = [404, 405]  # an older server, which has another endpoint or a log
LOADS = "/v1/loads"


def answering(http: Any, path: str, answers: Any) -> None:
    http.instead[path] = iter(answers)


def steady(server: Any, *, timeout: float = 20.0) -> tuple[bool, list[str | None]]:
    """Whether the load was steady, and the problem of each look."""
    looks: list[str | None] = []
    found = steady_load(
        server, 4, hold=0.0, timeout=timeout, stop=threading.Event(), on_look=looks.append
    )
    return found, looks


@pytest.mark.parametrize("answer", OF_A_MOMENT)
@pytest.mark.parametrize("times", [1, 3])
def test_fault_12_the_wait_for_steady_load_outlasts_it(http, server, answer, times):
    answering(http, LOADS, [answer] * times)
    found, looks = steady(server)
    assert found
    assert len(looks) == times + 1
    assert all(looks[:-1])
    assert looks[-1] is None


@pytest.mark.parametrize("answer", [503, "reset", "half", "<html>"])
def test_fault_12_what_does_not_pass_ends_at_the_limit(http, server, answer):
    answering(http, LOADS, itertools.repeat(answer))
    found, looks = steady(server, timeout=0.5)
    assert not found
    assert all("/v1/loads" in problem for problem in looks)


def test_fault_12_a_number_that_is_none_is_a_miss_too(http, server):
    answering(http, LOADS, ['{"loads": [{"num_running_reqs": "many"}]}'])
    found, looks = steady(server)
    assert found
    assert "does not give each DP rank's requests" in looks[0]


@pytest.mark.parametrize("status", sorted({*FOR_GOOD} - {*WITHOUT_LOADS}))
def test_fault_12_what_waiting_does_not_mend_is_told_at_once(http, server, status):
    answering(http, LOADS, [status])
    began = time.monotonic()
    with pytest.raises(ServerRefused) as refused:
        steady(server)
    assert refused.value.status == status
    assert time.monotonic() - began < 5.0


def polled(source: Any, times: int) -> list[list[Any]]:
    async def poll() -> list[list[Any]]:
        try:
            return [list(await source.poll()) for _ in range(times)]
        finally:
            await source.close()

    return asyncio.run(poll())


@pytest.mark.parametrize("answer", OF_A_MOMENT)
def test_fault_12_watching_takes_the_same_for_a_miss(http, answer):
    answering(http, LOADS, [answer])
    missed, seen = polled(LoadsSource(http.url, interval=0.5), 2)
    assert missed == []
    assert sum(sample.running for sample in seen) == http.running


@pytest.mark.parametrize("make", [LoadsSource, MetricsSource])
@pytest.mark.parametrize("status", FOR_GOOD)
def test_fault_12_watching_tells_the_same_at_once(http, make, status):
    source = make(http.url, interval=0.5)
    answering(http, source.path.partition("?")[0], [status])
    answering(http, "/get_load", [status])
    with pytest.raises(ServerRefused) as refused:
        polled(source, 1)
    assert refused.value.status == status


@pytest.fixture
def watched(http, server, tmp_path: Path):
    """A marked window, watched until `stop` is over; what its verdict says."""

    def watched(answers: Any, seconds: float) -> Window:
        answering(http, LOADS, answers)
        window = Window(
            server,
            WindowSpec(duration=0.05, timeout=10.0),
            tmp_path / "windows" / "w",
            settings=Settings(tmp_path),
        )
        stop = threading.Event()
        opening = in_thread(
            "window", lambda: open_in_time(window, LoadState(), stop, drives_load=False)
        )
        deadline = time.monotonic() + seconds
        while not window.was_opened and time.monotonic() < deadline:
            time.sleep(0.05)
        stop.set()
        opening.result()
        return window

    return watched


def test_fault_12_a_marked_window_opens_although_its_load_was_not_seen_for_a_moment(watched):
    window = watched([503, "reset", 429], 20.0)
    assert window.close().state == "complete"
    assert not window.close().notes


def test_fault_12_a_window_whose_load_is_never_seen_says_why(watched):
    window = watched(itertools.repeat(503), 0.6)
    assert not window.was_opened
    assert "the load could not be read" in window.close().reason
    assert "/v1/loads answered 503" in window.verdict.reason
    assert window.verdict.word == "inconclusive"


def test_fault_12_a_wrong_key_while_waiting_is_the_tests_error(watched):
    with pytest.raises(ServerRefused, match="401"):
        watched([401], 5.0)


@pytest.mark.parametrize("answer", OF_A_MOMENT[:9])
def test_fault_12_a_server_that_becomes_ready_is_waited_for(http, server, answer):
    answering(http, "/ready", [answer, answer] if isinstance(answer, int) else [answer])
    assert not server.client.is_ready()
    while not server.client.is_ready():
        pass


@pytest.mark.parametrize("status", [401, 403, 404])
def test_fault_12_what_will_never_be_ready_says_so(http, server, status):
    answering(http, "/ready", itertools.repeat(status))
    answering(http, "/health", itertools.repeat(status))
    with pytest.raises(ServerRefused) as refused:
        server.client.is_ready()
    assert refused.value.status == status


def test_a_probe_carries_the_key(http):
    http.auth = "key"
    client = SglangClient(http.url, api_key="key")
    assert client.is_ready()
    client.close()


def test_fault_12_an_attached_server_that_is_busy_for_a_moment_is_attached(http, tmp_path):
    answering(http, "/server_info", [503, "half", "<html>"])
    attached = servers.attach(http.url, folder=tmp_path / "attached")
    assert attached.info["tp_size"] == 2
    attached.stop()


def test_fault_12_attaching_has_its_limit(http, tmp_path, monkeypatch):
    patiently = transient.patiently
    monkeypatch.setattr(servers, "patiently", lambda ask: patiently(ask, 0.6))
    answering(http, "/server_info", itertools.repeat(503))
    with pytest.raises(ServerRefused, match="503"):
        servers.attach(http.url, folder=tmp_path / "attached")
    answering(http, "/server_info", itertools.repeat("reset"))
    with pytest.raises(ServerUnreachable):
        servers.attach(http.url, folder=tmp_path / "attached")
    assert len(http.requests) > 4


def test_nothing_that_listens_is_told_at_once(tmp_path):
    began = time.monotonic()
    with pytest.raises(ServerUnreachable):
        servers.attach("http://127.0.0.1:9", folder=tmp_path / "attached")
    assert time.monotonic() - began < 5.0


def test_fault_12_a_cache_is_emptied_although_the_server_is_busy_for_a_moment(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(bench, "FLUSH_PAUSE_S", 0.0)

    class Busy:
        def __init__(self, *answers: Any) -> None:
            self.client = self
            self.answers = list(answers)

        def flush_cache(self) -> bool:
            answer = self.answers.pop(0)
            if isinstance(answer, bool):
                return answer
            raise ServerRefused("planted", status=answer)

    def flushed(*answers: Any) -> bool:
        return bench.BenchServing(Busy(*answers), folder=tmp_path)._flush_cache()

    assert flushed(503, False, 429, True)
    assert not flushed(*[False] * bench.FLUSH_ATTEMPTS)
    for answers in ([503] * bench.FLUSH_ATTEMPTS, [403]):
        with pytest.raises(ServerRefused, match="planted"):
            flushed(*answers)
