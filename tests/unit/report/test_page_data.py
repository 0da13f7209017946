"""What a window keeps for its page: steps, kernels, lanes. Truth by plain loops over the rows."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from pytest_sglprof._analysis.collectives import by_step, matched_collectives, waits
from pytest_sglprof._analysis.times import sum_times
from pytest_sglprof._report import series as lanes_module
from pytest_sglprof._report import series as series_module
from pytest_sglprof._report import series as spread_module
from pytest_sglprof._report.results import validate
from pytest_sglprof._report.series import kernel_spread, lanes, step_times
from pytest_sglprof._trace.table import KernelTable
from tests.support.kernel_tables import KERNELS, build, slow, table_of
from tests.support.windows import run, window

SLOW = build(("TP0", "TP1", "TP2"), steps=12, scale=slow("TP1", "moe", 1.4, from_step=6))


def rows_of(table: KernelTable) -> list[dict[str, Any]]:
    return [dict(row) for row in table.frame.astype(object).to_dict("records")]


# ---- steps -----------------------------------------------------------------------------------


def test_compute_of_every_step_and_rank() -> None:
    (series,) = step_times(SLOW, sum_times(SLOW), waits(SLOW))
    truth: dict[tuple[int, str], int] = defaultdict(int)
    for row in rows_of(SLOW):
        if row["category"] not in ("communication", "memory"):
            truth[row["step"], row["rank"]] += row["dur_ns"]
    assert series.ranks == ("TP0", "TP1", "TP2")
    assert series.numbers == list(range(12))
    for number, line in zip(series.numbers, series.compute_ns, strict=True):
        assert line == [truth[number, rank] for rank in series.ranks]
    assert series.batch_size == [8] * 12
    assert series.state == ["compared"] * 12
    assert series.every == 1


def test_steps_that_are_not_compared_are_there_and_say_why() -> None:
    table = build(steps=10)
    frame, steps = table.frame, table.steps
    # TP1 lacks step 4; of step 9 it has one activity only.
    frame = frame[~((frame["rank"] == "TP1") & (frame["step"] == 4))]
    last = (frame["rank"] == "TP1") & (frame["step"] == 9) & (frame["name"] != "gemm_kernel")
    table = replace(
        table,
        frame=frame[~last],
        steps=steps[~((steps["rank"] == "TP1") & (steps["step"] == 4))],
    )
    (series,) = step_times(table, sum_times(table), waits(table))
    assert series.state == ["compared"] * 4 + ["unmatched"] + ["compared"] * 4 + ["cut"]
    assert series.compute_ns[4] == [1_100_000, -1]
    assert series.compute_ns[9] == [1_100_000, 300_000]


def test_a_long_window_keeps_the_most_unequal_step_of_each_run(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(series_module, "MAX_CELLS", 20)

    def scale(rank: str, category: str, step: int) -> float:
        return 2.0 if rank == "TP1" and step % 5 == 3 else 1.0

    table = build(steps=50, scale=scale)
    (series,) = step_times(table, sum_times(table), waits(table))
    assert series.every == 5
    assert series.numbers == [3, 8, 13, 18, 23, 28, 33, 38, 43, 48]
    assert len(series.compute_ns) == 10


def test_a_table_without_steps_has_no_series() -> None:
    table = build(with_steps=False)
    assert step_times(table, sum_times(table), waits(table)) == ()


# ---- waits -----------------------------------------------------------------------------------


def collective_rows(*calls: tuple[str, int, int, int], name: str = "all_reduce") -> list[Any]:
    """Rows of `(rank, step, start, dur)`."""
    return [
        (rank, name, name, "communication", "kernel", "decode", step, 7, start, dur)
        for rank, step, start, dur in calls
    ]


def spans(ranks: tuple[str, ...], steps: int) -> list[Any]:
    return [
        (r, s, "decode", s * 1000, s * 1000 + 999, 8, 8, s) for r in ranks for s in range(steps)
    ]


def test_a_rank_waits_from_its_own_arrival_to_the_last() -> None:
    ranks = ("TP0", "TP1")
    rows = collective_rows(
        ("TP0", 0, 100, 500), ("TP1", 0, 400, 200), ("TP0", 0, 700, 90), ("TP1", 0, 650, 140),
        ("TP0", 1, 1100, 50), ("TP1", 1, 1100, 50),
    )  # fmt: skip
    table = table_of(rows, spans(ranks, 2), ranks)
    matched = matched_collectives(table, ranks)
    assert matched["match"].nunique() == 3
    (own,) = waits(table)
    found = by_step(own, [0, 1, 2], ranks)
    assert found is not None
    assert found.tolist() == [[300, 50], [0, 0], [0, 0]]


def test_what_cannot_be_matched_is_left_out() -> None:
    ranks = ("TP0", "TP1")
    rows = collective_rows(("TP0", 0, 100, 50), ("TP1", 0, 100, 50), ("TP0", 0, 200, 50))
    rows += collective_rows(("TP0", 1, 1100, 50), ("TP1", 1, 1200, 50))
    rows += collective_rows(("TP0", 1, 1300, 9), ("TP1", 1, 1400, 9), name="ncclDevKernel_SendRecv")
    rows += collective_rows(("TP0", 1, 1500, 9), ("TP1", 1, 1600, 9), name="nccl_all_to_all")
    table = table_of(rows, spans(ranks, 2), ranks)
    assert matched_collectives(table, ranks)["start_ns"].tolist() == [1100, 1200]
    assert matched_collectives(table, ("TP0",)).empty
    assert waits(table)[0].step.tolist() == [1]


def test_one_rank_waits_for_nobody() -> None:
    table = table_of(collective_rows(("TP0", 0, 100, 50)), spans(("TP0",), 1), ("TP0",))
    assert by_step(waits(table)[0], [0], ["TP0"]) is None


# ---- kernels ---------------------------------------------------------------------------------


def test_kernels_are_ordered_by_lost_time_and_tell_their_calls() -> None:
    (group,) = kernel_spread(SLOW, sum_times(SLOW))
    first = group.rows[0]
    assert first.name == "fused_moe_kernel"
    # 6 steps with (840, 600, 600) µs: max - mean = 160 µs.
    assert first.lost_ns == 6 * 160_000
    assert first.total_ns == [7_200_000, 6 * 600_000 + 6 * 840_000, 7_200_000]
    assert first.count == [12, 12, 12]
    assert first.quantiles[0] == [600_000] * 5
    assert first.quantiles[1][0] == 600_000
    assert first.quantiles[1][4] == 840_000
    assert first.by_step[5] == [600_000] * 3
    assert first.by_step[6] == [600_000, 840_000, 600_000]
    assert first.by_call == [[600_000, 720_000, 600_000]]
    assert len(group.rows) == len(KERNELS)


def test_the_k_th_calls_of_a_step_stand_apart() -> None:
    ranks = ("TP0", "TP1")
    rows = []
    for rank in ranks:
        for step in range(3):
            for call, ns in enumerate((100, 200 if rank == "TP0" else 600, 300)):
                start = step * 10_000 + call * 1_000
                rows.append((rank, "k", "k", "moe", "kernel", "decode", step, 7, start, ns))
    table = table_of(rows, spans(ranks, 3), ranks)
    (group,) = kernel_spread(table, sum_times(table))
    assert group.rows[0].by_call == [[100, 100], [200, 600], [300, 300]]


def test_a_kernel_of_one_rank_only() -> None:
    def scale(rank: str, category: str, step: int) -> float:
        return 0.0 if rank == "TP0" and category == "moe" else 1.0

    table = build(steps=4, scale=scale)
    (group,) = kernel_spread(table, sum_times(table))
    row = next(row for row in group.rows if row.name == "fused_moe_kernel")
    assert (row.count, row.quantiles[0]) == ([0, 4], None)
    assert row.by_call == [[-1, 600_000]]


def test_kernels_and_their_matrices_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spread_module, "MAX_KERNELS", 3)
    monkeypatch.setattr(spread_module, "MAX_CELLS", 80)
    (group,) = kernel_spread(SLOW, sum_times(SLOW))
    assert [row.by_step is not None for row in group.rows] == [True, True, False]
    assert group.left_out == len(KERNELS) - 3


# ---- lanes -----------------------------------------------------------------------------------


def test_lanes_hold_every_activity_of_their_steps() -> None:
    found = lanes(SLOW, sum_times(SLOW))
    assert [picture.why[0] for picture in found.steps] == [
        "worst",
        "second worst",
        "third worst",
    ]
    for picture in found.steps:
        shown = sorted(
            (lane.rank, lane.stream, found.names[name], picture.origin_ns + start, dur)
            for lane in picture.lanes
            for name, start, dur in zip(lane.name, lane.start_ns, lane.dur_ns, strict=True)
        )
        truth = sorted(
            (row["rank"], row["stream"], row["name"], row["start_ns"], row["dur_ns"])
            for row in rows_of(SLOW)
            if row["step"] == picture.step
        )
        assert shown == truth
        assert all(lane.start_ns == sorted(lane.start_ns) for lane in picture.lanes)
    pairs = set(zip(found.names, found.categories, strict=True))
    assert pairs == {(name, category) for name, category, _ in KERNELS}


def test_the_worst_the_median_and_the_first_after_the_onset() -> None:
    def scale(rank: str, category: str, step: int) -> float:
        return 1.0 + 0.1 * step if rank == "TP1" and category == "moe" else 1.0

    table = build(steps=20, scale=scale)
    onset = int(table.steps["start_ns"].iloc[7])
    found = lanes(table, sum_times(table), onset_ns=onset).steps
    why = {picture.step: picture.why for picture in found}
    assert why == {
        19: ("worst",),
        10: ("median",),
        7: ("first after onset",),
        18: ("second worst",),
        17: ("third worst",),
    }


def test_chosen_steps_and_calls_that_belong_together() -> None:
    found = lanes(SLOW, sum_times(SLOW), steps=[3, 7])
    assert [picture.step for picture in found.steps] == [3, 7]
    reduce = found.names.index("all_reduce")
    for picture in found.steps:
        matches = [
            [m for n, m in zip(lane.name, lane.match, strict=True) if n == reduce]
            for lane in picture.lanes
        ]
        assert matches == [[0], [0], [0]]
        others = [
            m for lane in picture.lanes for n, m in zip(lane.name, lane.match, strict=True)
            if n != reduce
        ]  # fmt: skip
        assert set(others) == {-1}


def test_lanes_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lanes_module, "MAX_EVENTS", 32)
    found = lanes(SLOW, sum_times(SLOW))  # 15 events a step
    assert [picture.dropped for picture in found.steps] == [0, 0]
    assert found.left_out == 1
    monkeypatch.setattr(lanes_module, "MAX_EVENTS", 6)
    first = lanes(SLOW, sum_times(SLOW)).steps[0]
    assert first.dropped == 9
    kept = [dur for lane in first.lanes for dur in lane.dur_ns]
    assert sorted(kept) == [300_000] * 3 + [600_000, 600_000, 840_000]


def test_without_steps_the_window_itself_is_shown() -> None:
    table = build(steps=5, with_steps=False)
    (picture,) = lanes(table, sum_times(table)).steps
    assert (picture.step, picture.why) == (None, ("the window",))
    assert sum(len(lane.name) for lane in picture.lanes) == len(table.frame)


def test_groups_share_the_eight_steps() -> None:
    ranks = tuple(f"DP{dp} TP{tp}" for dp in range(4) for tp in range(2))
    table = build(ranks, steps=9)
    found = lanes(table, sum_times(table)).steps
    assert len(found) == 8
    assert {picture.group for picture in found} == {"DP0", "DP1", "DP2", "DP3"}


# ---- the document ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "make",
    [
        lambda: SLOW,
        lambda: build(with_steps=False),
        lambda: build(("DP0 TP0", "DP1 TP1")),
        lambda: build(steps=1),
        lambda: build(silent=("TP1",)),
        lambda: build(silent=("TP0", "TP1")),
    ],
    ids=["slow", "no steps", "alone", "one step", "a silent rank", "nothing"],
)
def test_every_kind_of_window_is_valid_and_plain(make: Callable[[], KernelTable]) -> None:
    document = run([window(make())])
    validate(document)
    again = json.loads(json.dumps(document, allow_nan=False))
    assert again == document
    assert not any(isinstance(value, np.generic) for value in document["windows"][0].values())
