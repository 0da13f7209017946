from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pytest_sglprof._analysis.busy import busy_parts
from pytest_sglprof._analysis.certainty import (
    autocorrelation,
    block_length,
    block_weights,
    certainty,
)
from tests.support.planted import matrix


def test_every_resample_has_as_many_steps_in_blocks_that_follow_each_other() -> None:
    weights = block_weights(100)
    assert weights.shape == (1000, 100)
    assert (weights.sum(axis=1) == 100).all()
    assert (block_length(1), block_length(30), block_length(100), block_length(1000)) == (
        1,
        4,
        5,
        10,
    )
    # Around the circle a step that was drawn comes with its successor in four of five cases.
    together = np.minimum(weights, np.roll(weights, -1, axis=1)).sum(axis=1) / 100
    assert together.mean() > 0.75


def test_the_interval_has_the_width_of_the_known_distribution() -> None:
    found = [certainty(matrix(2, seed)).slowdown for seed in range(100)]
    widths = [high - low for low, high in (one for one in found if one is not None)]
    # The ratio of two means over 100 steps of 3 % each: 1.96 * 2 * 0.03 * sqrt(2) / 10.
    assert np.mean(widths) == pytest.approx(2 * 1.96 * 0.03 * 2**0.5 / 10, rel=0.15)


def test_the_interval_holds_the_truth_of_autocorrelated_steps() -> None:
    hits = 0
    for seed in range(200):
        noise = np.random.default_rng(seed).normal(0, 0.03, (402, 2))
        smooth = (noise[:-2] + noise[1:-1] + noise[2:]) / 3  # each step resembles the next
        times = 1e6 * (1 + smooth) * np.array([1.0, 1.05])
        found = certainty(times).slowdown
        assert found is not None
        hits += found[0] <= 1.05 <= found[1]
    assert hits >= 180


def test_p_is_uniform_when_no_rank_differs() -> None:
    values = np.array([certainty(matrix(8, seed)).p_value for seed in range(400)], float)
    assert (values <= 0.01).mean() <= 0.025
    assert 0.4 < np.median(values) < 0.6
    assert values.min() > 0


def test_constant_times_are_certain_and_nothing_is_not() -> None:
    found = certainty(np.tile([100, 120], (40, 1)))
    assert found.slowdown == pytest.approx((1.2, 1.2))
    assert found.p_value == 1 / 2**9  # ten blocks, of which the first stays where it is
    assert certainty(np.ones((1, 4))).p_value is None
    assert certainty(np.ones((40, 1))).slowdown is None
    assert certainty(np.zeros((40, 2))).slowdown is None
    equal = certainty(np.ones((40, 2)))
    assert (equal.slowdown, equal.p_value) == ((1.0, 1.0), 1.0)
    assert certainty(np.tile([0, 5], (40, 1))).slowdown is None


def test_thirty_steps_of_two_ranks_can_be_significant() -> None:
    """Eight blocks of two ranks: the smallest p that there is must be below the limit."""
    times = matrix(2, 0, steps=30, slow=1.5)
    assert certainty(times).p_value == 1 / 2**7
    assert [-(-steps // block_length(steps)) >= 8 for steps in range(8, 2000)] == [True] * 1992


@pytest.mark.parametrize("phi", [0.0, 0.3, 0.6, 0.8])
def test_the_share_that_a_step_inherits_is_found(phi: float) -> None:
    found = [
        autocorrelation(matrix(4, seed, slow=1.3, inherited=phi).astype(float))
        for seed in range(100)
    ]
    assert np.mean(found) == pytest.approx(phi, abs=0.04)


def test_steps_that_alternate_inherit_nothing() -> None:
    times = np.tile([[1.0, 2.0], [2.0, 1.0]], (20, 1))
    assert autocorrelation(times) == 0.0
    assert autocorrelation(np.tile([100.0, 120.0], (40, 1))) == 0.0
    assert autocorrelation(np.ones((4, 2))) == 0.0


def test_a_few_steps_cannot_be_significant() -> None:
    found = certainty(np.tile([100, 150], (4, 1))).p_value
    assert found is not None
    assert found > 0.01


@given(st.integers(0, 10_000), st.permutations(range(5)), st.integers(2, 1000))
@settings(max_examples=15, deadline=None)
def test_neither_the_order_of_ranks_nor_the_unit_of_time_matters(
    seed: int, order: list[int], by: int
) -> None:
    times = matrix(5, seed, steps=40, slow=1.02)
    one, two = certainty(times), certainty(times[:, order] * by)
    assert two.p_value == one.p_value
    assert two.slowdown == pytest.approx(one.slowdown, rel=1e-12)
    assert two.factor == pytest.approx(one.factor, rel=1e-12)
    assert two.lost_share == pytest.approx(one.lost_share, rel=1e-9)


spans = st.lists(st.tuples(st.integers(0, 2), st.integers(0, 40), st.integers(0, 15)), max_size=30)


@given(spans)
@settings(max_examples=50, deadline=None)
def test_busy_time_is_the_union(rows: list[tuple[int, int, int]]) -> None:
    columns = np.array(rows, np.int64).reshape(-1, 3).T
    parts = busy_parts(*columns)
    for owner in range(3):
        covered = {ns for who, at, dur in rows if who == owner for ns in range(at, at + dur)}
        assert parts[columns[0] == owner].sum() == len(covered)
