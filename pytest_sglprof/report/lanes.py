"""The activities of a few steps on one time axis: what a person would pin rows for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import msgspec
import numpy as np
import pandas as pd

from pytest_sglprof.analysis.cells import GroupCells
from pytest_sglprof.analysis.collectives import matched_collectives
from pytest_sglprof.figures import Count

if TYPE_CHECKING:
    from pytest_sglprof.trace.table import KernelTable

MAX_STEPS = 8  # of a window
MAX_EVENTS = 160_000  # of a window; steps that do not fit are left out
WORST = 3
NO_MATCH = -1
EDGE_NS = 2_000_000_000  # ns of a window without steps that are shown, from its middle


class Lane(msgspec.Struct, frozen=True, kw_only=True):
    """The activities of one stream of a rank, in order of time, one item of each list a piece.

    name: index into `Lanes.names`. start_ns: from the picture's origin. match: the number of
    the collective, the same on all ranks; -1 where there is none.
    """

    rank: str
    stream: int
    name: list[int]
    start_ns: list[int]
    dur_ns: list[int]
    match: list[int]


class Picture(msgspec.Struct, frozen=True, kw_only=True):
    """One step of a work group, or the whole window (step: None).

    why: why it is shown. origin_ns: the earliest start. dropped: activities left out.
    """

    group: str
    ranks: tuple[str, ...]
    step: int | None
    stage: str
    why: tuple[str, ...]
    origin_ns: int
    dropped: Count
    lanes: tuple[Lane, ...]


class Lanes(msgspec.Struct, frozen=True, kw_only=True):
    """names, categories: of the kernels in all pictures. left_out: steps that did not fit."""

    names: tuple[str, ...]
    categories: tuple[str, ...]
    left_out: Count
    steps: tuple[Picture, ...]


def lanes(
    table: KernelTable,
    groups: Sequence[GroupCells],
    *,
    onset_ns: int | None = None,
    steps: Sequence[int] = (),
) -> Lanes:
    """Events of up to 8 chosen steps, as parallel integer lists.

    Of each work group: the steps in which its ranks differ most in compute, the median one,
    and the first that begins after `onset_ns`; or exactly `steps`, where given. A table
    without steps gives one picture of the whole window (its middle, where that is long).
    """
    names: dict[tuple[str, str], int] = {}
    pictures: list[Picture] = []
    room = MAX_EVENTS
    left_out = 0
    for cells, number, why in _chosen(groups, _first_after(table, onset_ns), steps):
        rows = _rows(table.frame, cells, number)
        if len(rows) > room and pictures:
            left_out += 1
            continue
        pictures.append(_picture(table, cells, rows, number, why, names, room))
        room -= len(rows)
    return Lanes(
        names=tuple(name for name, _ in names),
        categories=tuple(category for _, category in names),
        left_out=left_out,
        steps=tuple(pictures),
    )


def _chosen(
    groups: Sequence[GroupCells], onset: set[int], steps: Sequence[int]
) -> list[tuple[GroupCells, int | None, list[str]]]:
    each = max(1, MAX_STEPS // max(1, len(groups)))
    chosen = []
    for cells in groups[:MAX_STEPS]:
        if not cells.has_steps:
            found: dict[int | None, list[str]] = {None: ["the window"]}
        elif steps:
            found = {number: ["chosen"] for number in steps[:MAX_STEPS]}
        else:
            found = _telling(cells, onset)
        chosen += [(cells, number, why) for number, why in list(found.items())[:each]]
    return chosen


def _telling(cells: GroupCells, onset: set[int]) -> dict[int | None, list[str]]:
    """Step number -> why it is shown, the worst first."""
    numbers = cells.steps.numbers
    if not numbers:
        return {}
    matrix = cells.matrix(cells.select("compute"))
    spread = matrix.max(axis=1) - matrix.mean(axis=1)
    order = np.argsort(-spread, kind="stable")
    found: dict[int | None, list[str]] = {numbers[int(order[0])]: ["worst"]}
    longest = matrix.max(axis=1)
    median = int(np.argsort(longest, kind="stable")[len(longest) // 2])
    found.setdefault(numbers[median], []).append("median")
    after = next((number for number in numbers if number in onset), None)
    if after is not None:
        found.setdefault(after, []).append("first after onset")
    for place, at in enumerate(order[1:WORST], start=2):
        found.setdefault(numbers[int(at)], []).append(f"{_ORDINAL[place]} worst")
    return found


def _first_after(table: KernelTable, onset_ns: int | None) -> set[int]:
    """The steps that begin at or after the onset; none without one."""
    if onset_ns is None:
        return set()
    return {int(n) for n in table.steps.loc[table.steps["start_ns"] >= onset_ns, "step"]}


_ORDINAL = {2: "second", 3: "third"}


def _rows(frame: pd.DataFrame, cells: GroupCells, number: int | None) -> pd.DataFrame:
    mine = frame[frame["rank"].isin(cells.group.ranks)]
    if number is not None:
        return mine[mine["step"] == number]
    if mine.empty:
        return mine
    middle = (int(mine["start_ns"].min()) + int(mine["start_ns"].max())) // 2
    return mine[(mine["start_ns"] - middle).abs() <= EDGE_NS // 2]


def _picture(
    table: KernelTable,
    cells: GroupCells,
    rows: pd.DataFrame,
    number: int | None,
    why: Sequence[str],
    names: dict[tuple[str, str], int],
    room: int,
) -> Picture:
    """One step. More than `room` events: the shortest are left out."""
    dropped = max(0, len(rows) - room)
    matched = matched_collectives(_slice(table, rows), cells.group.ranks)["match"]
    if dropped:
        rows = rows.nlargest(room, "dur_ns")
    origin = int(rows["start_ns"].min()) if len(rows) else 0
    match = matched.reindex(rows.index).fillna(NO_MATCH).astype(np.int64)
    found = []
    rows = rows.assign(match=match).sort_values("start_ns", kind="stable")
    for rank in cells.group.ranks:
        mine = rows[rows["rank"] == rank]
        for stream in np.unique(mine["stream"].to_numpy(np.int64)):
            events = mine[mine["stream"] == stream]
            pairs = zip(events["name"], events["category"], strict=True)
            start = events["start_ns"].to_numpy(np.int64) - origin
            found.append(
                Lane(
                    rank=rank,
                    stream=int(stream),
                    name=[names.setdefault((str(n), str(c)), len(names)) for n, c in pairs],
                    start_ns=start.tolist(),
                    dur_ns=events["dur_ns"].tolist(),
                    match=events["match"].tolist(),
                )
            )
    spans = table.steps[table.steps["step"] == number] if number is not None else table.steps[:0]
    return Picture(
        group=cells.group.label,
        ranks=tuple(cells.group.ranks),
        step=number,
        stage=str(spans["stage"].iloc[0]) if len(spans) else "",
        why=tuple(why),
        origin_ns=origin,
        dropped=dropped,
        lanes=tuple(found),
    )


def _slice(table: KernelTable, rows: pd.DataFrame) -> KernelTable:
    return replace(table, frame=rows)
