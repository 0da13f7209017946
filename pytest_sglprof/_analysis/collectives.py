"""Which calls of a collective belong together across ranks, row by row.

`analysis.waits` measures them; this names them, so that a picture can join them too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt
import pandas as pd

from pytest_sglprof._analysis.busy import busy_parts
from pytest_sglprof._analysis.groups import RankGroup, sync_groups
from pytest_sglprof._trace.categories import NOT_COMPUTE, collective_kind, is_symmetric

if TYPE_CHECKING:
    from pytest_sglprof._trace.table import KernelTable


Ints = npt.NDArray[np.int64]
COLUMNS = ("rank", "name", "step", "start_ns", "dur_ns", "match")


def communication(table: KernelTable) -> pd.DataFrame:
    """All communication of a table; the index is that of `table.frame`.

    Columns `rank, name, step, start_ns, dur_ns`, `kind` (as `collective_kind`), `waits`
    (whether all ranks wait for the last, and the step is known where any is),
    `process_group` ("" unknown), `sequence` (its number in the group, -1 unknown).
    """
    frame = table.frame
    rows = frame.loc[frame["category"] == "communication"]
    texts = ["rank", "name", "full_name"]
    rows = rows[[*texts, "step", "start_ns", "dur_ns"]].astype(dict.fromkeys(texts, object))
    if (frame["kind"] == "collective").any():
        # The server's own operators wrap the annotations: one meeting would count twice.
        rows = rows[(frame.loc[rows.index, "kind"] == "collective").to_numpy(bool)]
    names = [str(name) for name in rows["full_name"].unique()]
    kind = rows["full_name"].map({name: collective_kind(name) for name in names})
    symmetric = rows["full_name"].map({name: is_symmetric(name) for name in names})
    known = rows["step"] >= 0 if (frame["step"] >= 0).any() else True
    told = table.collectives.reindex(rows.index)
    return rows.drop(columns="full_name").assign(
        kind=kind.astype(object),
        waits=symmetric.astype(bool) & known,
        process_group=told["process_group"].astype(object).fillna(""),
        sequence=told["sequence"].fillna(-1).astype(np.int64),
    )


def match(calls: pd.DataFrame, ranks: Sequence[str]) -> pd.DataFrame:
    """The collectives of `communication` that all of `ranks` entered, with a column `match`.

    Rows with equal `match` (0, 1, ... in the order of the first arrival) are one collective,
    one row a rank. Of a name in a step they are told apart by process group and number in it
    where every call there has them; else by the order of the calls, of each process group
    where every call has one. By order, a name (in its group) that some rank called more or
    less often in the step is left out there, since nobody knows which call is missing; by
    number, only the missing one is. Empty for less than two ranks.
    """
    calls = calls[calls["waits"] & calls["rank"].isin(list(ranks))]
    if len(ranks) < 2 or calls.empty:
        return calls.iloc[:0].assign(match=np.zeros(0, np.int64))
    calls = calls.sort_values("start_ns", kind="stable")
    key = _keys(calls)
    owner = pd.Index(ranks).get_indexer(pd.Index(calls["rank"])).astype(np.int64)
    counts = np.zeros((key.max() + 1, len(ranks)), np.int64)
    np.add.at(counts, (key, owner), 1)
    whole = (counts == counts[:, :1]).all(axis=1)[key]
    calls, key, owner = calls[whole], key[whole], owner[whole]
    order = np.asarray(calls.groupby(_pairs(key, owner)).cumcount(), np.int64)
    return calls.assign(match=_pairs(key, order))


def _keys(calls: pd.DataFrame) -> Ints:
    """What tells calls apart, but for their order: step and name, group and number if known."""
    steps, names = (_codes(calls[column]) for column in ("step", "name"))
    place = _pairs(steps, names)
    groups = calls["process_group"].to_numpy(object)
    known = _everywhere(groups != "", place)
    if not known.any():
        return place
    number = calls["sequence"].to_numpy(np.int64)
    numbered = known & _everywhere(number >= 0, place)
    own = _pairs(place, _codes(np.where(known, groups, "")))
    return _pairs(own, _codes(np.where(numbered, number, -1)))


def _everywhere(flag: npt.NDArray[np.bool_], place: Ints) -> npt.NDArray[np.bool_]:
    """Whether `flag` holds for all rows of a row's place."""
    found: npt.NDArray[np.bool_] = (np.bincount(place, weights=~flag) == 0)[place]
    return found


def _pairs(first: Ints, second: Ints) -> Ints:
    """Codes (0, 1, ... by appearance) of pairs of codes."""
    return _codes(first * (int(second.max(initial=0)) + 1) + second)


def _codes(values: Any) -> Ints:
    """Codes (0, 1, ... by appearance) of values."""
    codes: Ints = pd.factorize(values)[0].astype(np.int64)
    return codes


def matched_collectives(table: KernelTable, ranks: Sequence[str]) -> pd.DataFrame:
    """`match` of a table, with `COLUMNS`; the index is that of `table.frame`."""
    return match(communication(table), ranks)[list(COLUMNS)]


# Who waited for whom: the collectives of a sync group, matched across its ranks.
#
# In a collective the rank that arrives last spends the least time. So wait(r) = latest start
# - start(r), and the shortest duration among the ranks is the transfer itself.


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


# The clocks of several ranks brought together by what they do at the same moment.
#
# A collective ends everywhere at about the same time. How much later than the others' median
# a rank's clock says that it ended is that clock's offset; what is left after the offset was
# taken out is how certain it is.


MIN_ENDS = 20
MAX_PIECES = 16
ENDS_OF_PIECE = 20
CERTAIN_SHARE = 95.0


@dataclass(frozen=True)
class ClockFit:
    """offsets: how far each rank's clock is ahead, shape (instances, ranks), ns.

    uncertainty_ns: 95 % of what is left of the ends' differences is below it.
    """

    offsets: Floats
    uncertainty_ns: float


def fit_clocks(ends: Floats) -> ClockFit | None:
    """Offsets from the ends of matched collectives, shape (instances, ranks), ns, in order.

    Between medians of pieces of the window the offset moves along lines, so that drift is
    followed and single odd ends are not. Too few ends (below 20) give None.
    """
    if len(ends) < MIN_ENDS:
        return None
    middle = np.median(ends, axis=1)
    ahead = ends - middle[:, None]
    pieces = np.array_split(np.arange(len(ends)), min(MAX_PIECES, len(ends) // ENDS_OF_PIECE))
    at = np.array([np.median(middle[piece]) for piece in pieces])
    medians = np.array([np.median(ahead[piece], axis=0) for piece in pieces])
    offsets = np.column_stack([_line(middle, at, column) for column in medians.T])
    left = np.abs(ahead - offsets)
    # Around the median itself a rank has no difference at all: the worst rank counts.
    return ClockFit(offsets, float(np.percentile(left, CERTAIN_SHARE, axis=0).max()))


def _line(when: Floats, at: Floats, values: Floats) -> Floats:
    """`values` at times `at`, on lines between them and beyond the outer two."""
    if len(at) < 2:
        return np.full(len(when), values[0])
    found = np.interp(when, at, values)
    for outside, a, b in ((when < at[0], 0, 1), (when > at[-1], -2, -1)):
        slope = (values[b] - values[a]) / (at[b] - at[a])
        found[outside] = values[a] + slope * (when[outside] - at[a])
    return np.asarray(found, np.float64)


# Sync segments: what each rank did between two consecutive matched collectives.


@dataclass(frozen=True)
class Segments:
    """The segments of one sync group, one before each matched collective but the first.

    rows: positions in the table's frame of the compute that lies in a segment. rank,
    segment: of each of those rows, indices into the group's ranks and the segments. busy:
    what each adds to its rank's busy time, ns. span: from the end of the one collective to
    the start of the next, shape (segments, ranks), ns, each on the rank's own clock.
    """

    waits: Waits
    rows: Ints
    rank: Ints
    segment: Ints
    busy: Ints
    span: Ints

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
    """The segments between the collectives of `waits`; none without any."""
    frame = table.frame
    codes = pd.Index(waits.group.ranks).get_indexer(pd.Index(frame["rank"].astype(object)))
    compute = ~frame["category"].isin(NOT_COMPUTE).to_numpy(bool) & (codes >= 0)
    rows = np.flatnonzero(compute).astype(np.int64)
    rank = codes[rows].astype(np.int64)
    start = frame["start_ns"].to_numpy(np.int64)[rows]
    # A rank that runs collectives on two streams may start one before the last has ended.
    arrived = np.maximum.accumulate(waits.start, axis=0)
    before = np.full(len(rows), -1, np.int64)
    for number in range(len(waits.group.ranks)):
        mine = rank == number
        before[mine] = np.searchsorted(arrived[:, number], start[mine], side="right") - 1
    inside = (before >= 0) & (before < len(waits.step) - 1)
    rows, rank, segment = rows[inside], rank[inside], before[inside]
    dur = frame["dur_ns"].to_numpy(np.int64)[rows]
    busy = dur
    if table.is_timeline:  # self times are no intervals of a timeline: those are summed
        owner = segment * len(waits.group.ranks) + rank
        busy = busy_parts(owner, frame["start_ns"].to_numpy(np.int64)[rows], dur)
    span = np.maximum(0, waits.start[1:] - waits.end[:-1])
    return Segments(waits, rows, rank, segment, busy, span)


def sync_factor(sums: Ints) -> float | None:
    """λ_sync = Σ max / Σ mean over segments, of a matrix (segments, ranks); None of nothing."""
    mean = float(sums.mean(axis=1).sum()) if sums.size else 0.0
    return float(sums.max(axis=1).sum() / mean) if mean else None
