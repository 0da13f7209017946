"""The cumulative sums of `KernelImbalance`, and how far apart windows of a few steps are."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from benchmarks.kernel_imbalance import NOISES, openings, samples
from pytest_sglprof import KernelImbalance, Ring
from pytest_sglprof._analysis.sampled import log_ratios
from pytest_sglprof._config.load import Settings
from pytest_sglprof._config.windows import window_spec
from pytest_sglprof._errors import SettingsError
from pytest_sglprof._load.cusum import ALARM, Cusum
from pytest_sglprof._load.disturbance import Disturbance, gap_after
from pytest_sglprof._load.triggers import ImbalanceOnset
from tests.support.kernel_tables import build, slow

LIMIT = math.log(1.1)


def test_the_sums_are_those_of_page() -> None:
    sums = Cusum(1.1)
    figures = [0.02, 0.14, -0.2, 0.14, 0.14, 0.14, 0.14]
    held, expected = 0.0, None
    for at, figure in enumerate(figures):
        held = max(0.0, held + figure - LIMIT / 2)
        if held > ALARM * LIMIT and expected is None:
            expected = at
        alarm = sums.add({"TP0": -figure, "TP1": figure}, 100.0 + at)
        assert (alarm is not None) == (expected == at)
        if alarm is not None:
            assert (alarm.rank, alarm.samples) == ("TP1", 3)
            assert alarm.since == 103.0  # the sum had fallen to 0 before
            assert alarm.ratio == pytest.approx(math.exp(0.14))
            break
    assert expected == 5


def test_a_rank_that_is_slower_is_seen_within_four_samples() -> None:
    for ranks in (2, 8):
        rng = np.random.default_rng(7)
        slower = samples(rng, NOISES[-1], ranks, 200 * 4, steps=5, slower=1.15)
        seen = sum(openings(each) > 0 for each in slower.reshape(200, 4, ranks))
        assert seen >= 0.9 * 200


def test_ranks_that_are_alike_open_once_a_day_at_most() -> None:
    rng = np.random.default_rng(8)
    days = 3
    assert openings(samples(rng, NOISES[-1], 4, days * 1440, steps=5, slower=1.0)) <= days


def test_the_sum_of_ratios_below_the_limit_does_not_grow() -> None:
    sums = Cusum(1.1)
    assert all(sums.add({"TP0": 0.0, "TP1": LIMIT / 2}, float(at)) is None for at in range(10_000))


def test_a_sample_gives_the_ratio_of_a_typical_step() -> None:
    table = build(steps=5, scale=slow("TP1", "moe", 1.4))
    ratios = log_ratios(table)
    compute = table.frame[~table.frame["category"].isin(["communication", "memory"])]
    sums = compute.groupby(["rank", "step"], observed=True)["dur_ns"].sum().unstack("rank")
    truth = np.median(np.log(sums["TP1"] / sums.drop(columns="TP1").median(axis=1)))
    assert ratios["TP1"] == pytest.approx(truth, abs=0.02)
    assert max(ratios, key=lambda rank: ratios[rank]) == "TP1"
    assert log_ratios(build(ranks=("TP0",))) == {}


def test_windows_are_as_far_apart_as_their_stall_allows() -> None:
    quick = Disturbance(0.0, 1.0, stopped_s=5.0, stall_s=0.3)
    slow_one = Disturbance(0.0, 1.0, stopped_s=5.0)
    assert gap_after(quick, 60.0, 0.02) == 60.0
    assert gap_after(slow_one, 60.0, 0.02) == pytest.approx(250.0)


def test_what_makes_no_sense_is_refused() -> None:
    wrong: list[Any] = [
        lambda: KernelImbalance(limit=1.0),
        lambda: KernelImbalance(steps=2),
        lambda: KernelImbalance(every=0),
        lambda: KernelImbalance(max_share=2),
        lambda: Ring(keep=0),
        lambda: Ring(max_share=0.5),
        lambda: Ring(steps=1.5),  # type: ignore[arg-type]  # wrong on purpose
        lambda: Ring(evry=60),  # type: ignore[call-arg]  # likewise
        lambda: ImbalanceOnset(suspicion=1),  # type: ignore[arg-type]  # likewise
    ]
    for make in wrong:
        with pytest.raises(SettingsError):
            make()


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"ring": Ring()}, "ring without a trigger"),
        ({"ring": Ring(), "trigger": KernelImbalance()}, "ring without a trigger"),
        ({"ring": 10, "trigger": ImbalanceOnset()}, "ring=10"),
    ],
)
def test_a_ring_needs_a_trigger_to_wait_for(
    options: dict[str, Any], what: str, tmp_path: Any
) -> None:
    with pytest.raises(SettingsError, match=what):
        window_spec(Settings(tmp_path), options, origin="here")
    spec = window_spec(
        Settings(tmp_path), {"ring": Ring(keep=2), "trigger": ImbalanceOnset()}, origin="here"
    )
    assert spec.ring == Ring(keep=2)
