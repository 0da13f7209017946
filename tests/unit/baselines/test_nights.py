"""A figure over many nights: at equal work with the newest, changes where they were planted."""

from __future__ import annotations

import pytest

from pytest_sglprof._analysis.strata import StepWork
from pytest_sglprof._baselines.figures import Figure
from pytest_sglprof._baselines.nights import night_changes, night_values
from tests.support.lives import group, kind, life, load

OTHER = StepWork("decode", "", 8, 10, -1)
COMPUTE = 800_000.0  # ns of the kinds of `tests.support.lives`


def scale(factor: float) -> list[float]:
    return [factor * ns for ns in (300_000.0, 500_000.0, 80_000.0)]


def test_each_night_is_beside_the_newest_at_the_kinds_that_they_share() -> None:
    nights = [
        life(group(kind(scale(0.9)))),  # only the small kind
        life(group(kind(scale(3.6), OTHER))),  # only the large one
        life(group(kind(scale(1.0)), kind(scale(4.0), OTHER))),
    ]
    values = night_values(nights, Figure("compute"))
    newest = 2.5 * COMPUTE
    # Their compute is 4 times apart, but at equal work both nights were at 0.9.
    assert values == pytest.approx([0.9 * newest, 0.9 * newest, newest])


def test_a_night_of_other_work_or_kept_apart_has_no_value() -> None:
    nights = [
        life(group(kind(work=OTHER))),
        life(apart="a kernel was compiled"),
        life(group(ranks=("TP0",))),
        life(),
    ]
    assert night_values(nights, Figure("compute")) == [None, None, None, pytest.approx(COMPUTE)]


def test_the_newest_night_that_has_the_figure_counts() -> None:
    nights = [life(scale=0.5), life(), life(apart="tuned")]
    values = night_values(nights, Figure("compute"))
    assert values == [pytest.approx(0.5 * COMPUTE), pytest.approx(COMPUTE), None]
    assert night_values([], Figure("compute")) == []
    assert night_values([life(apart="tuned")], Figure("compute")) == [None]


def test_figures_of_the_load_and_shares_are_as_they_are() -> None:
    nights = [life(load=load(figures={"ttft_p99": 200.0 + at})) for at in range(3)]
    assert night_values(nights, Figure("ttft_p99")) == [200.0, 201.0, 202.0]
    idle = [life(group(kind(idle_ns=ns))) for ns in (100_000.0, 250_000.0)]
    assert night_values(idle, Figure("idle_share")) == pytest.approx([0.1, 0.25])


def test_a_change_is_named_by_its_night_although_others_have_no_figure() -> None:
    before = [100.0 + 0.1 * (at % 5) for at in range(12)]
    after = [110.0 + 0.1 * (at % 5) for at in range(12)]
    values: list[float | None] = [*before, None, None, *after]
    assert night_changes(values) == (14,)
    assert night_changes(before) == ()
    assert night_changes([None]) == ()
