"""The table of server lives: its cells keep their bounds in few nights too, a mutant does not."""

from __future__ import annotations

import math
from functools import cache

import numpy as np
import pytest

from benchmarks.life_judge import by_steps, judged, records_of
from benchmarks.life_truth import (
    CELLS,
    OF_ONE_VERSION,
    Bound,
    Cell,
    Tally,
    document,
    ks_p,
    missed,
    percent,
    table_lines,
    tail,
    tally_of,
)
from pytest_sglprof._analysis.lives import LifeValue, change_between
from pytest_sglprof._baselines.figures import Figure, life_values
from pytest_sglprof.standin.life_model import Change, LifePlan, draw, night

CELL = {cell.key: cell for cell in CELLS}
SEEDS = 25
(ONE_VERSION,) = (cell for cell in CELLS if cell.name == OF_ONE_VERSION)


@cache
def tally(key: str) -> Tally:
    return tally_of(CELL[key], range(SEEDS))


@pytest.mark.parametrize("key", [each.key for each in CELLS if each.bounds])
def test_a_cell_keeps_its_bounds(key: str) -> None:
    """Of so few nights, as far as chance allows."""
    found = tally(key)
    for bound in CELL[key].bounds:
        count = round(found.figure(bound.figure) * SEEDS)
        if bound.figure == "KS p":
            assert found.figure("KS p") > bound.low
            continue
        assert tail(SEEDS - count, SEEDS, 1 - bound.low) > 0.001, bound
        assert bound.high > 1 or tail(count, SEEDS, bound.high) > 0.001, bound


def test_steps_that_count_as_lives_break_the_table() -> None:
    """A gate between runs must not use the variance within one."""
    right, wrong = (tally_of(ONE_VERSION, range(80), unit=unit) for unit in ("life", "step"))
    assert any(": KS p" in line for line in missed(ONE_VERSION, wrong))
    assert not any(": KS p" in line for line in missed(ONE_VERSION, right))
    assert right.figure("by steps") > 0.5


def test_what_cannot_be_seen_is_in_the_table() -> None:
    found = tally("gate 10 + 2, +3 %")
    assert found.figure("fail") <= 0.4
    assert tally("confirm 10 + 4, +6 %").lives > SEEDS


def test_the_gate_says_what_it_sees() -> None:
    found = tally("gate 10 + 2, +6 %")
    assert np.median(found.sees) == pytest.approx(1.058, abs=0.006)  # by formula, sd 1.03 %


def test_a_change_of_everything_lists_no_kernel_although_it_fails() -> None:
    found = tally("scan 10 + 2, +6 % in compute")
    assert found.figure("fail") > 0.85
    assert found.figure("found") < 0.2


# From lives to records.


def test_a_record_has_what_was_drawn() -> None:
    lives = draw(LifePlan(steps=50), night(3, 1), 1)
    records = records_of(lives)
    values = life_values(records, Figure("compute"))
    assert isinstance(values, list)
    truth = np.exp(lives.truth).sum(axis=1)
    for value, true in zip(values, truth, strict=True):
        assert value is not None
        assert value == pytest.approx(true, rel=0.01)
    walls = life_values(records, Figure("pass_wall"))
    assert isinstance(walls, list)
    assert all(w > 1.05 * v for w, v in zip(walls, values, strict=True) if w and v)
    (group,) = records[0].groups
    assert group.strata[0].kernels == pytest.approx(np.exp(lives.truth[0]), rel=0.03)
    assert sum(group.strata[0].categories.values()) == pytest.approx(truth[0], rel=0.01)


def test_steps_as_lives_are_the_project_s_own_test_of_so_many_lives() -> None:
    lives = draw(LifePlan(kernels=20, steps=10), night(6, 2), 2)
    sums = lives.times.sum(axis=2)
    change = change_between(
        [LifeValue(float(ns)) for ns in sums[:6].ravel()],
        [LifeValue(float(ns)) for ns in sums[6:].ravel()],
    )
    assert not isinstance(change, str)
    wrong = by_steps(lives, 6)
    assert wrong.log_ratio == pytest.approx(change.log_ratio)
    assert wrong.error == pytest.approx(change.error)
    assert wrong.freedom == change.freedom == 78


def test_a_night_that_fails_says_by_how_much_and_one_that_asks_takes_further_lives() -> None:
    cell = CELL["confirm 10 + 4, +6 %"]
    lives = draw(cell.plan, cell.lives(), 0, Change(1.5))
    found = judged(lives, 10, 1.05, confirm=True)
    assert (found.word, found.fresh) == ("fail", 2)
    assert found.change is not None
    assert found.change.ratio == pytest.approx(1.5, rel=0.03)
    calm = judged(draw(cell.plan, night(10, 4), 0), 10, 1.05, confirm=True)
    assert (calm.word, calm.fresh) == ("pass", 1)


# Bounds and figures.


def test_values_that_are_uniform_have_a_large_ks_p_and_others_a_small_one() -> None:
    rng = np.random.default_rng(0)
    uniform = [ks_p(rng.random(200).tolist()) for _ in range(400)]
    assert np.mean(np.array(uniform) < 0.1) == pytest.approx(0.1, abs=0.04)
    assert ks_p((rng.random(200) ** 2).tolist()) < 1e-6
    assert ks_p([0.5]) == pytest.approx(0.84, abs=0.01)
    assert math.isnan(ks_p([]))


def test_ks_p_is_kolmogorov_s_table() -> None:
    """The 5 % point of the distance of 100 values is 0.1340 (Miller 1956)."""
    shifted = np.clip((np.arange(100) + 0.5) / 100 + 0.1340 - 0.005, 0, 1)
    assert ks_p(shifted.tolist()) == pytest.approx(0.05, abs=0.005)


def test_a_missed_bound_is_named_and_chance_is_allowed_for() -> None:
    cell = CELL["scan 10 + 2, no change"]
    assert missed(cell, Tally(nights=500, false=34, fail=9)) == []
    assert missed(cell, Tally(nights=500, false=40, fail=20)) == [
        "scan 10 + 2, no change: false 8 %, at most 5 % asked",
        "scan 10 + 2, no change: fail 4 %, at most 1 % asked",
    ]
    power = CELL["gate 10 + 2, +6 %"]
    assert missed(power, Tally(nights=500, fail=475)) == []
    assert missed(power, Tally(nights=500, fail=474)) == [
        "gate 10 + 2, +6 %: fail 95 %, at least 95 % asked"
    ]
    lines, count = document([(power, Tally(nights=500, fail=100))])
    assert (count, lines[0]) == (1, "1 cells. Bounds missed: 1.")


def test_of_seven_hundred_nights_two_may_fail() -> None:
    good = Tally(
        nights=700, judged=700, faster=350, by_steps=400, p=[(k + 0.5) / 700 for k in range(700)]
    )
    assert missed(ONE_VERSION, good) == []
    good.fail = 2
    assert missed(ONE_VERSION, good) == []
    good.fail = 3
    assert len(missed(ONE_VERSION, good)) == 1
    good.fail, good.faster, good.judged, good.by_steps = 0, 300, 600, 100
    assert len(missed(ONE_VERSION, good)) == 3


def test_what_is_not_asked_of_a_cell_is_no_figure_in_the_table() -> None:
    lines = list(table_lines([(CELL["gate 10 + 2, +3 %"], Tally(nights=10, fail=1, lives=20))]))
    assert lines[2].startswith("| gate 10 + 2, +3 % | 1.02 | 10 | 0 | 10 | 0 | – | – | – | – | – |")
    assert lines[2].endswith("| 2.0 | – | nothing |")
    assert len({line.count("|") for line in lines}) == 1


def test_words_of_bounds_and_shares() -> None:
    assert Bound("faster", 0.45, 0.55).text == "45 to 55 %"
    assert (percent(0.004), percent(0.5), percent(1.0), percent(0.985)) == (
        "0.4",
        "50",
        "100",
        "98.5",
    )
    assert len({cell.key for cell in CELLS}) == len(CELLS)
    assert isinstance(CELLS[0], Cell)
