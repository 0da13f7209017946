"""Strata: the compared steps of a window sorted by the work they do, so that another run's
window with another mix of batches can be compared stratum by stratum."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

import msgspec
import numpy as np
import numpy.typing as npt

from pytest_sglprof.analysis.cells import GroupCells
from pytest_sglprof.figures import Amount, Count, Share
from pytest_sglprof.trace.arrays import Ints, first_of

if TYPE_CHECKING:
    from pytest_sglprof.trace.table import KernelTable

MAX_STRATA = 32  # of a work group, those with the most steps
MAX_KERNELS = 300  # of a work group, those with the largest kernel time
MIN_KERNELS = 20
# Strata x kernels of a window: 64 replicas of 32 strata keep 29 kernels each.
MAX_CELLS = 60_000
UNKNOWN = -1
DIGITS = 3  # decimals of a mean, ns
_ROWS = 1_000_000  # of the table at once
_DECODE = "decode"

Floats = npt.NDArray[np.float64]


class StepWork(msgspec.Struct, frozen=True, order=True):
    """What a step does. Steps of equal work are compared. -1 where the source does not tell.

    batch: requests, padded as for the graph that ran, where that is told. kv_bucket:
    floor(log2(KV tokens per request)). token_bucket: floor(log2(new tokens)) of a step that is
    not decode; in decode the batch says the same.
    """

    stage: str
    substage: str
    batch: int
    kv_bucket: int
    token_bucket: int


class Stratum(msgspec.Struct, frozen=True, kw_only=True):
    """Steps of equal work; kernel times are means over these steps and the group's ranks, ns.

    steps: how many. kernels: of each of `GroupStrata.kernels`. categories, compute_ns: of all
    kernels, also of those that are not listed.
    """

    work: StepWork
    steps: Count
    compute_ns: Amount
    categories: dict[str, Amount]
    kernels: tuple[Amount, ...]


class GroupStrata(msgspec.Struct, frozen=True, kw_only=True):
    """The strata of one work group, the one with the most steps first.

    steps: compared steps by stage, also those of strata that are left out; None where the source
    tells no steps: then there is one stratum that holds the whole window, with `steps` 1, and
    `calls` are the calls of each kernel, mean of the ranks. kernels: (category, name).
    assigned_share: share of compute that lies in known steps. left_out_*: beyond the bounds.
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


def strata(table: KernelTable, groups: Sequence[GroupCells]) -> tuple[GroupStrata, ...]:
    """The strata of every work group. groups: as `cells.measure(table)` returns them."""
    room = max(MIN_KERNELS, min(MAX_KERNELS, MAX_CELLS // max(1, len(groups) * MAX_STRATA)))
    return tuple(_group(table, cells, room) for cells in groups)


def _group(table: KernelTable, cells: GroupCells, room: int) -> GroupStrata:
    works = _works(table, cells)
    sizes = Counter(works)
    found = sorted(sizes, key=lambda work: (-sizes[work], work))
    shown = found[:MAX_STRATA]
    sums, calls = _sums(table, cells, [found.index(work) for work in works], len(found))
    ranks = len(cells.group.ranks)
    steps = np.array([sizes[work] for work in found], dtype=np.int64)
    means = sums / np.maximum(1, steps[:, None] * ranks)
    totals = sums.sum(axis=0)
    order = np.argsort(-totals, kind="stable")[: int((totals > 0).sum())]
    names = dict.fromkeys(category for category, _ in cells.kernels)
    scopes = {name: cells.select(name) for name in names}
    return GroupStrata(
        group=cells.group.label,
        ranks=cells.group.ranks,
        steps=dict(Counter(cells.steps.stages)) if cells.has_steps else None,
        assigned_share=cells.assigned_share,
        kernels=tuple(cells.kernels[k] for k in order[:room]),
        strata=tuple(
            Stratum(
                work=work,
                steps=int(steps[at]),
                compute_ns=_mean(means[at][cells.select("compute")].sum()),
                categories={name: _mean(means[at][mask].sum()) for name, mask in scopes.items()},
                kernels=tuple(map(_mean, means[at][order[:room]])),
            )
            for at, work in enumerate(shown)
        ),
        left_out_strata=len(found) - len(shown),
        left_out_kernels=max(0, len(order) - room),
        calls=() if cells.has_steps else tuple(float(calls[0, k]) / ranks for k in order[:room]),
    )


def _sums(
    table: KernelTable, cells: GroupCells, of_step: Sequence[int], count: int
) -> tuple[Floats, Floats]:
    """Kernel time, ns, and calls of all ranks by stratum and kernel, shape (count, kernels).

    of_step: the stratum of each compared step. Whole numbers below 2**53, so exact.
    """
    frame, width = table.frame, len(cells.kernels)
    words = {key: [str(w) for w in frame[key].cat.categories] for key in ("category", "name")}
    place = {kernel: at for at, kernel in enumerate(cells.kernels)}
    kernel = np.array(
        [[place.get((category, name), UNKNOWN) for name in words["name"]]
         for category in words["category"]]
    ).reshape(len(words["category"]), len(words["name"]))  # fmt: skip
    member = frame["rank"].cat.categories.isin(list(cells.group.ranks))
    numbers = np.array(cells.steps.numbers, np.int64)
    stratum = np.array([*of_step, UNKNOWN], np.int64)  # the last one for other steps
    sums = np.zeros((2, count * width))
    for at in range(0, len(frame), _ROWS):
        part = frame.iloc[at : at + _ROWS]
        own = np.zeros(len(part), np.int64)
        if cells.has_steps:
            own = stratum[first_of(numbers, part["step"].to_numpy(np.int64))]
        which = kernel[part["category"].cat.codes, part["name"].cat.codes]
        mine = (own >= 0) & (which >= 0) & member[part["rank"].cat.codes]
        keys = own[mine] * width + which[mine]
        sums[0] += np.bincount(keys, part["dur_ns"].to_numpy()[mine], count * width)
        sums[1] += np.bincount(keys, minlength=count * width)
    return sums[0].reshape(count, width), sums[1].reshape(count, width)


def _works(table: KernelTable, cells: GroupCells) -> list[StepWork]:
    """The work of each compared step; of a table without steps one for the whole window."""
    if not cells.has_steps:
        return [StepWork("", "", UNKNOWN, UNKNOWN, UNKNOWN)]
    mine = table.steps[table.steps["rank"].isin(list(cells.group.ranks))]
    numbers = cells.steps.numbers

    def largest(name: str) -> Ints:
        """Of the ranks, which have one input: some may not tell."""
        if name not in mine or mine.empty:
            return np.full(len(numbers), UNKNOWN, np.int64)
        found = mine.groupby("step")[name].max().reindex(list(numbers)).fillna(UNKNOWN)
        return found.to_numpy(np.int64)

    substages = {}
    if "substage" in mine:
        told = mine[mine["substage"].astype(object) != ""]
        substages = told.drop_duplicates("step").set_index("step")["substage"].to_dict()
    names = ("batch_size", "padded_batch", "kv_tokens", "tokens")
    columns = [largest(name).tolist() for name in names]
    found = []
    for number, stage, batch, padded, kv, tokens in zip(
        numbers, cells.steps.stages, *columns, strict=True
    ):
        shape = padded if padded >= 0 else batch
        requests = batch if batch > 0 else shape
        found.append(
            StepWork(
                stage=stage,
                substage=str(substages.get(number, "")),
                batch=shape,
                kv_bucket=_bucket(kv // requests) if kv >= 0 and requests > 0 else UNKNOWN,
                token_bucket=UNKNOWN if stage == _DECODE else _bucket(tokens),
            )
        )
    return found


def _mean(ns: float) -> float:
    return round(float(ns), DIGITS)


def _bucket(tokens: int) -> int:
    """floor(log2(tokens)), of 0 and 1 the same; -1 where they are unknown."""
    return UNKNOWN if tokens < 0 else max(1, tokens).bit_length() - 1
