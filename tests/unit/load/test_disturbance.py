"""Windows disturb the load: for how long, and that detectors do not count it."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from pytest_sglprof._load.disturbance import Disturbances, Undisturbed, stall_of
from pytest_sglprof._load.onset import Onset
from pytest_sglprof._load.samples import BalanceSample, LoadSample
from pytest_sglprof._load.triggers import ImbalanceOnset, QueueGrowth

HOLD = 2.0


class Clock:
    def __init__(self, now: float = 0.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


def disturbed(clock: Clock, opened: float, stopping: float, closed: float) -> Disturbances:
    calm = Disturbances(clock)
    clock.now = opened
    with calm.window():
        clock.now = stopping
        calm.stopping()
        clock.now = closed
    return calm


def onsets(
    running: Callable[[float], tuple[int, int]],
    calm: Disturbances | None,
    *,
    until: float = 30.0,
) -> list[Onset]:
    """What `ImbalanceOnset` declares of two ranks that are looked at every half second."""
    detector = ImbalanceOnset(hold=HOLD).detector(["DP0", "DP1"])
    listening = detector if calm is None else Undisturbed(detector, calm)
    declared = []
    for number in range(int(2 * until)):
        now = number / 2
        samples = [
            LoadSample(now, f"DP{dp}", count, 0, 100 * count, count / 100, source="loads")
            for dp, count in enumerate(running(now))
        ]
        declared += listening.add(samples, now)
    return declared


def uneven(begin: float, end: float) -> Callable[[float], tuple[int, int]]:
    return lambda now: (30, 10) if begin <= now < end else (20, 20)


def test_what_a_stall_leaves_behind_is_no_onset() -> None:
    # A window from 10 s to 13 s whose end took 1.5 s: until 16 s nothing counts.
    load = uneven(11.0, 15.5)
    assert len(onsets(load, None)) == 1
    assert onsets(load, disturbed(Clock(), 10.0, 11.5, 13.0)) == []


def test_an_onset_that_begins_after_it_is_declared_as_ever() -> None:
    (onset,) = onsets(uneven(20.0, 30.0), disturbed(Clock(), 10.0, 11.5, 13.0))
    assert (onset.time, onset.declared) == (20.0, 22.0)


def test_a_hold_that_a_window_interrupts_goes_on_after_it() -> None:
    # Uneven from 9 s on: 1 s counts before the window, and 1 s more after 16 s.
    (onset,) = onsets(uneven(9.0, 30.0), disturbed(Clock(), 10.0, 11.5, 13.0))
    assert onset.time == 9.0
    assert onset.declared == pytest.approx(17.0, abs=0.5)


def test_while_a_window_is_open_nothing_counts() -> None:
    clock = Clock(10.0)
    calm = Disturbances(clock)
    with calm.window():
        assert onsets(uneven(10.0, 30.0), calm) == []
        assert calm.covers(1e9)
    assert not calm.covers(10.0)  # it took no time


def test_the_clock_that_stands_still_goes_back_and_forth() -> None:
    clock = Clock()
    calm = disturbed(clock, 10.0, 11.5, 13.0)  # until 16
    clock.now = 20.0
    with calm.window():
        clock.now = 21.0
    spans = [(10.0, 16.0), (20.0, 23.0)]
    for moment in (0.0, 9.75, 12.0, 16.0, 18.5, 22.0, 23.0, 40.0):
        truth = moment - sum(max(0.0, min(moment, end) - begin) for begin, end in spans)
        assert calm.undisturbed(moment) == pytest.approx(truth)
        if not calm.covers(moment):
            assert calm.wall_time(truth) == pytest.approx(moment)


def lines(stall: float, *, pass_s: float = 0.01, stamps: float = 0.001) -> dict[str, list]:
    """A line each 40 passes for a minute; the server stands still once, at 30 s."""
    made = []
    for line in range(150):
        moment = 40 * pass_s * line
        moment += stall if moment > 30.0 else 0.0
        made.append((round(moment / stamps) * stamps, 40 * line))
    return {"DP0": made}


@pytest.mark.parametrize("stall", [0.0, 0.3, 2.5])
def test_the_stall_is_the_gap_in_the_passes_of_the_log(stall: float) -> None:
    found = stall_of(lines(stall), 29.9, 30.1 + stall)
    assert found == pytest.approx(stall, abs=0.01)


def test_a_log_that_cannot_date_it_tells_no_stall() -> None:
    assert stall_of(lines(2.5, stamps=1.0), 29.9, 32.6) is None  # no milliseconds
    assert stall_of(lines(2.5), 29.9, 1e9) is None  # no line after it yet
    assert stall_of(lines(2.5), 0.1, 32.6) is None  # none before it
    assert stall_of({}, 29.9, 32.6) is None


def test_the_log_replaces_the_request_s_duration() -> None:
    clock = Clock(29.9)
    calm = Disturbances(clock)
    before = [LoadSample(time, "DP0", 4, 0, iteration=n) for time, n in lines(0.8)["DP0"][:75]]
    after = [LoadSample(time, "DP0", 4, 0, iteration=n) for time, n in lines(0.8)["DP0"][75:]]
    calm.hear(before)
    with calm.window():
        calm.stopping()
        clock.now = 30.9  # the answer came late
    assert calm.windows[-1].stall == pytest.approx(1.0)
    calm.hear(after)
    assert calm.windows[-1].stall == pytest.approx(0.8, abs=0.01)
    assert calm.windows[-1].until == pytest.approx(30.9 + 1.6, abs=0.02)


def test_a_mean_of_the_metrics_that_reaches_into_a_window_does_not_count() -> None:
    calm = disturbed(Clock(), 10.0, 12.0, 12.0)
    heard: list[object] = []

    class Listening:
        judged_s, largest_factor = 0.0, 1.0

        def add(self, samples, now):
            heard.extend(samples)
            return []

    balances = [
        BalanceSample(time, "", "dp_tokens", 2.0, source="metrics") for time in (9.0, 13.0, 15.0)
    ]
    Undisturbed(Listening(), calm).add(balances, 15.0)
    assert len(heard) == 2


def test_a_suspicion_comes_after_half_of_the_hold() -> None:
    trigger = QueueGrowth(requests=16, hold=4.0)
    ranks = ["DP0"]
    suspecting = trigger.suspecting(ranks)
    assert suspecting is not None
    declared = {}
    for name, detector in (("suspicion", suspecting), ("onset", trigger.detector(ranks))):
        for number in range(40):
            now = number / 2
            queue = 20 if now >= 5.0 else 0
            for onset in detector.add([LoadSample(now, "DP0", 1, queue, source="loads")], now):
                declared[name] = onset.declared
    assert declared == {"suspicion": 7.0, "onset": 9.0}
    assert QueueGrowth(suspicion=False).suspecting(ranks) is None
    assert QueueGrowth(hold=1.0, suspicion=False).detector(ranks) is not None


def idle(lines_of: dict[str, list], begin: float, end: float) -> dict[str, list]:
    """Without the lines of a time in which the server had no requests."""
    return {
        rank: [line for line in each if not begin < line[0] < end]
        for rank, each in lines_of.items()
    }


def test_a_server_without_requests_does_not_stand_still() -> None:
    assert stall_of(idle(lines(0.5), 31.0, 50.0), 29.9, 31.0) is None
    assert stall_of(idle(lines(0.5), 10.0, 29.9), 29.9, 31.0) is None
