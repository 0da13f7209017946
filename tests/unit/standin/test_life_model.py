"""The planted truth of server lives: what differs, between what, and by how much."""

from __future__ import annotations

import numpy as np
import pytest

from pytest_sglprof.standin.life_model import (
    CATEGORIES,
    IDLE,
    SPREAD_US,
    Change,
    Life,
    LifePlan,
    draw,
    night,
)

FEW_STEPS = LifePlan(steps=2)


def test_the_same_seed_gives_the_same_lives() -> None:
    one, two, other = (draw(LifePlan(), night(3, 1), seed) for seed in (5, 5, 6))
    assert np.array_equal(one.times, two.times)
    assert np.array_equal(one.idle, two.idle)
    assert one.times.shape == (4, 100, 200)
    assert not np.array_equal(one.truth, other.truth)


def test_kernels_are_spread_evenly_in_their_logarithm_and_over_the_categories() -> None:
    lives = draw(LifePlan(kernels=4000, steps=2, run_sd=0, kernel_sd=0), night(1, 0), 0)
    us = np.exp(lives.truth[0]) / 1000
    assert SPREAD_US[0] <= us.min() < 1.01 * SPREAD_US[0]
    assert 0.99 * SPREAD_US[1] < us.max() <= SPREAD_US[1]
    assert np.median(us) == pytest.approx(np.sqrt(SPREAD_US[0] * SPREAD_US[1]), rel=0.1)
    assert len(set(lives.names)) == 4000
    for name, share in CATEGORIES.items():
        assert lives.categories.count(name) / 4000 == pytest.approx(share, abs=0.03)


@pytest.mark.parametrize("freedom", [0, 5])
def test_lives_differ_in_everything_and_in_each_kernel(freedom: int) -> None:
    plan = LifePlan(kernels=100, steps=2, run_sd=0.03, kernel_sd=0.02, freedom=freedom)
    truth = draw(plan, night(600, 0), 1).truth
    apart = truth - truth.mean(axis=0)
    of_life = apart.mean(axis=1)
    rest = apart - of_life[:, None]
    assert of_life.std() == pytest.approx(0.03, rel=0.12)
    assert rest.std() == pytest.approx(0.02, rel=0.05)
    assert np.abs(np.corrcoef(rest.T)[np.triu_indices(100, 1)]).mean() < 0.05
    kurtosis = (rest**4).mean() / (rest**2).mean() ** 2
    assert (kurtosis > 4) == bool(freedom)


def test_each_host_has_a_level_of_its_own() -> None:
    plan = LifePlan(kernels=50, steps=2, run_sd=0, kernel_sd=0, host_sd=0.02)
    lives = [Life(host=host) for host in range(300) for _ in range(2)]
    levels = draw(plan, lives, 2).truth.mean(axis=1)
    assert np.array_equal(levels[::2], levels[1::2])
    assert levels[::2].std() == pytest.approx(0.02, rel=0.15)


def test_bistable_kernels_have_two_states_of_a_life() -> None:
    plan = LifePlan(steps=2, run_sd=0, kernel_sd=0, bistable=0.05)
    lives = draw(plan, night(400, 0), 3)
    assert len(lives.bistable) == 10
    for kernel, values in enumerate(lives.truth.T):
        states, counts = np.unique(np.round(values, 9), return_counts=True)
        if kernel in lives.bistable:
            assert np.diff(states) == pytest.approx([0.16])
            assert counts.min() > 150
        else:
            assert len(states) == 1


@pytest.mark.parametrize(
    ("change", "hits"),
    [
        (Change(1.05, kernel=7), lambda lives: np.arange(200) == 7),
        (Change(1.05, "moe"), lambda lives: np.array(lives.categories) == "moe"),
        (Change(1.05), lambda lives: np.ones(200, bool)),
    ],
)
def test_a_change_is_in_the_changed_lives_and_nothing_else_is_drawn_anew(change, hits) -> None:  # type: ignore[no-untyped-def]
    lives, unchanged = (
        draw(LifePlan(), night(5, 2, is_changed=True), 4, change),
        draw(LifePlan(), night(5, 2), 4),
    )
    factors = np.exp(lives.truth - unchanged.truth)
    assert np.allclose(factors[:5], 1.0)
    assert np.allclose(factors[5:], np.where(hits(lives), 1.05, 1.0))
    assert np.allclose(lives.times[5:] / unchanged.times[5:], factors[5:, None, :])
    assert np.array_equal(lives.idle, unchanged.idle)
    share = lives.planted_ratio()
    assert share == pytest.approx(1.05) if change == Change(1.05) else 1 < share < 1.05
    assert unchanged.planted_ratio() == pytest.approx(1.0)


def test_the_noise_of_steps_is_small_between_windows_and_hangs_together_within_one() -> None:
    lives = draw(LifePlan(), night(300, 0), 5)
    steps = np.log(lives.times.sum(axis=2))
    steps = steps - np.log(np.exp(lives.truth).sum(axis=1))[:, None]
    assert steps.std() == pytest.approx(0.010, rel=0.1)
    assert (steps[:, 1:] * steps[:, :-1]).mean() / (steps**2).mean() == pytest.approx(0.6, abs=0.05)
    assert steps.mean(axis=1).std() == pytest.approx(0.002, rel=0.15)
    own = np.log(lives.times) - lives.truth[:, None, :]
    assert own.std() == pytest.approx(np.hypot(0.01, 0.02), rel=0.02)


def test_idle_time_is_a_share_of_compute_that_differs_from_life_to_life() -> None:
    lives = draw(LifePlan(), night(300, 0), 6)
    shares = (lives.idle / lives.times.sum(axis=2)).mean(axis=1)
    assert shares.mean() == pytest.approx(IDLE, rel=0.02)
    assert np.log(shares).std() == pytest.approx(np.hypot(0.01, 0.01), rel=0.2)
