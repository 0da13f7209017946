from __future__ import annotations

import math
import statistics
from dataclasses import replace
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pytest_sglprof._analysis.imbalance import (
    KernelTime,
    all_findings,
    imbalance,
    imbalance_of_groups,
    steps_per_rank,
)
from pytest_sglprof._analysis.times import sum_times
from pytest_sglprof._trace.table import KernelTable
from tests.support.kernel_tables import KERNELS, build, slow, table_of

COMPUTE_NS = sum(ns for _, category, ns in KERNELS if category not in ("communication", "memory"))


def test_a_slow_category_is_found_with_its_exact_figures() -> None:
    table = build(scale=slow("TP1", "moe", 1.4))
    moe = imbalance(table, scope="moe")
    assert moe.slowest == "TP1"
    assert moe.slowdown == pytest.approx(1.4)
    assert moe.factor == pytest.approx(1.4 / 1.2)
    assert moe.lost_ns == 50 * (840_000 - 720_000)
    assert moe.lost_share == pytest.approx(120 / 840)
    assert [figure.total_ns for figure in moe.ranks] == [50 * 600_000, 50 * 840_000]
    assert [figure.slowest_share for figure in moe.ranks] == [0.0, 1.0]
    assert moe.contributors == (KernelTime("fused_moe_kernel", 50 * 240_000.0),)
    assert moe.share_of_compute == pytest.approx(1_440_000 / (2 * COMPUTE_NS + 240_000))
    assert (moe.steps, moe.compared_steps, moe.dropped_steps) == (50, 50, 0)


def test_compute_leaves_out_communication_and_memory() -> None:
    table = build(scale=slow("TP0", "communication", 9.0))
    compute = imbalance(table)
    assert compute.ranks[0].total_ns == 50 * COMPUTE_NS
    assert compute.slowdown == 1.0
    assert compute.slowest is None
    communication = imbalance(table, scope="communication")
    assert (communication.slowest, communication.slowdown) == ("TP0", 9.0)
    everything = imbalance(table, scope="all")
    assert everything.ranks[1].total_ns == 50 * sum(ns for _, _, ns in KERNELS)


def test_the_median_of_the_others_ignores_the_slowest_itself() -> None:
    factors = {"TP0": 1.0, "TP1": 1.2, "TP2": 2.0, "TP3": 1.1}
    table = build(tuple(factors), scale=lambda rank, category, step: factors[rank])
    found = imbalance(table, scope="gemm")
    assert found.slowest == "TP2"
    assert found.slowdown == pytest.approx(2.0 / 1.1)
    assert found.factor == pytest.approx(2.0 / statistics.mean(factors.values()))


def test_a_slowness_that_moves_between_ranks_shows_as_lost_time_only() -> None:
    """Totals are equal, yet in every step one rank waits for the other."""
    table = build(scale=lambda rank, category, step: 2.0 if step % 2 == int(rank[2]) else 1.0)
    found = imbalance(table)
    assert found.slowdown == 1.0
    assert found.factor == 1.0
    assert found.lost_share == pytest.approx(0.25)
    assert [figure.slowest_share for figure in found.ranks] == [0.5, 0.5]


def test_contributors_are_ordered_and_split_by_category() -> None:
    factors = {"moe": 1.1, "gemm": 1.5}
    table = build(scale=lambda rank, c, step: factors.get(c, 1.0) if rank == "TP1" else 1.0)
    found = imbalance(table)
    assert [(item.name, item.ns) for item in found.contributors] == [
        ("gemm_kernel", 7_500_000.0),
        ("fused_moe_kernel", 3_000_000.0),
    ]
    assert [item.name for item in found.category_contributors] == ["gemm", "moe"]


def test_a_stage_is_measured_on_its_own_steps() -> None:
    table = build(
        stage=lambda step: "prefill" if step < 10 else "decode",
        scale=lambda rank, c, step: 3.0 if rank == "TP1" and step < 10 else 1.0,
    )
    assert imbalance(table, stage="prefill").slowdown == 3.0
    assert imbalance(table, stage="prefill").steps == 10
    assert imbalance(table, stage="decode").slowdown == 1.0
    assert imbalance(table, stage="decode").compared_steps == 40
    assert imbalance(table, stage="verify").reason == "no verify step is whole on all of TP0, TP1"


def test_a_kernel_expression_sums_all_that_it_finds() -> None:
    table = build(scale=slow("TP0", "moe", 1.5))
    found = imbalance(table, kernel="^(fused_moe|gemm)_kernel$")
    assert found.ranks[0].total_ns == 50 * 1_200_000
    assert found.ranks[1].total_ns == 50 * 900_000
    assert imbalance(table, kernel="nothing").reason == "no activity of a kernel like /nothing/"


def test_steps_that_a_rank_lacks_are_dropped_and_counted() -> None:
    whole = build(steps=50)
    without = ~((whole.frame["rank"] == "TP1") & (whole.frame["step"] == 7))
    frame = whole.frame[without]
    spans = whole.steps[~((whole.steps["rank"] == "TP1") & (whole.steps["step"] == 7))]
    table = type(whole)(frame, whole.ranks, spans)
    found = imbalance(table)
    assert (found.steps, found.dropped_steps, found.slowdown) == (49, 1, 1.0)
    assert steps_per_rank(table) == {"TP0": 50, "TP1": 49}


def test_a_step_cut_by_the_edge_of_the_window_is_dropped() -> None:
    whole = build(steps=40)
    cut = (whole.frame["rank"] == "TP0") & (whole.frame["step"] == 0)
    cut &= whole.frame["category"].isin(["moe", "gemm"])
    table = type(whole)(whole.frame[~cut], whole.ranks, whole.steps)
    found = imbalance(table)
    assert (found.compared_steps, found.dropped_steps, found.slowdown) == (39, 1, 1.0)


def test_fewer_kernels_in_every_step_are_no_cut() -> None:
    whole = build(steps=40)
    absent = (whole.frame["rank"] == "TP0") & whole.frame["category"].isin(["moe"])
    table = type(whole)(whole.frame[~absent], whole.ranks, whole.steps)
    assert imbalance(table).dropped_steps == 0


def test_a_step_of_two_stages_is_not_compared() -> None:
    table = build(steps=10)
    table.steps.loc[table.steps["rank"] == "TP1", "stage"] = "prefill"
    found = imbalance(table)
    assert found.reason == "no step is whole on all of TP0, TP1"
    assert found.dropped_steps == 10


def test_without_steps_totals_are_compared_and_that_is_said() -> None:
    found = imbalance(build(with_steps=False, scale=slow("TP1", "moe", 1.4)))
    assert not found.has_steps
    assert (found.steps, found.compared_steps) == (None, None)
    assert found.slowdown == pytest.approx(1_340 / 1_100)
    assert found.lost_ns == 50 * 120_000
    assert {figure.slowest_share for figure in found.ranks} == {None}
    staged = imbalance(build(with_steps=False), stage="decode")
    assert staged.reason == "the table has no steps, so decode steps cannot be selected"


def test_steps_known_only_from_the_rows_are_used() -> None:
    table = build(steps=35)
    bare = type(table)(table.frame, table.ranks, table.steps.iloc[:0])
    assert imbalance(bare).steps == 35


def test_kernel_time_outside_all_steps_is_not_compared() -> None:
    table = build(steps=40)
    table.frame.loc[table.frame["step"] < 10, "step"] = -1
    found = imbalance(table)
    assert (found.steps, found.compared_steps) == (30, 40)
    table.frame.loc[table.frame["step"] < 30, "step"] = -1
    assert imbalance(table).reason == "only 25 % of the compute time belongs to a known step"


def test_scheduler_ranges_between_steps_are_no_lost_kernels() -> None:
    table = build(steps=40)
    table.frame.loc[table.frame["step"] < 35, "step"] = -1
    assert "belongs to a known step" in imbalance(table).reason
    assert imbalance(replace(table, source="nvtx")).reason == ""


def test_waiting_for_requests_between_steps_is_no_reason_to_doubt() -> None:
    table = build(steps=40, scale=lambda r, c, step: 99.0 if c == "communication" else 1.0)
    between = (table.frame["category"] == "communication") & (table.frame["step"] < 35)
    table.frame.loc[between, "step"] = -1
    assert imbalance(table).reason == ""


def test_an_idle_replica_has_no_step_while_another_has() -> None:
    table = build(("DP0 TP0", "DP0 TP1", "DP1 TP0", "DP1 TP1"))
    idle = table.frame["rank"].isin(["DP0 TP0", "DP0 TP1"])
    table.frame.loc[idle, "step"] = -1
    steps = table.steps[~table.steps["rank"].isin(["DP0 TP0", "DP0 TP1"])]
    cells = sum_times(KernelTable(table.frame, table.ranks, steps))
    reasons = [found.reason for found in imbalance_of_groups(cells)]
    assert reasons == ["replicas that never meet: DP0, DP1; DP0 had no pass", ""]


@pytest.mark.parametrize(
    ("table", "reason"),
    [
        (
            build(("TP0",)),
            "TP0 is the only rank with this input, so it has no peer to compare with",
        ),
        (build(silent=["TP1"]), "TP1 recorded no activity"),
        (build(silent=["TP0", "TP1"]), "no rank recorded any activity"),
        (build(steps=0), "no rank recorded any activity"),
        (build(()), "no rank at all"),
    ],
)
def test_where_nothing_can_be_compared_there_are_no_figures_but_a_reason(table, reason) -> None:
    found = imbalance(table)
    assert found.reason == reason
    figures = (found.slowdown, found.factor, found.lost_share, found.slowest, found.others_ns)
    assert figures == (None,) * 5
    assert found.lost_ns == 0


def test_activities_of_no_duration_are_no_activity_of_the_scope() -> None:
    rows = [(rank, "k", "k", "gemm", "kernel", "decode", 0, 7, 0, 0) for rank in ("TP0", "TP1")]
    spans = [(rank, 0, "decode", 0, 9, 1, 1, 0) for rank in ("TP0", "TP1")]
    found = imbalance(table_of(rows, spans, ("TP0", "TP1")))
    assert (found.reason, found.slowdown, found.factor) == ("no activity of compute", None, None)


def test_a_rank_that_alone_has_the_scope_has_no_ratio_but_a_name() -> None:
    table = build(scale=slow("TP0", "moe", 0.0))
    found = imbalance(table, scope="moe")
    assert (found.slowest, found.slowdown, found.others_ns) == ("TP1", None, 0.0)
    assert found.factor == 2.0


def test_the_worst_of_several_work_groups_answers() -> None:
    ranks = ("DP0 TP0", "DP0 TP1", "DP1 TP0", "DP1 TP1")
    found = imbalance(build(ranks, scale=slow("DP1 TP0", "gemm", 1.5)), scope="gemm")
    assert (found.group, found.slowest) == ("DP1", "DP1 TP0")
    one_sided = build(ranks, scale=slow("DP0 TP0", "gemm", 0.0))
    assert imbalance(one_sided, scope="gemm").group == "DP0"


def test_all_findings_list_scopes_then_kernels_of_each_group() -> None:
    ranks = ("DP0 TP0", "DP0 TP1", "DP1 TP0", "DP1 TP1")
    findings = all_findings(build(ranks, scale=slow("DP1 TP0", "gemm", 1.5)))
    assert len(findings) == 2 * (1 + len(KERNELS) + len(KERNELS))
    first = findings[: len(findings) // 2]
    assert [f.scope for f in first if not f.kernel] == [
        "compute", "communication", "moe", "gemm", "attention", "memory",
    ]  # fmt: skip
    assert [f.kernel for f in first if f.kernel] == [name for name, _, _ in KERNELS]
    slowed = [f for f in findings if f.slowdown and f.slowdown > 1.01]
    assert {(f.group, f.scope, f.kernel) for f in slowed} == {
        ("DP1", "compute", ""),
        ("DP1", "gemm", ""),
        ("DP1", "gemm", "gemm_kernel"),
    }


durations = st.lists(
    st.lists(st.integers(0, 10**9), min_size=4, max_size=4), min_size=1, max_size=6
)


def _table(matrix: list[list[int]], ranks: list[str]):
    """One gemm kernel a step and rank; durations by `matrix[step][rank]`."""
    rows = [
        (rank, "k", "k", "gemm", "kernel", "decode", step, 7, 0, ns)
        for step, line in enumerate(matrix)
        for rank, ns in zip(ranks, line, strict=True)
    ]
    spans = [
        (rank, step, "decode", 0, 1, 1, 1, step) for step in range(len(matrix)) for rank in ranks
    ]
    return table_of(rows, spans, ranks)


RANKS = ["TP0", "TP1", "TP2", "TP3"]


def _level(matrix: list[list[int]], rank: int) -> float:
    """By plain Python; NaN where a step has none of the rank, or of half of all."""
    logs = []
    for line in filter(any, matrix):
        middle = statistics.median(line)
        logs.append(math.log(line[rank] / middle) if line[rank] and middle else math.nan)
    if any(map(math.isnan, logs)):
        return math.nan
    cut = len(logs) // 5
    return math.exp(statistics.fmean(sorted(logs)[cut : len(logs) - cut]))


@given(durations)
@settings(max_examples=25, deadline=None)
def test_figures_equal_an_independent_exact_computation(matrix: list[list[int]]) -> None:
    found = imbalance(_table(matrix, RANKS))
    totals = [sum(line[at] for line in matrix) for at in range(4)]
    if not any(totals):
        assert found.slowdown is None
        return
    slowest = max(totals)
    lost = sum(max(line) - Fraction(sum(line), 4) for line in matrix)
    assert [figure.total_ns for figure in found.ranks] == totals
    assert found.factor == pytest.approx(float(Fraction(4 * slowest, sum(totals))))
    assert found.lost_ns == pytest.approx(float(lost), abs=1)
    assert found.lost_share == pytest.approx(float(lost / sum(max(line) for line in matrix)))
    levels = [_level(matrix, at) for at in range(4)]
    if all(map(math.isfinite, levels)):
        beside = [levels[at] / sorted(levels[:at] + levels[at + 1 :])[1] for at in range(4)]
        assert found.slowdown == pytest.approx(max(beside))


@given(durations, st.permutations(range(4)))
@settings(max_examples=20, deadline=None)
def test_permuting_ranks_permutes_the_answer(matrix: list[list[int]], order: list[int]) -> None:
    one = imbalance(_table(matrix, RANKS))
    two = imbalance(_table([[line[at] for at in order] for line in matrix], RANKS))
    renamed = {RANKS[at]: RANKS[place] for place, at in enumerate(order)}
    assert two.slowest == (renamed[one.slowest] if one.slowest else None)
    assert (two.slowdown, two.lost_ns, two.lost_share) == (
        one.slowdown,
        one.lost_ns,
        one.lost_share,
    )
    figures = {renamed[f.rank]: (f.total_ns, f.slowest_share) for f in one.ranks}
    assert figures == {f.rank: (f.total_ns, f.slowest_share) for f in two.ranks}


@given(durations, st.integers(2, 1000))
@settings(max_examples=20, deadline=None)
def test_scaling_time_scales_times_and_no_ratio(matrix: list[list[int]], by: int) -> None:
    one = imbalance(_table(matrix, RANKS))
    two = imbalance(_table([[ns * by for ns in line] for line in matrix], RANKS))
    assert [f.total_ns for f in two.ranks] == [f.total_ns * by for f in one.ranks]
    assert two.slowest == one.slowest
    assert two.lost_ns == pytest.approx(one.lost_ns * by, abs=by)
    for name in ("slowdown", "factor", "lost_share"):
        before, after = getattr(one, name), getattr(two, name)
        assert after == (None if before is None else pytest.approx(before, rel=1e-9))
