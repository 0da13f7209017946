"""How often a verdict is wrong, on windows whose truth is planted."""

from __future__ import annotations

import os
from math import comb

import pytest

from pytest_sglprof._analysis.certainty import typical_ratio
from pytest_sglprof._analysis.imbalance import estimate, imbalance_of_groups
from pytest_sglprof._analysis.straggler import stragglers
from pytest_sglprof._config.model import Threshold
from pytest_sglprof._verdict.judge import Judgement, judge, judge_finding
from tests.support.planted import Plan, cells, matrix, window

LIMIT = Threshold(limit=1.02)
SEEDS = int(os.environ.get("SGLPROF_SEEDS", "300"))
UNLIKELY = 0.002
PROMISED = 0.01


def most_by_chance(windows: int) -> int:
    """Wrong verdicts among `windows` that the promised rate exceeds with p < UNLIKELY.

    The upper tail of the binomial distribution, exact; of 1000 windows it is 20, or 2 %.
    """
    within = 0.0
    for wrong in range(windows):
        within += comb(windows, wrong) * PROMISED**wrong * (1 - PROMISED) ** (windows - wrong)
        if 1 - within < UNLIKELY:
            return wrong
    return windows


def test_the_most_by_chance_is_the_tail_of_the_binomial() -> None:
    assert [most_by_chance(windows) for windows in (200, 500, 1000)] == [7, 12, 20]


def judged(
    ranks: int, seed: int, slow: float = 1.0, jitter: float = 0.03, inherited: float = 0.0
) -> Judgement:
    times = matrix(ranks, seed, slow=slow, jitter=jitter, inherited=inherited)
    group = cells(times)
    (finding,) = imbalance_of_groups([group])
    return judge_finding(finding, LIMIT, estimate(group, "typical_ratio"))


def slowest(found: Judgement) -> str | None:
    return found.finding.slowest if found.finding else None


@pytest.mark.parametrize(("ranks", "jitter"), [(2, 0.03), (8, 0.03), (64, 0.03), (8, 0.15)])
def test_a_balanced_system_fails_in_at_most_2_percent_of_windows(ranks: int, jitter: float) -> None:
    words = [judged(ranks, seed, jitter=jitter).verdict for seed in range(SEEDS)]
    assert words.count("fail") <= most_by_chance(SEEDS)


@pytest.mark.parametrize(("ranks", "jitter"), [(2, 0.03), (2, 0.10), (8, 0.10), (64, 0.10)])
def test_nor_where_each_step_resembles_the_one_before(ranks: int, jitter: float) -> None:
    found = [judged(ranks, seed, jitter=jitter, inherited=0.6) for seed in range(SEEDS)]
    assert sum(one.verdict == "fail" for one in found) <= most_by_chance(SEEDS)


@pytest.mark.parametrize("inherited", [0.6, 0.9])
@pytest.mark.parametrize(("ranks", "steps"), [(2, 30), (2, 100), (8, 30), (8, 100), (64, 100)])
def test_the_lower_end_knows_that_steps_resemble_each_other(
    ranks: int, steps: int, inherited: float
) -> None:
    """A rank exactly at the limit is above it by chance only; as are p of ranks that do not differ.

    Taking steps as independent, 7 % (2 ranks) to 60 % (64 ranks) of these lower ends are above.
    """
    ends, p = [], []
    for seed in range(SEEDS):
        times = matrix(ranks, seed, steps=steps, inherited=inherited)
        found = typical_ratio(times)
        assert found is not None
        if found.interval is not None:
            ends.append(found.interval[0])
            p.append(found.chance(1.0))
    assert sum(low > 1 for low in ends) <= most_by_chance(SEEDS)
    assert sum(chance <= 0.005 for chance in p) == sum(low > 1 for low in ends)


# Two ranks are one series: its error is less well known than that of seven.
@pytest.mark.parametrize(("ranks", "share"), [(2, 0.95), (8, 0.99), (64, 0.99)])
def test_a_slow_rank_is_found_in_correlated_steps_too(ranks: int, share: float) -> None:
    found = [judged(ranks, seed, slow=1.10, inherited=0.6) for seed in range(200)]
    assert sum(one.verdict == "fail" for one in found) >= share * 200
    assert {slowest(one) for one in found if one.verdict == "fail"} == {f"TP{ranks - 1}"}


@pytest.mark.parametrize(("ranks", "share"), [(2, 0.92), (8, 0.99), (64, 0.99)])
def test_a_rank_5_percent_slower_is_found_and_no_other_is_named(ranks: int, share: float) -> None:
    found = [judged(ranks, seed, slow=1.05) for seed in range(SEEDS)]
    assert sum(one.verdict == "fail" for one in found) >= share * SEEDS
    assert {slowest(one) for one in found if one.verdict == "fail"} == {f"TP{ranks - 1}"}


@pytest.mark.parametrize(("ranks", "seeds"), [(2, 10), (8, 10), (64, 2)])
def test_whole_windows_give_the_same_answers(ranks: int, seeds: int) -> None:
    slow = {(ranks - 1, ""): 1.05}
    for seed in range(seeds):
        balanced = window(Plan(ranks=ranks, seed=seed, layers=1))
        planted = window(Plan(ranks=ranks, seed=seed, layers=1, slow=slow))
        assert judge(balanced, [LIMIT]).word != "fail"
        assert [found.straggler for found in stragglers(balanced)] == [None]
        worst = judge(planted, [LIMIT]).deciding
        assert worst is not None
        assert (worst.verdict, slowest(worst)) == ("fail", f"TP{ranks - 1}")
        assert [found.straggler for found in stragglers(planted)] == [f"TP{ranks - 1}"]
