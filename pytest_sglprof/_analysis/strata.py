"""Groups the compared steps of a window by the work they do.

Such groups, strata, can be compared with another run's window, whatever its mix of batch sizes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

import msgspec
import numpy as np
import numpy.typing as npt

from pytest_sglprof._analysis.budget import BETWEEN, LAUNCHING, Walls
from pytest_sglprof._analysis.certainty import Amount, Count, Share, trimmed
from pytest_sglprof._analysis.collectives import Waits
from pytest_sglprof._analysis.times import GroupCells
from pytest_sglprof._trace.table import Ints, first_of

if TYPE_CHECKING:
    from pytest_sglprof._trace.table import KernelTable

MAX_STRATA = 32  # kept of a work group: those with the most steps
MAX_KERNELS = 300  # kept of a work group: those with the largest kernel time
MIN_KERNELS = 20
MAX_CELLS = 60_000  # strata x kernels kept of a window; 64 groups of 32 strata keep 29 each
UNKNOWN = -1
DIGITS = 3  # decimals kept of a figure
_NUMBERS = 2_000_000  # steps x kernels that are looked at at once, to bound memory
_DECODE = "decode"

Floats = npt.NDArray[np.float64]


class StepWork(msgspec.Struct, frozen=True, order=True):
    """The work of a step; steps of equal work are compared. -1 where it is not known.

    batch: requests, or the padded batch size of the graph that ran, if known. kv_bucket:
    floor(log2(KV tokens per request)). token_bucket: floor(log2(new tokens)); -1 for decode,
    where the batch says the same.
    """

    stage: str
    substage: str
    batch: int
    kv_bucket: int
    token_bucket: int


class Stratum(msgspec.Struct, frozen=True, kw_only=True):
    """Steps of equal work. Every figure is typical of them: of the means over the group's ranks of
    each step the 20 % trimmed mean, which a few slow steps do not move. Times in ns.

    steps: number of steps. kernels: the kernel time of each of `GroupStrata.kernels`, in that
    order; where not every step has a kernel, what is typical of those that have it, times their
    share. categories, compute_ns: over all kernels, including those that are not listed.
    calls: number of calls of each kernel, like its time. transfer_ns: time in collectives from
    the arrival of the last rank; None where none could be matched. wall_ns, idle_ns: of the
    passes, as in `RankBudget`; None where a step is no pass. All four None in older documents.
    """

    work: StepWork
    steps: Count
    compute_ns: Amount
    categories: dict[str, Amount]
    kernels: tuple[Amount, ...]
    calls: tuple[Amount, ...] | None = None
    transfer_ns: Amount | None = None
    wall_ns: Amount | None = None
    idle_ns: Amount | None = None


class GroupStrata(msgspec.Struct, frozen=True, kw_only=True):
    """The strata of one work group, the one with the most steps first.

    steps: number of compared steps by stage, including those of strata that are left out; None
    if the source has no steps. Then one stratum, with `steps` 1, holds the whole window, and
    `calls` has the number of calls of each kernel, mean of the ranks. kernels: (category,
    name). assigned_share: share of compute that lies in known steps. left_out_strata,
    left_out_kernels: number beyond the bounds on what is kept.
    """

    group: str
    ranks: tuple[str, ...]
    steps: dict[str, Count] | None
    assigned_share: Share
    kernels: tuple[tuple[str, str], ...]
    strata: tuple[Stratum, ...]
    left_out_strata: Count
    left_out_kernels: Count
    calls: tuple[Amount, ...]


def strata(
    table: KernelTable,
    groups: Sequence[GroupCells],
    waited: Sequence[Waits] = (),
    walls: Walls | None = None,
) -> tuple[GroupStrata, ...]:
    """The strata of every work group. groups, waited, walls: the results of `sum_times(table)`,
    `waits(table)` and `step_walls(table)`."""
    room = max(MIN_KERNELS, min(MAX_KERNELS, MAX_CELLS // max(1, len(groups) * MAX_STRATA)))
    return tuple(
        _group_strata(
            _works(table, cells), cells, room, _transfer(cells, waited), _wall(cells, walls)
        )
        for cells in groups
    )


def _group_strata(
    works: Sequence[StepWork],
    cells: GroupCells,
    room: int,
    transfer: Floats | None,
    wall: Floats | None,
) -> GroupStrata:
    """transfer, wall: of each compared step, as `_transfer` and `_wall` return them."""
    sizes = Counter(works)
    ordered = sorted(sizes, key=lambda work: (-sizes[work], work))
    shown = ordered[:MAX_STRATA]
    totals = cells.kernel_totals(np.ones(len(cells.kernels), bool)).sum(axis=1)
    order = np.argsort(-totals, kind="stable")[: int((totals > 0).sum())]
    steps = [np.flatnonzero([each == work for each in works]) for work in shown]
    ns, calls = _of_kernels(cells, order[:room], steps)
    names = tuple(dict.fromkeys(category for category, _ in cells.kernels))
    scopes = np.stack(
        [cells.kernel_matrix(cells.select(name)).mean(axis=1) for name in ("compute", *names)],
        axis=1,
    )
    of_scopes = [_typical(scopes[at]) for at in steps]
    return GroupStrata(
        group=cells.group.label,
        ranks=cells.group.ranks,
        steps=dict(Counter(cells.steps.stages)) if cells.has_steps else None,
        assigned_share=cells.assigned_share,
        kernels=tuple(cells.kernels[k] for k in order[:room]),
        strata=tuple(
            Stratum(
                work=work,
                steps=len(steps[at]),
                compute_ns=_rounded(of_scopes[at][0]),
                categories=dict(zip(names, map(_rounded, of_scopes[at][1:]), strict=True)),
                kernels=tuple(map(_rounded, ns[at])),
                calls=tuple(map(_rounded, calls[at])) if cells.has_steps else None,
                transfer_ns=_known(transfer, steps[at]),
                wall_ns=_known(None if wall is None else wall[:, 0], steps[at]),
                idle_ns=_known(None if wall is None else wall[:, 1], steps[at]),
            )
            for at, work in enumerate(shown)
        ),
        left_out_strata=len(ordered) - len(shown),
        left_out_kernels=max(0, len(order) - room),
        calls=() if cells.has_steps or not steps else tuple(map(float, calls[0])),
    )


def _of_kernels(cells: GroupCells, chosen: Ints, steps: Sequence[Ints]) -> tuple[Floats, Floats]:
    """What is typical of the time and the calls of kernels, each of shape (strata, kernels).

    chosen: indices of the kernels. steps: those of each stratum.
    """
    ranks, rows = len(cells.group.ranks), max(1, cells.times.owners // len(cells.group.ranks))
    typical = np.zeros((2, len(steps), len(chosen)))
    width = max(1, _NUMBERS // rows)
    for at in range(0, len(chosen), width):
        part = chosen[at : at + width]
        place = np.full(len(cells.kernels), UNKNOWN, np.int64)
        place[part] = np.arange(len(part))
        column = place[cells.times.kernel]
        kept = column >= 0
        keys = (cells.times.owner[kept] % rows) * len(part) + column[kept]
        for which, values in enumerate((cells.times.ns, cells.times.count)):
            sums = np.bincount(keys, values[kept], rows * len(part)).reshape(rows, len(part))
            for number, of_stratum in enumerate(steps):
                typical[which, number, at : at + width] = _typical(sums[of_stratum] / ranks)
    return typical[0], typical[1]


def _typical(values: Floats) -> Floats:
    """The trimmed mean of each column over the steps that have it, times their share.

    values: shape (steps, columns), at least one step. A kernel of every tenth step would be
    trimmed away otherwise.
    """
    means, _ = trimmed(values)
    for at in np.flatnonzero((values == 0).any(axis=0)):
        known = values[values[:, at] > 0, at]
        means[at] = trimmed(known[:, None])[0][0] * len(known) / len(values) if len(known) else 0.0
    return means


def _known(values: Floats | None, steps: Ints) -> float | None:
    """The trimmed mean over those of the steps whose value is known; None without one."""
    known = np.zeros(0) if values is None else values[steps][~np.isnan(values[steps])]
    return _rounded(trimmed(known[:, None])[0][0]) if len(known) else None


def _transfer(cells: GroupCells, waited: Sequence[Waits]) -> Floats | None:
    """The time of each compared step in collectives, without waits, ns; None if not known."""
    ranks = set(cells.group.ranks)
    met = next((each for each in waited if ranks <= set(each.group.ranks)), None)
    if met is None or not cells.has_steps:
        return None
    numbers = np.array(cells.steps.numbers, np.int64)
    at = first_of(numbers, met.step)
    known = (at >= 0) & ~np.isnan(met.transfer)
    if not known.any():
        return None
    sums = np.bincount(at[known], met.transfer[known], len(numbers))
    return sums.astype(np.float64)


def _wall(cells: GroupCells, walls: Walls | None) -> Floats | None:
    """Wall and idle time of each compared step, mean of the ranks, ns, shape (steps, 2).

    NaN where a rank has no such pass. None if no walls are known.
    """
    if walls is None or not walls.ranks or not cells.has_steps:
        return None
    numbers = np.array(cells.steps.numbers, np.int64)
    sums, seen = np.zeros((len(numbers), 2)), np.zeros(len(numbers), np.int64)
    for rank in walls.ranks:
        if rank.rank in cells.group.ranks and rank.has_steps:
            at = first_of(numbers, rank.numbers)
            known = (at >= 0) & rank.whole
            parts = rank.parts[known]
            idle = parts[:, [LAUNCHING, BETWEEN]].sum(axis=1)
            sums[at[known]] += np.stack([parts.sum(axis=1), idle], axis=1)
            seen[at[known]] += 1
    sums[seen < len(cells.group.ranks)] = np.nan
    return sums / len(cells.group.ranks)


def _works(table: KernelTable, cells: GroupCells) -> list[StepWork]:
    """The work of each compared step; without steps, one entry for the whole window."""
    if not cells.has_steps:
        return [StepWork("", "", UNKNOWN, UNKNOWN, UNKNOWN)]
    steps = table.steps[table.steps["rank"].isin(list(cells.group.ranks))]
    numbers = cells.steps.numbers

    def largest(name: str) -> Ints:
        """Maximum over the ranks: all have the same input, but some may not record it."""
        if name not in steps or steps.empty:
            return np.full(len(numbers), UNKNOWN, np.int64)
        values = steps.groupby("step")[name].max().reindex(list(numbers)).fillna(UNKNOWN)
        return values.to_numpy(np.int64)

    substages = {}
    if "substage" in steps:
        known = steps[steps["substage"].astype(object) != ""]
        substages = known.drop_duplicates("step").set_index("step")["substage"].to_dict()
    names = ("batch_size", "padded_batch", "kv_tokens", "tokens")
    columns = [largest(name).tolist() for name in names]
    works = []
    for number, stage, batch, padded, kv, tokens in zip(
        numbers, cells.steps.stages, *columns, strict=True
    ):
        shape = padded if padded >= 0 else batch
        requests = batch if batch > 0 else shape
        works.append(
            StepWork(
                stage=stage,
                substage=str(substages.get(number, "")),
                batch=shape,
                kv_bucket=_bucket(kv // requests) if kv >= 0 and requests > 0 else UNKNOWN,
                token_bucket=UNKNOWN if stage == _DECODE else _bucket(tokens),
            )
        )
    return works


def _rounded(figure: float) -> float:
    return round(float(figure), DIGITS)


def _bucket(tokens: int) -> int:
    """floor(log2(tokens)), and 0 for no tokens; -1 if unknown."""
    return UNKNOWN if tokens < 0 else max(1, tokens).bit_length() - 1
