from __future__ import annotations

import threading

import pytest

from pytest_sglprof._errors import ServerRefused, ServerUnreachable
from pytest_sglprof._run.opening import LoadLook, steady_load
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
        LoadLook(server).requests()


def test_a_real_loads_answer_is_summed(http, server):
    http.running = 7
    assert LoadLook(server).requests() == (7, None)


class WithoutLoads:
    """A server that has no endpoint for its load."""

    def __init__(self, server):
        self._server = server

    def __getattr__(self, name):
        return getattr(self._server, name)

    class client:
        @staticmethod
        def loads():
            raise ServerRefused("/v1/loads answered 404", status=404)


DECODE = "Decode batch. #running-req: {}, #token: 10, token usage: 0.10, #queue-req: {}, "


def test_without_an_endpoint_the_log_says_what_runs(http, server):
    http.entry("DP0 TP0", DECODE.format(1, 0))
    look = LoadLook(WithoutLoads(server))
    look.requests()
    assert look.requests() == (0, None)  # what was logged before is not what runs now
    http.entry("DP0 TP0", DECODE.format(5, 7))
    http.entry("DP1 TP1", DECODE.format(3, 0))
    assert look.requests() == (8, None)
    assert not look.is_blind


def test_with_neither_the_window_opens_and_says_so(http, server):
    looks = []
    look = LoadLook(WithoutLoads(server))
    assert steady_load(
        look._server, 8, hold=0.0, timeout=5, stop=threading.Event(), on_look=looks.append,
        look=look,
    )  # fmt: skip
    assert look.is_blind
    assert "no endpoint" in looks[-1]
    assert "no log here has its batches" in looks[-1]


def of_role(role, loads, **more):
    server = Loaded(Clock(), lambda now: 0)
    server.info = {"is_embedding": True} if role == "embedding" else {"disaggregation_mode": role}
    server.loads = lambda: loads
    return LoadLook(server)


@pytest.mark.parametrize(
    ("role", "load", "requests"),
    [
        ("null", DpLoad(0, 3, 9), 3),
        ("prefill", DpLoad(0, 0, 9), 9),
        ("prefill", DpLoad(0, 2, 9), 11),
        ("decode", DpLoad(0, 2, 9), 11),
        ("decode", DpLoad(0, 0, 9), 0),  # nothing is decoded yet
        ("embedding", DpLoad(0, 0, 4), 4),
    ],
)
def test_queues_are_the_load_of_a_prefill_server(role, load, requests):
    look = of_role(role, [load])
    assert look.requests()[0] == requests
    assert look.reachable(64) == (64 if role == "null" else 1)


def test_embeddings_without_a_log_are_in_no_figure():
    look = of_role("embedding", [DpLoad(0, 0)])
    assert "lack the batch" in look.requests()[1]
    assert look.is_blind


def test_a_prefill_that_was_just_logged_is_load(http, server):
    http.entry("TP0", "Prefill batch, #new-seq: 1, #new-token: 9, #running-req: 0, #queue-req: 0")
    server.info = {"disaggregation_mode": "prefill"}
    http.running = 0
    look = LoadLook(server)
    assert look.requests() == (0, None)
    http.entry("TP0", "Prefill batch, #new-seq: 0, #new-token: 9, #running-req: 0, #queue-req: 0")
    assert look.requests() == (1, None)


def test_the_advice_fits_the_role():
    prefill = of_role("prefill", [DpLoad(0, 0, 2)])
    prefill.requests()
    assert "2 at most" in prefill.advice()
    assert "longer" not in prefill.advice()
    assert of_role("null", []).advice() == "drive a longer load"
