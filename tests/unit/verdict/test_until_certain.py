"""Windows that go on until the verdict is certain: each look judges the steps of all so far."""

from __future__ import annotations

import math
import statistics

import numpy as np
import pytest

from pytest_sglprof._analysis.certainty import ALPHA, Estimate, disagreeing, pool, typical_ratio
from pytest_sglprof._analysis.imbalance import estimate, imbalance_of_groups
from pytest_sglprof._config.model import MOST_WINDOWS, Threshold, WindowSpec
from pytest_sglprof._verdict.judge import Verdict, judge, judge_finding
from pytest_sglprof._verdict.repeats import (
    RepeatedVerdict,
    judge_repeats,
    judge_together,
    judge_until_certain,
)
from tests.support.kernel_tables import build, slow
from tests.support.planted import cells, matrix

LIMIT = Threshold(limit=1.02)


def window(seed: int, slow: float = 1.0, ranks: int = 8, jitter: float = 0.05) -> Verdict:
    """The verdict on a window of 100 steps in which each resembles the one before."""
    group = cells(matrix(ranks, seed, jitter=jitter, slow=slow, inherited=0.6))
    (finding,) = imbalance_of_groups([group])
    judged = judge_finding(finding, LIMIT, estimate(group, "typical_ratio"))
    return Verdict(judged.verdict, judged.reason, (judged,))


def until_certain(first_seed: int, slow: float = 1.0, ranks: int = 8) -> RepeatedVerdict:
    windows = [window(first_seed, slow, ranks)]
    while True:
        together = judge_until_certain(windows)
        if len(windows) == MOST_WINDOWS or together.word != "inconclusive":
            return together
        windows.append(window(first_seed + len(windows), slow, ranks))


def test_one_window_decides_nothing_however_clear_it_is() -> None:
    alone = window(0, slow=2.0)
    assert alone.word == "fail"
    found = judge_until_certain([alone])
    assert found.word == "inconclusive"
    assert found.reason == "slowdown of compute: one window alone decides nothing"
    two = judge_until_certain([alone, window(1, slow=2.0)])
    assert two.word == "fail"
    assert two.reason.startswith("slowdown of compute is 2.0")
    assert "over 2 windows (limit 1.02)" in two.reason
    assert "the window in the middle: TP7 is 2.0" in two.reason


@pytest.mark.parametrize(("slow", "word"), [(1.0, "pass"), (1.05, "fail")])
def test_what_one_window_cannot_tell_several_can(slow: float, word: str) -> None:
    """Noise of 5 %, φ 0.6: alone 1 % of balanced windows pass, and 28 % of slow ones fail."""
    found = [until_certain(100 * seed, slow) for seed in range(40)]
    assert sum(one.word == word for one in found) >= 38
    assert {one.word for one in found} <= {word, "inconclusive"}
    assert max(one.count for one in found) > 2


def test_a_pass_says_how_far_it_goes_and_an_open_verdict_what_would_settle_it() -> None:
    found = until_certain(0)
    assert "; at most 1.0" in found.reason
    two = judge_until_certain([window(0), window(1)])
    assert two.word == "inconclusive"
    assert "a pass must be surely below 1.030: it may be " in two.reason
    assert "steps would settle it" in two.reason


def test_the_error_is_that_of_all_steps_where_windows_agree() -> None:
    one = Estimate((0.0, 0.03), (0.01, 0.01), (50.0, 50.0), 25.0, 100, 1, is_log=True)
    two = Estimate((0.002, 0.028), (0.01, 0.01), (50.0, 50.0), 25.0, 100, 1, is_log=True)
    found = pool([one, two, one, two], ALPHA)
    assert found.values == pytest.approx((0.001, 0.029))
    assert found.errors == pytest.approx([0.01 / math.sqrt(4)] * 2)
    assert found.freedom == pytest.approx([200.0, 200.0])
    assert (found.effective, found.steps) == (100.0, 400)


def test_the_error_is_that_of_the_windows_where_ranks_move_between_them() -> None:
    """By plain Python: variance between windows, mean over ranks, df (k − 1)(R − 1)."""
    rows = ((0.0, 0.10, 0.02), (0.08, 0.0, -0.03), (0.02, 0.04, 0.09), (-0.05, 0.06, 0.0))
    errors, freedom = (0.001,) * 3, (50.0,) * 3
    found = pool([Estimate(row, errors, freedom, 50.0, 100, 3, True) for row in rows], ALPHA)
    variance = statistics.fmean(statistics.variance(column) for column in zip(*rows, strict=True))
    assert found.errors == pytest.approx([math.sqrt(variance / 4)] * 3)
    assert found.freedom == (6.0, 6.0, 6.0)


def test_windows_that_disagree_are_named() -> None:
    windows = [typical_ratio(matrix(4, seed, jitter=0.01)) for seed in range(3)]
    known = [each for each in windows if each is not None]
    assert disagreeing(known) == ()
    odd = typical_ratio(matrix(4, 9, jitter=0.01, slow=1.2))
    assert odd is not None
    assert 3 in disagreeing([*known, odd])
    verdicts = [window(seed, jitter=0.01) for seed in range(3)] + [window(9, 1.3, jitter=0.01)]
    reason = judge_until_certain(verdicts).reason
    assert "4 (1.3" in reason
    assert "from the mean by more than the noise of the steps explains" in reason


def test_two_ranks_at_the_limit_rarely_fail_where_their_speeds_move_between_windows() -> None:
    """1 % of movement, exactly at the limit: naive pooling of the steps fails in 16 %."""
    rng = np.random.default_rng(0)
    failed = 0
    for seed in range(150):
        moved = 1.02 * np.exp(rng.normal(0, 0.01, MOST_WINDOWS))
        windows = []
        for number, factor in enumerate(moved):
            windows.append(window(1000 * seed + number, factor, ranks=2, jitter=0.01))
            word = judge_until_certain(windows).word
            if word != "inconclusive":
                failed += word == "fail"
                break
    assert failed <= 5  # 1 % is promised; more than 5 of 150 have a probability of 0.4 %


def test_a_scope_of_one_rank_fails_in_every_window_and_too_little_data_is_never_enough() -> None:
    only = judge(build(scale=lambda rank, c, s: float(rank == "TP1" or c != "moe")), [MOE])
    assert only.word == "fail"
    assert judge_until_certain([only]).word == "inconclusive"
    assert judge_until_certain([only, only]).word == "fail"
    short = judge(build(steps=5), [MOE])
    assert judge_until_certain([short] * 8).word == "inconclusive"
    good = judge(build(scale=slow("TP1", "moe", 1.5)), [MOE])
    assert judge_until_certain([short, good]).word == "inconclusive"
    assert judge_until_certain([short, good, good]).word == "fail"


MOE = Threshold(scope="moe", limit=1.10)


def test_a_window_that_was_not_opened_is_the_reason_where_nothing_is_certain() -> None:
    unopened = Verdict("inconclusive", "the body was over")
    found = judge_until_certain([window(0), window(1), unopened])
    assert found.word == "inconclusive"
    assert found.reason.endswith("; no further window: the body was over")


def test_the_specification_says_how_windows_are_judged_together() -> None:
    windows = [window(0, 1.5), window(1, 1.5)]
    assert judge_together(WindowSpec(repeat="certain"), windows) == judge_until_certain(windows)
    assert judge_together(WindowSpec(repeat=3), windows) == judge_repeats(windows, 3)
    assert judge_until_certain([Verdict("pass", "no threshold")] * 2).word == "pass"
