"""Every kernel of a window, rank by rank: how long its calls took, and in which step or call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np
import pandas as pd

from pytest_sglprof.analysis.busy import Ints
from pytest_sglprof.analysis.cells import GroupCells
from pytest_sglprof.figures import Count

if TYPE_CHECKING:
    from pytest_sglprof.trace.table import KernelTable

MAX_KERNELS = 300  # a work group; those with the largest lost time, then total
QUANTILES = (0.0, 0.25, 0.5, 0.75, 1.0)
# Numbers in the step x rank and call x rank matrices of a work group: as many kernels have
# them, in the order of lost time, as fit.
MAX_CELLS = 200_000
MAX_DETAILED = 20
MAX_CALLS = 512  # k-th calls in a step
_KEYS = ("rank", "category", "name")
_DUR_BITS = 40  # 18 minutes in ns; longer calls count as that
_DUR_MASK = (1 << _DUR_BITS) - 1


class KernelSpread(msgspec.Struct, frozen=True, kw_only=True):
    """One kernel over the compared steps; lists are by rank.

    quantiles: 0, 25, 50, 75, 100 % of single calls, ns; None without a call. by_step: steps x
    ranks, kernel time, ns. by_call: k-th call in a step x ranks, mean duration, ns; -1 without
    one. Both are None but for the kernels with the largest lost time.
    """

    name: str
    category: str
    lost_ns: Count
    total_ns: list[int]
    count: list[int]
    quantiles: list[list[int] | None]
    by_step: list[list[int]] | None
    by_call: list[list[int]] | None


class KernelGroup(msgspec.Struct, frozen=True, kw_only=True):
    """The kernels of one work group, the largest lost time first.

    numbers: the steps of `by_step`. left_out: kernels that are not listed.
    """

    group: str
    ranks: tuple[str, ...]
    numbers: list[int]
    left_out: Count
    rows: tuple[KernelSpread, ...]


def kernel_spread(table: KernelTable, groups: Sequence[GroupCells]) -> tuple[KernelGroup, ...]:
    """The kernels of each work group. groups: as `cells.measure(table)` returns them."""
    return tuple(_group(table, cells) for cells in groups)


def _group(table: KernelTable, cells: GroupCells) -> KernelGroup:
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
        by_step = by_call = None
        room -= len(cells.steps.numbers) * len(ranks)
        if cells.has_steps and room >= 0 and at < MAX_DETAILED:
            by_step = cells.kernel_matrix(_only(k, len(lost))).tolist()
            by_call = calls.by_call(k)
            room -= sum(len(line) for line in by_call)
        rows.append(
            KernelSpread(
                name=name,
                category=category,
                lost_ns=round(float(lost[k])),
                total_ns=totals[k].tolist(),
                count=count,
                quantiles=quantiles,
                by_step=by_step,
                by_call=by_call,
            )
        )
    return KernelGroup(
        group=cells.group.label,
        ranks=tuple(ranks),
        numbers=list(cells.steps.numbers) if cells.has_steps else [],
        left_out=len(order) - len(shown),
        rows=tuple(rows),
    )


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
        codes = {key: frame[key].cat.codes.to_numpy().astype(np.int64) for key in _KEYS}
        words = {key: [str(word) for word in frame[key].cat.categories] for key in _KEYS}
        self._ranks = len(cells.group.ranks)
        rank = pd.Index(list(cells.group.ranks)).get_indexer(pd.Index(words["rank"], dtype=object))
        # (category, name) as one number, and which kernel of the cells it is.
        width = max(1, len(words["name"]))
        places = {key: {word: at for at, word in enumerate(words[key])} for key in _KEYS}
        kernel = np.full(len(words["category"]) * width, -1, np.int64)
        for k, (category, name) in enumerate(cells.kernels):
            kernel[places["category"][category] * width + places["name"][name]] = k
        key = kernel[codes["category"] * width + codes["name"]] * self._ranks
        key += rank[codes["rank"]]
        mine = (rank >= 0)[codes["rank"]]
        if cells.has_steps:
            mine &= np.isin(frame["step"].to_numpy(np.int64), np.array(cells.steps.numbers))
        self._key = key[mine]
        self._dur = frame["dur_ns"].to_numpy(np.int64)[mine]
        self._start = frame["start_ns"].to_numpy(np.int64)[mine]
        self._step = frame["step"].to_numpy(np.int64)[mine]
        # One sort of one number is several times faster than a sort by two keys.
        ordered = np.sort((self._key << _DUR_BITS) | np.minimum(self._dur, _DUR_MASK))
        self._sorted_dur = ordered & _DUR_MASK
        edges = np.arange(len(cells.kernels) * self._ranks + 1) << _DUR_BITS
        self._bounds = np.searchsorted(ordered, edges)

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
