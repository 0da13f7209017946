"""The kernel table summed once into small cells, from which every figure is made.

A cell is the kernel time of one kernel on one rank in one step. A window of 50 steps,
8 ranks and 60 kernels has 24,000 of them, however many activities it holds.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import pandas as pd

from pytest_sglprof.analysis.groups import WorkGroup, work_groups
from pytest_sglprof.analysis.steps import ComparedSteps, compared_steps, step_spans

if TYPE_CHECKING:
    from pytest_sglprof.trace.table import KernelTable

Ints = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]

# What the server computes, as opposed to what it says to its peers and to the host: a
# collective's duration is mostly waiting, a copy's depends on the bus and the host.
NOT_COMPUTE = ("communication", "memory")


@dataclass(frozen=True)
class GroupCells:
    """Kernel time of one work group in its compared steps (or over everything).

    ns: kernel time of each cell, int64 nanoseconds. rank, step, kernel: indices of each
    cell into `group.ranks`, `steps.numbers` and `kernels`. kernels: (category, normalised
    name) pairs. Cells are sorted by kernel; those of kernel k are `bounds[k]:bounds[k+1]`.
    has_steps: False when the table knows no steps; then there is one pseudo-step that
    holds everything. assigned_share: share of the group's compute time that belongs to
    some step, 0 to 1 (1.0 without steps and for NVTX ranges). active: ranks with any activity.
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
    # NVTX ranges outside of steps are the scheduler's own loop (idle, receive), no kernels
    # that lost their step; they cannot say how much of the work the steps cover.
    is_covering = table.source != "nvtx"
    return tuple(
        _group_cells(group, sums, spans, is_covering) for group in work_groups(table.ranks)
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


def _group_cells(
    group: WorkGroup, sums: pd.DataFrame, spans: pd.DataFrame, is_covering: bool
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
    )


def _positions(known: Sequence[object], values: pd.Series) -> Ints:
    """Index into `known` of each value, shape of `values`."""
    found: Ints = pd.Index(list(known)).get_indexer(pd.Index(values)).astype(np.int64)
    return found
