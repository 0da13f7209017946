from __future__ import annotations

import statistics

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pytest_sglprof._config.model import Threshold
from pytest_sglprof._config.thresholds import default_thresholds, thresholds_from_keywords
from pytest_sglprof._report.terminal import spike_lines
from pytest_sglprof._trace.table import KernelTable
from pytest_sglprof._verdict.judge import Verdict, judge
from pytest_sglprof._verdict.reasons import headline
from tests.support.kernel_tables import KERNELS, build, slow
from tests.support.planted import Plan, window

MOE = Threshold(scope="moe", limit=1.10)
FOUR = ("DP0 TP0", "DP0 TP1", "DP1 TP0", "DP1 TP1")


def words(verdict: Verdict) -> list[str]:
    return [judgement.verdict for judgement in verdict.judgements]


def test_a_failure_names_rank_scope_figures_limit_and_kernel() -> None:
    verdict = judge(build(scale=slow("TP1", "moe", 1.39)), [MOE])
    assert verdict.word == "fail"
    assert verdict.reason == (
        "TP1 is 1.39x slower than its peers in moe (limit 1.10): 41.7 ms against 30.0 ms "
        "over 50 steps, slowest in 100 % of the steps, with the same work; fused_moe_kernel alone "
        "accounts for 11.7 ms of the difference"
    )
    assert verdict.judgements[0].value == pytest.approx(1.39)


def test_a_failure_of_compute_names_the_category_too() -> None:
    verdict = judge(build(scale=slow("TP1", "moe", 1.4)), default_thresholds())
    assert "in compute (limit 1.05)" in verdict.reason
    assert (
        "most of all in moe: fused_moe_kernel alone accounts for 12.0 ms of the difference"
        in verdict.reason
    )


def test_a_kernel_that_costs_more_than_the_whole_difference_is_said_so() -> None:
    factors = {"moe": 1.5, "gemm": 0.7}
    table = build(scale=lambda rank, c, s: factors.get(c, 1.0) if rank == "TP1" else 1.0)
    assert (
        "fused_moe_kernel alone takes 15.0 ms longer" in judge(table, default_thresholds()).reason
    )


def test_a_balanced_window_passes_with_its_figures() -> None:
    verdict = judge(build(scale=slow("TP1", "moe", 1.02)), [MOE])
    assert verdict.word == "pass"
    assert verdict.reason == (
        "TP1 is 1.02x slower than its peers in moe (limit 1.10): 30.6 ms against 30.0 ms "
        "over 50 steps; at most 1.020 in this window"
    )
    assert judge(build(), [MOE]).reason == (
        "no rank is slower in moe (1.00, limit 1.10) over 50 steps; at most 1.000 in this window"
    )


@pytest.mark.parametrize(
    ("metric", "limit", "reason"),
    [
        ("slowdown", 1.10, "no rank is slower in moe (1.00, limit 1.10) over 50 steps"),
        (
            "imbalance_factor",
            1.10,
            "no rank takes longer than the mean in moe (1.00, limit 1.10) over 50 steps",
        ),
        (
            "lost_share",
            0.05,
            "0.05 % of the time in moe is lost to imbalance (limit 5.00 %): 15.0 µs over 50 steps",
        ),
        ("slowdown", 1.002, "TP1 is 1.001x slower than its peers in moe (limit 1.002): 30.0 ms"),
    ],
)
def test_a_figure_is_said_in_words_where_it_reads_like_equal_ranks(
    metric: str, limit: float, reason: str
) -> None:
    """TP1 takes 0.1 % longer, which two digits do not show unless the limit is as near."""
    verdict = judge(build(scale=slow("TP1", "moe", 1.001)), [Threshold(metric, limit, "moe")])
    assert verdict.reason.startswith(reason)


def test_nothing_is_lost_among_equal_ranks() -> None:
    verdict = judge(build(), [Threshold("lost_share", 0.05, "moe")])
    assert verdict.reason.startswith(
        "no time in moe is lost to imbalance (0.00 %, limit 5.00 %) over 50 steps"
    )


@pytest.mark.parametrize(
    ("threshold", "line"),
    [
        (MOE, "TP1 1.40x slower in moe (limit 1.10), fused_moe_kernel +12.0 ms"),
        (
            Threshold("imbalance_factor", 1.1, "moe"),
            "imbalance_factor of moe 1.17 (limit 1.10): TP1, fused_moe_kernel +12.0 ms",
        ),
    ],
)
def test_a_failure_in_one_line(threshold: Threshold, line: str) -> None:
    verdict = judge(build(scale=slow("TP1", "moe", 1.4)), [threshold])
    assert verdict.deciding is not None
    assert verdict.word == "fail"
    assert headline(verdict.deciding.measured, threshold) == line


def test_spikes_are_judged_by_a_metric_of_their_own() -> None:
    """A rank of which six steps take three times as long is not slow throughout."""
    late = (3, 11, 20, 31, 38, 46)
    table = build(
        scale=lambda rank, c, step: 3.0 if rank == "TP1" and c == "moe" and step in late else 1.0
    )
    assert judge(table, [MOE]).word == "pass"
    verdict = judge(table, [Threshold("spike_share", 0.01, scope="moe")], min_steps=50)
    (judgement,) = verdict.judgements
    finding = judgement.finding
    assert finding is not None
    assert (finding.spike_rank, finding.spike_steps, finding.spike_steps_of_all) == ("TP1", 6, 6)
    # Six steps of 1.8 ms instead of 0.6, of 44 · 0.6 + 6 · 1.8 in all.
    assert judgement.value == pytest.approx(6 * 1.2 / (44 * 0.6 + 6 * 1.8))
    assert "TP1 loses 19.35 % of the time in moe in spikes (limit 1.00 %)" in verdict.reason
    assert "it has 6 of the 6 steps above 1.3 times its usual over 50 steps" in verdict.reason
    assert verdict.word == "fail"
    assert spike_lines(finding) == [
        "spikes: TP1 has 6 of the 6 steps above 1.3 times the usual; they take 19.4 % of the time"
    ]


def test_what_noise_alone_loses_is_not_judged() -> None:
    times = np.random.default_rng(0).normal(1.0, 0.05, (50, 2))
    table = build(scale=lambda rank, c, step: float(times[step, int(rank[2:])]))
    (judgement,) = judge(table, [Threshold("lost_share", 0.02)]).judgements
    finding = judgement.finding
    assert finding is not None
    assert finding.lost_share is not None
    assert finding.lost_share > 0.02
    assert judgement.value is not None
    assert judgement.value < 0.01
    assert "is what noise alone loses" in judgement.reason


def test_exactly_the_limit_passes() -> None:
    table = build(scale=slow("TP1", "moe", 1.5))
    assert judge(table, [Threshold(scope="moe", limit=1.5)]).word == "pass"
    above = judge(table, [Threshold(scope="moe", limit=1.4999)])
    assert above.word == "fail"
    assert "1.5000x" in above.reason


def test_every_metric_is_judged_and_told() -> None:
    table = build(scale=slow("TP1", "moe", 1.4))
    keywords = {"imbalance_factor": {"moe": 1.1}, "lost_share": {"moe": 0.05}}
    verdict = judge(table, thresholds_from_keywords(keywords, "marker"))
    factor, lost = verdict.judgements
    assert factor.reason.startswith(
        "the imbalance factor of moe is 1.17 (limit 1.10): TP1 has 42.0 ms, the mean is 36.0 ms "
        "over 50 steps; TP1 takes 12.0 ms longer, slowest in 100 % of the steps"
    )
    assert lost.reason.startswith(
        "14.29 % of the time in moe is lost to imbalance (limit 5.00 %): 6.00 ms over 50 steps"
    )
    assert words(verdict) == ["fail", "fail"]


def test_the_worst_failure_comes_first_and_the_others_by_their_figures() -> None:
    table = build(scale=slow("TP1", "moe", 1.4))
    verdict = judge(table, (*default_thresholds(), MOE, Threshold(scope="rope")))
    assert verdict.word == "fail"
    assert verdict.deciding is not None
    assert verdict.deciding.threshold == MOE
    assert verdict.reason.startswith("TP1 is 1.40x slower than its peers in moe")
    assert "also beyond their limits: slowdown of compute 1.22 (limit 1.05)" in verdict.reason
    assert verdict.reason.endswith("not judged: no activity of rope")


@pytest.mark.parametrize(
    ("table", "reason"),
    [
        (build(steps=49), "49 steps with compute, 50 are needed for a verdict"),
        (build(("TP0",)), "TP0 is the only rank with this input"),
        (build(silent=["TP1"]), "TP1 recorded no activity"),
        (build(partial=True), "a trace of this window is truncated"),
        (build(with_steps=False), "no step markers in the trace"),
        (build(()), "the window has no rank"),
        (None, "the window left nothing to read"),
    ],
)
def test_too_little_data_is_inconclusive_however_bad_the_figures(
    table: KernelTable | None, reason: str
) -> None:
    verdict = judge(table, default_thresholds())
    assert verdict.word == "inconclusive"
    assert reason in verdict.reason


def test_steps_without_the_scope_do_not_count_for_it() -> None:
    table = build(steps=50, scale=lambda rank, c, step: 0.0 if c == "moe" and step > 9 else 1.0)
    assert judge(table, [MOE]).reason.startswith("10 steps with moe, 50 are needed")
    assert judge(table, default_thresholds()).word == "pass"
    assert judge(table, [MOE], min_steps=10).word == "pass"


def test_dropped_steps_are_counted_in_the_reason() -> None:
    whole = build(steps=30)
    spans = whole.steps[~((whole.steps["rank"] == "TP1") & (whole.steps["step"] == 3))]
    table = KernelTable(whole.frame, whole.ranks, spans)
    reason = judge(table, default_thresholds()).reason
    assert reason.endswith("(1 step dropped: not whole on every rank)")


def test_min_steps_zero_accepts_a_table_without_steps() -> None:
    table = build(with_steps=False, scale=slow("TP0", "gemm", 2.0))
    verdict = judge(table, default_thresholds(), min_steps=0)
    assert verdict.word == "fail"
    assert "over the whole window" in verdict.reason


def test_a_missing_rank_outranks_every_failure() -> None:
    table = build(scale=slow("TP1", "moe", 3.0))
    for keywords in (
        {"missing_ranks": ["TP2"]},
        {"expected_ranks": ["TP0", "TP1", "TP2"]},
    ):
        verdict = judge(table, [MOE, *default_thresholds()], **keywords)
        assert words(verdict) == ["inconclusive", "inconclusive"]
        assert "missing: TP2" in verdict.reason
    assert judge(table, [MOE], expected_ranks=["DP0 TP0", "PP0 TP1"]).word == "fail"
    assert "node-7" in judge(table, [MOE], expected_ranks=["TP0", "node-7"]).reason


def test_an_incomplete_window_says_why() -> None:
    verdict = judge(None, [MOE], incomplete_reason="the server died: out of memory")
    assert (verdict.word, verdict.reason) == ("inconclusive", "the server died: out of memory")
    assert verdict.judgements[0].finding is None
    verdict = judge(build(), [], missing_ranks=["TP9"], expected_ranks=["TP0", "TP9"])
    assert verdict.reason == "1 rank of 2 missing: TP9"


def test_a_failing_replica_fails_though_another_is_idle() -> None:
    table = build(FOUR, silent=FOUR[:2], scale=slow("DP1 TP1", "moe", 1.4))
    verdict = judge(table, [MOE])
    assert words(verdict) == ["inconclusive", "fail"]
    assert verdict.word == "fail"
    assert verdict.reason.startswith("DP1 TP1 is 1.40x slower")
    assert verdict.reason.endswith(
        "not judged: DP0: replicas that never meet: DP0, DP1; DP0 had no pass"
    )
    assert judge(build(FOUR, silent=FOUR[:2]), [MOE]).word == "inconclusive"


def test_a_scope_on_one_rank_only_fails_but_another_kernel_does_not() -> None:
    table = build(scale=slow("TP0", "moe", 0.0))
    verdict = judge(table, [MOE])
    assert (verdict.word, verdict.judgements[0].value) == ("fail", None)
    assert verdict.reason == "only TP1 has any moe: 30.0 ms over 50 steps"
    kernel = judge(table, [Threshold(kernel="fused_moe")])
    assert kernel.word == "inconclusive"
    assert "another kernel for the same work" in kernel.reason


def test_a_kernel_too_small_to_matter_is_listed_but_cannot_fail() -> None:
    kernels = (*KERNELS, ("tiny_kernel", "elementwise", 4_000))
    table = build(kernels=kernels, scale=slow("TP1", "elementwise", 3.0))
    threshold = Threshold(kernel="tiny", limit=1.1)
    verdict = judge(table, [threshold])
    assert verdict.word == "pass"
    assert verdict.judgements[0].value == pytest.approx(3.0)
    assert "0.72 % of compute it is too small to fail (below 1 %)" in verdict.reason
    assert judge(table, [threshold], min_share=0.0).word == "fail"
    assert judge(table, [Threshold(scope="elementwise")]).word == "fail"


def test_nothing_to_judge_passes_and_says_so() -> None:
    verdict = judge(build(), [])
    assert verdict.word == "pass"
    assert "no threshold is set" in verdict.reason
    assert verdict.deciding is None


def test_thresholds_of_lives_alone_are_set_although_they_judge_no_ranks() -> None:
    verdict = judge(build(), [Threshold(metric="regression", limit=1.05)])
    assert (verdict.word, verdict.reason) == ("pass", "no threshold compares its ranks")
    both = judge(build(), [Threshold(metric="regression", limit=1.05), Threshold()])
    assert "no threshold" not in both.reason


@given(
    st.integers(2, 6),
    st.integers(0, 5),
    st.floats(0.2, 5.0),
    st.floats(1.0, 3.0),
)
@settings(max_examples=25, deadline=None)
def test_fail_exactly_when_a_planted_slowdown_is_above_the_limit(
    size: int, at: int, factor: float, limit: float
) -> None:
    ranks = tuple(f"TP{number}" for number in range(size))
    slowed = ranks[at % size]
    table = build(ranks, steps=50, scale=slow(slowed, "moe", factor))
    verdict = judge(table, [Threshold(scope="moe", limit=limit)])
    totals = sorted(round(600_000 * (factor if rank == slowed else 1.0)) for rank in ranks)
    truth = totals[-1] / statistics.median(totals[:-1])
    assert verdict.word == ("fail" if truth > limit else "pass")
    assert verdict.deciding is not None
    assert verdict.deciding.finding is not None
    if factor > 1.001:
        assert verdict.deciding.finding.slowest == slowed


def test_one_faster_rank_of_three_blames_the_others_together() -> None:
    verdict = judge(build(("TP0", "TP1", "TP2"), scale=slow("TP1", "moe", 0.5)), [MOE])
    assert verdict.reason == (
        "TP0, TP2 are equally 1.33x slower than their peers in moe (limit 1.10): 30.0 ms against "
        "22.5 ms over 50 steps"
    )


@pytest.mark.parametrize("seed", [0, 1, 6])
def test_the_level_of_failures_holds_for_all_thresholds_together(seed: int) -> None:
    """Holm 1979: what fails alone may be chance among twenty, unless the others fail too."""
    plan = Plan(ranks=4, steps=60, layers=1, jitter=0.05, seed=seed, slow={(3, ""): 1.08})
    table, limit = window(plan), Threshold(limit=1.05)
    assert judge(table, [limit]).word == "fail"
    never = [Threshold(limit=2.0 + number) for number in range(20)]
    assert judge(table, [limit, *never]).judgements[0].verdict == "inconclusive"
    surely = [Threshold(limit=1.001 + number * 1e-6) for number in range(20)]
    assert words(judge(table, [limit, *surely])) == ["fail"] * 21
