"""How often a verdict is wrong, on windows whose truth is planted."""

from __future__ import annotations

import os
from math import comb

import pytest

from pytest_sglprof._analysis.certainty import MAX_P, certainty
from pytest_sglprof._analysis.imbalance import imbalance_of_groups
from pytest_sglprof._analysis.straggler import stragglers
from pytest_sglprof._config.model import Threshold
from pytest_sglprof._verdict.judge import Judgement, judge, judge_finding
from tests.support.planted import Plan, cells, matrix, window

LIMIT = Threshold(limit=1.02)
SEEDS = int(os.environ.get("SGLPROF_SEEDS", "300"))  # 1000 in .ci/run
UNLIKELY = 0.002


def most_by_chance(windows: int) -> int:
    """Wrong verdicts among `windows` that the promised rate, MAX_P, exceeds with p < UNLIKELY.

    The upper tail of the binomial distribution, exact; of 1000 windows it is 20, or 2 %.
    """
    within = 0.0
    for wrong in range(windows):
        within += comb(windows, wrong) * MAX_P**wrong * (1 - MAX_P) ** (windows - wrong)
        if 1 - within < UNLIKELY:
            return wrong
    return windows


def test_the_most_by_chance_is_the_tail_of_the_binomial() -> None:
    assert [most_by_chance(windows) for windows in (200, 500, 1000)] == [7, 12, 20]


def judged(
    ranks: int, seed: int, slow: float = 1.0, jitter: float = 0.03, inherited: float = 0.0
) -> Judgement:
    times = matrix(ranks, seed, slow=slow, jitter=jitter, inherited=inherited)
    (finding,) = imbalance_of_groups([cells(times)])
    return judge_finding(finding, LIMIT)


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


@pytest.mark.parametrize(("ranks", "steps"), [(2, 30), (2, 100), (8, 30), (8, 100), (64, 100)])
def test_p_knows_that_steps_resemble_each_other(ranks: int, steps: int) -> None:
    """Shifting each step by itself gives p <= 0.01 in 17 % (2 ranks) to 90 % (64 ranks)."""
    windows = (matrix(ranks, seed, steps=steps, inherited=0.6) for seed in range(SEEDS))
    low = [certainty(times).p_value or 0.0 for times in windows]
    assert sum(p <= MAX_P for p in low) <= most_by_chance(SEEDS)


@pytest.mark.parametrize("ranks", [2, 8, 64])
def test_a_slow_rank_is_found_in_correlated_steps_too(ranks: int) -> None:
    found = [judged(ranks, seed, slow=1.10, inherited=0.6) for seed in range(200)]
    assert sum(one.verdict == "fail" for one in found) >= 0.99 * 200
    assert {slowest(one) for one in found if one.verdict == "fail"} == {f"TP{ranks - 1}"}


@pytest.mark.parametrize("ranks", [2, 8, 64])
def test_a_rank_5_percent_slower_is_found_and_no_other_is_named(ranks: int) -> None:
    found = [judged(ranks, seed, slow=1.05) for seed in range(SEEDS)]
    assert sum(one.verdict == "fail" for one in found) >= 0.99 * SEEDS
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
