"""Calls of a collective that belong together, by process group and number or by order."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from pytest_sglprof._analysis.collectives import COLUMNS, matched_collectives, waits
from pytest_sglprof._analysis.straggler import stragglers
from pytest_sglprof._trace.table import KernelTable
from tests.support.kernel_tables import table_of
from tests.support.planted import COLLECTIVE, Plan, window

RANKS = ("TP0", "TP1", "TP2", "TP3")
PLAN = Plan(ranks=4, slow={(1, ""): 1.1})


def numbered(table: KernelTable, group: str = "3", **more: object) -> KernelTable:
    """A planted window whose every collective has its group and its number in it."""
    meets = table.frame[table.frame["name"] == COLLECTIVE]
    number = meets.groupby("rank", observed=True).cumcount()
    told = {"process_group": group, "sequence": number.astype(np.int64), **more}
    return replace(table, collectives=pd.DataFrame(told, index=meets.index))


def without(table: KernelTable, *lost: tuple[str, int, int]) -> KernelTable:
    """The table without the k-th collective of a step of a rank."""
    frame = table.frame
    gone = []
    for rank, step, call in lost:
        mine = (frame["name"] == COLLECTIVE) & (frame["rank"] == rank) & (frame["step"] == step)
        gone.append(frame.index[mine][call])
    return replace(table, frame=frame.drop(index=gone))


def starts(table: KernelTable) -> set[tuple[int, ...]]:
    (found,) = waits(table)
    return {tuple(row) for row in found.start.tolist()}


@pytest.mark.parametrize(
    "lost",
    [
        [("TP2", 9, 1)],
        [("TP0", 9, 0), ("TP3", 9, 2), ("TP1", 40, 1)],
        [("TP0", 9, 0), ("TP1", 9, 1), ("TP2", 9, 2), ("TP3", 9, 0)],  # as many on every rank
    ],
)
def test_by_number_only_the_missing_call_is_left_out(lost: list[tuple[str, int, int]]) -> None:
    table = window(PLAN)
    whole = starts(table)
    assert len(whole) == 300
    damaged = without(numbered(table), *lost)
    (found,) = waits(damaged)
    missing = len({(step, call) for _, step, call in lost})
    assert starts(damaged) < whole  # nothing is shifted
    assert len(found.step) == 300 - missing
    assert found.unmatched == 4 * missing - len(lost)
    (verdict,) = stragglers(damaged)
    assert (verdict.straggler, verdict.collectives) == ("TP1", 300 - missing)


def test_by_order_the_name_is_left_out_of_the_step() -> None:
    table = window(PLAN)
    damaged = without(table, ("TP2", 9, 1))
    (found,) = waits(damaged)
    assert starts(damaged) < starts(table)
    assert (len(found.step), found.unmatched) == (297, 11)
    assert 9 not in found.step


def test_numbers_count_only_where_every_call_of_the_name_in_the_step_has_one() -> None:
    table = numbered(window(PLAN))
    told = table.collectives.copy()
    told.iloc[0, 1] = -1  # one call of the first step
    half = replace(table, collectives=told)
    assert len(starts(half)) == 300
    (found,) = waits(without(half, ("TP2", 0, 1), ("TP2", 50, 1)))
    assert (np.sum(found.step == 0), np.sum(found.step == 50)) == (0, 2)


def test_numbers_that_disagree_match_nothing() -> None:
    """Steps that do not mean the same on every rank are not forced together."""
    table = numbered(window(PLAN))
    told = table.collectives.copy()
    rank = table.frame.loc[told.index, "rank"].astype(str)
    told.loc[(rank == "TP3").to_numpy(), "sequence"] += 1000
    (found,) = waits(replace(table, collectives=told))
    assert (len(found.step), found.unmatched) == (0, 1200)
    assert "no collective is on every rank" in found.reason


def call(rank: str, start: int) -> tuple[object, ...]:
    return (rank, "nccl", "nccl_AllReduce", "communication", "kernel", "decode", 0, 7, start, 50)


def test_groups_of_fewer_ranks_are_not_taken_for_a_meeting_of_all() -> None:
    """All meet in group 0; TP0 and TP1 in group 1, TP2 and TP3 in group 2, before or after."""
    rows, groups = [], []
    for rank in RANKS:
        pair = "1" if rank in RANKS[:2] else "2"
        first, second = (100, 900) if pair == "1" else (900, 1700)
        rows += [call(rank, first), call(rank, second)]
        groups += [pair, "0"] if pair == "1" else ["0", pair]
    spans = [(rank, 0, "decode", 0, 2000, 8, 8, 0) for rank in RANKS]
    table = table_of(rows, spans, RANKS)
    told = pd.DataFrame({"process_group": groups, "sequence": -1}, index=table.frame.index)
    # By order alone, 100 would be matched with 900.
    assert sorted(starts(table)) == [(100, 100, 900, 900), (900, 900, 1700, 1700)]
    assert starts(replace(table, collectives=told)) == {(900, 900, 900, 900)}


def test_a_picture_joins_the_same_calls_as_the_waits_measure() -> None:
    table = without(numbered(window(PLAN)), ("TP2", 9, 1))
    matched = matched_collectives(table, RANKS)
    assert tuple(matched) == COLUMNS
    wide = matched.pivot(index="match", columns="rank", values="start_ns")[list(RANKS)]
    assert {tuple(row) for row in wide.to_numpy().tolist()} == starts(table)
    assert wide.min(axis=1).is_monotonic_increasing
    assert (table.frame.loc[matched.index, "start_ns"] == matched["start_ns"]).all()
