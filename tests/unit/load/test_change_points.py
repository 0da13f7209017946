"""The same schedules, read from their finished logs."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest

from pytest_sglprof._load.change_points import finished_load
from pytest_sglprof._load.onset import OnsetRule
from pytest_sglprof._load.samples import LoadSample
from pytest_sglprof._load.sources import LineReader, read_log
from tests.support.simulated import START, SimulatedServer
from tests.unit.load.test_onset import NEVER, SECONDS, Schedule, schedule


def samples_of(plan: Schedule) -> list[LoadSample]:
    server = SimulatedServer(plan.ranks, plan.wanted, plan.seed)
    server.advance(SECONDS)
    return [s for s in LineReader().read(server.log) if isinstance(s, LoadSample)]


@pytest.mark.parametrize("seed", range(100, 120))
def test_a_planted_period_is_found_with_both_ends(seed: int) -> None:
    plan = schedule(seed)
    (found,) = finished_load(samples_of(plan), OnsetRule(hold=3.0)).onsets
    assert plan.at - 1.5 <= found.time - START <= plan.at + 1.5
    assert found.ended is not None
    assert plan.until - 1.5 <= found.ended - START <= plan.until + 1.5
    assert found.factor >= 1.5


@pytest.mark.parametrize("seed", range(100, 110))
def test_balanced_load_has_none(seed: int) -> None:
    plan = replace(schedule(seed), at=NEVER, until=NEVER, spike=NEVER)
    found = finished_load(samples_of(plan), OnsetRule())
    assert found.onsets == ()
    assert found.judged_s > SECONDS - 3
    assert found.largest_factor < 1.2


@pytest.mark.parametrize("name", ["dp2/server.log", "tp2dp2/server.log", "dp2_idle_rank.log"])
def test_few_requests_of_a_real_server_are_no_imbalance(shared_data: Path, name: str) -> None:
    samples = [s for s in read_log(shared_data / "logs" / name) if isinstance(s, LoadSample)]
    assert {sample.rank for sample in samples} == {"DP0", "DP1"}
    assert finished_load(samples, OnsetRule()).onsets == ()


def test_a_replica_that_falls_silent_is_starved_from_its_last_line_on() -> None:
    plan = Schedule(7, 2, 20, (40, 0), 15.0, 30.0, NEVER, 2.0)
    (found,) = finished_load(samples_of(plan), OnsetRule()).onsets
    assert found.kind == "starved"
    assert found.sentence.startswith("DP1 is starved")
    assert found.time - START == pytest.approx(15.0, abs=1.5)


def test_nothing_is_found_in_nothing() -> None:
    assert finished_load([], OnsetRule()).onsets == ()
    one = LoadSample(5.0, "DP0", 30, 0)
    assert not math.isnan(finished_load([one], OnsetRule()).largest_factor)
