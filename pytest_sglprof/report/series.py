"""The step x rank series of a window: compute, waits, batch size, tokens of every step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import msgspec
import numpy as np
import pandas as pd

from pytest_sglprof.analysis.busy import busy_parts
from pytest_sglprof.analysis.cells import GroupCells
from pytest_sglprof.analysis.steps import step_spans
from pytest_sglprof.analysis.waits import Waits, by_step
from pytest_sglprof.trace.kernels import NOT_COMPUTE

if TYPE_CHECKING:
    from pytest_sglprof.trace.table import KernelTable

# Steps x ranks of a series. A window of more keeps, of each run of consecutive steps, the one
# in which the ranks differ most.
MAX_CELLS = 200_000
ABSENT = -1
State = Literal["compared", "cut", "unmatched"]


class StepSeries(msgspec.Struct, frozen=True, kw_only=True):
    """The steps of one work group, in order. Times in ns, -1 where a figure is not there.

    compute_ns, wait_ns: rows are steps, columns ranks; wait_ns is None without collectives.
    state: "compared", "cut" (a rank has a part only) or "unmatched" (a rank lacks it).
    every: 1, or k when each row stands for k consecutive steps.
    """

    group: str
    ranks: tuple[str, ...]
    every: int
    numbers: list[int]
    stages: list[str]
    state: list[State]
    batch_size: list[int]
    tokens: list[int]
    start_ns: list[int]
    compute_ns: list[list[int]]
    wait_ns: list[list[int]] | None


def step_times(
    table: KernelTable, groups: Sequence[GroupCells], waited: Sequence[Waits]
) -> tuple[StepSeries, ...]:
    """One series for each work group whose table knows steps."""
    spans = step_spans(table)
    if spans.empty:
        return ()
    compute = _compute_sums(table)
    series = (_series(table, group, spans, compute, waited) for group in groups)
    return tuple(one for one in series if one is not None)


def _series(
    table: KernelTable,
    cells: GroupCells,
    spans: pd.DataFrame,
    compute: pd.DataFrame,
    waited: Sequence[Waits],
) -> StepSeries | None:
    ranks = cells.group.ranks
    mine = spans[spans["rank"].isin(ranks)]
    if mine.empty:
        return None
    numbers = np.unique(mine["step"].to_numpy(np.int64))
    present = _wide(mine.assign(n=1), "n", numbers, ranks, 0) > 0
    ns = _wide(compute[compute["rank"].isin(ranks)], "ns", numbers, ranks, 0)
    ns[~present] = ABSENT
    # A work group lies inside one sync group: ranks with equal input meet.
    own = next((found for found in waited if set(ranks) <= set(found.group.ranks)), None)
    wait = None if own is None else by_step(own, numbers.tolist(), ranks)
    if wait is not None:
        wait[~present] = ABSENT
    kept, every = _kept(ns, present)
    about = table.steps[table.steps["rank"].isin(list(ranks))]
    first = about.groupby("step")[["batch_size", "tokens", "start_ns"]].agg(
        {"batch_size": "max", "tokens": "max", "start_ns": "min"}
    )
    first = first.reindex(numbers).fillna(ABSENT).astype(np.int64).iloc[kept]
    stages = mine.groupby("step")["stage"].first().reindex(numbers)
    return StepSeries(
        group=cells.group.label,
        ranks=tuple(ranks),
        every=every,
        numbers=numbers[kept].tolist(),
        stages=[str(stage) for stage in stages.iloc[kept]],
        state=_states(cells, numbers, present.all(axis=1), kept),
        batch_size=first["batch_size"].tolist(),
        tokens=first["tokens"].tolist(),
        start_ns=first["start_ns"].tolist(),
        compute_ns=ns[kept].tolist(),
        wait_ns=None if wait is None else wait[kept].tolist(),
    )


def _compute_sums(table: KernelTable) -> pd.DataFrame:
    """`rank, step, ns`: busy time of compute; self times are no intervals, but summed."""
    frame = table.frame
    mine = frame[(frame["step"] >= 0) & ~frame["category"].isin(list(NOT_COMPUTE))]
    ns = mine["dur_ns"].to_numpy(np.int64)
    if table.is_timeline:
        rank = mine["rank"].astype("category").cat.codes.to_numpy().astype(np.int64)
        step = mine["step"].to_numpy(np.int64)
        owner = rank * (step.max(initial=0) + 1) + step
        ns = busy_parts(owner, mine["start_ns"].to_numpy(np.int64), ns)
    sums = mine.assign(ns=ns).groupby(["rank", "step"], observed=True, sort=False)["ns"].sum()
    typed: pd.DataFrame = sums.reset_index().astype({"rank": object})
    return typed


def _wide(
    rows: pd.DataFrame, value: str, numbers: Any, ranks: Sequence[str], empty: int
) -> np.ndarray[Any, np.dtype[np.int64]]:
    wide = rows.pivot_table(index="step", columns="rank", values=value, aggfunc="sum")
    full = wide.reindex(index=numbers, columns=list(ranks)).fillna(empty)
    return full.to_numpy(np.int64, copy=True)


def _kept(ns: Any, present: Any) -> tuple[Any, int]:
    """Rows that are kept, and how many steps each stands for."""
    steps, ranks = ns.shape
    every = -(-steps * ranks // MAX_CELLS)
    if every <= 1:
        return np.arange(steps), 1
    spread = np.where(present.all(axis=1), ns.max(axis=1) - ns.mean(axis=1), -1.0)
    starts = range(0, steps, every)
    return np.array([at + int(spread[at : at + every].argmax()) for at in starts]), every


def _states(cells: GroupCells, numbers: Any, common: Any, kept: Any) -> list[State]:
    compared = set(cells.steps.numbers)
    words: list[State] = []
    for at in kept:
        if int(numbers[at]) in compared:
            words.append("compared")
        else:
            words.append("cut" if common[at] else "unmatched")
    return words
