"""The kernel table summed once into small cells, from which every figure is made.

A cell is the kernel time of one kernel on one rank in one step. A window of 50 steps,
8 ranks and 60 kernels has 24,000 of them, however many activities it holds.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import pandas as pd

from pytest_sglprof.analysis.busy import busy_parts
from pytest_sglprof.analysis.groups import WorkGroup, work_groups
from pytest_sglprof.analysis.segments import (
    NOT_COMPUTE,
    Segments,
    segment_sums,
    segments,
    sync_factor,
)
from pytest_sglprof.analysis.steps import ComparedSteps, compared_steps, step_spans
from pytest_sglprof.analysis.waits import waits

if TYPE_CHECKING:
    from pytest_sglprof.trace.table import KernelTable

Ints = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class SyncCells:
    """Compute in sync segments and compared steps: kernel, rank, step and segment of each
    activity, as indices, and its share of the busy time, ns. segments: how many there are."""

    kernel: Ints
    rank: Ints
    step: Ints
    segment: Ints
    ns: Ints
    segments: int


@dataclass(frozen=True)
class GroupCells:
    """Kernel time of one work group in its compared steps (or over everything).

    ns: kernel time of each cell, int64 nanoseconds. rank, step, kernel: indices of each
    cell into `group.ranks`, `steps.numbers` and `kernels`. kernels: (category, normalised
    name) pairs. Cells are sorted by kernel; those of kernel k are `bounds[k]:bounds[k+1]`.
    has_steps: False when the table knows no steps; then there is one pseudo-step that
    holds everything. assigned_share: share of the group's compute time that belongs to
    some step, 0 to 1 (1.0 without steps and for NVTX ranges). active: ranks with any activity.
    busy: busy time of all activities, shape (steps, ranks), ns.
    """

    group: WorkGroup
    steps: ComparedSteps
    has_steps: bool
    ns: Ints
    rank: Ints
    step: Ints
    kernel: Ints
    kernels: tuple[tuple[str, str], ...]
    bounds: Ints
    assigned_share: float
    active: frozenset[str]
    busy: Ints
    sync: SyncCells | None = None

    @property
    def categories(self) -> tuple[str, ...]:
        """Categories with a cell, by kernel time, largest first."""
        every = self.kernel_totals(np.ones(len(self.kernels), bool)).sum(axis=1)
        totals: dict[str, int] = {}
        for (category, _), ns in zip(self.kernels, every, strict=True):
            totals[category] = totals.get(category, 0) + int(ns)
        return tuple(sorted(totals, key=lambda name: (-totals[name], name)))

    def select(self, scope: str, kernel: str = "") -> Mask:
        """Which kernels a scope, or a regular expression over names, means.

        Shape (kernels,). scope: "all", "compute" (all but communication and memory) or a
        category. A `kernel` expression stands instead of the scope.
        """
        if kernel:
            search = re.compile(kernel).search
            chosen = [search(name) is not None for _, name in self.kernels]
        elif scope == "all":
            chosen = [True] * len(self.kernels)
        elif scope == "compute":
            chosen = [category not in NOT_COMPUTE for category, _ in self.kernels]
        else:
            chosen = [category == scope for category, _ in self.kernels]
        return np.array(chosen, dtype=bool)

    def matrix(self, kernels: Mask, stage: str = "") -> Ints:
        """Kernel time of the chosen kernels, shape (steps of the stage, ranks), int64 ns."""
        full = np.zeros((self._rows, len(self.group.ranks)), np.int64)
        mine = self._cells_of(kernels)
        np.add.at(full, (self.step[mine], self.rank[mine]), self.ns[mine])
        return full[self._stage_rows(stage)]

    def kernel_totals(self, kernels: Mask, stage: str = "") -> Ints:
        """Kernel time over all compared steps, shape (all kernels, ranks), int64 ns.

        Rows of kernels that were not chosen are zero.
        """
        totals = np.zeros((len(self.kernels), len(self.group.ranks)), np.int64)
        mine = kernels[self.kernel] & self._stage_rows(stage)[self.step]
        np.add.at(totals, (self.kernel[mine], self.rank[mine]), self.ns[mine])
        return totals

    def compute_ns(self, stage: str = "") -> int:
        """Kernel time of compute over all compared steps and ranks, ns."""
        return int(self.ns[self._is_compute & self._stage_rows(stage)[self.step]].sum())

    def busy_ns(self, stage: str = "") -> int:
        """Busy time of everything over all compared steps and ranks, ns."""
        return int(self.busy[self._stage_rows(stage)].sum())

    def sync_factor(self, kernels: Mask, stage: str = "") -> float | None:
        """λ over sync segments; None where no collectives are matched."""
        if self.sync is None:
            return None
        mine = kernels[self.sync.kernel] & self._stage_rows(stage)[self.sync.step]
        shape = (self.sync.segments, len(self.group.ranks))
        found = (self.sync.segment[mine], self.sync.rank[mine], self.sync.ns[mine])
        return sync_factor(segment_sums(*found, shape))

    @cached_property
    def _is_compute(self) -> Mask:
        chosen: Mask = self.select("compute")[self.kernel]
        return chosen

    def _cells_of(self, kernels: Mask) -> slice | Mask:
        """Which cells belong to the chosen kernels; a view where it is one kernel only."""
        chosen = np.flatnonzero(kernels)
        if len(chosen) == 1:
            return slice(int(self.bounds[chosen[0]]), int(self.bounds[chosen[0] + 1]))
        return kernels[self.kernel]

    @property
    def _rows(self) -> int:
        return len(self.steps.numbers) if self.has_steps else 1

    def _stage_rows(self, stage: str) -> Mask:
        """Which rows of the step axis a stage means, shape (steps,)."""
        if not stage:
            return np.ones(self._rows, bool)
        if not self.has_steps:
            return np.zeros(1, bool)
        return np.array([found == stage for found in self.steps.stages], dtype=bool)


def measure(table: KernelTable) -> tuple[GroupCells, ...]:
    """Sums a kernel table into the cells of each of its work groups.

    Only steps that all ranks of a group have count, and of those only whole ones. A table
    without any step is summed as a whole.
    """
    sums = _sums(table.frame)
    spans = step_spans(table)
    busy = _busy(table)
    synced = [segments(table, found) for found in waits(table) if len(found.step) > 1]
    # NVTX ranges outside of steps are the scheduler's own loop (idle, receive), no kernels
    # that lost their step; they cannot say how much of the work the steps cover.
    is_covering = table.source != "nvtx"
    found = []
    for group in work_groups(table.ranks):
        cells = _group_cells(group, sums, spans, busy, is_covering)
        mine = [part for part in synced if set(group.ranks) <= set(part.waits.group.ranks)]
        found.append(replace(cells, sync=_sync(table.frame, cells, mine[0])) if mine else cells)
    return tuple(found)


def _sync(frame: pd.DataFrame, cells: GroupCells, part: Segments) -> SyncCells:
    """Of a sync group's segments what belongs to the ranks and steps of `cells`."""
    rows = frame.iloc[part.rows]
    pairs = pd.MultiIndex.from_tuples(cells.kernels, names=("category", "name"))
    named = pd.MultiIndex.from_arrays(
        [rows["category"].astype(object), rows["name"].astype(object)]
    )
    kernel = pairs.get_indexer(named) if len(pairs) else np.full(len(rows), -1)
    members = _positions(cells.group.ranks, pd.Series(part.waits.group.ranks))
    rank = members[part.rank]
    step = np.zeros(len(rows), np.int64)
    if cells.has_steps:
        step = _positions(cells.steps.numbers, rows["step"])
    kept = (kernel >= 0) & (rank >= 0) & (step >= 0)
    return SyncCells(
        kernel=kernel[kept].astype(np.int64),
        rank=rank[kept],
        step=step[kept],
        segment=part.segment[kept],
        ns=part.busy[kept],
        segments=len(part.span),
    )


def _sums(frame: pd.DataFrame) -> pd.DataFrame:
    """`rank, step, category, name, ns, count`: the one pass over all activities."""
    keys = ["rank", "step", "category", "name"]
    grouped = frame.groupby(keys, observed=True, sort=False)["dur_ns"]
    sums = grouped.agg(ns="sum", count="size").reset_index()
    text = {"rank": object, "category": object, "name": object}
    numbers = {"step": np.int64, "ns": np.int64, "count": np.int64}
    typed: pd.DataFrame = sums.astype({**text, **numbers})
    return typed


def _busy(table: KernelTable) -> pd.DataFrame:
    """`rank, step, ns`: busy time of everything.

    Self times are no intervals of a timeline: those are summed.
    """
    frame = table.frame
    rank = frame["rank"].astype("category")
    step = frame["step"].to_numpy(np.int64)
    ns = frame["dur_ns"].to_numpy(np.int64)
    if table.source == "gpu" and len(frame):
        owner = rank.cat.codes.to_numpy(np.int64) * (int(step.max()) + 2) + step + 1
        ns = busy_parts(owner, frame["start_ns"].to_numpy(np.int64), ns)
    parts = pd.DataFrame({"rank": rank, "step": step, "ns": ns})
    sums = parts.groupby(["rank", "step"], observed=True, sort=False)["ns"].sum()
    typed: pd.DataFrame = sums.reset_index().astype({"rank": object})
    return typed


def _busy_matrix(busy: pd.DataFrame, ranks: Sequence[str], numbers: Sequence[int] | None) -> Ints:
    """Shape (steps, ranks), ns; without numbers one row that holds everything."""
    mine = busy[busy["rank"].isin(list(ranks))]
    at = _positions(numbers, mine["step"]) if numbers is not None else np.zeros(len(mine), int)
    full = np.zeros((1 if numbers is None else len(numbers), len(ranks)), np.int64)
    known = at >= 0
    columns = _positions(ranks, mine["rank"])
    np.add.at(full, (at[known], columns[known]), mine["ns"].to_numpy(np.int64)[known])
    return full


def _group_cells(
    group: WorkGroup,
    sums: pd.DataFrame,
    spans: pd.DataFrame,
    busy: pd.DataFrame,
    is_covering: bool,
) -> GroupCells:
    mine = sums[sums["rank"].isin(group.ranks)]
    has_steps = not spans.empty  # a replica without any has no steps, not no concept of them
    steps = compared_steps(spans, mine, group.ranks)
    # Of compute only: between steps an idle server waits for requests in a collective.
    compute = mine[~mine["category"].isin(NOT_COMPUTE)]
    every = int(compute["ns"].sum())
    assigned = int(compute.loc[compute["step"] >= 0, "ns"].sum())
    active = frozenset(str(rank) for rank in mine["rank"].unique())
    if has_steps:
        mine = mine[mine["step"].isin(steps.numbers)]
        step = _positions(steps.numbers, mine["step"])
    else:
        step = np.zeros(len(mine), np.int64)
    pairs = pd.MultiIndex.from_frame(mine[["category", "name"]])
    codes, kernels = pairs.factorize()
    order = np.argsort(codes, kind="stable")
    return GroupCells(
        group=group,
        steps=steps,
        has_steps=has_steps,
        ns=mine["ns"].to_numpy(np.int64)[order],
        rank=_positions(group.ranks, mine["rank"])[order],
        step=step[order],
        kernel=codes[order].astype(np.int64),
        kernels=tuple((str(category), str(name)) for category, name in kernels),
        bounds=np.searchsorted(codes[order], np.arange(len(kernels) + 1)).astype(np.int64),
        assigned_share=assigned / every if has_steps and is_covering and every else 1.0,
        active=active,
        busy=_busy_matrix(busy, group.ranks, steps.numbers if has_steps else None),
    )


def _positions(known: Sequence[object], values: pd.Series) -> Ints:
    """Index into `known` of each value, shape of `values`."""
    found: Ints = pd.Index(list(known)).get_indexer(pd.Index(values)).astype(np.int64)
    return found
