from __future__ import annotations

import threading

import pytest

from pytest_sglprof._errors import ServerRefused, ServerUnreachable
from pytest_sglprof._run.opening import running_requests, steady_load
from pytest_sglprof._server.client import DpLoad


class Clock:
    """Time that passes only when somebody sleeps; `loads` follows it."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


class Loaded:
    """A server whose running requests are a function of time."""

    def __init__(self, clock: Clock, running) -> None:
        self.client = self
        self.info: dict[str, object] = {}
        self.log = None
        self._clock = clock
        self._running = running
        self.died = False

    def loads(self):
        running = self._running(self._clock.now)
        if running is None:
            raise ServerUnreachable("busy")
        half = running // 2
        return [DpLoad(0, half), DpLoad(1, running - half)]

    def is_alive(self) -> bool:
        return not self.died


def wait(running, target=10, timeout=20.0, **options):
    clock = Clock()
    server = Loaded(clock, running)
    stop = options.pop("stop", threading.Event())
    answer = steady_load(
        server, target, timeout=timeout, stop=stop, clock=clock, sleep=clock.sleep, **options
    )
    return answer, clock.now


def test_steady_is_four_fifths_of_the_target_for_two_seconds():
    answer, when = wait(lambda now: min(int(now), 8))
    assert answer
    assert when == pytest.approx(10, abs=0.5)


def test_a_dip_or_a_silence_starts_the_hold_again():
    for low in (0, None):
        answer, when = wait(lambda now, low=low: low if 1.5 < now < 1.9 else 10)
        assert answer
        assert when == pytest.approx(3.9, abs=0.5)


def test_never_enough_ends_at_the_timeout():
    answer, when = wait(lambda now: 7)
    assert not answer
    assert when == pytest.approx(20, abs=0.5)


def test_share_and_hold_are_options():
    answer, when = wait(lambda now: 5, share=0.5, hold=0.0)
    assert (answer, when) == (True, 0.0)


def test_a_stop_ends_it_and_a_dead_server_too():
    stop = threading.Event()
    stop.set()
    assert wait(lambda now: 10, stop=stop) == (False, 0.0)
    server = Loaded(Clock(), lambda now: None)
    server.died = True
    assert not steady_load(server, 1, timeout=5, stop=threading.Event())


def test_a_refusal_is_an_error_not_an_idle_server():
    class Refusing:
        def loads(self):
            raise ServerRefused("no", status=401)

    server = Loaded(Clock(), lambda now: 1)
    server.client = Refusing()
    with pytest.raises(ServerRefused):
        running_requests(server)


def test_a_real_loads_answer_is_summed(http, server):
    http.running = 7
    assert running_requests(server) == (7, None)
