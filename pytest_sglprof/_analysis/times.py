"""Sums the kernel table once into small cells, from which every figure is computed.

A cell is the time of one kernel on one rank in one step. A window of 50 steps, 8 ranks and
60 kernels has 24,000 cells, however many activities it holds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

from pytest_sglprof._analysis.busy import Activities, BusyTimes, Ints, Mask, busy_times
from pytest_sglprof._analysis.collectives import Segments, Waits, segments, sync_factor, waits
from pytest_sglprof._analysis.groups import (
    ComparedSteps,
    RankGroup,
    compared_steps,
    never_meet,
    step_spans,
    work_groups,
)
from pytest_sglprof._analysis.work import StepInputs, step_inputs
from pytest_sglprof._limits import matching
from pytest_sglprof._trace.categories import NOT_COMPUTE
from pytest_sglprof._trace.table import first_of, places_of

if TYPE_CHECKING:
    import pandas as pd

    from pytest_sglprof._trace.table import KernelTable


Floats = npt.NDArray[np.float64]
_NONE = np.zeros(0, np.int64)


@dataclass(frozen=True)
class SyncCells:
    """Times in sync segments, each split into pieces where a step ends.

    times: its owners are the pieces of all ranks, rank by rank. step, segment: the indices of
    each piece's step and segment. segments: number of segments.
    """

    times: BusyTimes
    step: Ints
    segment: Ints
    segments: int


@dataclass(frozen=True)
class GroupCells:
    """The times of one work group in its compared steps, or of the whole window.

    times: its owners are the steps of all ranks, rank by rank. kernels: (category, normalised
    name) pairs. has_steps: False if the table has no steps; then one pseudo-step holds
    everything. assigned_share: share of the group's compute time that lies in known steps,
    0 to 1 (1.0 without steps and for NVTX ranges). active: ranks with any activity.
    inputs: input of each rank in each step; None without steps. doubt: why its ranks cannot be
    compared; "" if they can. lost: of each compared step, ns lost by waiting and wall time of all
    ranks, shape (steps, 2); None where ranks are compared with their peers only. sync: times in
    sync segments; None if no collectives are matched. is_paired: False for passes of replicas,
    which stand side by side without having met, so that nothing was lost by waiting.
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
    across: Literal["peers", "sync"] = "peers"
    doubt: str = ""
    lost: Floats | None = None
    is_paired: bool = True

    @property
    def categories(self) -> tuple[str, ...]:
        """The categories that occur, largest kernel time first."""
        every = self.kernel_totals(np.ones(len(self.kernels), bool)).sum(axis=1)
        totals: dict[str, int] = {}
        for (category, _), ns in zip(self.kernels, every, strict=True):
            totals[category] = totals.get(category, 0) + int(ns)
        return tuple(sorted(totals, key=lambda name: (-totals[name], name)))

    def select(self, scope: str, kernel: str = "") -> Mask:
        """Mask of the kernels in a scope, or matched by a regular expression, shape (kernels,).

        scope: "all", "compute" (all but communication and memory) or a category. kernel: a
        regular expression searched in normalised names; if given, the scope is ignored.
        """
        if kernel:
            matches = matching(kernel, (name for _, name in self.kernels))
            chosen = [name in matches for _, name in self.kernels]
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

    def calls(self, kernels: Mask, stage: str = "") -> Ints:
        """Number of activities of the chosen kernels in the compared steps, shape (ranks,)."""
        totals: Ints = self._by_step(self.times.counts(kernels))[self.stage_rows(stage)].sum(axis=0)
        return totals

    def count_matrix(self, kernels: Mask) -> Ints:
        """Number of activities of the chosen kernels, shape (steps, ranks)."""
        return self._by_step(self.times.counts(kernels))

    def kernel_totals(self, kernels: Mask, stage: str = "") -> Ints:
        """Kernel time over all compared steps, shape (all kernels, ranks), int64 ns.

        Rows of kernels that were not chosen are zero.
        """
        cells, chosen = self.times, self.times.cells_of(kernels)
        totals = np.zeros((len(self.kernels), len(self.group.ranks)), np.int64)
        rank, step = np.divmod(cells.owner[chosen], self._rows)
        ns = np.where(self.stage_rows(stage)[step], cells.ns[chosen], 0)
        np.add.at(totals, (cells.kernel[chosen], rank), ns)
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
        in_stage = self.stage_rows(stage)[self.sync.step]
        sums = np.zeros((self.sync.segments, len(self.group.ranks)), np.int64)
        np.add.at(sums, self.sync.segment[in_stage], pieces[in_stage])
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
        """Mask of the steps of a stage ("" for all), shape (steps,)."""
        if not stage:
            return np.ones(self._rows, bool)
        if not self.has_steps:
            return np.zeros(1, bool)
        return np.array([each == stage for each in self.steps.stages], dtype=bool)


def sum_times(table: KernelTable, waited: Sequence[Waits] | None = None) -> tuple[GroupCells, ...]:
    """Sums a kernel table into the cells of each of its work groups.

    Only steps that every rank of a group has in full count. A table without steps is summed
    as a whole. waited: `waits(table)`, if already computed.
    """
    rows = rows_of(table)
    spans = step_spans(table)
    waited = waits(table) if waited is None else waited
    synced = [segments(table, each) for each in waited if len(each.step) > 1]
    groups = []
    for group in work_groups(table.ranks):
        around = [part for part in synced if set(group.ranks) <= set(part.waits.group.ranks)]
        cells = _group_cells(group, rows, spans, around[0] if around else None)
        if cells.has_steps and not cells.steps.seen and (apart := never_meet(table.ranks)):
            cells = replace(cells, doubt=f"{apart}; {group.label} had no pass")
        if cells.has_steps:
            inputs = step_inputs(table.steps, cells.steps.numbers, group.ranks)
            cells = replace(cells, inputs=inputs)
        groups.append(cells)
    return tuple(groups)


@dataclass(frozen=True)
class Rows:
    """The table's activities as parallel arrays. rank, kernel: indices into ranks and kernels."""

    ranks: tuple[str, ...]
    kernels: tuple[tuple[str, str], ...]
    rank: Ints
    kernel: Ints
    step: Ints
    start: Ints
    dur: Ints
    is_timeline: bool
    has_idle_ranges: bool

    def places(self, ranks: Sequence[str]) -> tuple[Ints, Ints]:
        """The activities of these ranks, ascending, and the index of each one's rank in `ranks`."""
        at = [self._by_rank[place] if place >= 0 else _NONE for place in self._indices(ranks)]
        member = np.repeat(np.arange(len(at)), list(map(len, at)))
        rows = np.concatenate([_NONE, *at])
        order = np.argsort(rows, kind="stable")
        return rows[order], member[order]

    def counts_of(self, ranks: Sequence[str]) -> pd.DataFrame:
        """`rank, step, count`: number of activities."""
        at = [self._counts_by_rank[place] for place in self._indices(ranks) if place >= 0]
        chosen: pd.DataFrame = self._counts.iloc[np.sort(np.concatenate([_NONE, *at]))]
        return chosen

    def has_any(self, label: str) -> bool:
        """Whether a rank has any activity."""
        return label in self._index and len(self._by_rank[self._index[label]]) > 0

    def _indices(self, ranks: Sequence[str]) -> list[int]:
        return [self._index.get(label, -1) for label in ranks]

    @cached_property
    def _index(self) -> dict[str, int]:
        return {label: at for at, label in enumerate(self.ranks)}

    @cached_property
    def _by_rank(self) -> list[Ints]:
        return places_of(self.rank, len(self.ranks))

    @cached_property
    def _counts_by_rank(self) -> list[Ints]:
        return places_of(
            np.array(self._indices(self._counts["rank"].tolist()), np.int64), len(self.ranks)
        )

    @cached_property
    def _counts(self) -> pd.DataFrame:
        import pandas as pd

        pairs = pd.DataFrame({"rank": self.rank, "step": self.step})
        sums = pairs.groupby(["rank", "step"], sort=False).size().rename("count").reset_index()
        names = [self.ranks[at] for at in sums["rank"]]
        typed: pd.DataFrame = sums.assign(rank=pd.Series(names, dtype=object, index=sums.index))
        return typed

    def of_kernels(self, chosen: Mask) -> Rows:
        """The activities of some of the kernels. chosen: shape (kernels,)."""
        kept = np.flatnonzero(chosen[self.kernel])
        columns = ("rank", "kernel", "step", "start", "dur")
        return replace(self, **{name: getattr(self, name)[kept] for name in columns})

    @cached_property
    def is_compute(self) -> Mask:
        """Shape (activities,)."""
        outside = [category in NOT_COMPUTE for category, _ in self.kernels]
        chosen: Mask = ~np.array(outside, bool)[self.kernel]
        return chosen


def rows_of(table: KernelTable) -> Rows:
    frame = table.frame
    rank, category, name = (
        frame[key].astype("category").cat for key in ("rank", "category", "name")
    )
    names, categories = list(name.categories), list(category.categories)
    pair = _codes(category) * len(names) + _codes(name)
    known = np.flatnonzero(np.bincount(pair, minlength=1))
    return Rows(
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
    group: RankGroup, rows: Rows, spans: pd.DataFrame, part: Segments | None
) -> GroupCells:
    counts = rows.counts_of(group.ranks)
    steps = compared_steps(spans, counts, group.ranks)
    # Of the table: a replica that ran none still has steps, zero.
    return cells_of_steps(group, rows, steps, has_steps=not spans.empty, part=part)


def cells_of_steps(
    group: RankGroup,
    rows: Rows,
    steps: ComparedSteps,
    *,
    has_steps: bool = True,
    part: Segments | None = None,
) -> GroupCells:
    """The cells of a group of ranks in some of its steps. part: its sync segments, if matched."""
    at, member = rows.places(group.ranks)
    step, dur = rows.step[at], rows.dur[at]
    # Compute only: an idle server waits for requests inside a collective, between steps.
    compute = rows.is_compute[at]
    every = int(dur[compute].sum())
    assigned = int(dur[compute & (step >= 0)].sum())
    # NVTX ranges outside of steps are the scheduler's loop (idle, receive), not kernels whose
    # step is unknown, so with them the share of assigned work cannot be measured.
    is_measurable = has_steps and not rows.has_idle_ranges and every > 0
    place = first_of(np.array(steps.numbers, np.int64), step) if has_steps else 0 * step
    at, member, place = (values[place >= 0] for values in (at, member, place))
    present = np.unique(rows.kernel[at])
    kernel = np.full(len(rows.kernels) + 1, -1, np.int64)
    kernel[present] = np.arange(len(present))
    length = len(steps.numbers) if has_steps else 1
    activities = Activities(
        kernel[rows.kernel[at]], member * length + place, rows.start[at], rows.dur[at]
    )
    return GroupCells(
        group=group,
        steps=steps,
        has_steps=has_steps,
        kernels=tuple(rows.kernels[k] for k in present if rows.kernels),
        times=busy_times(
            activities,
            len(present),
            length * len(group.ranks),
            is_timeline=rows.is_timeline,
        ),
        assigned_share=assigned / every if is_measurable else 1.0,
        active=frozenset(label for label in group.ranks if rows.has_any(label)),
        sync=None if part is None else _sync(rows, activities, at, length, part, group.ranks),
    )


def _sync(
    rows: Rows, activities: Activities, at: Ints, length: int, part: Segments, ranks: Sequence[str]
) -> SyncCells:
    """The part of a sync group's segments that belongs to a work group's ranks and steps.

    activities: of the work group in its steps, in whose owners ranks have `length` steps each.
    at: their positions in the table.
    """
    inside = part.of_ranks(ranks)
    place = first_of(at, part.rows[inside])
    inside, place = inside[place >= 0], place[place >= 0]
    rank, step = np.divmod(activities.owner[place], length)
    pieces, piece = np.unique(part.segment[inside] * length + step, return_inverse=True)
    kernel, start, dur = activities.kernel[place], activities.start[place], activities.dur[place]
    return SyncCells(
        times=busy_times(
            Activities(kernel, rank * len(pieces) + piece, start, dur),
            int(activities.kernel.max(initial=-1)) + 1,
            len(ranks) * len(pieces),
            is_timeline=rows.is_timeline,
        ),
        step=pieces % length,
        segment=pieces // length,
        segments=len(part.span),
    )
