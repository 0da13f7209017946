"""The kernel table summed once into small cells, from which every figure is made.

A cell is the time of one kernel on one rank in one step. A window of 50 steps, 8 ranks and
60 kernels has 24,000 of them, however many activities it holds.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from pytest_sglprof._analysis.busy import Activities, BusyTimes, Ints, Mask, busy_times
from pytest_sglprof._analysis.collectives import Segments, segments, sync_factor, waits
from pytest_sglprof._analysis.groups import (
    ComparedSteps,
    RankGroup,
    compared_steps,
    step_spans,
    work_groups,
)
from pytest_sglprof._analysis.work import StepInputs, step_inputs
from pytest_sglprof._trace.categories import NOT_COMPUTE
from pytest_sglprof._trace.table import first_of

if TYPE_CHECKING:
    from pytest_sglprof._trace.table import KernelTable


@dataclass(frozen=True)
class SyncCells:
    """Times in sync segments, of which each is cut where a step ends.

    times: owners are the pieces of all ranks, rank by rank. step, segment: of each piece, as
    indices. segments: how many there are.
    """

    times: BusyTimes
    step: Ints
    segment: Ints
    segments: int


@dataclass(frozen=True)
class GroupCells:
    """The times of one work group in its compared steps (or over everything).

    times: owners are the steps of all ranks, rank by rank. kernels: (category, normalised
    name) pairs. has_steps: False when the table knows no steps; then there is one pseudo-step
    that holds everything. assigned_share: share of the group's compute time that belongs to
    some step, 0 to 1 (1.0 without steps and for NVTX ranges). active: ranks with any activity.
    inputs: what each rank had to do in each step; None without steps.
    """

    group: RankGroup
    steps: ComparedSteps
    has_steps: bool
    kernels: tuple[tuple[str, str], ...]
    times: BusyTimes
    assigned_share: float
    active: frozenset[str]
    inputs: StepInputs | None = None
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
        """Busy time of the chosen kernels, shape (steps of the stage, ranks), int64 ns."""
        return self._by_step(self.times.busy(kernels))[self.stage_rows(stage)]

    def kernel_matrix(self, kernels: Mask, stage: str = "") -> Ints:
        """Kernel time of the chosen kernels, shape (steps of the stage, ranks), int64 ns."""
        return self._by_step(self.times.kernel_time(kernels))[self.stage_rows(stage)]

    def kernel_totals(self, kernels: Mask, stage: str = "") -> Ints:
        """Kernel time over all compared steps, shape (all kernels, ranks), int64 ns.

        Rows of kernels that were not chosen are zero.
        """
        cells, mine = self.times, self.times.cells_of(kernels)
        totals = np.zeros((len(self.kernels), len(self.group.ranks)), np.int64)
        rank, step = np.divmod(cells.owner[mine], self._rows)
        ns = np.where(self.stage_rows(stage)[step], cells.ns[mine], 0)
        np.add.at(totals, (cells.kernel[mine], rank), ns)
        return totals

    def compute_ns(self, stage: str = "") -> int:
        """Busy time of compute over all compared steps and ranks, ns."""
        return int(self._compute[self.stage_rows(stage)].sum())

    def busy_ns(self, stage: str = "") -> int:
        """Busy time of everything over all compared steps and ranks, ns."""
        return int(self._everything[self.stage_rows(stage)].sum())

    def sync_factor(self, kernels: Mask, stage: str = "") -> float | None:
        """λ over sync segments; None where no collectives are matched."""
        if self.sync is None:
            return None
        pieces = self.sync.times.busy(kernels).reshape(len(self.group.ranks), -1).T
        mine = self.stage_rows(stage)[self.sync.step]
        sums = np.zeros((self.sync.segments, len(self.group.ranks)), np.int64)
        np.add.at(sums, self.sync.segment[mine], pieces[mine])
        return sync_factor(sums)

    @cached_property
    def _compute(self) -> Ints:
        return self.matrix(self.select("compute"))

    @cached_property
    def _everything(self) -> Ints:
        return self.matrix(self.select("all"))

    def _by_step(self, values: Ints) -> Ints:
        return values.reshape(len(self.group.ranks), self._rows).T

    @property
    def _rows(self) -> int:
        return len(self.steps.numbers) if self.has_steps else 1

    def stage_rows(self, stage: str) -> Mask:
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
    rows = _rows_of(table)
    spans = step_spans(table)
    synced = [segments(table, found) for found in waits(table) if len(found.step) > 1]
    found = []
    for group in work_groups(table.ranks):
        mine = [part for part in synced if set(group.ranks) <= set(part.waits.group.ranks)]
        cells = _group_cells(group, rows, spans, mine[0] if mine else None)
        if cells.has_steps:
            inputs = step_inputs(table.steps, cells.steps.numbers, group.ranks)
            cells = replace(cells, inputs=inputs)
        found.append(cells)
    return tuple(found)


@dataclass(frozen=True)
class _Rows:
    """The table's activities as numbers. rank, kernel: indices into ranks and kernels."""

    ranks: tuple[str, ...]
    kernels: tuple[tuple[str, str], ...]
    rank: Ints
    kernel: Ints
    step: Ints
    start: Ints
    dur: Ints
    is_timeline: bool
    has_idle_ranges: bool

    @cached_property
    def counts(self) -> pd.DataFrame:
        """`rank, step, count`: number of activities."""
        pairs = pd.DataFrame({"rank": self.rank, "step": self.step})
        sums = pairs.groupby(["rank", "step"], sort=False).size().rename("count").reset_index()
        names = [self.ranks[at] for at in sums["rank"]]
        typed: pd.DataFrame = sums.assign(rank=pd.Series(names, dtype=object, index=sums.index))
        return typed

    @cached_property
    def is_compute(self) -> Mask:
        """Shape (activities,)."""
        outside = [category in NOT_COMPUTE for category, _ in self.kernels]
        chosen: Mask = ~np.array(outside, bool)[self.kernel]
        return chosen


def _rows_of(table: KernelTable) -> _Rows:
    frame = table.frame
    rank, category, name = (
        frame[key].astype("category").cat for key in ("rank", "category", "name")
    )
    names, categories = list(name.categories), list(category.categories)
    pair = _codes(category) * len(names) + _codes(name)
    known = np.flatnonzero(np.bincount(pair, minlength=1))
    return _Rows(
        ranks=tuple(str(label) for label in rank.categories),
        kernels=tuple(
            (str(categories[at // len(names)]), str(names[at % len(names)]))
            for at in known
            if names
        ),
        rank=_codes(rank),
        kernel=np.searchsorted(known, pair).astype(np.int64),
        step=frame["step"].to_numpy(np.int64),
        start=frame["start_ns"].to_numpy(np.int64),
        dur=frame["dur_ns"].to_numpy(np.int64),
        is_timeline=table.is_timeline,
        has_idle_ranges=table.has_idle_ranges,
    )


def _codes(column: Any) -> Ints:
    codes: Ints = column.codes.to_numpy().astype(np.int64)
    return codes


def _group_cells(
    group: RankGroup, rows: _Rows, spans: pd.DataFrame, part: Segments | None
) -> GroupCells:
    member = _positions(group.ranks, rows.ranks)[rows.rank]
    mine = member >= 0
    has_steps = not spans.empty  # a replica without any has no steps, not no concept of them
    counts = rows.counts[rows.counts["rank"].isin(group.ranks)]
    steps = compared_steps(spans, counts, group.ranks)
    # Of compute only: between steps an idle server waits for requests in a collective.
    compute = mine & rows.is_compute
    every = int(rows.dur[compute].sum())
    assigned = int(rows.dur[compute & (rows.step >= 0)].sum())
    # NVTX ranges outside of steps are the scheduler's own loop (idle, receive), no kernels
    # that lost their step; they cannot say how much of the work the steps cover.
    is_telling = has_steps and not rows.has_idle_ranges and every > 0
    step = np.zeros(len(mine), np.int64)
    if has_steps:
        step = first_of(np.array(steps.numbers, np.int64), rows.step)
        mine &= step >= 0
    at = np.flatnonzero(mine)
    present = np.flatnonzero(np.bincount(rows.kernel[at], minlength=1) > 0)
    kernel = np.full(len(rows.kernels) + 1, -1, np.int64)
    kernel[present] = np.arange(len(present))
    length = len(steps.numbers) if has_steps else 1
    found = Activities(
        kernel[rows.kernel[at]], member[at] * length + step[at], rows.start[at], rows.dur[at]
    )
    place = np.where(mine, step, -1)
    return GroupCells(
        group=group,
        steps=steps,
        has_steps=has_steps,
        kernels=tuple(rows.kernels[k] for k in present if rows.kernels),
        times=busy_times(
            found,
            len(present),
            length * len(group.ranks),
            is_timeline=rows.is_timeline,
        ),
        assigned_share=assigned / every if is_telling else 1.0,
        active=frozenset(str(rank) for rank in counts["rank"].unique()),
        sync=None if part is None else _sync(rows, kernel, member, place, length, part),
    )


def _sync(
    rows: _Rows, kernel: Ints, member: Ints, step: Ints, length: int, part: Segments
) -> SyncCells:
    """Of a sync group's segments what belongs to a work group's ranks and steps.

    kernel: of each of the table's kernels, member, step: of each activity, the index in the
    work group; -1 for none. length: how many steps there are.
    """
    found, rank = kernel[rows.kernel[part.rows]], member[part.rows]
    kept = (found >= 0) & (rank >= 0) & (step[part.rows] >= 0)
    at = part.rows[kept]
    pieces, piece = np.unique(part.segment[kept] * length + step[at], return_inverse=True)
    owner = rank[kept] * len(pieces) + piece
    ranks = int(member.max(initial=-1)) + 1
    return SyncCells(
        times=busy_times(
            Activities(found[kept], owner, rows.start[at], rows.dur[at]),
            int(kernel.max(initial=-1)) + 1,
            ranks * len(pieces),
            is_timeline=rows.is_timeline,
        ),
        step=pieces % length,
        segment=pieces // length,
        segments=len(part.span),
    )


def _positions(known: Sequence[object], values: Sequence[object]) -> Ints:
    """Index into `known` of each value, -1 for none; shape of `values`."""
    found: Ints = pd.Index(list(known)).get_indexer(pd.Index(list(values))).astype(np.int64)
    return found
