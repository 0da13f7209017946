"""Windows as the unit: the median decides, and unknown windows only where they cannot matter."""

from __future__ import annotations

import math
import statistics
from functools import cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pytest_sglprof._config.model import Threshold
from pytest_sglprof._verdict.judge import Verdict, judge
from pytest_sglprof._verdict.repeats import judge_repeats
from tests.support.kernel_tables import build, slow

LIMIT = 1.10
MOE = Threshold(scope="moe", limit=LIMIT)


@cache
def window(factor: float | None, *thresholds: Threshold) -> Verdict:
    """A window of which rank TP1 is slower in moe; None: too short for a verdict."""
    limits = thresholds or (MOE,)
    if factor is None:
        return judge(build(steps=5), limits)
    return judge(build(scale=slow("TP1", "moe", factor)), limits)


def test_one_outlier_fails_nothing_and_the_spread_shows_it() -> None:
    found = judge_repeats([window(1.0), window(1.5), window(1.02)], 3)
    (spread,) = found.spreads
    assert found.word == "pass"
    assert spread.values == pytest.approx((1.0, 1.5, 1.02))
    assert spread.known == pytest.approx((1.0, 1.02, 1.5))
    assert spread.median == pytest.approx(1.02)
    assert found.reason == (
        "slowdown of moe is 1.02 in the median of 3 windows (limit 1.10), from 1.00 to 1.50"
    )
    assert found.typical == 2


def test_a_median_above_the_limit_fails_and_names_the_rank() -> None:
    found = judge_repeats([window(1.3), window(1.0), window(1.2)], 3)
    assert (found.word, found.typical) == ("fail", 2)
    assert "1.20 in the median of 3 windows (limit 1.10), from 1.00 to 1.30" in found.reason
    assert "the window in the middle: TP1 is 1.20x slower" in found.reason


def test_an_even_number_takes_the_mean_of_the_middle_two() -> None:
    assert judge_repeats([window(1.0), window(1.3)], 2).word == "fail"
    assert judge_repeats([window(1.0), window(1.16)], 2).word == "pass"


@pytest.mark.parametrize(
    ("factors", "planned", "word"),
    [
        ([1.0, 1.0, None], 3, "pass"),
        ([1.5, 1.5, None], 3, "fail"),
        ([1.5, 1.0, None], 3, "inconclusive"),
        ([1.0, None, None], 3, "inconclusive"),
        ([None], 3, "inconclusive"),
        ([1.0, 1.0, 1.0], 5, "pass"),
        ([1.0, 1.0], 5, "inconclusive"),
        ([1.0], 2, "inconclusive"),
    ],
)
def test_windows_without_a_verdict_decide_nothing(
    factors: list[float | None], planned: int, word: str
) -> None:
    found = judge_repeats([window(factor) for factor in factors], planned)
    assert found.word == word
    assert len(found.spreads[0].values) == planned
    if word == "inconclusive":
        known = sum(factor is not None for factor in factors)
        assert f"only {known} of {planned} windows can be judged" in found.reason


def test_the_worst_threshold_speaks() -> None:
    both = (Threshold(limit=LIMIT), MOE)
    found = judge_repeats([window(1.4, *both), window(1.4, *both)], 2)
    assert [spread.threshold.scope for spread in found.spreads] == ["compute", "moe"]
    assert {spread.verdict for spread in found.spreads} == {"fail"}
    assert "slowdown of moe is 1.40" in found.reason


def test_a_kernel_too_small_to_fail_is_no_failure_of_all() -> None:
    kernel = Threshold(kernel="fused_moe", limit=LIMIT)
    table = build(scale=slow("TP1", "moe", 1.5))
    verdicts = [judge(table, [kernel], min_share=0.9)] * 3
    found = judge_repeats(verdicts, 3)
    assert found.word == "pass"
    assert found.spreads[0].median == pytest.approx(1.5)


def test_a_scope_of_one_rank_alone_fails_without_a_figure() -> None:
    table = build(scale=lambda rank, category, step: float(category != "moe" or rank == "TP1"))
    found = judge_repeats([judge(table, [MOE])] * 2, 2)
    assert found.word == "fail"
    assert found.spreads[0].values == (None, None)


def test_without_thresholds_every_window_must_be_whole() -> None:
    whole = judge(build(), [])
    broken = judge(build(partial=True), [])
    assert judge_repeats([whole, whole], 2).word == "pass"
    assert judge_repeats([whole, broken], 2).word == "inconclusive"
    missing = judge_repeats([whole], 2)
    assert (missing.word, missing.reason) == ("inconclusive", "1 window of 2 never opened")


@settings(deadline=None)  # the first time each window is measured
@given(
    st.lists(st.one_of(st.none(), st.sampled_from([1.0, 1.05, 1.2, 1.5])), min_size=1, max_size=7),
    st.integers(0, 3),
)
def test_a_word_holds_whatever_the_unknown_windows_would_have_shown(
    factors: list[float | None], unopened: int
) -> None:
    planned = len(factors) + unopened
    found = judge_repeats([window(factor) for factor in factors], planned)
    known = [factor for factor in factors if factor is not None]
    missing = planned - len(known)
    best = statistics.median([*known, *[-math.inf] * missing])
    worst = statistics.median([*known, *[math.inf] * missing])
    expected = "fail" if best > LIMIT else "pass" if worst <= LIMIT else "inconclusive"
    assert found.word == expected
