from __future__ import annotations

import math
import os
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pytest_sglprof._analysis.distributions import chi2_below, chi2_quantile, reach
from pytest_sglprof._analysis.lives import (
    FAIL_ALPHA,
    LifeChange,
    LifeValue,
    change_between,
    floor_of,
    floor_ratio,
    holm,
    lives_needed,
    upper_factor,
)

SEEDS = int(os.environ.get("SGLPROF_SEEDS", "300"))
NIGHTS = 3 * SEEDS
LIMIT = 1.05
PASS_BOUND = 1.075


def lives(
    values: Sequence[float], hosts: str = "", levels: Sequence[int] | None = None
) -> list[LifeValue]:
    """hosts: one letter a life, none if all are the same."""
    return [
        LifeValue(float(value), hosts[at] if hosts else "h1", levels[at] if levels else 0)
        for at, value in enumerate(values)
    ]


def compared(accepted: list[LifeValue], fresh: list[LifeValue]) -> LifeChange:
    change = change_between(accepted, fresh)
    assert isinstance(change, LifeChange), change
    return change


def reason(accepted: list[LifeValue], fresh: list[LifeValue]) -> str:
    why = change_between(accepted, fresh)
    assert isinstance(why, str), why
    return why


def drawn(seed: int, count: int, sd: float = 0.01) -> np.ndarray:
    return np.exp(np.random.default_rng(seed).normal(0, sd, count))


# One host.


@pytest.mark.parametrize(("accepted", "fresh"), [(5, 1), (10, 1), (10, 4), (5, 5), (1000, 100)])
def test_lives_of_one_host_are_compared_by_students_t(accepted: int, fresh: int) -> None:
    stats = pytest.importorskip("scipy.stats")
    old, new = drawn(1, accepted), 1.02 * drawn(2, fresh)

    change = compared(lives(old), lives(new))

    expected = stats.ttest_ind(np.log(new), np.log(old))
    assert change.ratio == pytest.approx(
        math.exp(np.log(new).mean() - np.log(old).mean()), rel=1e-9
    )
    assert change.freedom == accepted + fresh - 2
    assert change.difference_p == pytest.approx(expected.pvalue, rel=1e-3)
    ends = expected.confidence_interval(0.98)
    assert change.ends(0.01, 0.01) == pytest.approx(
        (math.exp(ends.low), math.exp(ends.high)), rel=1e-4
    )
    less = stats.ttest_ind(np.log(new), np.log(old) + math.log(LIMIT), alternative="greater")
    assert change.chance(LIMIT) == pytest.approx(less.pvalue, rel=1e-3)


@given(st.integers(0, 10_000), st.floats(0.9, 1.2), st.sampled_from([1.02, 1.05, 1.1]))
@settings(max_examples=60, deadline=None)
def test_p_is_below_a_level_where_the_lower_end_is_above_the_limit(
    seed: int, ratio: float, limit: float
) -> None:
    change = compared(lives(drawn(seed, 8)), lives(ratio * drawn(seed + 1, 2)))

    for alpha in (0.05, FAIL_ALPHA, FAIL_ALPHA / 3):
        low, _ = change.ends(low_alpha=alpha)
        if abs(low / limit - 1) > 1e-4:
            assert (change.chance(limit) < alpha) == (low > limit)


def test_lives_that_are_all_equal_do_not_differ() -> None:
    change = compared(lives([0.3] * 5), lives([0.3, 0.3]))

    assert (change.log_ratio, change.error, change.sd) == (0.0, 0.0, 0.0)
    assert change.difference_p == 1.0
    assert change.ends() == (1.0, 1.0)


@given(st.integers(0, 10_000), st.floats(1e-6, 1e9))
@settings(max_examples=30, deadline=None)
def test_the_unit_of_a_figure_and_the_names_of_hosts_change_nothing(
    seed: int, factor: float
) -> None:
    old, new = drawn(seed, 9), drawn(seed + 1, 2)
    first = compared(lives(old, "aaabbbccc"), lives(new, "ab"))
    second = compared(lives(old * factor, "zzzyyyccc"), lives(new * factor, "zy"))

    assert second.log_ratio == pytest.approx(first.log_ratio, abs=1e-9)
    assert second.error == pytest.approx(first.error, rel=1e-6)
    assert second.freedom == first.freedom


# Reasons.


@pytest.mark.parametrize(
    ("accepted", "fresh", "words"),
    [
        (lives([1.0] * 4), lives([1.0]), "4 accepted lives, 5 are needed"),
        (lives([1.0] * 5), [], "no new life"),
        (lives([1.0] * 4 + [0.0]), lives([1.0]), "not above 0"),
        (lives([1.0] * 5), lives([math.nan]), "not above 0"),
        (
            lives(drawn(1, 6), "aaaaaa"),
            lives([1.0], "b"),
            "first life on b; accepted ones ran on a",
        ),
        (
            lives(drawn(1, 8), "aaaabbbb"),
            lives([1.0], "c"),
            "first life on c; accepted ones ran on a, b",
        ),
    ],
    ids=["few", "none", "zero", "nan", "other host", "third host"],
)
def test_lives_that_cannot_be_compared_say_why(
    accepted: list[LifeValue], fresh: list[LifeValue], words: str
) -> None:
    assert words in reason(accepted, fresh)


# Hosts.


def test_new_lives_are_compared_with_accepted_ones_on_their_own_host() -> None:
    old, new = drawn(3, 8), 1.03 * drawn(4, 2)
    slow = np.where([host == "b" for host in "aaaabbbb"], 1.4, 1.0)

    change = compared(lives(old * slow, "aaaabbbb"), lives(new * 1.4, "bb"))

    logs, fresh = np.log(old), np.log(new)
    parts = (logs[:4], logs[4:], fresh)
    variance = sum(((part - part.mean()) ** 2).sum() for part in parts) / 7
    assert change.log_ratio == pytest.approx(fresh.mean() - logs[4:].mean())
    assert change.error == pytest.approx(math.sqrt(variance * (1 / 4 + 1 / 2)))
    assert change.freedom == 7


@pytest.mark.parametrize("host", ["c", "z"])
def test_where_each_life_has_its_host_hosts_are_a_part_of_what_lives_differ_by(host: str) -> None:
    old, new = drawn(5, 10, 0.03), drawn(6, 1)

    change = compared(lives(old, "abcdefghij"), lives(new, host))

    one_host = compared(lives(old), lives(new))
    assert change.error == pytest.approx(one_host.error)
    assert change.freedom == one_host.freedom


@pytest.mark.parametrize(
    ("accepted", "fresh"),
    [
        ("aaaaa", "a"),
        ("abcabcabcabc", "b"),
        ("aaaaaaaaab", "b"),
        ("aabbccddee", "az"),
        ("abcdefghij", "z"),
        ("abcdefghij", "zzz"),
        ("abcdefghij", "ccc"),
        ("aaabbbcccc", "z"),
        ("abcab", "z"),
        ("abcab", "c"),
        ("aaabb", "a"),
    ],
)
@pytest.mark.parametrize("host_sd", [0.0, 0.02])
def test_a_change_that_is_just_allowed_fails_once_in_a_hundred_nights(
    accepted: str, fresh: str, host_sd: float
) -> None:
    allowed = NIGHTS * FAIL_ALPHA
    assert failures(accepted, fresh, host_sd) <= allowed + 3.5 * math.sqrt(allowed)


def failures(accepted: str, fresh: str, host_sd: float, *, are_told: bool = True) -> int:
    """How many of NIGHTS fail LIMIT, which is the true ratio. are_told: which host is which."""
    rng = np.random.default_rng([len(accepted), len(fresh), int(1000 * host_sd)])
    count = 0
    for _ in range(NIGHTS):
        host = dict(zip("abcdefghijz", rng.normal(0, host_sd, 11), strict=True))
        old, new = (
            [math.exp(host[each] + rng.normal(0, 0.01)) for each in which]
            for which in (accepted, fresh)
        )
        new = [LIMIT * each for each in new]
        hosts = (accepted, fresh) if are_told else ("", "")
        change = compared(lives(old, hosts[0]), lives(new, hosts[1]))
        count += change.ends()[0] > LIMIT
    return count


def test_hosts_that_nobody_tells_of_would_fail_nights() -> None:
    assert failures("aaabbbcccc", "z", 0.02, are_told=False) > 0.025 * NIGHTS
    assert failures("aaaaaaaaab", "b", 0.02, are_told=False) > 0.04 * NIGHTS


# Levels.


def test_the_night_after_a_new_level_was_accepted_passes() -> None:
    passed = 0
    for seed in range(SEEDS):
        values = drawn(seed, 7, 0.005) * ([1.0] * 5 + [1.15] * 2)
        change = compared(lives(values[:6], levels=[0] * 5 + [1]), lives(values[6:]))
        assert change.of_level == 1
        passed += change.ends()[1] < PASS_BOUND

    assert passed == SEEDS


def test_earlier_levels_tell_how_much_lives_differ_and_nothing_else() -> None:
    old, new = drawn(7, 9), drawn(8, 1)
    levels = [0] * 4 + [1] * 2 + [4] * 3
    moved = old * ([2.0] * 4 + [0.7] * 2 + [1.0] * 3)

    change = compared(lives(old, levels=levels), lives(new))

    assert compared(lives(moved, levels=levels), lives(new)).error == pytest.approx(change.error)
    assert change.log_ratio == pytest.approx(np.log(new[0]) - np.log(old[6:]).mean())
    assert change.freedom == 3 + 1 + 2
    assert change.of_level == 3


# A/A.


def test_p_of_nights_without_a_change_is_uniform() -> None:
    stats = pytest.importorskip("scipy.stats")
    changes = []
    for seed in range(700):
        values = drawn(seed, 11)
        changes.append(compared(lives(values[:10]), lives(values[10:])))

    assert stats.kstest([change.difference_p for change in changes], "uniform").pvalue > 0.01
    assert np.mean([change.ratio < 1 for change in changes]) == pytest.approx(0.5, abs=0.05)
    assert sum(change.ends()[0] > LIMIT for change in changes) <= 2


# What can be seen.


# Accepted and new lives; by sd between lives the per cent found at limits 1.05 and 1.02.
SMALLEST = [
    (3, 1, {0.005: (12.7, 9.5), 0.01: (21.0, 17.5), 0.015: (29.8, 26.1), 0.03: (60.6, 56.0)}),
    (5, 1, {0.005: (8.7, 5.6), 0.01: (12.5, 9.3), 0.015: (16.4, 13.1), 0.03: (29.1, 25.4)}),
    (5, 2, {0.005: (7.5, 4.4), 0.01: (10.1, 6.9), 0.015: (12.7, 9.5), 0.03: (20.9, 17.5)}),
    (10, 1, {0.005: (7.6, 4.6), 0.01: (10.3, 7.2), 0.015: (13.1, 9.9), 0.03: (21.8, 18.3)}),
    (10, 2, {0.005: (6.9, 3.8), 0.01: (8.8, 5.7), 0.015: (10.8, 7.6), 0.03: (16.9, 13.6)}),
    (10, 4, {0.005: (6.4, 3.4), 0.01: (7.8, 4.8), 0.015: (9.3, 6.2), 0.03: (13.7, 10.5)}),
    (5, 5, {0.005: (6.6, 3.6), 0.01: (8.3, 5.2), 0.015: (9.9, 6.8), 0.03: (15.1, 11.8)}),
]


@pytest.mark.parametrize(("accepted", "fresh", "cells"), SMALLEST)
def test_the_smallest_change_that_is_seen(
    accepted: int, fresh: int, cells: dict[float, tuple[float, float]]
) -> None:
    for sd, per_cent in cells.items():
        change = LifeChange(
            accepted=accepted,
            fresh=fresh,
            log_ratio=0.0,
            error=sd * math.sqrt(1 / accepted + 1 / fresh),
            freedom=accepted + fresh - 2,
            sd=sd,
        )
        seen = [100 * (change.detects(limit) - 1) for limit in (1.05, 1.02)]
        assert seen == pytest.approx(per_cent, abs=0.1)


def test_what_is_said_to_be_seen_is_seen_in_95_per_cent_of_nights() -> None:
    error = 0.01 * math.sqrt(1 / 10 + 1 / 2)
    ratio = LIMIT * math.exp(reach(FAIL_ALPHA, 0.95, 10.0) * error)
    seen = 0
    for seed in range(NIGHTS):
        values = drawn(seed, 12)
        seen += compared(lives(values[:10]), lives(ratio * values[10:])).ends()[0] > LIMIT

    assert seen / NIGHTS == pytest.approx(0.95, abs=3.5 * math.sqrt(0.05 * 0.95 / NIGHTS))


def test_as_many_lives_as_are_needed_see_the_effect_and_one_less_does_not() -> None:
    for accepted in (5, 10, None):
        needed = lives_needed(0.01, LIMIT, 1.10, accepted=accepted)
        assert needed is not None
        for fresh, sees in ((needed, True), (needed - 1, False)):
            other = fresh if accepted is None else accepted
            if fresh and other + fresh - 2 >= 2:
                error = 0.01 * math.sqrt(1 / other + 1 / fresh)
                far = reach(FAIL_ALPHA, 0.95, float(other + fresh - 2)) * error
                assert (LIMIT * math.exp(far) <= 1.10) is sees


def test_an_effect_too_small_for_a_hundred_lives_is_said_to_need_more() -> None:
    assert lives_needed(0.03, LIMIT, 1.051) is None
    assert lives_needed(0.01, LIMIT, 1.055, accepted=5) is None


# Holm.


def test_holm_multiplies_the_smallest_by_all_and_keeps_the_order() -> None:
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.5, 0.9]) == [1.0, 1.0]
    assert holm([0.002]) == [0.002]
    assert holm([]) == []


@given(st.lists(st.floats(0, 1), min_size=1, max_size=6), st.floats(0.001, 0.2))
def test_holm_rejects_what_its_steps_reject(chances: list[float], alpha: float) -> None:
    rejected = set()
    for place, index in enumerate(sorted(range(len(chances)), key=lambda at: chances[at])):
        if chances[index] * (len(chances) - place) > alpha:
            break
        rejected.add(index)

    adjusted = holm(chances)

    assert {index for index, p in enumerate(adjusted) if p <= alpha} == rejected


# The floor.


def test_the_floor_of_a_machine_has_an_upper_end_and_grows_with_few_lives() -> None:
    assert [upper_factor(lives) for lives in (5, 10, 20)] == pytest.approx(
        [2.37, 1.65, 1.37], abs=0.005
    )
    sd = 0.01
    factors = [
        math.log(floor_ratio(sd, lives, accepted=10, fresh=1)) / sd for lives in (5, 10, 1000)
    ]
    assert factors == pytest.approx([4.83, 3.41, 2.576 * math.sqrt(1.1)], abs=0.02)


def test_the_floor_is_the_standard_deviation_of_logarithms() -> None:
    logs = np.log(drawn(9, 10))

    floor = floor_of(logs)

    assert not isinstance(floor, str)
    assert (floor.lives, floor.upper) == (10, upper_factor(10))
    assert floor.sd == pytest.approx(float(np.std(logs, ddof=1)))
    assert "2 lives, at least 3" in str(floor_of(logs[:2]))


def test_lives_of_one_version_are_beyond_the_floor_once_in_two_hundred() -> None:
    beyond = 0
    for seed in range(NIGHTS):
        logs = np.log(drawn(seed, 21))
        floor = floor_of(logs[:10])
        assert not isinstance(floor, str)
        far = floor_ratio(floor.sd, floor.lives, accepted=10, fresh=1)
        beyond += logs[20] - logs[10:20].mean() > math.log(far)

    assert beyond <= 0.005 * NIGHTS + 3.5 * math.sqrt(0.005 * NIGHTS)
    assert beyond > 0


# Distributions.


@pytest.mark.parametrize("freedom", [1.0, 2.0, 3.3, 9.0, 100.0, 1000.0])
def test_chi_squared_is_that_of_scipy(freedom: float) -> None:
    stats = pytest.importorskip("scipy.stats")
    for below in (0.001, 0.05, 0.5, 0.95, 0.999):
        value = chi2_quantile(below, freedom)
        assert value == pytest.approx(stats.chi2.ppf(below, freedom), rel=1e-9)
        assert chi2_below(value, freedom) == pytest.approx(below, rel=1e-9)


@pytest.mark.parametrize("freedom", [2.0, 3.3, 4.0, 10.0, 50.0, 5000.0])
def test_the_power_of_t_is_that_of_scipys_noncentral_t(freedom: float) -> None:
    stats = pytest.importorskip("scipy.stats")
    for alpha, power in ((0.01, 0.95), (0.01 / 3, 0.95), (0.05, 0.5)):
        effect = reach(alpha, power, freedom)
        t = stats.t.isf(alpha, freedom)
        assert stats.nct.sf(t, freedom, effect) == pytest.approx(power, abs=0.001)
