"""Planted faults, of which the late rank and its cause are known."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pytest_sglprof._analysis.groups import sync_groups
from pytest_sglprof._analysis.imbalance import imbalance
from pytest_sglprof._analysis.straggler import StragglerFinding, stragglers
from pytest_sglprof._server.nvml import GpuClocks
from pytest_sglprof._trace.table import KernelTable
from tests.support.planted import COLLECTIVE, Plan, window
from tests.support.recorded_clocks import recorded_clocks

FOUR = Plan(ranks=4)


def only(table: KernelTable, **options: Any) -> StragglerFinding:
    (found,) = stragglers(table, **options)
    return found


@pytest.mark.parametrize(
    ("plan", "straggler", "cause"),
    [
        (FOUR, None, None),
        (replace(FOUR, slow={(2, ""): 1.1}, slow_from=40), "TP2", "kernel"),
        (replace(FOUR, slow={(3, "gemm"): 1.3}), "TP3", "kernel"),
        (replace(FOUR, tokens={1: 1.5}), "TP1", "more_work"),
        (replace(FOUR, late={1: 30_000}), "TP1", "host_late"),
        (replace(FOUR, slow={(0, ""): 1.1}, overlap=5_000), "TP0", "kernel"),
        (replace(FOUR, slow={(2, ""): 1.1}, missing=((0, 7), (1, 50))), "TP2", "kernel"),
        # Balanced in total, another rank slow in each layer: nobody is *the* straggler.
        (Plan(ranks=3, hot=2.0, jitter=0.01), None, None),
        # Clocks apart by seconds and running apart by 20 ppm.
        (
            replace(FOUR, slow={(2, ""): 1.1}, offset={1: 3 * 10**9, 2: -(10**7)}, drift={2: 2e-5}),
            "TP2",
            "kernel",
        ),
        (replace(FOUR, offset={1: 40_000}, drift={3: 1e-5}), None, None),
    ],
)
def test_the_planted_rank_and_cause_are_named(
    plan: Plan, straggler: str | None, cause: str | None
) -> None:
    found = only(window(plan))
    assert (found.straggler, found.cause) == (straggler, cause)
    assert found.verdict == ("fail" if straggler else "pass")
    assert found.method == "arrival"


def test_twice_the_work_in_a_kernel_names_rank_and_kernel_where_sums_mislead() -> None:
    table = window(Plan(slow={(1, "moe"): 2.0}))
    found = only(table)
    first, second = found.ranks
    assert (found.straggler, found.cause) == ("TP1", "kernel")
    assert second.wait_ns < first.wait_ns
    assert second.explained_share > 0.95
    assert second.kernels[0].name == "fused_moe_kernel"
    # 299 segments lie between the 300 collectives; each has 150 µs more.
    assert second.kernels[0].ns == pytest.approx(299 * 150_000, rel=0.02)
    assert second.compute_ns - first.compute_ns == pytest.approx(299 * 150_000, rel=0.02)
    assert first.wait_ns == pytest.approx(299 * 150_000, rel=0.02)
    sums = table.frame.groupby("rank", observed=True)["dur_ns"].sum()
    assert [rank.total_ns for rank in found.ranks] == list(sums)
    assert found.totals_difference is not None
    assert found.totals_difference < 0.15


def test_clock_offsets_and_their_uncertainty_are_reported() -> None:
    found = only(window(Plan(ranks=3, offset={1: 5_000, 2: -2_000_000})))
    assert found.clock_offsets_ns is not None
    zero, one, two = found.clock_offsets_ns
    assert one - zero == pytest.approx(5_000, abs=200)
    assert two - zero == pytest.approx(-2_000_000, abs=200)
    assert found.clock_uncertainty_ns is not None
    assert 200 < found.clock_uncertainty_ns < 1_000  # ends are planted with 200 ns of noise
    assert found.transfer_ns == pytest.approx(20_000, rel=0.05)


def test_throttling_is_the_cause_only_where_the_gpu_says_so() -> None:
    table = window(Plan(slow={(1, ""): 1.1}))
    hot = GpuClocks("TP1", "GPU-1", 900.0, 700.0, throttled=True, reason="thermal")
    assert only(table, clocks=[hot]).cause == "throttled"
    assert only(table, clocks=[replace(hot, throttled=False, reason="")]).cause == "kernel"
    assert only(table, clocks=[replace(hot, rank="TP0")]).cause == "kernel"


@pytest.mark.parametrize(
    ("reasons", "cause", "word"),
    [
        (0x20, "throttled", "thermal"),
        (0x40 | 0x8 | 0x4, "throttled", "thermal"),
        (0x80 | 0x8, "throttled", "power brake"),
        (0x4, "kernel", ""),  # at its power limit, as every loaded GPU
        (0x4 | 0x8, "kernel", ""),
        (0x0, "kernel", ""),
    ],
)
def test_a_planted_throttled_gpu_is_the_cause_by_its_own_recorded_clocks(
    reasons: int, cause: str, word: str
) -> None:
    plan = replace(FOUR, throttled={2: reasons})
    clocks = recorded_clocks(plan)
    found = only(window(plan), clocks=clocks)
    assert (found.straggler, found.verdict, found.cause) == ("TP2", "fail", cause)
    assert [(one.rank, one.throttled) for one in clocks] == [
        (label, label == "TP2" and bool(word)) for label in plan.labels
    ]
    assert (f"its GPU was throttled ({word})" in found.reason) == bool(word)


def test_a_throttled_gpu_that_nobody_waits_for_is_no_cause() -> None:
    """TP1's clock says thermal, but TP3 is slow: by a kernel of its own."""
    hot = recorded_clocks(replace(FOUR, throttled={1: 0x20}))
    found = only(window(replace(FOUR, slow={(3, "gemm"): 1.3})), clocks=hot)
    assert (found.straggler, found.cause) == ("TP3", "kernel")
    assert only(window(FOUR), clocks=hot).straggler is None


def test_a_window_that_is_not_whole_blames_nobody() -> None:
    found = only(window(Plan(slow={(1, ""): 1.1})), doubt="ranks are missing: TP2")
    assert (found.straggler, found.verdict, found.cause) == (None, "inconclusive", None)
    assert found.reason == "ranks are missing: TP2"
    assert found.latest == "TP1"


@pytest.mark.parametrize(
    ("plan", "reason"),
    [
        (Plan(p2p_only=True), "only p2p communication"),
        (Plan(ranks=1), "TP0 is the only rank"),
        (Plan(steps=12, slow={(1, ""): 2.0}), "12 steps with matched collectives, 50 are needed"),
    ],
)
def test_what_cannot_be_known_is_inconclusive_with_its_figures(plan: Plan, reason: str) -> None:
    found = only(window(plan))
    assert (found.verdict, found.straggler) == ("inconclusive", None)
    assert reason in found.reason
    assert all(rank.total_ns and rank.compute_ns for rank in found.ranks)


def test_a_truncated_trace_and_an_uncertain_lateness_blame_nobody() -> None:
    table = window(Plan(slow={(1, ""): 1.5}))
    assert only(replace(table, partial=True)).verdict == "inconclusive"
    wild = only(window(Plan(ranks=8, jitter=0.6, steps=30, seed=3)))
    assert wild.straggler is None


@pytest.mark.parametrize(("held", "everywhere"), [(400_000, 1.0), (400_000, 1.2), (3_000_000, 1.0)])
def test_a_rank_held_up_inside_collectives_makes_no_straggler_of_the_other(
    held: int, everywhere: float
) -> None:
    """TP1 ends some collectives late, which makes TP0 look late: nobody is to blame."""
    table = window(Plan(slow={(1, ""): everywhere}))
    frame = table.frame.copy()
    meets = frame["full_name"].astype(str).str.contains("AllReduce") & (frame["rank"] == "TP1")
    at = frame.index[meets][::3]
    frame.loc[at, "dur_ns"] += held
    found = only(replace(table, frame=frame))
    assert found.method == "duration"
    assert (found.straggler, found.verdict, found.latest) == (None, "inconclusive", "TP0")
    assert "clocks are too uncertain" in found.reason


def test_a_moving_hot_rank_is_seen_in_segments_and_not_in_totals() -> None:
    found = imbalance(window(Plan(ranks=3, hot=2.0, jitter=0.01)))
    assert found.factor is not None
    assert found.factor < 1.01
    # 300 µs and once 150 more: 450 / 350.
    assert found.factor_sync == pytest.approx(450 / 350, rel=0.02)


def test_without_collectives_there_is_no_factor_over_segments() -> None:
    assert imbalance(window(Plan(p2p_only=True))).factor_sync is None


@given(st.permutations(range(4)), st.integers(0, 3), st.integers(0, 1000))
@settings(max_examples=8, deadline=None)
def test_permuting_ranks_permutes_the_answer(order: list[int], slow: int, seed: int) -> None:
    table = window(replace(FOUR, slow={(slow, ""): 1.1}, seed=seed))
    names = {f"TP{rank}": f"TP{order[rank]}" for rank in range(4)}
    labels = [str(rank) for rank in table.frame["rank"].cat.categories]

    def renamed(frame):
        moved = frame.copy()
        codes = moved["rank"].astype(object).map(names)
        moved["rank"] = codes.astype("category").cat.set_categories(labels, ordered=True)
        return moved

    other = KernelTable(renamed(table.frame), table.ranks, renamed(table.steps))
    one, two = only(table), only(other)
    assert one.straggler == f"TP{slow}"
    assert two.straggler == names[one.straggler]
    assert two.p_value == one.p_value
    assert two.lateness == pytest.approx(one.lateness)
    assert {names[rank.rank]: rank.wait_ns for rank in one.ranks} == pytest.approx(
        {rank.rank: rank.wait_ns for rank in two.ranks}, abs=2
    )


@given(st.integers(2, 50), st.integers(0, 1000))
@settings(max_examples=8, deadline=None)
def test_scaling_time_scales_times_and_no_share(by: int, seed: int) -> None:
    table = window(replace(FOUR, slow={(1, "gemm"): 1.3}, seed=seed))
    frame = table.frame.assign(
        start_ns=table.frame["start_ns"] * by, dur_ns=table.frame["dur_ns"] * by
    )
    one, two = only(table), only(replace(table, frame=frame))
    assert (one.straggler, two.straggler) == ("TP1", "TP1")
    assert two.lateness == pytest.approx(one.lateness, rel=1e-6)
    assert [rank.wait_ns for rank in two.ranks] == pytest.approx(
        [rank.wait_ns * by for rank in one.ranks], rel=1e-6, abs=2 * by
    )
    assert [rank.compute_ns for rank in two.ranks] == [rank.compute_ns * by for rank in one.ranks]


@pytest.mark.parametrize(
    ("labels", "groups"),
    [
        (["TP0", "TP1"], [""]),
        (["DP0 TP0", "DP0 TP1", "DP1 TP0", "DP1 TP1"], ["DP0", "DP1"]),  # replicas never meet
        (["DP0 TP0", "DP1 TP1"], [""]),  # data-parallel attention: all meet
        (["DP0", "DP1"], ["DP0", "DP1"]),
        (["PP0 TP0", "PP0 TP1", "PP1 TP0", "PP1 TP1"], ["PP0", "PP1"]),
        (["GPU0", "GPU1"], [""]),
    ],
)
def test_ranks_that_meet_form_a_sync_group(labels: list[str], groups: list[str]) -> None:
    found = sync_groups(labels)
    if labels[0].startswith("GPU"):
        assert len(found) == 1
    assert [group.label for group in found] == groups
    assert sorted(rank for group in found for rank in group.ranks) == sorted(labels)


def test_a_collective_that_a_rank_lacks_is_left_out_of_that_step_only() -> None:
    table = window(Plan(slow={(1, ""): 1.1}))
    mine = (table.frame["name"] == COLLECTIVE) & (table.frame["rank"] == "TP0")
    gone = table.frame.index[mine & (table.frame["step"] == 9)][0]
    found = only(replace(table, frame=table.frame.drop(index=gone)))
    assert (found.straggler, found.collectives, found.unmatched) == ("TP1", 297, 5)
