"""Matches collectives across ranks, and measures who waited and what each did in between.

`match` finds the calls that belong together, `waits` who arrived when, `segments` the compute
between two consecutive matched collectives.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

from pytest_sglprof._analysis.busy import busy_parts
from pytest_sglprof._analysis.groups import RankGroup, sync_groups
from pytest_sglprof._trace.categories import NOT_COMPUTE, collective_kind, is_symmetric

if TYPE_CHECKING:
    import pandas as pd

    from pytest_sglprof._trace.table import KernelTable


Ints = npt.NDArray[np.int64]
COLUMNS = ("rank", "name", "step", "start_ns", "dur_ns", "match")


def communication(table: KernelTable) -> pd.DataFrame:
    """All communication of a table, with the index of `table.frame`.

    Columns `rank, name, step, start_ns, dur_ns`, `kind` (see `collective_kind`), `waits`
    (True if all ranks wait for the last to arrive, and the step is known if the table has
    steps), `process_group` ("" if unknown), `sequence` (number in the group, -1 if unknown).
    """
    frame = table.frame
    rows = frame.loc[frame["category"] == "communication"]
    texts = ["rank", "name", "full_name"]
    rows = rows[[*texts, "step", "start_ns", "dur_ns"]].astype(dict.fromkeys(texts, object))
    if (frame["kind"] == "collective").any():
        # The server's operators wrap these annotations: each collective would count twice.
        rows = rows[(frame.loc[rows.index, "kind"] == "collective").to_numpy(bool)]
    names = [str(name) for name in rows["full_name"].unique()]
    kind = rows["full_name"].map({name: collective_kind(name) for name in names})
    symmetric = rows["full_name"].map({name: is_symmetric(name) for name in names})
    known = rows["step"] >= 0 if (frame["step"] >= 0).any() else True
    numbers = table.collectives.reindex(rows.index)
    return rows.drop(columns="full_name").assign(
        kind=kind.astype(object),
        waits=symmetric.astype(bool) & known,
        process_group=numbers["process_group"].astype(object).fillna(""),
        sequence=numbers["sequence"].fillna(-1).astype(np.int64),
    )


def match(calls: pd.DataFrame, ranks: Sequence[str]) -> pd.DataFrame:
    """The rows of `communication` that all of `ranks` entered, with a column `match`.

    Rows with equal `match` (0, 1, ... in order of the first arrival) are one collective, one
    row for each rank. Calls of one name in one step are matched by process group and sequence
    number if every such call has them, else by process group and order if every call has a
    group, else by order alone. If ranks differ in the number of calls, matching by number
    drops only the calls that some rank lacks; matching by order drops them all, since it is
    not known which one is missing. Empty for fewer than two ranks.
    """
    import pandas as pd

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
    """Keys of calls, apart from their order: step and name, and group and number if known."""
    steps, names = (_codes(calls[column]) for column in ("step", "name"))
    place = _pairs(steps, names)
    groups = calls["process_group"].to_numpy(object)
    known = _everywhere(groups != "", place)
    if not known.any():
        return place
    number = calls["sequence"].to_numpy(np.int64)
    numbered = known & _everywhere(number >= 0, place)
    in_group = _pairs(place, _codes(np.where(known, groups, "")))
    return _pairs(in_group, _codes(np.where(numbered, number, -1)))


def _everywhere(flag: npt.NDArray[np.bool_], place: Ints) -> npt.NDArray[np.bool_]:
    """For each row, whether `flag` is True in all rows with the same `place`."""
    everywhere: npt.NDArray[np.bool_] = (np.bincount(place, weights=~flag) == 0)[place]
    return everywhere


def _pairs(first: Ints, second: Ints) -> Ints:
    """Encodes pairs of codes as 0, 1, ... in order of appearance."""
    return _codes(first * (int(second.max(initial=0)) + 1) + second)


def _codes(values: Any) -> Ints:
    """Encodes values as 0, 1, ... in order of appearance."""
    import pandas as pd

    codes: Ints = pd.factorize(values)[0].astype(np.int64)
    return codes


def matched_collectives(table: KernelTable, ranks: Sequence[str]) -> pd.DataFrame:
    """The matched collectives of a table: `COLUMNS`, with the index of `table.frame`."""
    return match(communication(table), ranks)[list(COLUMNS)]


# Waits. The rank that arrives last at a collective spends the least time in it, so
# wait(r) = latest start - start(r), and the shortest duration among the ranks is the transfer.


Floats = npt.NDArray[np.float64]
Method = Literal["arrival", "duration"]


@dataclass(frozen=True)
class Waits:
    """The matched collectives ("instances") of one sync group, in order of time.

    step: step number, shape (instances,); -1 without steps. start, end: as recorded, each on
    its rank's own clock, shape (instances, ranks), int64 ns. wait: ns, same shape; 0 if below
    `uncertainty_ns`. transfer: shortest duration, shape (instances,), ns. skew: latest -
    earliest start, same shape. method: how waits are measured: "arrival", by start times, or
    "duration" if the clocks cannot be aligned (skew is then the largest wait); None if nothing
    is matched. offsets: each rank's median clock offset, ns. uncertainty_ns: of an arrival.
    unmatched: number of calls that some rank lacks. kinds: number of calls of each kind.
    reason: why there are no waits; "" if there are.
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
    def late_ns(self) -> Floats:
        """Arrival of each rank after the earliest, shape (instances, ranks), ns."""
        late: Floats = self.wait.max(axis=1, keepdims=True, initial=0.0) - self.wait
        return late


def waits(table: KernelTable) -> tuple[Waits, ...]:
    """The waits of each sync group, in the order of the table."""
    rows = communication(table)
    return tuple(_group_waits(group, rows) for group in sync_groups(table.ranks))


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


def _group_waits(group: RankGroup, rows: pd.DataFrame) -> Waits:
    calls = rows[rows["rank"].isin(group.ranks)]
    kinds = {str(kind): int(number) for kind, number in calls["kind"].value_counts().items()}
    meeting = int(calls["waits"].sum())
    reason = _why_none(group, kinds, len(calls), meeting)
    if reason:
        return _nothing(group, kinds, 0, reason)
    step, start, dur = _matched(calls, group.ranks)
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
    """Step, start and duration of each instance, in order of time."""
    import pandas as pd

    matched = match(rows, ranks)
    owner = pd.Index(ranks).get_indexer(pd.Index(matched["rank"]))
    matched = matched.iloc[np.lexsort((owner, matched["match"]))]
    shape = (-1, len(ranks))
    step = matched["step"].to_numpy(np.int64).reshape(shape)[:, 0]
    start = matched["start_ns"].to_numpy(np.int64).reshape(shape)
    dur = matched["dur_ns"].to_numpy(np.int64).reshape(shape)
    # The first rank's clock suffices: every rank runs the collectives in the same order.
    at = np.argsort(start[:, 0] + dur[:, 0], kind="stable")
    return step[at], start[at], dur[at]


def _waits_of(
    start: Ints, dur: Ints, end: Ints
) -> tuple[Floats, Floats, Method, tuple[float, ...] | None, float | None]:
    by_duration = (dur - dur.min(axis=1, keepdims=True)).astype(np.float64)
    origin = int(
        end.min()
    )  # float64 is exact for the ns of a window, not for those since the epoch
    fit = fit_clocks((end - origin).astype(np.float64))
    if fit is None:
        return by_duration, by_duration.max(axis=1), "duration", None, None
    offsets = tuple(float(value) for value in np.median(fit.offsets, axis=0))
    # Clocks cannot be aligned by ends that vary more than the waits themselves.
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


# Clocks. A collective ends on all ranks at about the same moment, so the difference between a
# rank's end and the median end is the offset of its clock. The residual after subtracting the
# offset is the uncertainty.


MIN_ENDS = 20
MAX_PIECES = 16
ENDS_OF_PIECE = 20
CERTAIN_SHARE = 95.0


@dataclass(frozen=True)
class ClockFit:
    """Offsets of the ranks' clocks.

    offsets: how far each clock is ahead of the median, shape (instances, ranks), ns.
    uncertainty_ns: 95th percentile of the residuals, for the rank with the largest.
    """

    offsets: Floats
    uncertainty_ns: float


def fit_clocks(ends: Floats) -> ClockFit | None:
    """Fits clock offsets to the ends of matched collectives; None for fewer than 20.

    ends: shape (instances, ranks), ns, in order of time. The window is cut into pieces, and
    the offset is interpolated between their medians, so that it follows drift but not
    outliers.
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
    # The rank that is the median has no residual at all, so the largest of the ranks counts.
    return ClockFit(offsets, float(np.percentile(left, CERTAIN_SHARE, axis=0).max()))


def _line(when: Floats, at: Floats, values: Floats) -> Floats:
    """Interpolates `values` at times `at` to the times `when`; extrapolates the outer lines."""
    if len(at) < 2:
        return np.full(len(when), values[0])
    line = np.interp(when, at, values)
    for outside, a, b in ((when < at[0], 0, 1), (when > at[-1], -2, -1)):
        slope = (values[b] - values[a]) / (at[b] - at[a])
        line[outside] = values[a] + slope * (when[outside] - at[a])
    return np.asarray(line, np.float64)


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
    import pandas as pd

    frame = table.frame
    codes = pd.Index(waits.group.ranks).get_indexer(pd.Index(frame["rank"].astype(object)))
    compute = ~frame["category"].isin(NOT_COMPUTE).to_numpy(bool) & (codes >= 0)
    rows = np.flatnonzero(compute).astype(np.int64)
    rank = codes[rows].astype(np.int64)
    start = frame["start_ns"].to_numpy(np.int64)[rows]
    # With collectives on two streams, a rank may start one before the previous one ends.
    arrived = np.maximum.accumulate(waits.start, axis=0)
    before = np.full(len(rows), -1, np.int64)
    for number in range(len(waits.group.ranks)):
        of_rank = rank == number
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
