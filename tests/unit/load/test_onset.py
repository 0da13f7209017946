"""Planted onsets are found in time, and nothing else is: 50 schedules of the stand-in's
batching, on a clock that the test turns."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import httpx
import pytest

from pytest_sglprof._load.onset import OnsetDetector, OnsetRule
from pytest_sglprof._load.samples import BalanceSample, LoadSample
from pytest_sglprof._load.sources import LineReader, Sample
from tests.support.simulated import START, SimulatedServer, poll_until

SECONDS = 40.0
NEVER = 1e9


@dataclass(frozen=True)
class Schedule:
    """Requests that each of the ranks has before `at`, and from then until `until`.

    spike: when the same appears for less than half of `hold`, which is no onset.
    """

    seed: int
    ranks: int
    before: int
    after: tuple[int, ...]
    at: float
    until: float
    spike: float
    hold: float

    def wanted(self, moment: float) -> list[int]:
        planted = self.at <= moment < self.until
        if planted or self.spike <= moment < self.spike + 0.4 * self.hold:
            return list(self.after)
        return [self.before] * self.ranks


def schedule(seed: int) -> Schedule:
    rng = random.Random(seed)
    ranks = rng.choice([2, 2, 4, 8])
    before = rng.randint(12, 40)
    hot = rng.randrange(ranks)
    after = [before] * ranks
    if rng.random() < 0.4:  # the others go hungry
        after = [rng.randint(0, before // 4)] * ranks
    after[hot] = min(250, max(before * rng.randint(4, 6), 10 * ranks))  # the mean stays above 8
    at = rng.uniform(12.0, 20.0)
    spike = rng.uniform(3.0, 7.0)
    return Schedule(
        seed, ranks, before, tuple(after), at, at + 12.0, spike, rng.choice([1.0, 2.0, 3.0])
    )


def watch(plan: Schedule) -> tuple[OnsetDetector, OnsetDetector]:
    """What is found by polling, and what from the lines of the log."""
    server = SimulatedServer(plan.ranks, plan.wanted, plan.seed)
    rule = OnsetRule(hold=plan.hold)
    ranks = [f"DP{number}" for number in range(plan.ranks)]
    by_loads = OnsetDetector(rule, ranks=ranks)
    by_log = OnsetDetector(rule, ranks=ranks, source="log")
    reader = LineReader()

    def take(samples: Sequence[Sample], now: float) -> None:
        by_loads.add(samples, now)
        lines, server.log[:] = list(server.log), []
        by_log.add(reader.read(lines), now)

    poll_until(START + SECONDS, server, take)
    return by_loads, by_log


@pytest.mark.parametrize("seed", range(50))
def test_a_planted_onset_is_found_in_time_and_nothing_else(seed: int) -> None:
    plan = schedule(seed)
    by_loads, by_log = watch(plan)
    (found,) = by_loads.onsets
    assert plan.at <= found.time - START <= plan.at + 1.0, (plan, found)
    assert found.declared - START <= plan.at + plan.hold + 1.0
    assert found.factor >= 1.5
    assert found.ended is not None
    assert plan.until <= found.ended - START <= plan.until + 1.0
    assert found.resolution_s == pytest.approx(0.5, abs=0.03)
    (logged,) = by_log.onsets
    # One interval of the log, 0.4 s, and its stamps of 1 s.
    assert plan.at - 1.0 <= logged.time - START <= plan.at + 1.4, (plan, logged)
    assert logged.declared - START <= plan.at + max(plan.hold, 2.0) + 1.9
    assert logged.resolution_s == 1.0


@pytest.mark.parametrize("seed", range(50, 62))
def test_balanced_load_has_no_onset(seed: int) -> None:
    plan = replace(schedule(seed), at=NEVER, until=NEVER)
    by_loads, by_log = watch(plan)
    assert by_loads.onsets == by_log.onsets == ()
    assert by_loads.judged_s > SECONDS - 2


def load(moment: float, rank: str, running: int, **more: Any) -> LoadSample:
    values: dict[str, Any] = {
        "waiting": 0,
        "tokens": running * 100,
        "token_usage": running / 100,
        **more,
    }
    return LoadSample(moment, rank, running, source="loads", **values)


def feed(
    detector: OnsetDetector, seconds: float, *running: int, begin: float = 0.0, **more: Any
) -> None:
    for number in range(int(seconds * 2)):
        moment = begin + number / 2
        samples = [load(moment, f"DP{rank}", r, **more) for rank, r in enumerate(running)]
        detector.add(samples, moment)


def test_few_requests_are_never_unequal() -> None:
    detector = OnsetDetector(OnsetRule())
    feed(detector, 20, 15, 0)
    assert detector.onsets == ()
    assert detector.judged_s == 0.0


def test_a_small_gap_is_never_an_onset() -> None:
    detector = OnsetDetector(OnsetRule(factor=1.1))
    feed(detector, 20, 15, 9)  # λ 1.25, but the fullest has only 3 above the mean
    assert detector.onsets == ()


def test_a_starved_rank_is_named() -> None:
    detector = OnsetDetector(OnsetRule())
    feed(detector, 5, 20, 20)
    feed(detector, 5, 40, 0, begin=5)
    (onset,) = detector.onsets
    assert (onset.time, onset.declared, onset.kind) == (5.0, 7.0, "starved")
    assert onset.sentence == "DP1 is starved while the others run 40.0 requests each"
    assert (onset.factor, onset.lost_capacity) == (2.0, 0.5)


def test_a_rank_that_fills_in_a_long_prompt_is_not_starved() -> None:
    detector = OnsetDetector(OnsetRule())
    for number in range(20):
        busy = load(number / 2, "DP0", 20)
        filling = load(number / 2, "DP1", 0, tokens=1900, token_usage=0.19)
        detector.add([busy, filling], number / 2)
    assert [onset.kind for onset in detector.onsets] == ["running"]
    assert "starved" not in detector.onsets[0].sentence


def test_tokens_differ_where_requests_do_not() -> None:
    detector = OnsetDetector(OnsetRule())
    for number in range(20):
        moment = number / 2
        samples = [
            load(moment, "DP0", 20, tokens=9000, token_usage=0.45),
            load(moment, "DP1", 20, tokens=1000, token_usage=0.05),
        ]
        detector.add(samples, moment)
    (onset,) = detector.onsets
    assert (onset.kind, onset.factor) == ("tokens", pytest.approx(1.8))
    assert onset.sentence == "DP0 has 9000 KV tokens, 1.80x the mean of 5000 over 2 ranks"


def test_queues_differ_where_what_runs_does_not() -> None:
    detector = OnsetDetector(OnsetRule())
    for number in range(20):
        samples = [load(number / 2, "DP0", 20, waiting=12), load(number / 2, "DP1", 20)]
        detector.add(samples, number / 2)
    assert [onset.kind for onset in detector.onsets] == ["queue"]


def test_between_the_two_limits_an_onset_goes_on_and_none_begins() -> None:
    middle = (28, 12)  # λ 1.4: below the factor of 1.5, above the release at 1.3
    detector = OnsetDetector(OnsetRule())
    feed(detector, 10, *middle)
    assert detector.onsets == ()
    feed(detector, 5, 32, 8, begin=10)
    feed(detector, 10, *middle, begin=15)
    assert detector.onsets[0].ended is None
    feed(detector, 5, 20, 20, begin=25)
    assert detector.onsets[0].ended == 25.0


def test_swings_before_a_change_do_not_date_it_back() -> None:
    detector = OnsetDetector(OnsetRule(min_running=4, min_gap=3), source="log", milliseconds=True)
    for number in range(100):
        moment = 100.0 + number / 10
        swing = 2 if number % 3 else 8  # two times of three the limit is passed
        pair = (8, swing) if number < 50 else (16, 0)
        samples = [LoadSample(moment, f"DP{r}", pair[r], 0, pair[r] * 9, 0.01) for r in (0, 1)]
        detector.add(samples, moment)
    (onset,) = detector.onsets
    assert onset.time == pytest.approx(105.0, abs=0.2)
    assert onset.declared == pytest.approx(107.0, abs=0.2)


def test_a_dp_tag_proves_that_there_is_another_rank() -> None:
    detector = OnsetDetector(OnsetRule(), source="log")
    for second in range(10):
        sample = LoadSample(100.0 + second, "DP0", 30, 0, 900, 0.2)
        detector.add([sample], 100.0 + second)
    (onset,) = detector.onsets
    assert (onset.kind, [r.rank for r in onset.ranks]) == ("starved", ["DP0", "DP1"])


def test_stages_of_a_pipeline_are_groups_of_their_own() -> None:
    detector = OnsetDetector(OnsetRule())
    for number in range(12):
        samples = [
            load(number / 2, f"DP{dp} PP{pp}", 40 if dp else 4) for dp in (0, 1) for pp in (0, 1)
        ]
        detector.add(samples, number / 2)
    assert [onset.group for onset in detector.onsets] == ["PP0", "PP1"]


@pytest.mark.parametrize(("running", "found"), [(30, 1), (2, 0)])
def test_balances_that_the_server_measures_need_no_second_rank(running: int, found: int) -> None:
    detector = OnsetDetector(OnsetRule(), source="log")
    for second, factor in enumerate([1.1, 1.2, 2.0, 2.2, 2.4, 2.0, 1.1]):
        line = LoadSample(float(second), "", running, 0)
        detector.add([line, BalanceSample(float(second), "", "experts", factor)], float(second))
    assert len(detector.onsets) == found  # the tokens of few requests are never even
    for onset in detector.onsets:
        assert (onset.time, onset.declared, onset.ended, onset.kind) == (2.0, 4.0, 6.0, "experts")
        assert onset.factor == pytest.approx(2.2)


class TwoRanks:
    """Two ranks that run so many requests at each moment."""

    def __init__(self, running_at: Callable[[float], tuple[int, int]]) -> None:
        self.now = 0.0
        self._running_at = running_at

    def advance(self, seconds: float) -> None:
        self.now += seconds

    def transport(self) -> httpx.MockTransport:
        def answer(request: httpx.Request) -> httpx.Response:
            loads = [
                {"dp_rank": rank, "num_running_reqs": running, "num_used_tokens": 50 * running}
                for rank, running in enumerate(self._running_at(self.now))
            ]
            return httpx.Response(200, json={"loads": loads})

        return httpx.MockTransport(answer)


def polled(seconds: float, running_at: Callable[[float], tuple[int, int]]) -> OnsetDetector:
    """What is found by asking them."""
    detector = OnsetDetector(OnsetRule(), ranks=["DP0", "DP1"])
    poll_until(seconds, TwoRanks(running_at), detector.add)
    return detector


@pytest.mark.parametrize("phase", [0.0, 0.05, 0.1, 0.3, 0.45])
def test_looks_in_step_with_waves_of_requests_are_no_onset(phase: float) -> None:
    """Each wave lasts 0.5 s, the interval of the looks, and 0.12 s of it nothing runs."""
    found = polled(30.0, lambda now: (20, 0 if (now + phase) % 0.5 < 0.12 else 20))
    assert found.onsets == ()
    assert found.judged_s > 25


def test_an_onset_is_known_as_well_as_the_gap_that_it_lies_in() -> None:
    (found,) = polled(30.0, lambda now: (40, 0) if now > 10.2 else (20, 20)).onsets
    assert found.time - found.resolution_s <= 10.2 <= found.time
    assert found.resolution_s == pytest.approx(0.5)  # the closer looks came after it
    assert found.declared == pytest.approx(found.time + 2.0, abs=0.11)


def test_a_queue_is_judged_where_nothing_runs() -> None:
    detector = OnsetDetector(OnsetRule())
    for number in range(20):
        samples = [load(number / 2, "DP0", 0, waiting=30), load(number / 2, "DP1", 0, waiting=2)]
        detector.add(samples, number / 2)
    assert [onset.kind for onset in detector.onsets] == ["queue"]
    assert detector.judged_s > 9.0
    short = OnsetDetector(OnsetRule())
    for number in range(20):
        samples = [load(number / 2, "DP0", 7, waiting=12), load(number / 2, "DP1", 7)]
        short.add(samples, number / 2)
    assert (short.onsets, short.judged_s) == ((), 0.0)  # neither is enough to be spread evenly


def test_ranks_before_those_that_a_log_holds_are_not_idle() -> None:
    detector = OnsetDetector(OnsetRule(), source="log")
    for second in range(10):
        samples = [LoadSample(100.0 + second, f"DP{dp}", 30, 0, 900, 0.2) for dp in (4, 5)]
        detector.add(samples, 100.0 + second)
    (group,) = detector.groups
    assert detector.onsets == ()
    assert group.board.elsewhere == ["DP0", "DP1", "DP2", "DP3"]
    assert detector.judged_s == 9.0
