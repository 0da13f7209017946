"""How long a window may be for what it costs."""

from __future__ import annotations

import math

import pytest

from pytest_sglprof._run.cost import GROWTH, most_within


def test_without_any_cost_nothing_is_limited() -> None:
    assert most_within([], 1.0) == math.inf
    assert most_within([(3.0, 0.0), (7.0, 0.0)], 1.0) == math.inf


def test_the_cost_of_one_window_counts_as_growing_from_zero() -> None:
    assert most_within([(3.0, 0.6)], 1.2) == pytest.approx(6.0)


@pytest.mark.parametrize(("base", "slope"), [(0.0, 0.04), (0.5, 0.01), (0.2, 0.2)])
@pytest.mark.parametrize("limit", [0.9, 1.5])
def test_two_windows_show_what_each_one_costs(base: float, slope: float, limit: float) -> None:
    costs = [(steps, base + slope * steps) for steps in (3.0, 40.0)]
    steps = most_within(costs, limit)
    assert base + slope * steps <= limit + 1e-9
    exact = (limit - base) / slope
    assert steps == pytest.approx(min(exact, GROWTH * 40.0))


def test_two_short_windows_do_not_vouch_for_a_long_one() -> None:
    assert most_within([(3.0, 1.5), (7.0, 1.5)], 4.0) == GROWTH * 7.0
    assert most_within([(3.0, 1.51), (7.0, 1.5)], 4.0) == GROWTH * 7.0


def test_what_even_the_shortest_window_exceeds_allows_no_longer_one() -> None:
    assert most_within([(3.0, 1.51), (60.0, 1.5)], 0.9) < 3.0
    assert most_within([(3.0, 1.51), (60.0, 1.6)], 0.9) < 3.0
