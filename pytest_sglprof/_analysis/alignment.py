"""Which passes of the ranks are the same, where no id tells: by the ends of their collectives.

A symmetric collective ends on all ranks at about the same moment. A rank whose window opened
some passes later counts them from another one; its numbers are shifted so that the ends agree.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from pytest_sglprof._trace.categories import is_meeting
from pytest_sglprof._trace.table import NO_STEP

if TYPE_CHECKING:
    import pandas as pd

    from pytest_sglprof._trace.table import KernelTable

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]

CLEAR = 3.0  # times the residual of the best shift: that of the second-best at least
MIN_PASSES = 3  # that two ranks have in common
COMMON_SHARE = 0.5  # of the passes of the rank with fewer: windows of one profile open together
SAMPLE = 128  # passes by which every shift is tried; the best TRIED then by all collectives
TRIED = 6
FEW_SHIFTS = 32  # so few are all tried by all collectives
PASSES_OF_PIECE = 8  # in no such part of the window another shift may be CLEAR times better
CANNOT = "passes cannot be aligned: "
NO_BATCH = "no batch is recorded (nsys records none)"


@dataclass(frozen=True)
class Alignment:
    """What to add to the numbers of each rank's passes, so that equal ones are the same pass.

    shifts: of each rank, 0 of the first; None where they are not known. reason: why not, else "".
    """

    shifts: dict[str, int] | None
    reason: str = ""


def aligned(table: KernelTable, ranks: Sequence[str]) -> Alignment:
    """Aligns the passes of a sync group. Passes that were numbered by their ids are aligned.

    Where they cannot be, the reason also says so of their load, if no batch is recorded.
    """
    alignment = _aligned(table, ranks)
    has_batches = "batch_size" in table.steps and bool((table.steps["batch_size"] >= 0).any())
    if alignment.shifts is not None or has_batches:
        return alignment
    return Alignment(None, f"{alignment.reason}; load not known: {NO_BATCH}")


def _aligned(table: KernelTable, ranks: Sequence[str]) -> Alignment:
    if len(ranks) < 2 or _has_ids(table):
        return Alignment(dict.fromkeys(ranks, 0))
    lines = _collectives(table, ranks)
    none = [rank for rank in ranks if rank not in lines]
    if none:
        return _not(f"{none[0]} has no symmetric collective in a pass")
    first = ranks[0]
    shifts = {first: 0}
    for rank in ranks[1:]:
        hosts = {table.hosts.get(label, "") for label in (first, rank)}
        shares_clock = len(hosts) == 1 and "" not in hosts
        shift = _shift(lines[rank], lines[first], shares_clock=shares_clock)
        if isinstance(shift, str):
            return _not(f"{rank} beside {first}: {shift}")
        shifts[rank] = shift
    return Alignment(shifts)


def renumbered(table: KernelTable, alignment: Alignment) -> KernelTable:
    """The table with the ranks' passes renumbered; the smallest shift counts as 0.

    Unchanged where all shifts are equal, or not known.
    """
    shifts = alignment.shifts or {}
    if len(set(shifts.values())) < 2:
        return table
    least = min(shifts.values())
    up = {rank: shift - least for rank, shift in shifts.items()}
    return replace(table, frame=_moved(table.frame, up), steps=_moved(table.steps, up))


def _moved(rows: pd.DataFrame, up: Mapping[str, int]) -> pd.DataFrame:
    step = rows["step"].to_numpy(np.int64)
    ranks = rows["rank"].astype("category").cat
    by_code = np.array([up.get(str(rank), 0) for rank in ranks.categories], np.int64)
    shift = by_code[ranks.codes.to_numpy(np.int64)] if len(rows) else step
    return rows.assign(step=np.where(step == NO_STEP, NO_STEP, step + shift))


def _not(reason: str) -> Alignment:
    return Alignment(None, CANNOT + reason)


def _has_ids(table: KernelTable) -> bool:
    """Whether passes were numbered by id: where any rank has none, all are numbered by order."""
    if table.steps.empty or "forward_id" not in table.steps:
        return False
    has_id = table.steps["forward_id"] >= 0
    return bool(has_id.groupby(table.steps["rank"], observed=True).any().all())


@dataclass(frozen=True)
class _Line:
    """The symmetric collectives of one rank, in order of pass, name and start.

    first: number of its first pass. ends: ns, shape (collectives,). edges: where in `ends` each
    pass begins, and the last one ends, shape (passes + 1,). alike: which collectives a pass has;
    passes of any rank with equal ones have the same, -1 for none, shape (passes,). last: the end
    of the last one of each pass, NaN for none.
    """

    first: int
    ends: Floats
    edges: Ints
    alike: Ints
    last: Floats


def _collectives(table: KernelTable, ranks: Sequence[str]) -> dict[str, _Line]:
    """The collectives of each rank that has any."""
    import pandas as pd

    frame = table.frame
    rows = _symmetric(table, len(ranks))
    owner = frame["rank"].cat.codes.to_numpy(np.int64)[rows]
    step = frame["step"].to_numpy(np.int64)[rows]
    start = frame["start_ns"].to_numpy(np.int64)[rows]
    names, name = np.unique(frame["name"].cat.codes.to_numpy()[rows], return_inverse=True)
    end = start + frame["dur_ns"].to_numpy(np.int64)[rows]
    counts: list[Ints] = []
    parts: dict[str, tuple[int, Floats, Ints, Floats]] = {}
    for rank, code in zip(
        ranks, frame["rank"].cat.categories.get_indexer(pd.Index(list(ranks))), strict=True
    ):
        members = np.flatnonzero(owner == code)
        if not len(members):
            continue
        members = members[np.lexsort((start[members], name[members], step[members]))]
        low = int(step[members[0]])
        place = step[members] - low
        passes = int(place[-1]) + 1
        # float64 is exact for the ns of a window, not for those since the epoch.
        ends = (end[members] - int(end[0])).astype(np.float64)
        last = np.full(passes, -np.inf)
        np.maximum.at(last, place, ends)
        last[np.isneginf(last)] = np.nan
        edges = np.searchsorted(place, np.arange(passes + 1)).astype(np.int64)
        parts[rank] = (low, ends, edges, last)
        flat = np.bincount(place * len(names) + name[members], minlength=passes * len(names))
        counts.append(flat.reshape(passes, len(names)).astype(np.int64))
    if not parts:
        return {}
    alike = np.unique(np.concatenate(counts), axis=0, return_inverse=True)[1].reshape(-1)
    alike = np.where(np.concatenate(counts).any(axis=1), alike, -1).astype(np.int64)
    of_rank = np.split(alike, np.cumsum([len(each) for each in counts])[:-1])
    return {
        rank: _Line(low, ends, edges, kinds, last)
        for (rank, (low, ends, edges, last)), kinds in zip(parts.items(), of_rank, strict=True)
    }


def _symmetric(table: KernelTable, ranks: int) -> Ints:
    """The rows of collectives in passes at which so many ranks meet."""
    frame = table.frame
    names = frame["full_name"].cat
    meets = np.array([is_meeting(str(name)) for name in names.categories], bool)
    chosen = meets[names.codes.to_numpy()] if len(meets) else np.zeros(len(frame), bool)
    chosen &= (frame["category"] == "communication").to_numpy(bool)
    chosen &= frame["step"].to_numpy(np.int64) >= 0
    is_call = (frame["kind"] == "collective").to_numpy(bool)
    if is_call.any():  # the operators around these annotations would count twice
        chosen &= is_call
    size = table.collectives["group_size"]
    few = size.index[((size > 0) & (size < ranks)).to_numpy(bool)]
    at = frame.index.get_indexer(few)
    chosen[at[at >= 0]] = False
    return np.flatnonzero(chosen).astype(np.int64)


def _shift(line: _Line, first: _Line, *, shares_clock: bool) -> int | str:
    """What to add to the pass numbers of `line` to get those of `first`; or why nothing is."""
    passes, others = len(line.last), len(first.last)
    enough = max(MIN_PASSES, int(np.ceil(COMMON_SHARE * min(passes, others))))
    # How many places the passes of `line` move: pass n of it is pass n + place of `first`.
    places = np.arange(enough - passes, others - enough + 1)
    rough = _rough(line, first, places, enough, shares_clock=shares_clock)
    most = TRIED if len(places) > FEW_SHIFTS else FEW_SHIFTS
    order = np.argsort(rough, kind="stable")[:most]
    order = order[np.isfinite(rough[order])]
    if len(order) < 2:
        return "too few passes with the same collectives"
    tried = places[order].tolist()
    fine = [_residual(line, first, place, shares_clock=shares_clock) for place in tried]
    (best, place), (second, other) = sorted(zip(fine, tried, strict=True))[:2]
    if second < CLEAR * max(best, 1.0):
        return (
            f"the ends of collectives differ by {best / 1e3:.3g} µs at the best shift "
            f"({place:+d}), by {second / 1e3:.3g} µs at the next ({other:+d})"
        )
    if not _is_best_throughout(line, first, place, tried, shares_clock=shares_clock):
        return "another shift is better in a part of the window"
    return int(place) + first.first - line.first


def _rough(line: _Line, first: _Line, places: Ints, enough: int, *, shares_clock: bool) -> Floats:
    """The residual of each place, by the last ends of some passes; infinite with too few."""
    known = np.flatnonzero(line.alike >= 0)
    share = min(1.0, SAMPLE / len(known))
    chosen = known[np.linspace(0, len(known) - 1, min(SAMPLE, len(known))).astype(np.int64)]
    at = chosen + places[:, None]
    inside = (at >= 0) & (at < len(first.last))
    at = np.where(inside, at, 0)
    matched = inside & (first.alike[at] == line.alike[chosen])
    counts = matched.sum(axis=1)
    apart = np.where(matched, line.last[chosen] - first.last[at], np.inf)
    if not shares_clock:
        apart = np.where(matched, apart - _medians(apart, counts)[:, None], np.inf)
    is_enough = counts >= max(MIN_PASSES, int(enough * share))
    return np.where(is_enough, _medians(np.abs(apart), counts), np.inf)


def _medians(values: Floats, counts: Ints) -> Floats:
    """The median of each row; all but the `counts` lowest of a row are infinite."""
    if not values.size:
        return np.full(len(values), np.inf)
    ordered = np.sort(values, axis=1)
    rows = np.arange(len(values))
    half = np.maximum(counts, 1)
    middle: Floats = (ordered[rows, (half - 1) // 2] + ordered[rows, half // 2]) / 2
    return np.where(counts > 0, middle, 0.0)


def _residual(line: _Line, first: _Line, place: int, *, shares_clock: bool) -> float:
    """Median absolute difference of the ends of all collectives in matched passes, ns."""
    moved, counterpart = _matched(line, first, place)
    lengths = np.diff(line.edges)[moved]
    within = np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    ends = line.ends[np.repeat(line.edges[moved], lengths) + within]
    return _spread(
        ends - first.ends[np.repeat(first.edges[counterpart], lengths) + within],
        shares_clock=shares_clock,
    )


def _matched(line: _Line, first: _Line, place: int) -> tuple[Ints, Ints]:
    """The passes of both with the same collectives, when those of `line` move by `place`."""
    moved = np.arange(max(0, -place), min(len(line.last), len(first.last) - place))
    moved = moved[(line.alike[moved] >= 0) & (line.alike[moved] == first.alike[moved + place])]
    return moved, moved + place


def _spread(apart: Floats, *, shares_clock: bool) -> float:
    """Median absolute difference; of ranks without a common clock, from its median."""
    offset = 0.0 if shares_clock else float(np.median(apart))
    return float(np.median(np.abs(apart - offset)))


def _is_best_throughout(
    line: _Line, first: _Line, best: int, tried: Sequence[int], *, shares_clock: bool
) -> bool:
    """Whether no other place is clearly better in a part of the window: one may lack a pass."""

    def apart(place: int) -> Floats:
        """How much later each pass of `line` ends than its counterpart, ns; NaN without one."""
        moved, counterpart = _matched(line, first, place)
        differences = np.full(len(line.last), np.nan)
        differences[moved] = line.last[moved] - first.last[counterpart]
        return differences

    at_best = apart(best)
    clock = 0.0 if shares_clock else float(np.nanmedian(at_best))
    for place in {*tried, *range(best - 2, best + 3)} - {best}:
        pair = np.abs(np.stack([at_best, apart(place)]) - clock)
        pair = pair[:, np.isfinite(pair).all(axis=0)]
        width = min(PASSES_OF_PIECE, pair.shape[1])
        if not width:
            continue
        whole = pair[:, : pair.shape[1] // width * width].reshape(2, -1, width)
        pieces = np.concatenate([whole, pair[:, None, -width:]], axis=1)
        of_best, of_other = np.median(pieces, axis=2)
        if (of_best > CLEAR * of_other).any():
            return False
    return True
