"""Decide whether the ranks of a window can be compared: nothing is missing, and it is one window.

A profiler drops kernels: those of the front of a session, those of a stream while a buffer is
full. A rank that lost kernels looks fast, so that a healthy one would be blamed. A launch call
has one kernel; a graph launch has as many as most replays of its kind have, on all ranks. What
was launched near the edges of the window may have run outside of it and proves nothing.

Files of different runs are known by the number of processes of their run, and by their times.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pytest_sglprof._errors import NoKernels
from pytest_sglprof._trace.table import Ints, RankActivities

_SUFFIX = r"(_ptsz|_v\d+)?$"
KERNEL_LAUNCH = re.compile(
    r"(cuda|cu|hip)(Drv)?(Ext)?(Module)?Launch(Cooperative)?Kernel(ExC|Ex)?" + _SUFFIX
)
GRAPH_LAUNCH = re.compile(r"(cuda|cu|hip)GraphLaunch" + _SUFFIX)
Counts = npt.NDArray[np.signedinteger[Any]]
CALLS = (KERNEL_LAUNCH, GRAPH_LAUNCH)
# Every call that starts work on a GPU, however many kernels; not functions that run on the host.
ANY_LAUNCH = re.compile(r"(?:cuda|cu|hip|musa)[A-Za-z]*Launch(?!HostFunc)")

LOST = "kernels lost"  # why a step is excluded
EDGE_STEPS = 2  # at each end: the overlap schedule launches one step while another one runs
MIN_REPLAYS = 3  # of a graph, from which its number of kernels is known
STEP_SHARE = 0.02  # of a step's kernels; if more are lost, the step is not compared
LOST_SHARE = 0.01  # of a rank's kernels in the steps between front and edges
LOST_STEPS = 0.05  # of a rank's steps
FRONT_SHARE = 0.3  # of a rank's steps


def with_lost_steps(parts: Sequence[RankActivities]) -> tuple[list[RankActivities], list[str], str]:
    """The ranks with steps excluded that lack kernels; notes; why they cannot be compared.

    The last is "" if they can.
    """
    calls = [_calls(part) for part in parts]
    fan_out = _fan_out(calls)
    checked, notes, reasons = [], [], []
    for part, own_calls in zip(parts, calls, strict=True):
        marked, note, reason = _checked(part, own_calls, fan_out)
        checked.append(marked)
        notes += [note] if note else []
        reasons += [reason] if reason else []
        if share := _unusable_share(part):
            reasons.append(
                f"{part.rank}: {part.unusable:,} kernels ({100 * share:.1f} %) have times that "
                "cannot be"
            )
    return checked, notes, "; ".join(reasons)


def _unusable_share(part: RankActivities) -> float:
    """Share of the kernels that cannot be used; 0 where it is small enough."""
    share = part.unusable / max(len(part.start) + part.unusable, 1)
    return share if share > LOST_SHARE else 0.0


# The stage and batch size of a step, and which of its graph launches: replays of one graph.
Kind = tuple[str, int, int]


APART_NS = 60 * 10**9  # between the end of one rank's window and the start of another's


def different_runs(parts: Sequence[RankActivities]) -> str:
    """Why these are not the ranks of one window, with both values; "" if nothing says so."""
    sizes = {part.world_size: part.rank for part in reversed(parts) if part.world_size}
    if len(sizes) > 1:
        runs = ", ".join(f"{rank} is of a run of {size}" for size, rank in sorted(sizes.items()))
        return f"these files are not of one run: {runs} processes"
    spans = sorted(
        (int(part.start.min()), int((part.start + part.dur).max()), part.rank)
        for part in parts
        if part.is_timeline and len(part.start)
    )
    for (_, end, before), (start, _, after) in pairwise(spans):
        if start - end > APART_NS:
            apart = f"{after} begins {(start - end) / 1e9:,.0f} s after {before} ended"
            return f"these files are not of one window: {apart}"
    return ""


@dataclass(frozen=True)
class _Calls:
    """The calls of one rank inside of its steps, in the order of their start.

    at: index of the step of each call. kinds: of a graph launch; None for one kernel.
    """

    at: Ints
    recorded: Ints
    kinds: Sequence[Kind | None]


def _calls(part: RankActivities) -> _Calls:
    launches, steps = part.launches, part.steps
    if launches is None:
        return _Calls(np.empty(0, np.int64), np.empty(0, np.int64), ())
    index = {step.step: number for number, step in enumerate(steps) if not step.excluded}
    at = np.array([index.get(number, -1) for number in launches.step.tolist()], np.int64)
    order = np.argsort(launches.start, kind="stable")
    order = order[at[order] >= 0]
    nth: Counter[int] = Counter()
    kinds: list[Kind | None] = []
    for number, is_graph in zip(at[order].tolist(), launches.is_graph[order].tolist(), strict=True):
        if not is_graph:
            kinds.append(None)
            continue
        step = steps[number]
        batch = step.padded_batch if step.padded_batch >= 0 else step.batch_size
        kinds.append((step.substage or step.stage, batch, nth[number]))
        nth[number] += 1
    return _Calls(at[order], launches.recorded[order], kinds)


def _fan_out(calls: Sequence[_Calls]) -> dict[Kind, int]:
    """Kernels of a graph launch: the most frequent number over its replays on all ranks.

    Of equally frequent numbers the largest. Graphs with fewer than `MIN_REPLAYS` are left out.
    """
    counts: dict[Kind, Counter[int]] = {}
    for rank in calls:
        for kind, recorded in zip(rank.kinds, rank.recorded.tolist(), strict=True):
            if kind is not None:
                counts.setdefault(kind, Counter())[recorded] += 1
    return {
        kind: max(seen, key=lambda number: (seen[number], number))
        for kind, seen in counts.items()
        if seen.total() >= MIN_REPLAYS
    }


def _checked(
    part: RankActivities, calls: _Calls, fan_out: Mapping[Kind, int]
) -> tuple[RankActivities, str, str]:
    """The rank with its incomplete steps excluded, a note, and why it cannot be compared."""
    count = len(part.steps)
    expected = np.array([1 if kind is None else fan_out.get(kind, 0) for kind in calls.kinds])
    lost = np.maximum(expected - calls.recorded, 0)
    if not lost.any():
        return part, "", ""
    in_step = np.bincount(calls.at, expected, count)
    lost_in = np.bincount(calls.at, lost, count)
    front = _front(in_step, lost_in)
    is_bad = lost_in > STEP_SHARE * in_step
    is_bad[:front] = True
    steps = [
        step.changed(excluded=LOST) if bad else step
        for step, bad in zip(part.steps, is_bad.tolist(), strict=True)
    ]
    part = replace(part, steps=steps)
    inner = slice(max(front, EDGE_STEPS), max(count - EDGE_STEPS, 0))
    bad_steps = int(np.count_nonzero(lost_in[inner]))
    if not front and not bad_steps:
        return part, "", ""
    places = [f"its first {front} steps"] if front else []
    places += [f"{bad_steps} {'later ' if front else ''}steps"] if bad_steps else []
    what = "launched kernels are missing" if any(calls.kinds) else "launches have no kernel"
    where = " and ".join(places)
    text = f"{part.rank}: {lost.sum():,} of {expected.sum():,} {what} ({where})"
    too_many = (
        front > FRONT_SHARE * count
        or lost_in[inner].sum() > LOST_SHARE * in_step[inner].sum()
        or np.count_nonzero(is_bad[inner]) > LOST_STEPS * count
    )
    if too_many:
        return part, "", text
    return part, f"{text}: judged from step {front + 1} on" if front else text, ""


def _front(in_step: Counts, lost_in: Counts) -> int:
    """Number of leading steps before the moment from which kernels were recorded.

    All of them lost every kernel, but for the last, which may have lost a part. 0 where no more
    than the edge is lost.
    """
    recorded = np.flatnonzero(lost_in < in_step)
    front = int(recorded[0]) if len(recorded) else len(in_step)
    if front < len(in_step) and lost_in[front] > 0:
        front += 1
    return front if front > EDGE_STEPS else 0


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
