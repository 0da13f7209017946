"""Who waited for whom: the collectives of a sync group, matched across its ranks.

In a collective the rank that arrives last spends the least time. So wait(r) = latest start
- start(r), and the shortest duration among the ranks is the transfer itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
import numpy.typing as npt
import pandas as pd

from pytest_sglprof.analysis.clocks import fit_clocks
from pytest_sglprof.analysis.collectives import communication, match
from pytest_sglprof.analysis.groups import RankGroup, sync_groups

if TYPE_CHECKING:
    from pytest_sglprof.trace.table import KernelTable

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
Method = Literal["arrival", "duration"]


@dataclass(frozen=True)
class Waits:
    """The matched collectives of one sync group, in order of time.

    step: of each instance, shape (instances,); -1 without steps. start, end: as recorded,
    on each rank's own clock, shape (instances, ranks), int64 ns. wait: ns, same shape; 0
    below the uncertainty. transfer, skew: shortest duration and latest - earliest start,
    shape (instances,), ns. method: "arrival", or "duration" where the clocks could not be
    brought together (then skew is the largest wait), None when nothing is matched. offsets:
    median of each rank's clock offset, ns. uncertainty_ns: of an arrival. unmatched:
    collectives that are not on every rank. kinds: activities of each kind. reason: why
    there are no waits; "" when there are.
    """

    group: RankGroup
    step: Ints
    start: Ints
    end: Ints
    wait: Floats
    transfer: Floats
    skew: Floats
    method: Method | None
    offsets: tuple[float, ...] | None
    uncertainty_ns: float | None
    unmatched: int
    kinds: dict[str, int]
    reason: str = ""

    @property
    def lateness(self) -> Floats:
        """How much later than the earliest each rank arrived, shape (instances, ranks), ns."""
        lateness: Floats = self.wait.max(axis=1, keepdims=True, initial=0.0) - self.wait
        return lateness


def waits(table: KernelTable) -> tuple[Waits, ...]:
    """The waits of each sync group of a table, in its order."""
    rows = communication(table)
    return tuple(_group_waits(group, rows) for group in sync_groups(table.ranks))


def by_step(found: Waits, numbers: Sequence[int], ranks: Sequence[str]) -> Ints | None:
    """Waiting of these ranks in each step, shape (steps, ranks), ns; None without collectives."""
    if not len(found.step):
        return None
    columns = [found.group.ranks.index(rank) for rank in ranks]
    known = np.isin(found.step, numbers)
    at = np.searchsorted(np.asarray(numbers, np.int64), found.step[known])
    sums = np.zeros((len(numbers), len(ranks)), np.float64)
    np.add.at(sums, at, found.wait[known][:, columns])
    rounded: Ints = np.rint(sums).astype(np.int64)
    return rounded


def _group_waits(group: RankGroup, rows: pd.DataFrame) -> Waits:
    mine = rows[rows["rank"].isin(group.ranks)]
    kinds = {str(kind): int(number) for kind, number in mine["kind"].value_counts().items()}
    meeting = int(mine["waits"].sum())
    reason = _why_none(group, kinds, len(mine), meeting)
    if reason:
        return _nothing(group, kinds, 0, reason)
    step, start, dur = _matched(mine, group.ranks)
    unmatched = meeting - start.size
    if not len(step):
        reason = "no collective is on every rank as often in the same step"
        return _nothing(group, kinds, unmatched, reason)
    end = start + dur
    wait, skew, method, offsets, uncertainty = _waits_of(start, dur, end)
    return Waits(
        group=group,
        step=step,
        start=start,
        end=end,
        wait=wait,
        transfer=dur.min(axis=1).astype(np.float64),
        skew=skew,
        method=method,
        offsets=offsets,
        uncertainty_ns=uncertainty,
        unmatched=unmatched,
        kinds=kinds,
    )


def _why_none(group: RankGroup, kinds: dict[str, int], every: int, symmetric: int) -> str:
    if len(group.ranks) == 1:
        return f"{group.ranks[0]} is the only rank, so it waits for nobody"
    if not every:
        return "no communication was recorded"
    if symmetric:
        return ""
    if set(kinds) == {"p2p"}:
        return "only p2p communication: a receiver always waits, so waiting blames nobody"
    if "collective" in kinds:
        return "no collective in which all wait for the last lies in a known step"
    return f"only {' and '.join(sorted(kinds))} communication: its waiting blames nobody"


def _matched(rows: pd.DataFrame, ranks: Sequence[str]) -> tuple[Ints, Ints, Ints]:
    """step, start and dur of each instance in order of time."""
    matched = match(rows, ranks)
    owner = pd.Index(ranks).get_indexer(pd.Index(matched["rank"]))
    matched = matched.iloc[np.lexsort((owner, matched["match"]))]
    shape = (-1, len(ranks))
    step = matched["step"].to_numpy(np.int64).reshape(shape)[:, 0]
    start = matched["start_ns"].to_numpy(np.int64).reshape(shape)
    dur = matched["dur_ns"].to_numpy(np.int64).reshape(shape)
    # By the ends on one clock: a rank's own order is that of all.
    at = np.argsort(start[:, 0] + dur[:, 0], kind="stable")
    return step[at], start[at], dur[at]


def _waits_of(
    start: Ints, dur: Ints, end: Ints
) -> tuple[Floats, Floats, Method, tuple[float, ...] | None, float | None]:
    by_duration = (dur - dur.min(axis=1, keepdims=True)).astype(np.float64)
    origin = int(end.min())  # float64 holds a window's ns, not an epoch's
    fit = fit_clocks((end - origin).astype(np.float64))
    if fit is None:
        return by_duration, by_duration.max(axis=1), "duration", None, None
    offsets = tuple(float(value) for value in np.median(fit.offsets, axis=0))
    # Ends that differ by more than the waits themselves bring no clocks together.
    if fit.uncertainty_ns > max(float(np.median(by_duration.max(axis=1))), 1.0):
        return by_duration, by_duration.max(axis=1), "duration", offsets, fit.uncertainty_ns
    arrived = (start - origin) - fit.offsets
    wait = arrived.max(axis=1, keepdims=True) - arrived
    skew = wait.max(axis=1)
    wait[wait < fit.uncertainty_ns] = 0.0
    return wait, skew, "arrival", offsets, fit.uncertainty_ns


def _nothing(group: RankGroup, kinds: dict[str, int], unmatched: int, reason: str) -> Waits:
    none = np.zeros((0, len(group.ranks)), np.int64)
    line = np.zeros(0, np.float64)
    return Waits(
        group=group,
        step=np.zeros(0, np.int64),
        start=none,
        end=none,
        wait=none.astype(np.float64),
        transfer=line,
        skew=line,
        method=None,
        offsets=None,
        uncertainty_ns=None,
        unmatched=unmatched,
        kinds=kinds,
        reason=reason,
    )
