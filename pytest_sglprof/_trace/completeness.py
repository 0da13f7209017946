"""Decide whether the kernels of every rank are there, and leave out what cannot be compared.

A profiler drops kernels: those of the front of a session, those of a stream while a buffer is
full. A rank that lost kernels looks fast, so that a healthy one would be blamed. A launch call
has one kernel; a graph launch has as many as its graph. What was launched near the edges of the
window may have run outside of it and proves nothing. Where few kernels are missing on a rank,
the same kernels are left out on its peers, so that like is compared with like.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from pytest_sglprof._errors import NoKernels
from pytest_sglprof._ranks import Rank, work_group
from pytest_sglprof._trace.counterparts import Counterparts
from pytest_sglprof._trace.steps import StepIndex
from pytest_sglprof._trace.table import NO_STEP, Flags, Ints, RankActivities

_SUFFIX = r"(_ptsz)?(_v\d+)?$"
KERNEL_LAUNCH = re.compile(
    r"(cuda|cu|hip)(Drv)?(Ext)?(Module)?Launch(Cooperative)?Kernel(ExC|Ex)?" + _SUFFIX
)
GRAPH_LAUNCH = re.compile(r"(cuda|cu|hip)GraphLaunch" + _SUFFIX)
Amounts = npt.NDArray[np.float64]
CALLS = (KERNEL_LAUNCH, GRAPH_LAUNCH)
# Every call that starts work on a GPU, however many kernels; not functions that run on the host.
ANY_LAUNCH = re.compile(r"(?:cuda|cu|hip|musa)[A-Za-z]*Launch(?!HostFunc)")

LOST = "kernels lost"  # why a step is excluded
EDGE_STEPS = 2  # at each end: the overlap schedule launches one step while another one runs
MIN_REPLAYS = 3  # of a graph, from which its number of kernels is known
STEP_SHARE = 0.02  # of a step's kernels; if more are lost, the step is not compared
STEP_KERNELS = 3  # or so many, in small steps,
SMALL_STEP_SHARE = 0.1  # if they are no more than this share
LOST_SHARE = 0.01  # of a rank's kernels behind the front
LOST_TIME = 0.015  # of their time: 1 % of the kernels seldom takes exactly 1 % of it
LOST_STEPS = 0.05  # of a rank's steps
FRONT_SHARE = 0.3  # of a rank's steps
UNKNOWN_SHARE = 0.1  # of a rank's kernel time, in steps with a graph of unknown size


class Comparable(NamedTuple):
    """The ranks of a window without what cannot be compared.

    Steps that lack too many kernels are excluded. A kernel whose counterpart is missing on another
    rank belongs to no step (`NO_STEP`). reason: why nothing of them can be compared, "" if they
    can. front: number of leading steps that are cut away, since a rank lost their kernels.
    """

    parts: list[RankActivities]
    notes: list[str]
    reason: str
    front: int


def comparable(parts: Sequence[RankActivities]) -> Comparable:
    """The ranks with the same kernels in each step, as far as these were recorded."""
    calls = [_calls(part) for part in parts]
    ledgers = [
        _ledger(part, rank_calls, graphs)
        for part, rank_calls, graphs in zip(parts, calls, _graph_sizes(parts, calls), strict=True)
    ]
    kept, left_out = _with_equal_kernels(parts, ledgers)
    notes, reasons = [], []
    alone = len({part.rank for part in parts}) == 1
    for part, ledger in zip(kept, ledgers, strict=True):
        more_notes, why = _finding(part, ledger, alone=alone)
        notes += more_notes
        reasons += why
    if left_out:
        kernels = counted(left_out, "kernel", "kernels")
        notes.append(f"left out {kernels} whose counterpart on another rank is lost")
    front = max((ledger.front for ledger in ledgers), default=0)
    return Comparable(kept, notes, "; ".join(reasons), front)


# How many kernels a call should have.

Graph = int | tuple[str, int, int, int]
"""Its id, else the stage, batch size and tokens of its step, and which launch of the step it is."""

Place = tuple[int, int]
"""The number of a step, and which launch of a graph in it: equal on all ranks."""

_ONE_KERNEL, _UNKNOWN_GRAPH = -1, -2  # instead of a number of `graphs`


@dataclass(frozen=True)
class _Calls:
    """The calls of one rank that count, in the order of their start.

    at: index of the step of each call; 0 for all calls where they have no steps. recorded: number
    of kernels. graph: index into graphs, or one of the two numbers above. places: of the launches
    of graphs in steps.
    """

    at: Ints
    recorded: Ints
    graph: Ints
    graphs: Sequence[Graph] = ()
    places: Mapping[int, Place] = field(default_factory=dict)
    has_steps: bool = True


def _calls(part: RankActivities) -> _Calls:
    launches = part.launches
    if launches is None:
        return _Calls(*np.empty((3, 0), np.int64))
    order = np.argsort(launches.start, kind="stable")
    at = launches.step[order]
    has_steps = bool((at >= 0).any())
    if has_steps:
        is_compared = np.array([not step.excluded for step in part.steps])
        order = order[(at >= 0) & is_compared[at]]
    else:  # What was launched after the last kernel that was recorded may have run later.
        done = np.flatnonzero(launches.recorded[order])
        order = order[: int(done[-1]) + 1 if len(done) else 0]
    at = launches.step[order]
    number_of: dict[Graph, int] = {}
    places: dict[int, Place] = {}
    numbers = np.full(len(order), _ONE_KERNEL, np.int64)
    nth: Counter[int] = Counter()
    for place in np.flatnonzero(launches.is_graph[order]).tolist():
        graph: Graph | None = int(launches.graph[order[place]]) or None
        if has_steps:
            step = part.steps[at[place]]
            places[place] = (step.step, nth[step.step])
            nth[step.step] += 1
            batch = step.padded_batch if step.padded_batch >= 0 else step.batch_size
            if graph is None and batch >= 0:
                graph = (step.substage or step.stage, batch, step.tokens, places[place][1])
        if graph is None:
            numbers[place] = _UNKNOWN_GRAPH
        else:
            numbers[place] = number_of.setdefault(graph, len(number_of))
    recorded = launches.recorded[order]
    return _Calls(np.maximum(at, 0), recorded, numbers, tuple(number_of), places, has_steps)


def _alike(ranks: Sequence[str]) -> dict[int, list[int]]:
    """The indices of the ranks of each pipeline stage: they have the same layers, so graphs."""
    stages: dict[int, list[int]] = {}
    for place, label in enumerate(ranks):
        rank = Rank.parse(label)
        stages.setdefault((rank.pp or 0) if rank else 0, []).append(place)
    return stages


def _graph_sizes(parts: Sequence[RankActivities], calls: Sequence[_Calls]) -> list[Ints]:
    """For each rank the number of kernels that each call should have, 0 where it is not known."""
    sizes: list[Ints] = [np.empty(0, np.int64)] * len(parts)
    for members in _alike([part.rank for part in parts]).values():
        seen: dict[Graph, list[Counter[int]]] = {}
        usual: Counter[int] = Counter()
        for rank_calls in (calls[member] for member in members):
            counts: dict[int, Counter[int]] = {}
            replays = rank_calls.graph != _ONE_KERNEL
            pairs = zip(
                rank_calls.graph[replays].tolist(),
                rank_calls.recorded[replays].tolist(),
                strict=True,
            )
            for number, recorded in pairs:
                counts.setdefault(number, Counter())[recorded] += 1
                usual[recorded] += recorded > 0
            for number, graph in enumerate(rank_calls.graphs):
                seen.setdefault(graph, []).append(counts[number])
        size_of = {graph: _size(counters) for graph, counters in seen.items()}
        common = [size for size, count in usual.items() if count >= MIN_REPLAYS]
        of_place: dict[tuple[int, int], int] = {}
        for member in members:
            rank_calls = calls[member]
            known = np.array([*(size_of[graph] for graph in rank_calls.graphs), 0, 1], np.int64)
            size = known[rank_calls.graph]  # the last two stand for the two negative numbers
            is_usual = (size == 0) & np.isin(rank_calls.recorded, common)
            sizes[member] = np.where(is_usual, rank_calls.recorded, size)
            of_place |= {rank_calls.places[c]: int(size[c]) for c in rank_calls.places if size[c]}
        otherwise = max(common, key=lambda size: usual[size], default=0)
        for member in members:
            rank_calls, size = calls[member], sizes[member]
            for call in np.flatnonzero((size == 0) & (rank_calls.recorded == 0)).tolist():
                size[call] = of_place.get(rank_calls.places.get(call, (NO_STEP, 0)), otherwise)
    return sizes


def _size(counters: Sequence[Counter[int]]) -> int:
    """The kernels of a graph, from the counters of its replays on each rank; 0 if not known.

    That of most replays of the rank on which it is largest: what is missing in all replays of a
    rank looks normal there. Few replays tell it if there are several ranks.
    """
    if len(counters) < 2 and sum(map(Counter.total, counters)) < MIN_REPLAYS:
        return 0
    return max(max(counts, key=lambda size: (counts[size], size)) for counts in counters)


# What is missing, step by step.


@dataclass
class _Ledger:
    """The kernels of one rank in each of its steps; one entry for all of them without steps.

    expected, lost: numbers of kernels. front: number of leading steps before the moment from which
    kernels were recorded. inner: the steps behind it that are not at an edge. is_dropped: whether
    the step lacks too much to be compared.
    ns, lost_ns: time of the recorded kernels, and of the lost ones; NaN where it is not known.
    unknown: whether the step has a graph of unknown size. has_graphs: whether any call has.
    """

    expected: Ints
    lost: Ints
    front: int
    inner: slice
    is_dropped: Flags
    ns: Amounts
    lost_ns: Amounts
    unknown: Flags
    has_steps: bool
    has_graphs: bool

    @property
    def missing(self) -> int:
        """Number of lost kernels, without those of steps at an edge that have none at all."""
        outside = self.lost == self.expected
        outside[self.inner] = outside[: self.front] = False
        return int(self.lost[~outside].sum())

    @property
    def dropped_inside(self) -> int:
        """Number of inner steps that lack too much to be compared."""
        return int(np.count_nonzero(self.is_dropped[self.inner]))

    @property
    def is_judged_with_loss(self) -> Flags:
        """Which steps are compared although they lack kernels."""
        return (self.lost > 0) & ~self.is_dropped & self.has_steps


def _ledger(part: RankActivities, calls: _Calls, sizes: Ints) -> _Ledger:
    count = len(part.steps) if calls.has_steps else 1
    is_unknown = sizes == 0
    # Of a graph of unknown size, one kernel at least.
    missing = np.where(is_unknown, calls.recorded == 0, np.maximum(sizes - calls.recorded, 0))
    expected = np.bincount(calls.at, calls.recorded + missing, count).astype(np.int64)
    lost = np.bincount(calls.at, missing, count).astype(np.int64)
    front = _front(expected, lost) if calls.has_steps else 0
    few = np.minimum(STEP_KERNELS, SMALL_STEP_SHARE * expected)
    is_dropped = lost > np.maximum(STEP_SHARE * expected, few)
    is_dropped[:front] = True
    inner = _inner(is_dropped, front) if calls.has_steps else slice(0, 1)
    unknown = np.bincount(calls.at, is_unknown, count) > 0
    ns, longest = np.zeros(count), 0.0
    if lost.any() or unknown.any():
        kernels = np.flatnonzero(part.is_kernel)
        at = StepIndex(part.steps).numbered(part.step[kernels]) if calls.has_steps else None
        places = np.zeros(len(kernels), np.int64) if at is None else at
        ns[:] = np.bincount(places[places >= 0], part.dur[kernels][places >= 0], count)
        longest = _longest_mean(part, kernels)
    # Which kernels a step lacks is looked up below; without steps they may be the longest ones.
    lost_ns = np.full(count, np.nan)
    if not calls.has_steps:
        lost_ns[:] = lost * longest
    return _Ledger(
        expected,
        lost,
        front,
        inner,
        is_dropped,
        ns,
        lost_ns,
        unknown,
        calls.has_steps,
        bool((calls.graph != _ONE_KERNEL).any()),
    )


def _inner(is_dropped: Flags, front: int) -> slice:
    """The steps behind the front that are not at an edge.

    At each end these are the steps that lack much, `EDGE_STEPS` at most: they were launched before
    the window, or ran after it.
    """
    steps = len(is_dropped)
    first = front or _edge(is_dropped)
    return slice(first, max(steps - _edge(is_dropped[::-1]), first))


def _edge(is_dropped: Flags) -> int:
    """How many steps stand at an edge, seen from there."""
    return int(np.argmin(np.append(is_dropped[:EDGE_STEPS], False)))


def _longest_mean(part: RankActivities, kernels: Ints) -> float:
    """The largest of the mean durations of the rank's kernels, by name; ns."""
    codes = part.name_codes[kernels]
    sums = np.bincount(codes, part.dur[kernels], 1)
    return float((sums / np.maximum(np.bincount(codes, minlength=1), 1)).max())


def _front(expected: Ints, lost: Ints) -> int:
    """Number of leading steps before the moment from which kernels were recorded.

    All of them lost every kernel, but for the last, which may have lost a part. 0 where no more
    than the edge is lost.
    """
    recorded = np.flatnonzero(lost < expected)
    front = int(recorded[0]) if len(recorded) else len(expected)
    if front < len(expected) and lost[front] > 0:
        front += 1
    return front if front > EDGE_STEPS and lost[:front].any() else 0


# Leave out on every rank what one rank lacks.


def _with_equal_kernels(
    parts: Sequence[RankActivities], ledgers: Sequence[_Ledger]
) -> tuple[list[RankActivities], int]:
    """The ranks with the same kernels in each step, and how many were left out for that.

    Steps that lack too much, or of which it is not known what they lack, are excluded. The time
    of what is lost is entered into the ledgers.
    """
    # Where each stage has a file, a rank has several parts, in the same order on all ranks.
    groups: dict[tuple[tuple[int, ...] | None, int], list[int]] = {}
    before: Counter[str] = Counter()
    for member, part in enumerate(parts):
        groups.setdefault((work_group(part.rank), before[part.rank]), []).append(member)
        before[part.rank] += 1
    rows: list[list[int]] = [[] for _ in parts]
    for members in groups.values():
        if any(ledgers[member].is_judged_with_loss.any() for member in members):
            _settle_group({member: parts[member] for member in members}, ledgers, rows)
    return [_without(*each) for each in zip(parts, ledgers, rows, strict=True)], sum(map(len, rows))


def _settle_group(
    group: Mapping[int, RankActivities], ledgers: Sequence[_Ledger], rows: Sequence[list[int]]
) -> None:
    """Adds to `rows` what the ranks of a group have and others lost; amends the ledgers."""
    expected = {
        member: {
            part.steps[place].step: (int(ledgers[member].expected[place]), int(loss))
            for place, loss in enumerate(ledgers[member].lost.tolist())
            if not part.steps[place].excluded and not ledgers[member].is_dropped[place]
        }
        for member, part in group.items()
    }
    common = set.intersection(*(set(steps) for steps in expected.values()))
    counterparts = Counterparts(group, expected)
    for member, part in group.items():
        ledger = ledgers[member]
        for place in np.flatnonzero(ledger.is_judged_with_loss).tolist():
            if part.steps[place].step not in common:
                continue  # not compared, because of another rank
            gaps = counterparts.of(part.steps[place].step)
            if gaps is None:
                ledger.is_dropped[place] = True
            else:
                ledger.lost_ns[place] = gaps.lost_ns[member]
    for gaps in counterparts.settled():
        for member, left_out in gaps.left_out.items():
            rows[member].extend(left_out)


def _without(part: RankActivities, ledger: _Ledger, rows: Sequence[int]) -> RankActivities:
    if ledger.has_steps and ledger.is_dropped.any():
        pairs = zip(part.steps, ledger.is_dropped.tolist(), strict=True)
        steps = [
            step.changed(excluded=LOST) if dropped and not step.excluded else step
            for step, dropped in pairs
        ]
        part = replace(part, steps=steps)
    if rows:
        step = part.step.copy()
        step[rows] = NO_STEP
        part = replace(part, step=step)
    return part


# Say what is missing, and whether it is too much.


def _finding(part: RankActivities, ledger: _Ledger, *, alone: bool) -> tuple[list[str], list[str]]:
    """Notes on what the rank lacks, and why it cannot be compared."""
    notes, reasons = [], []
    inner = ledger.inner
    bad_steps = int(np.count_nonzero(ledger.lost[inner]))
    share = _time_share(ledger)
    if ledger.front or bad_steps:
        text = _missing_words(part, ledger, bad_steps)
        by_count = ledger.lost[inner].sum() - 1 > LOST_SHARE * ledger.expected[inner].sum()
        if (
            by_count
            or share > LOST_TIME
            or ledger.front > FRONT_SHARE * len(ledger.lost)
            or (ledger.has_steps and ledger.dropped_inside > LOST_STEPS * len(ledger.lost))
        ):
            weighed = share > LOST_TIME and not by_count
            reasons.append(f"{text}, {100 * share:.1f} % of its time" if weighed else text)
        else:
            notes.append(
                f"{text}: judged from step {ledger.front + 1} on" if ledger.front else text
            )
    if unusable := _unusable_share(part):
        reasons.append(
            f"{part.rank}: {part.unusable:,} kernels ({100 * unusable:.1f} %) have times that "
            "cannot be"
        )
    if alone:
        return notes, reasons  # and no graph of it is compared with that of another rank
    unknown = ledger.ns[ledger.unknown].sum() / max(ledger.ns.sum(), 1.0)
    if ledger.unknown.any():
        text = (
            f"{part.rank}: it is not known how many kernels belong to the graphs of "
            f"{np.count_nonzero(ledger.unknown)} steps ({100 * unknown:.1f} % of its time), which "
            f"were replayed fewer than {MIN_REPLAYS} times"
        )
        (reasons if unknown > UNKNOWN_SHARE else notes).append(text)
    return notes, reasons


def _missing_words(part: RankActivities, ledger: _Ledger, bad_steps: int) -> str:
    """`TP1: 60 of 400 launches have no kernel (its first 12 steps)`."""
    places = [f"its first {ledger.front} steps"] if ledger.front else []
    if bad_steps and ledger.has_steps:
        places.append(f"{bad_steps} {'later ' if ledger.front else ''}steps")
    what = "launched kernels are missing" if ledger.has_graphs else "launches have no kernel"
    lost = ledger.missing
    where = f" ({' and '.join(places)})" if places else ""
    return f"{part.rank}: {lost:,} of {ledger.expected.sum():,} {what}{where}"


def _time_share(ledger: _Ledger) -> float:
    """Share of the rank's expected kernel time, behind the front, that is lost."""
    inner = ledger.inner
    ns, lost = ledger.ns[inner].sum(), ledger.lost[inner]
    if not lost.any():
        return 0.0
    mean = ns / max((ledger.expected - ledger.lost)[inner].sum(), 1)
    known = ledger.lost_ns[inner]
    lost_ns = np.where(np.isnan(known), lost * mean, known).sum()
    return float(lost_ns / max(ns + lost_ns, 1.0))


def _unusable_share(part: RankActivities) -> float:
    """Share of the kernels that cannot be used; 0 where it is small enough."""
    share = part.unusable / max(len(part.start) + part.unusable, 1)
    return share if share > LOST_SHARE else 0.0


# A rank that used its GPU, but of which no kernel was recorded, is never compared. Its CPU
# operators are no substitute: they are the work of launching, not of the GPU.

MAX_NAMED = 4  # ranks


@dataclass(frozen=True)
class Unrecorded:
    """What shows that kernels were not recorded.

    what: for example "40 launches". hint: known causes. certain: False where the GPU may as
    well have been idle, which the kernels of other ranks then tell.
    """

    what: str
    hint: str
    certain: bool = True


def counted(count: int, one: str, many: str) -> str:
    """`1 launch` or `40 launches`."""
    return f"{count} {one if count == 1 else many}"


def refuse_unrecorded(parts: Sequence[tuple[Path, RankActivities]]) -> None:
    """Raises `NoKernels` where a rank's kernels were not recorded. parts: with their files."""
    on_gpu = any(part.is_timeline and len(part.start) for _, part in parts)
    lost = [
        (f"{part.rank} ({file.name})", part.unrecorded)
        for file, part in parts
        if part.unrecorded is not None and (part.unrecorded.certain or not on_gpu)
    ]
    if lost:
        raise no_kernels(lost)


def no_kernels(lost: Sequence[tuple[str, Unrecorded]]) -> NoKernels:
    """The error for these ranks or files."""
    named = "; ".join(f"{name}: {reason.what}" for name, reason in lost[:MAX_NAMED])
    more = f"; and {len(lost) - MAX_NAMED} more ranks alike" if len(lost) > MAX_NAMED else ""
    return NoKernels(
        f"{named}{more}, but no kernels were recorded",
        expected="kernels of every rank that used its GPU",
        hint=" ".join(dict.fromkeys(reason.hint for _, reason in lost)),
    )
