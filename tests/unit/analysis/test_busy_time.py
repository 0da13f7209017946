"""Figures are made of busy time: unions, counted here nanosecond by nanosecond."""

from __future__ import annotations

import statistics
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pytest_sglprof._analysis.imbalance import group_findings, imbalance
from pytest_sglprof._analysis.straggler import stragglers
from pytest_sglprof._analysis.times import sum_times
from pytest_sglprof._config.model import Threshold
from pytest_sglprof._trace.read import read_window
from pytest_sglprof._trace.table import KernelTable
from pytest_sglprof._verdict.judge import judge
from tests.support.kernel_tables import build, table_of
from tests.support.planted import Plan, window

KERNELS = (
    ("gemm_a", "gemm"),
    ("gemm_b", "gemm"),
    ("moe_a", "moe"),
    ("ncclDevKernel_AllGather", "communication"),
    ("Memcpy HtoD", "memory"),
)
Row = tuple[str, int, int, int, int]  # rank, step, kernel, start, duration
RANKS = ("TP0", "TP1", "TP2")
STEPS = 2  # of three the outer ones could be cut
ACTIVITY = st.tuples(
    st.sampled_from(RANKS),
    st.integers(0, STEPS - 1),
    st.integers(0, len(KERNELS) - 1),
    st.integers(0, 60),
    st.integers(0, 25),
)


def table(rows: list[Row]) -> KernelTable:
    listed = [
        (rank, KERNELS[k][0], *KERNELS[k], "kernel", "decode", step, 7, at, dur)
        for rank, step, k, at, dur in rows
    ]
    spans = [(rank, step, "decode", 0, 99, 1, 1, step) for rank in RANKS for step in range(STEPS)]
    return table_of(listed, spans, RANKS)


def summed(rows: list[Row], rank: str, step: int, kernels: set[int]) -> int:
    mine = [row for row in rows if row[:2] == (rank, step) and row[2] in kernels]
    return sum(dur for *_, dur in mine)


def union(rows: list[Row], rank: str, step: int, kernels: set[int]) -> int:
    covered = set()
    for who, when, kernel, at, dur in rows:
        if (who, when) == (rank, step) and kernel in kernels:
            covered.update(range(at, at + dur))
    return len(covered)


@given(st.lists(ACTIVITY, max_size=40))
@settings(max_examples=60, deadline=None)
def test_every_scope_is_the_union_of_its_own_intervals(
    rows: list[Row],
) -> None:
    (cells,) = sum_times(table(rows))
    scopes = {
        "all": {0, 1, 2, 3, 4},
        "compute": {0, 1, 2},
        "gemm": {0, 1},
        "moe": {2},
        "communication": {3},
    }
    wanted = [(scope, "", kernels) for scope, kernels in scopes.items()]
    wanted += [("all", "_a$", {0, 2}), ("all", "^gemm_b$", {1}), ("all", "gemm|Mem", {0, 1, 4})]
    for scope, kernel, kernels in wanted:
        chosen = cells.select(scope, kernel)
        truth = [[union(rows, rank, step, kernels) for rank in RANKS] for step in range(STEPS)]
        sums = [[summed(rows, rank, step, kernels) for rank in RANKS] for step in range(STEPS)]
        assert cells.matrix(chosen).tolist() == truth
        assert cells.kernel_matrix(chosen).tolist() == sums


def slowdown(times: list[list[int]]) -> float | None:
    """The typical ratio of so few steps that none is trimmed; None where a rank has no level."""
    live = [line for line in times if any(line)]
    if any(not each or not statistics.median(line) for line in live for each in line):
        return None
    levels = [
        statistics.geometric_mean([line[rank] / statistics.median(line) for line in live])
        for rank in range(len(RANKS))
    ]
    pairs = [(levels[at], levels[:at] + levels[at + 1 :]) for at in range(len(levels))]
    return max(level / statistics.median(others) for level, others in pairs)


@given(st.lists(ACTIVITY, min_size=1, max_size=40))
@settings(max_examples=40, deadline=None)
def test_figures_are_those_of_the_unions(rows: list[Row]) -> None:
    found = imbalance(table(rows), scope="gemm")
    truth = [[union(rows, rank, step, {0, 1}) for rank in RANKS] for step in range(STEPS)]
    if found.reason:
        return
    totals = [sum(column) for column in zip(*truth, strict=True)]
    assert [figure.busy_ns for figure in found.ranks] == totals
    assert [figure.total_ns for figure in found.ranks] == [
        sum(r[4] for r in rows if r[0] == rank and r[2] in (0, 1)) for rank in RANKS
    ]
    assert found.factor == pytest.approx(max(totals) / statistics.mean(totals))
    lost = sum(max(line) - statistics.mean(line) for line in truth)
    assert found.lost_ns == pytest.approx(lost, abs=1)
    assert found.lost_share == pytest.approx(lost / sum(max(line) for line in truth))
    others = statistics.median(sorted(totals)[:-1])
    assert found.others_ns == others
    if others:
        assert found.slowdown == pytest.approx(slowdown(truth) or max(totals) / others)
    cells = [(rank, step) for rank in RANKS for step in range(STEPS)]
    everything = sum(union(rows, *cell, {0, 1, 2, 3, 4}) for cell in cells)
    assert found.share_of_step == pytest.approx(sum(totals) / everything)


def test_without_steps_the_union_is_over_the_whole_window() -> None:
    rows = [("TP0", -1, 0, 0, 10), ("TP0", -1, 1, 5, 10), ("TP1", -1, 0, 0, 10)]
    rows += [("TP1", -1, 1, 20, 10), ("TP2", -1, 2, 0, 1)]
    bare = table(rows)
    (cells,) = sum_times(replace(bare, steps=bare.steps.iloc[:0]))
    assert cells.matrix(cells.select("gemm")).tolist() == [[15, 20, 0]]


@pytest.mark.parametrize("source", ["cpu_op", "nvtx"])
def test_self_times_are_summed(source: str) -> None:
    rows = [(rank, step, 0, 0, 10) for rank in RANKS for step in range(STEPS)]
    rows += [(rank, step, 1, 0, 10) for rank in RANKS for step in range(STEPS)]
    found = imbalance(replace(table(rows), source=source), scope="gemm")
    assert [figure.busy_ns for figure in found.ranks] == [40, 40, 40]
    assert [figure.busy_ns for figure in imbalance(table(rows), scope="gemm").ranks] == [20] * 3


def test_without_overlap_busy_time_is_kernel_time() -> None:
    (cells,) = sum_times(build())
    assert len(cells.times.crowd.start) == 0
    for found in group_findings(cells):
        assert [figure.busy_ns for figure in found.ranks] == [f.total_ns for f in found.ranks]


def test_sums_blame_a_rank_whose_kernels_only_overlap_more() -> None:
    """Programmatic dependent launch: TP1's kernels begin early and wait, none of it is lost."""
    overlapping = window(Plan(jitter=0.0, early={1: 20_000}))
    found = imbalance(overlapping)
    first, second = found.ranks
    assert second.total_ns / first.total_ns == pytest.approx(340 / 300, rel=1e-3)
    assert second.busy_ns == pytest.approx(first.busy_ns, rel=1e-3)
    assert found.slowdown == pytest.approx(1.0, abs=1e-3)
    assert found.lost_share == pytest.approx(0.0, abs=1e-3)
    assert judge(overlapping, [Threshold(limit=1.02)]).word == "pass"
    assert [late.verdict for late in stragglers(overlapping)] == ["pass"]
    # A category's own activities do not overlap each other, so they are longer there.
    moe = imbalance(overlapping, scope="moe")
    assert moe.slowdown == pytest.approx(170 / 150, rel=1e-3)


def test_a_slow_rank_is_found_under_overlap_with_the_true_ratio() -> None:
    plan = Plan(ranks=4, jitter=0.0, overlap=20_000, slow={(2, "moe"): 1.4})
    found = imbalance(window(plan))
    assert found.slowest == "TP2"
    # 300 µs less two overlaps of 20; the slow one has 60 more.
    assert found.slowdown == pytest.approx((260 + 60) / 260, rel=1e-3)
    sums = [figure.total_ns for figure in found.ranks]
    assert sums[2] / sums[0] == pytest.approx(360 / 300, rel=1e-3)


def test_far_apart_clocks_and_long_windows_stay_exact() -> None:
    day = 86_400 * 10**9
    rows = [(rank, step, 0, step * day, 10) for rank in RANKS for step in range(STEPS)]
    rows += [(rank, step, 1, step * day + 5, 10) for rank in RANKS for step in range(STEPS)]
    (cells,) = sum_times(table(rows))
    assert (cells.matrix(cells.select("gemm")) == np.full((STEPS, 3), 15)).all()


@pytest.mark.parametrize("name", ["sglang_Qwen3-8B_decode", "sglang_Qwen3-8B_prefilldecode"])
def test_a_real_gpu_trace_has_the_unions_of_a_sweep(shared_data: Path, name: str) -> None:
    table = read_window([shared_data / "torch" / "sglang-mi300x" / f"{name}.json.gz"])
    (cells,) = sum_times(table)
    frame = table.frame.sort_values("start_ns")
    for scope in ("all", "compute", "gemm", "attention"):
        mine = frame
        if scope == "compute":
            mine = frame[~frame["category"].isin(["communication", "memory"])]
        elif scope != "all":
            mine = frame[frame["category"] == scope]
        busy, reached = dict.fromkeys(cells.steps.numbers, 0), dict.fromkeys(cells.steps.numbers, 0)
        for step, start, dur in zip(mine["step"], mine["start_ns"], mine["dur_ns"], strict=True):
            if step in busy:
                busy[step] += max(0, start + dur - max(start, reached[step]))
                reached[step] = max(reached[step], start + dur)
        assert busy
        assert cells.matrix(cells.select(scope))[:, 0].tolist() == list(busy.values())
