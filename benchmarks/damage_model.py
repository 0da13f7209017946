"""Windows of ranks whose truth is known, and what a profiler can do to them.

A window has prefill steps, launched kernel by kernel (half of them by the driver's call, as
Triton does), and decode steps, each one launch of a graph with two streams and collectives in which
the ranks meet. The scheduler launches a step while the one before it runs, so the launch of the
last step is recorded and its kernels are not.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pytest_sglprof._trace.steps import contains_later
from pytest_sglprof._trace.table import Launches, RankActivities, Step

Ints = npt.NDArray[np.int64]
Flags = npt.NDArray[np.bool_]

STEPS = 80
PREFILL_EVERY = 5  # of five steps the last one is a prefill
PREFILL_KERNELS = 120
SEGMENTS = 4  # of a step, each of which ends with a collective
SLOW = 1.15
STEP_SD = 0.02  # of a rank's speed in a step; of a single kernel half of it
KERNEL_NS = 20_000
SPAN_NS = 200_000  # of a step on the CPU
ALL_REDUCE = "ncclDevKernel_AllReduce_Sum_bf16_RING_LL(ncclDevKernelArgsStorage<4096ul>)"
NAMES = ("gemm_bf16_128x64", "fused_add_rmsnorm_kernel", "flash_fwd_splitkv_kernel", ALL_REDUCE)
MAIN, SIDE = 7, 13  # streams
BASE_NS = 1_790_000_000_000_000_000


@dataclass(frozen=True)
class Window:
    """The ranks of a window, and for each of their activities the launch that started it.

    call: index into the rank's launches, shape (activities,). slow: the rank that is slower.
    """

    parts: tuple[RankActivities, ...]
    call: tuple[Ints, ...]
    slow: int | None


@dataclass(frozen=True)
class Graph:
    """The kernels of a step in the order of their launch; shape (kernels,)."""

    name: Ints
    stream: Ints
    segment: Ints

    @property
    def size(self) -> int:
        """Number of kernels."""
        return len(self.name)


def graph(kernels: int) -> Graph:
    """A step of so many kernels: in each segment a third runs on the second stream."""
    segment = np.arange(kernels) * SEGMENTS // kernels
    is_last = np.append(np.diff(segment) > 0, True)
    name = np.where(is_last, 3, np.arange(kernels) % 3)
    stream = np.where(is_last | (np.arange(kernels) % 3 > 0), MAIN, SIDE)
    return Graph(name, stream, segment)


def window(rng: np.random.Generator, ranks: int, *, slow: bool, large: bool = False) -> Window:
    """A sound window. slow: whether one rank, drawn at random, is `SLOW` times slower.

    large: whether one of the decode graphs has 1,000 kernels; otherwise they have 50 to 120.
    """
    slow_rank = int(rng.integers(ranks)) if slow else None
    sizes = [int(rng.integers(50, 121)), 1000 if large else int(rng.integers(50, 121))]
    kinds = [graph(size) for size in (*sizes, PREFILL_KERNELS)]
    of_step = rng.integers(2, size=STEPS)
    of_step[PREFILL_EVERY - 1 :: PREFILL_EVERY] = 2
    speed = rng.lognormal(0.0, STEP_SD, (STEPS, ranks))
    if slow_rank is not None:
        speed[:, slow_rank] *= SLOW
    begin = np.zeros(ranks)
    columns: list[list[tuple[Any, ...]]] = [[] for _ in range(ranks)]
    starts = np.zeros((STEPS, ranks))
    for step in range(STEPS):
        kind = kinds[of_step[step]]
        noise = rng.lognormal(0.0, STEP_SD / 2, (kind.size, ranks))
        dur = KERNEL_NS * speed[step] * noise
        starts[step] = begin
        start, dur, begin = _laid_out(kind, begin, dur)
        for rank in range(ranks):
            columns[rank].append((kind, start[:, rank], dur[:, rank]))
        begin = begin + 15_000.0
    parts, calls = [], []
    for rank in range(ranks):
        part, call = _rank(rank, columns[rank], of_step, starts[:, rank], sizes)
        parts.append(part)
        calls.append(call)
    return Window(tuple(parts), tuple(calls), slow_rank)


def _laid_out(
    kind: Graph, begin: npt.NDArray[Any], dur: npt.NDArray[Any]
) -> tuple[npt.NDArray[Any], npt.NDArray[Any], npt.NDArray[Any]]:
    """Start and duration of each kernel on each rank, and the end of the step; ns.

    begin: of the step on each rank. A collective starts when its rank gets there, and ends on
    all ranks 10 us after the last one came.
    """
    start = np.zeros_like(dur)
    for segment in range(SEGMENTS):
        rows = kind.segment == segment
        for stream in (MAIN, SIDE):
            chosen = rows & (kind.stream == stream) & (kind.name != 3)
            ends = begin + np.cumsum(dur[chosen] + 1_000.0, axis=0)
            start[chosen] = ends - dur[chosen] - 1_000.0
        work = rows & (kind.name != 3)
        arrival = np.maximum(begin, (start[work] + dur[work]).max(axis=0)) + 1_000.0
        collective = rows & (kind.name == 3)
        start[collective] = arrival
        dur[collective] = arrival.max() + 10_000.0 - arrival
        begin = np.full_like(begin, arrival.max() + 12_000.0)
    return start, dur, begin


def _rank(
    rank: int,
    steps: list[tuple[Any, ...]],
    of_step: Ints,
    starts: npt.NDArray[Any],
    sizes: list[int],
) -> tuple[RankActivities, Ints]:
    """One rank's activities, and the launch of each."""
    calls_of = [1 if kind < 2 else PREFILL_KERNELS for kind in of_step.tolist()]
    first = np.cumsum([0, *calls_of])
    call = np.concatenate(
        [
            first[step] + (np.zeros(kind.size, np.int64) if calls == 1 else np.arange(kind.size))
            for step, ((kind, _, _), calls) in enumerate(zip(steps, calls_of, strict=True))
        ]
    )
    start = np.concatenate([start for _, start, _ in steps]).round().astype(np.int64) + BASE_NS
    dur = np.concatenate([dur for _, _, dur in steps]).round().astype(np.int64)
    number = np.repeat(np.arange(STEPS), [kind.size for kind, _, _ in steps])
    # A step is launched while the one before it runs; its span on the CPU is short.
    launched = np.append(starts, starts[-1] + 3_000_000).round().astype(np.int64) + BASE_NS
    launched[1:] -= 300_000
    at = np.append(np.repeat(np.arange(STEPS), calls_of), STEPS)
    spread = np.concatenate([np.arange(count) for count in (*calls_of, 1)]) * 1_000
    spans = [
        _step(step, launched[step], int(of_step[step]) if step < STEPS else 0, sizes)
        for step in range(STEPS + 1)
    ]
    is_graph = np.append(np.repeat(of_step < 2, calls_of), True)
    recorded = np.bincount(call, minlength=len(at))
    part = RankActivities(
        rank=f"TP{rank}",
        names=NAMES,
        name_codes=np.concatenate([kind.name for kind, _, _ in steps]),
        kinds=("kernel",),
        kind_codes=np.zeros(len(start), np.int64),
        start=start,
        dur=dur,
        stream=np.concatenate([kind.stream for kind, _, _ in steps]),
        step=number,
        steps=spans,
        launches=Launches(at, launched[at] + 5_000 + spread, recorded, is_graph, 0 * at),
    )
    return part, call


def _step(number: int, start: int, kind: int, sizes: list[int]) -> Step:
    begin = int(start)
    if kind == 2:
        return Step(number, "prefill", begin, begin + SPAN_NS, 1, 512, number, "EXTEND")
    return Step(number, "decode", begin, begin + SPAN_NS, 8 * (kind + 1), -1, number, "DECODE")


# What a profiler does.


@dataclass(frozen=True)
class Damage:
    """A rank after some of its kernels were damaged.

    part: what a reader makes of it. count: how many kernels. recorded, call: what the file holds,
    and the launch of each activity in it.
    """

    part: RankActivities
    count: int
    recorded: RankActivities
    call: Ints


Harm = Callable[[RankActivities, Ints, float], Damage]


def _lost(part: RankActivities, call: Ints, lost: Flags) -> Damage:
    """These kernels were not recorded."""
    left = _without(part, call, lost)
    return Damage(left, int(lost.sum()), left, call[~lost])


def _unusable(part: RankActivities, call: Ints, dur: Ints, bad: Flags) -> Damage:
    """These kernels were recorded with a duration that cannot be."""
    left = replace(_without(part, call, bad), unusable=int(bad.sum()))
    return Damage(left, int(bad.sum()), replace(part, dur=dur), call)


def _without(part: RankActivities, call: Ints, lost: Flags) -> RankActivities:
    assert part.launches is not None
    recorded = np.bincount(call[~lost], minlength=len(part.launches.recorded))
    return replace(
        part,
        launches=replace(part.launches, recorded=recorded),
        name_codes=part.name_codes[~lost],
        kind_codes=part.kind_codes[~lost],
        start=part.start[~lost],
        dur=part.dur[~lost],
        stream=part.stream[~lost],
        step=part.step[~lost],
    )


def lost_front(part: RankActivities, call: Ints, share: float) -> Damage:
    """All kernels before one moment: that at which this share of the steps has ended."""
    return _lost(part, call, part.step < round(share * STEPS))


def lost_stream(part: RankActivities, call: Ints, share: float) -> Damage:
    """The kernels of the second stream from one moment on, until so many are lost."""
    rows = np.flatnonzero((part.stream == SIDE) & (part.step > 0.3 * STEPS))
    if share * len(part.start) > len(rows):
        rows = np.flatnonzero(part.stream == SIDE)
    lost = np.zeros(len(part.start), bool)
    lost[rows[: max(round(share * len(part.start)), 1)]] = True
    return _lost(part, call, lost)


def lost_every_nth(part: RankActivities, call: Ints, share: float) -> Damage:
    """Every nth kernel."""
    return _lost(part, call, _every_nth(len(part.start), share))


def bad_durations(part: RankActivities, call: Ints, share: float) -> Damage:
    """Every nth kernel has a negative duration."""
    bad = _every_nth(len(part.start), share)
    return _unusable(part, call, np.where(bad, -part.dur, part.dur), bad)


def running_over(part: RankActivities, call: Ints, share: float) -> Damage:
    """Every nth kernel runs over the next one of its stream, which is impossible."""
    rows = np.lexsort((part.start, part.stream))
    stream, start, dur = part.stream[rows], part.start[rows], part.dur[rows].copy()
    is_chosen = _every_nth(len(rows), share)[rows][:-1] & (np.diff(stream) == 0)
    chosen = np.flatnonzero(is_chosen)
    dur[chosen] = start[chosen + 1] + dur[chosen + 1] + 500 - start[chosen]
    bad, changed = np.zeros(len(rows), bool), part.dur.copy()
    bad[rows] = contains_later(start + dur, stream)
    changed[rows] = dur
    return _unusable(part, call, changed, bad)


def _every_nth(count: int, share: float) -> Flags:
    chosen = np.zeros(count, bool)
    chosen[np.arange(1 / share / 2, count, 1 / share).astype(np.int64)] = True
    return chosen


HARMS: dict[str, Harm] = {
    "lost front": lost_front,
    "lost stream": lost_stream,
    "lost every nth": lost_every_nth,
    "bad durations": bad_durations,
    "durations over the next kernel": running_over,
}


# The same as files, as torch.profiler writes them.


def write(path: Path, part: RankActivities, call: Ints, *, size: int, later_s: int = 0) -> None:
    """The trace of one rank. call: the launch of each activity. size: of the run, in processes.

    later_s: by how much the clock of the file is ahead of that of the others.
    """
    rank = int(part.rank.removeprefix("TP"))
    trace = {
        "distributedInfo": {"backend": "nccl", "rank": rank, "world_size": size},
        "baseTimeNanoseconds": BASE_NS + later_s * 10**9,
        "traceEvents": list(_events(part, call)),
    }
    path.write_text(json.dumps(trace))


def _events(part: RankActivities, call: Ints) -> Iterator[dict[str, Any]]:
    assert part.launches is not None
    for step in part.steps:
        tokens = f" toks={step.tokens}" if step.tokens >= 0 else ""
        name = f"step[{step.substage} bs={step.batch_size}{tokens} forward_id={step.step}]"
        dur = step.end_ns - step.start_ns
        yield _event("user_annotation", name, step.start_ns, dur, pid=1, tid=1)
    launches = zip(part.launches.start.tolist(), part.launches.is_graph.tolist(), strict=True)
    for number, (start, is_graph) in enumerate(launches):
        kind = "cuda_driver" if number % 2 and not is_graph else "cuda_runtime"
        name = "cuLaunchKernelEx" if kind == "cuda_driver" else "cudaLaunchKernel"
        name = "cudaGraphLaunch" if is_graph else name
        args = {"correlation": number + 1}
        yield _event(kind, name, start, 1_500, pid=1, tid=1, args=args)
    columns = (part.name_codes, part.start, part.dur, part.stream, call)
    for code, start, dur, stream, launch in zip(*(c.tolist() for c in columns), strict=True):
        args = {"device": 0, "stream": stream, "correlation": launch + 1}
        yield _event("kernel", part.names[code], start, dur, pid=0, tid=stream, args=args)


def _event(category: str, name: str, start: int, dur: int, **more: Any) -> dict[str, Any]:
    times = {"ts": (start - BASE_NS) / 1000, "dur": dur / 1000}
    return {"ph": "X", "cat": category, "name": name, **times, **more}
