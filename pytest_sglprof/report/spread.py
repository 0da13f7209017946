"""Every kernel of a window, rank by rank: how long its calls took, and in which step or call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from pytest_sglprof.analysis.cells import GroupCells, Ints

if TYPE_CHECKING:
    from pytest_sglprof.trace.table import KernelTable

MAX_KERNELS = 300  # a work group; those with the largest lost time, then total
QUANTILES = (0.0, 0.25, 0.5, 0.75, 1.0)
# Numbers in the step x rank and call x rank matrices of a work group: as many kernels have
# them, in the order of lost time, as fit.
MAX_CELLS = 200_000
MAX_DETAILED = 20
MAX_CALLS = 512  # k-th calls in a step


def kernel_spread(table: KernelTable, groups: Sequence[GroupCells]) -> list[dict[str, Any]]:
    """For each work group its kernels, the largest lost time first.

    A kernel has `name, category, lost_ns`, and by rank `total_ns`, `count` and `quantiles`
    (0, 25, 50, 75, 100 %, of single calls, ns; null without a call) over the compared steps.
    The first ones also have `by_step` (steps x ranks, kernel time, ns; numbers: `numbers`)
    and `by_call` (k-th call in a step x ranks, mean duration, ns; -1 without one).
    """
    return [_group(table, cells) for cells in groups]


def _group(table: KernelTable, cells: GroupCells) -> dict[str, Any]:
    ranks = cells.group.ranks
    lost, totals = _lost(cells)
    order = sorted(range(len(lost)), key=lambda k: (-lost[k], -int(totals[k].sum()), k))
    shown = order[:MAX_KERNELS]
    calls = _Calls(table.frame, cells)
    rows = []
    room = MAX_CELLS
    for at, k in enumerate(shown):
        category, name = cells.kernels[k]
        count, quantiles = calls.quantiles(k)
        row: dict[str, Any] = {
            "name": name,
            "category": category,
            "lost_ns": round(float(lost[k])),
            "total_ns": totals[k].tolist(),
            "count": count,
            "quantiles": quantiles,
        }
        room -= len(cells.steps.numbers) * len(ranks)
        if cells.has_steps and room >= 0 and at < MAX_DETAILED:
            row["by_step"] = cells.matrix(_only(k, len(lost))).tolist()
            row["by_call"] = calls.by_call(k)
            room -= sum(len(line) for line in row["by_call"])
        rows.append(row)
    return {
        "group": cells.group.label,
        "ranks": list(ranks),
        "numbers": list(cells.steps.numbers) if cells.has_steps else [],
        "left_out": len(order) - len(shown),
        "rows": rows,
    }


def _lost(cells: GroupCells) -> tuple[list[float], Ints]:
    """Lost time of each kernel (as in a finding), and its totals, shape (kernels, ranks)."""
    every = np.ones(len(cells.kernels), bool)
    lost = []
    for k in range(len(cells.kernels)):
        matrix = cells.matrix(_only(k, len(cells.kernels)))
        lost.append(float(matrix.max(axis=1).sum() - matrix.mean(axis=1).sum()))
    return lost, cells.kernel_totals(every)


def _only(k: int, count: int) -> np.ndarray[Any, np.dtype[np.bool_]]:
    chosen = np.zeros(count, bool)
    chosen[k] = True
    return chosen


class _Calls:
    """Single calls of a work group in its compared steps, sorted by kernel and rank."""

    def __init__(self, frame: pd.DataFrame, cells: GroupCells) -> None:
        mine = frame["rank"].isin(cells.group.ranks).to_numpy()
        if cells.has_steps:
            mine = mine & frame["step"].isin(cells.steps.numbers).to_numpy()
        rank_codes = pd.Index(list(cells.group.ranks)).get_indexer(
            pd.Index(frame["rank"].cat.categories.astype(object))
        )
        pairs = pd.MultiIndex.from_arrays([frame["category"].cat.codes, frame["name"].cat.codes])
        codes, uniques = pairs[mine].factorize()
        names = frame["name"].cat.categories
        categories = frame["category"].cat.categories
        known = {pair: k for k, pair in enumerate(cells.kernels)}
        to_kernel = np.array(
            [known.get((str(categories[c]), str(names[n])), -1) for c, n in uniques], np.int64
        )
        kernel = to_kernel[codes] if len(codes) else np.zeros(0, np.int64)
        rank = rank_codes[frame["rank"].cat.codes.to_numpy()[mine]].astype(np.int64)
        self._ranks = len(cells.group.ranks)
        self._key = kernel * self._ranks + rank
        self._dur = frame["dur_ns"].to_numpy(np.int64)[mine]
        self._start = frame["start_ns"].to_numpy(np.int64)[mine]
        self._step = frame["step"].to_numpy(np.int64)[mine]
        order = np.lexsort((self._dur, self._key))
        self._sorted_dur = self._dur[order]
        edges = np.arange(len(cells.kernels) * self._ranks + 1)
        self._bounds = np.searchsorted(self._key[order], edges)

    def quantiles(self, kernel: int) -> tuple[list[int], list[list[int] | None]]:
        """Number of calls and the quantiles of their durations, by rank."""
        counts, found = [], []
        for rank in range(self._ranks):
            at = kernel * self._ranks + rank
            calls = self._sorted_dur[self._bounds[at] : self._bounds[at + 1]]
            counts.append(len(calls))
            points = (
                [int(calls[round(q * (len(calls) - 1))]) for q in QUANTILES] if counts[-1] else None
            )
            found.append(points)
        return counts, found

    def by_call(self, kernel: int) -> list[list[int]]:
        """Mean duration of the k-th call in a step, rows k, columns ranks."""
        mine = self._key // self._ranks == kernel
        calls = pd.DataFrame(
            {
                "rank": self._key[mine] % self._ranks,
                "step": self._step[mine],
                "start": self._start[mine],
                "dur": self._dur[mine],
            }
        ).sort_values("start", kind="stable")
        calls["call"] = calls.groupby(["rank", "step"]).cumcount()
        calls = calls[calls["call"] < MAX_CALLS]
        mean = calls.groupby(["call", "rank"])["dur"].mean().unstack("rank")
        full = mean.reindex(columns=range(self._ranks)).fillna(-1).round()
        return [[int(ns) for ns in row] for row in full.to_numpy()]
