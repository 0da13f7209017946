"""Who waited for whom in collectives, and what each rank did in between.

`waits` finds who arrived when at the collectives that `matching` found to belong together,
`segments` the compute between two consecutive ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Literal

import numpy as np
import numpy.typing as npt

from pytest_sglprof._analysis.busy import busy_parts
from pytest_sglprof._analysis.clocks import TIMES_UNCERTAINTY, ClockFit, clocks_of
from pytest_sglprof._analysis.exposure import computing
from pytest_sglprof._analysis.groups import RankGroup, group_of_each, sync_groups
from pytest_sglprof._analysis.kinds import communication
from pytest_sglprof._analysis.matching import Meetings, match, meetings
from pytest_sglprof._trace.categories import NOT_COMPUTE
from pytest_sglprof._trace.table import places_of

if TYPE_CHECKING:
    import pandas as pd

    from pytest_sglprof._trace.table import KernelTable


Ints = npt.NDArray[np.int64]
COLUMNS = ("rank", "name", "step", "start_ns", "dur_ns", "match")


def matched_collectives(
    table: KernelTable, ranks: Sequence[str], calls: pd.DataFrame | None = None
) -> pd.DataFrame:
    """The matched collectives of a table: `COLUMNS`, with the index of `table.frame`.

    calls: those that are looked at, of `communication(table)`; None for all.
    """
    return match(communication(table) if calls is None else calls, ranks)[list(COLUMNS)]


# Waits. The rank that arrives last at a collective spends the least time in it, so
# wait(r) = latest arrival - arrival(r), and the shortest duration among the ranks is the transfer.


Floats = npt.NDArray[np.float64]
Method = Literal["arrival", "duration"]


@dataclass(frozen=True)
class Waits:
    """The matched collectives ("instances") of one sync group, in order of time.

    step: step number, shape (instances,); -1 without steps. start: when each rank arrived, end:
    when it left, each on its own clock, shape (instances, ranks), int64 ns. whole_wait: ns, same
    shape; 0 if below three times `clocks.reach_ns`. wait: the same without the time in which the
    rank computes on another stream. late_ns: how much later than the earliest each rank arrived, as
    far as any rank waited exposed for it, same shape. overlapped: share of the time in
    collectives in which their ranks compute on other streams. transfer: shortest time from
    arrival to end, shape (instances,), ns; NaN where the collective does other work besides.
    skew: latest - earliest arrival, same shape. method: how waits are measured: "arrival", or
    "duration" if the clocks cannot be aligned (skew is then the largest wait); None if nothing is
    matched. clocks: None if nothing tells of them. unmatched: number of calls that some rank
    lacks. kinds: number of calls of each kind. reason: why there are no waits; "" if there are.
    """

    group: RankGroup
    step: Ints
    start: Ints
    end: Ints
    whole_wait: Floats
    wait: Floats
    late_ns: Floats
    overlapped: float
    transfer: Floats
    skew: Floats
    method: Method | None
    clocks: ClockFit | None
    unmatched: int
    kinds: dict[str, int]
    reason: str = ""


def waits(table: KernelTable) -> tuple[Waits, ...]:
    """The waits of each sync group, in the order of the table."""
    rows, groups = communication(table), sync_groups(table.ranks)
    places = places_of(group_of_each(rows["rank"], groups), len(groups))
    pairs = zip(groups, places, strict=True)
    return tuple(_group_waits(table, group, rows.iloc[at]) for group, at in pairs)


def by_step(waited: Waits, numbers: Sequence[int], ranks: Sequence[str]) -> Ints | None:
    """Wait of `ranks` in the steps `numbers`, shape (steps, ranks), ns; None without matches."""
    if not len(waited.step):
        return None
    columns = [waited.group.ranks.index(rank) for rank in ranks]
    known = np.isin(waited.step, numbers)
    at = np.searchsorted(np.asarray(numbers, np.int64), waited.step[known])
    sums = np.zeros((len(numbers), len(ranks)), np.float64)
    np.add.at(sums, at, waited.wait[known][:, columns])
    rounded: Ints = np.rint(sums).astype(np.int64)
    return rounded


def _group_waits(table: KernelTable, group: RankGroup, calls: pd.DataFrame) -> Waits:
    kinds = {str(kind): int(number) for kind, number in calls["kind"].value_counts().items()}
    meeting = int(calls["waits"].sum())
    reason = _why_none(group, kinds, len(calls), meeting)
    if reason:
        return _nothing(group, kinds, 0, reason)
    met = meetings(match(calls, group.ranks), group.ranks)
    unmatched = meeting - met.arrived.size
    if not len(met.step):
        reason = "no collective is on every rank as often in the same step"
        return _nothing(group, kinds, unmatched, reason)
    clocks = _clocks(met, [table.hosts.get(rank, "") for rank in group.ranks])
    wait, skew, method = _waits_of(met, clocks)
    if method == "duration" and met.is_fused.any():
        met = met.take(~met.is_fused)
        if not len(met.step):
            reason = "only fused communication, and clocks that are not known well enough for it"
            return _nothing(group, kinds, unmatched, reason)
        wait, skew, method = _waits_of(met, None)
    hidden, beneath = (
        computing(table, group.ranks, met.stream, met.arrived, length)
        for length in (wait, met.dur.astype(np.float64))
    )
    return Waits(
        group=group,
        step=met.step,
        start=met.arrived,
        end=met.arrived + met.dur,
        whole_wait=wait,
        wait=wait - hidden,
        late_ns=_late(wait, wait - hidden),
        overlapped=float(beneath.sum() / max(1, met.dur.sum())),
        transfer=np.where(met.is_fused, np.nan, met.dur.min(axis=1)),
        skew=skew,
        method=method,
        clocks=clocks,
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
    if "unknown" in kinds:
        return (
            "it is not known whether the ranks' SendRecv is p2p or all-to-all, so its waiting "
            "blames nobody"
        )
    return f"only {' and '.join(sorted(kinds))} communication: its waiting blames nobody"


def _clocks(met: Meetings, hosts: Sequence[str]) -> ClockFit | None:
    # float64 is exact for the ns of a window, not for those since the epoch.
    ends = (met.arrived - int(met.arrived.min()) + met.dur).astype(np.float64)
    return clocks_of(ends, hosts, ~met.is_fused)


def _waits_of(met: Meetings, clocks: ClockFit | None) -> tuple[Floats, Floats, Method]:
    """Wait of each rank at each collective, its skew, and how it was measured."""
    by_duration = (met.dur - met.dur.min(axis=1, keepdims=True)).astype(np.float64)
    longest = by_duration.max(axis=1)
    # Clocks cannot be aligned by ends that vary more than the waits themselves.
    if clocks is None or clocks.uncertainty_ns > max(float(np.median(longest)), 1.0):
        return by_duration, longest, "duration"
    arrived = (met.arrived - int(met.arrived.min())) - clocks.offsets
    wait = arrived.max(axis=1, keepdims=True) - arrived
    skew = wait.max(axis=1)
    wait[wait < TIMES_UNCERTAINTY * clocks.reach_ns] = 0.0
    return wait, skew, "arrival"


def _late(wait: Floats, exposed: Floats) -> Floats:
    """How much later than the earliest each rank arrived; what is hidden comes first."""
    late = wait.max(axis=1, keepdims=True, initial=0.0) - wait
    lost = exposed.max(axis=1, keepdims=True, initial=0.0)
    left: Floats = np.maximum(0.0, late - (late.max(axis=1, keepdims=True, initial=0.0) - lost))
    return left


def _nothing(group: RankGroup, kinds: dict[str, int], unmatched: int, reason: str) -> Waits:
    none = np.zeros((0, len(group.ranks)), np.int64)
    line = np.zeros(0, np.float64)
    return Waits(
        group=group,
        step=np.zeros(0, np.int64),
        start=none,
        end=none,
        whole_wait=none.astype(np.float64),
        wait=none.astype(np.float64),
        late_ns=none.astype(np.float64),
        overlapped=0.0,
        transfer=line,
        skew=line,
        method=None,
        clocks=None,
        unmatched=unmatched,
        kinds=kinds,
        reason=reason,
    )


# Sync segments. What each rank did between two consecutive matched collectives.


@dataclass(frozen=True)
class Segments:
    """The segments of one sync group: one before each matched collective except the first.

    rows: positions in the table's frame of the compute activities inside a segment. rank,
    segment: indices of each such row into the group's ranks and the segments. busy: how much
    each adds to its rank's busy time, ns. span: time from the end of one collective to the
    start of the next, shape (segments, ranks), ns, each on its rank's own clock.
    """

    waits: Waits
    rows: Ints
    rank: Ints
    segment: Ints
    busy: Ints
    span: Ints

    def of_ranks(self, ranks: Sequence[str]) -> Ints:
        """The indices of the rows of these ranks, ascending."""
        labels = self.waits.group.ranks
        return np.sort(np.concatenate([self._by_rank[labels.index(label)] for label in ranks]))

    @cached_property
    def _by_rank(self) -> list[Ints]:
        return places_of(self.rank, len(self.waits.group.ranks))

    @cached_property
    def compute(self) -> Ints:
        """Busy time of compute, shape (segments, ranks), ns."""
        return self.sums(self.busy)

    def sums(self, values: Ints) -> Ints:
        """`values` of the rows summed by segment and rank, shape (segments, ranks)."""
        full = np.zeros(self.span.shape, np.int64)
        np.add.at(full, (self.segment, self.rank), values)
        return full


def segments(table: KernelTable, waits: Waits) -> Segments:
    """The segments between the collectives of `waits`; empty if there are none."""
    frame = table.frame
    places = [table.places[label] for label in waits.group.ranks]
    rank = np.repeat(np.arange(len(places)), list(map(len, places)))
    order = np.argsort(np.concatenate(places), kind="stable")
    rows, rank = np.concatenate(places)[order], rank[order]
    compute = ~frame["category"].iloc[rows].isin(NOT_COMPUTE).to_numpy(bool)
    rows, rank = rows[compute], rank[compute]
    start = frame["start_ns"].to_numpy(np.int64)[rows]
    # With collectives on two streams, a rank may start one before the previous one ends.
    arrived = np.maximum.accumulate(waits.start, axis=0)
    before = np.full(len(rows), -1, np.int64)
    for number, of_rank in enumerate(places_of(rank, len(places))):
        before[of_rank] = np.searchsorted(arrived[:, number], start[of_rank], side="right") - 1
    inside = (before >= 0) & (before < len(waits.step) - 1)
    rows, rank, segment = rows[inside], rank[inside], before[inside]
    dur = frame["dur_ns"].to_numpy(np.int64)[rows]
    busy = dur
    if table.is_timeline:  # self times are not intervals: they are summed
        owner = segment * len(waits.group.ranks) + rank
        busy = busy_parts(owner, frame["start_ns"].to_numpy(np.int64)[rows], dur)
    span = np.maximum(0, waits.start[1:] - waits.end[:-1])
    return Segments(waits, rows, rank, segment, busy, span)


def sync_factor(sums: Ints) -> float | None:
    """λ_sync = Σ max / Σ mean over the segments; None without compute.

    sums: busy time, shape (segments, ranks), ns.
    """
    mean = float(sums.mean(axis=1).sum()) if sums.size else 0.0
    return float(sums.max(axis=1).sum() / mean) if mean else None
