from __future__ import annotations

import math
import statistics

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pytest_sglprof._analysis.busy import busy_parts
from pytest_sglprof._analysis.certainty import (
    SPIKE,
    Estimate,
    correlation,
    expected_largest,
    log_ratios,
    lost_share,
    noise_share,
    share_of_mean,
    spike_shares,
    spikes,
    t_quantile,
    t_tail,
    typical_ratio,
)
from pytest_sglprof._config.model import Threshold
from pytest_sglprof._verdict.judge import word_of
from tests.support.planted import matrix


def typical(times: npt.NDArray[np.generic]) -> Estimate:
    found = typical_ratio(times)
    assert found is not None
    return found


@pytest.mark.parametrize(
    ("freedom", "tail", "t"),
    [  # from a printed table of Student's t
        (3, 0.005, 5.841),
        (5, 0.005, 4.032),
        (5, 0.0005, 6.869),
        (10, 0.025, 2.228),
        (30, 0.005, 2.750),
        (120, 0.005, 2.617),
        (10**6, 0.005, 2.576),
    ],
)
def test_quantiles_of_student_are_those_of_the_tables(
    freedom: float, tail: float, t: float
) -> None:
    assert t_quantile(tail, freedom) == pytest.approx(t, abs=0.0015)
    assert t_tail(t, freedom) == pytest.approx(tail, rel=0.005)


@given(st.floats(3, 4000), st.floats(1e-7, 0.49))
@settings(max_examples=50, deadline=None)
def test_quantiles_and_tails_are_inverse_and_agree_with_scipy(freedom: float, tail: float) -> None:
    t = t_quantile(tail, freedom)
    assert t_tail(t, freedom) == pytest.approx(tail, rel=2e-3)
    special = pytest.importorskip("scipy.special", reason="SciPy is not installed")
    assert t == pytest.approx(-special.stdtrit(round(freedom, 1), tail), rel=2e-3)


def test_the_largest_of_normal_numbers() -> None:
    """Table of Harter 1961."""
    found = [expected_largest(count) for count in (1, 2, 8, 64)]
    assert found == pytest.approx([0.0, 0.56419, 1.42360, 2.34373], abs=1e-4)


@given(st.integers(2, 9), st.integers(0, 10_000))
@settings(max_examples=25, deadline=None)
def test_the_figure_is_the_level_of_a_rank_beside_that_of_the_others(ranks: int, seed: int) -> None:
    """By plain Python; a level is the trimmed mean of the logarithms, in each step beside all."""
    times = matrix(ranks, seed, steps=53, slow=1.1)
    levels = []
    for rank in range(ranks):
        ratios = sorted(math.log(line[rank] / statistics.median(line)) for line in times)
        levels.append(math.exp(statistics.fmean(ratios[10:-10])))
    for rank, value in enumerate(typical(times).values):
        others = statistics.median(levels[:rank] + levels[rank + 1 :])
        assert value == pytest.approx(math.log(levels[rank] / others), abs=1e-12)


def test_noise_does_not_blur_the_peers_where_nearly_half_of_the_ranks_are_slow() -> None:
    """The mean of ratios to the median of the others in each step gives 1.015."""
    times = matrix(64, 0, steps=300, jitter=0.01).astype(float)
    times[:, :31] *= 1.03
    assert typical(times).value == pytest.approx(1.03, abs=0.004)


def test_the_ends_have_the_distance_of_the_known_distribution() -> None:
    """The ratio of two ranks over 100 steps of 3 % each: 0.5 % a side, halved for two ranks.

    Student's t of 99 degrees of freedom, or of the 8 cosines, whichever reaches farther.
    """
    ends = [typical(matrix(2, seed)).interval for seed in range(100)]
    widths = [high - low for low, high in (one for one in ends if one is not None)]
    error = 0.03 * 2**0.5 / 10 * 1.07  # a mean trimmed by 20 % has 1.07 times that of the mean
    assert (2.626 + 2.871) * error < np.mean(widths) < 1.1 * (3.355 + 3.833) * error


@pytest.mark.parametrize("phi", [0.0, 0.6])
def test_the_ends_hold_the_truth(phi: float) -> None:
    """Of 400 windows the lower and the upper end each miss it in no more than 1 %."""
    ends = [typical(matrix(2, seed, slow=1.05, inherited=phi)).interval for seed in range(400)]
    assert sum(end is not None for end in ends) >= 0.93 * len(ends)
    assert sum(low > 1.05 for low, _ in filter(None, ends)) <= 9
    assert sum(high < 1.05 for _, high in filter(None, ends)) <= 9


def test_one_spike_moves_the_sum_and_not_the_typical_step() -> None:
    times = matrix(8, 0, slow=1.10)
    before = typical(times)
    times[50, 0] *= 3  # a peer's
    after = typical(times)
    assert after.value == pytest.approx(before.value, rel=1e-3)
    assert after.interval == pytest.approx(before.interval, rel=1e-3)
    assert (after.top, after.interval is not None and after.interval[0] > 1.05) == (7, True)


def test_spikes_are_counted_by_rank_with_the_time_that_they_take() -> None:
    times = np.full((100, 4), 1000)
    times[[3, 17, 40], 2] = 3000
    times[60, 1] = 1500
    times[70, 0] = 1000 * SPIKE - 10  # just not
    longer = spikes(times.astype(float))
    assert (longer > 0).sum(axis=0).tolist() == [0, 1, 3, 0]
    assert longer.sum(axis=0) == pytest.approx([0, 500, 6000, 0])
    found = spike_shares(times.astype(float))
    assert found is not None
    peak = times.max(axis=1).sum()
    assert found.values == pytest.approx([0, 500 / peak, 6000 / peak, 0])
    assert found.top == 2


@pytest.mark.parametrize("ranks", [2, 8, 64])
@pytest.mark.parametrize("phi", [0.0, 0.6])
def test_what_noise_alone_loses_is_told_apart(ranks: int, phi: float) -> None:
    """Noise of 5 % makes balanced ranks lose 2.8 to 10.5 %; a rank 20 % slower loses more."""
    balanced = [matrix(ranks, seed, jitter=0.05, inherited=phi).astype(float) for seed in range(60)]
    lost = [1 - (times.mean() / times.max(axis=1).mean()) for times in balanced]
    assert np.mean([noise_share(times) for times in balanced]) == pytest.approx(
        np.mean(lost), rel=0.1
    )
    rest = [lost_share(times) for times in balanced]
    assert abs(np.mean([one.value for one in rest if one is not None])) < 0.004
    assert all(one is not None and one.low() < 0.02 for one in rest)
    slow = lost_share(matrix(ranks, 1, jitter=0.05, slow=1.5, inherited=phi).astype(float))
    assert slow is not None
    assert slow.low() > 0.1


def test_constant_times_are_certain_and_nothing_is_not() -> None:
    found = typical(np.tile([100, 120], (40, 1)))
    assert (found.value, found.interval, found.top) == (1.2, (1.2, 1.2), 1)
    assert found.chance(1.0) < 1e-9
    assert typical(np.ones((1, 4))).interval is None
    assert typical_ratio(np.ones((40, 1))) is None
    assert typical_ratio(np.zeros((0, 2))) is None
    equal = typical(np.ones((40, 2)))
    assert (equal.interval, equal.top, equal.chance(1.0)) == ((1.0, 1.0), None, 1.0)
    assert typical_ratio(np.tile([0, 5], (40, 1))) is None


def test_steps_in_which_a_rank_has_nothing_are_outliers_up_to_a_fifth() -> None:
    times = np.tile([100, 120], (40, 1))
    times[:8, 0] = 0
    assert typical(times).value == 1.2
    times[:9, 0] = 0
    assert typical_ratio(times) is None
    assert log_ratios(np.array([[0.0, 5.0, 0.0]]))[0].tolist() == [-math.inf, math.inf, -math.inf]
    assert log_ratios(np.array([[0.0, 0.0, 0.0]]))[0].tolist() == [0.0, 0.0, 0.0]


def test_a_few_steps_say_nothing() -> None:
    assert typical(np.tile([100, 150], (5, 1))).interval is None
    assert typical(np.tile([100, 150], (6, 1))).interval == (1.5, 1.5)


@pytest.mark.parametrize("phi", [0.0, 0.3, 0.6, 0.8, 0.9])
@pytest.mark.parametrize("white", [0.0, 0.02])
def test_the_share_that_a_step_inherits_is_found(phi: float, white: float) -> None:
    """Also beneath noise that carries nothing over, which hides it from lag 1."""
    found = []
    for seed in range(100):
        logs = np.log(matrix(4, seed, steps=200, slow=1.3, inherited=phi).astype(float))
        logs += np.random.default_rng(seed).normal(0, white, logs.shape)
        found.append(correlation(logs - logs.mean(axis=0)))
    hidden = 0.7 if white and phi <= 0.6 else 1.0  # of the variance 0.03² / (0.03² + 0.02²) is left
    assert hidden * phi - 0.06 <= np.mean(found) <= phi + 0.07


def test_steps_that_alternate_inherit_nothing() -> None:
    times = np.tile([[1.0, -1.0], [-1.0, 1.0]], (20, 1))
    assert correlation(times) == 0.0
    assert correlation(np.zeros((40, 2))) == 0.0


def test_a_change_of_level_is_no_noise_and_drift_is() -> None:
    """A rank that is throttled from the middle on is slow; one that wanders may be."""
    times = matrix(4, 0).astype(float)
    times[50:, 2] *= 1.3
    found = typical(times)
    assert found.interval is not None
    assert (found.top, found.interval[0] > 1.1) == (2, True)
    times = matrix(4, 0).astype(float)
    times[:, 2] *= 1 + 0.3 * np.sin(np.arange(100) / 16)
    wandering = typical(times)
    assert wandering.interval is None
    # Its errors are hardly known: ten of them do not reach a limit of 100, and any near one.
    ends = wandering.ends()
    assert ends is not None
    assert word_of(Threshold(limit=100.0), wandering.value, ends) == "pass"
    assert word_of(Threshold(limit=1.05), wandering.value, ends) == "inconclusive"
    assert word_of(Threshold(limit=1.5), wandering.value, ends) == "inconclusive"
    assert typical(np.tile([100, 150], (5, 1))).ends() is None


def test_a_noisy_rank_keeps_its_own_error() -> None:
    times = matrix(8, 3).astype(float)
    times[:, 0] *= np.exp(np.random.default_rng(0).normal(0, 0.2, 100))
    errors = typical(times).errors
    assert errors[0] > 3 * max(errors[1:])


@given(st.integers(0, 10_000), st.permutations(range(5)), st.integers(2, 1000))
@settings(max_examples=15, deadline=None)
def test_neither_the_order_of_ranks_nor_the_unit_of_time_matters(
    seed: int, order: list[int], by: int
) -> None:
    times = matrix(5, seed, steps=40, slow=1.02).astype(float)
    for estimate in (typical_ratio, share_of_mean, lost_share, spike_shares):
        one, two = estimate(times), estimate(times[:, order] * by)
        assert one is not None
        assert two is not None
        assert two.value == pytest.approx(one.value, rel=1e-9, abs=1e-12)
        assert (two.interval is None) == (one.interval is None)
        if one.interval is not None:
            assert two.interval == pytest.approx(one.interval, rel=1e-9, abs=1e-12)


spans = st.lists(st.tuples(st.integers(0, 2), st.integers(0, 40), st.integers(0, 15)), max_size=30)


@given(spans)
@settings(max_examples=50, deadline=None)
def test_busy_time_is_the_union(rows: list[tuple[int, int, int]]) -> None:
    columns = np.array(rows, np.int64).reshape(-1, 3).T
    parts = busy_parts(*columns)
    for owner in range(3):
        covered = {ns for who, at, dur in rows if who == owner for ns in range(at, at + dur)}
        assert parts[columns[0] == owner].sum() == len(covered)
