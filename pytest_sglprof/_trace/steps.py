"""Which step each activity belongs to, and which steps may be compared.

From top to bottom: find the step of GPU activities, exclude steps in which something was
compiled or captured, drop impossible durations, compute self times, and add what the server's
log says about the window.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from pytest_sglprof._ranks import Rank
from pytest_sglprof._server.log_lines import AcceptLength, ServerFacts
from pytest_sglprof._trace.passes import is_step, passes, step_spans
from pytest_sglprof._trace.table import (
    NO_STEP,
    Flags,
    Ints,
    KernelTable,
    PassSettings,
    Step,
    first_of,
    holding,
)
from pytest_sglprof._trace.torch.events import Annotation

if TYPE_CHECKING:
    import pandas as pd


def launch_times(ids: Ints, times: Ints, correlation: Ints) -> Ints:
    """The time of the first launch with each correlation id; -1 if there is none.

    A correlation id of 0 or less belongs to no launch.
    """
    order = np.argsort(ids, kind="stable")
    at = np.where(correlation > 0, first_of(ids[order], correlation), -1)
    return _taken(times[order], at, -1)


class StepIndex:
    """Finds the steps of one rank, by time or by number."""

    def __init__(self, steps: Sequence[Step]) -> None:
        times = [(step.start_ns, step.end_ns, step.step) for step in steps]
        starts, ends, self._numbers = np.array(times, dtype=np.int64).reshape(-1, 3).T
        # A step of length 0 still holds the moment at which it starts.
        self._pieces = apart(starts, np.maximum(ends, starts + 1))
        self._by_number = np.argsort(self._numbers, kind="stable")

    def holding(self, times: Ints) -> Ints:
        """The index of the step that holds each time, -1 for none; of several the latest."""
        starts, ends, place = self._pieces
        return _taken(place, holding(starts, ends, times), -1)

    def of(self, times: Ints) -> Ints:
        """The number of the step that holds each time, -1 for none."""
        return _taken(self._numbers, self.holding(times), NO_STEP)

    def numbered(self, numbers: Ints) -> Ints:
        """The index of the step with each number, -1 for none; of several the first."""
        at = first_of(self._numbers[self._by_number], numbers)
        return _taken(self._by_number, at, -1)


def apart(starts: Ints, ends: Ints) -> tuple[Ints, Ints, Ints]:
    """Pieces of intervals that do not overlap, ascending: their starts, ends and intervals.

    Where several intervals overlap, the time is that of the one that began last.
    """
    order = np.argsort(starts, kind="stable")
    if (ends[order][:-1] <= starts[order][1:]).all():
        return starts[order], ends[order], order
    pieces: list[tuple[int, int, int]] = []
    unfinished: list[int] = []
    at = 0
    for place in [*order.tolist(), -1]:
        until = int(starts[place]) if place >= 0 else int(ends.max())
        while unfinished:
            stop = min(int(ends[unfinished[-1]]), until)
            if stop > at:
                pieces.append((at, stop, unfinished[-1]))
                at = stop
            if ends[unfinished[-1]] > until:
                break
            unfinished.pop()
        at = until
        unfinished.append(place)
    first, last, interval = np.array(pieces, dtype=np.int64).T
    return first, last, interval


def _taken(values: Ints, at: Ints, otherwise: int) -> Ints:
    """`values[at]`, and `otherwise` where `at` is -1."""
    taken = np.full(len(at), otherwise, dtype=np.int64)
    taken[at >= 0] = values[at[at >= 0]]
    return taken


def with_graph_share(
    steps: Sequence[Step], step: Ints, kernel: Flags, graph: Flags
) -> tuple[Step, ...]:
    """The steps with their `graph_share`: the share of their kernels that are graph nodes.

    step, kernel, graph: of each activity its step, whether it is a kernel, and whether it is
    a graph node. Unchanged for a rank without nodes: older profilers, and AMD's, do not mark
    them.
    """
    if not steps or not graph.any():
        return tuple(steps)
    at = StepIndex(steps).numbered(step)
    known = (at >= 0) & kernel
    every = np.bincount(at[known], minlength=len(steps))
    nodes = np.bincount(at[known & graph], minlength=len(steps))
    shares = np.where(every > 0, nodes / np.maximum(every, 1), -1.0)
    return tuple(
        entry.changed(graph_share=share)
        for entry, share in zip(steps, shares.tolist(), strict=True)
    )


# Find the step of each GPU activity.
#
# Kineto projects a CPU annotation onto every stream that its kernels ran on; the two share
# an `External id`. With these projections the launches need not be read. Without, an activity
# belongs to the step whose span on the CPU holds its launch (same correlation id).

PROJECTED_SHARE = 0.5  # of the steps; with fewer, the profiler did not project steps


class TraceSteps:
    """The steps of one rank of a torch trace, from its annotations."""

    def __init__(self, annotations: Sequence[Annotation]) -> None:
        marks = [a for a in annotations if is_step(a.name)]
        spans = step_spans(marks)
        self.steps = passes(spans.cpu or spans.gpu)
        """One for each pass, in order of their start."""
        self._by_launch = StepIndex(spans.cpu)
        self._by_gpu_time = StepIndex(spans.gpu)
        self._by_number = StepIndex(self.steps)
        on_gpu = [a for a in marks if a.gpu]
        self._projections = Projections(spans.cpu, spans.annotations, on_gpu)

    def of_time(self, start: Ints) -> Ints:
        """The step whose span on the CPU holds `start`, else -1."""
        return self._by_launch.of(start)

    def index_of_time(self, start: Ints) -> Ints:
        """The index in `steps` of the one whose span on the CPU holds `start`, else -1."""
        return self._by_number.numbered(self._by_launch.of(start))

    def of_gpu(self, start: Ints, stream: npt.NDArray[Any], launched: Ints) -> Ints:
        """The step of each GPU activity, else -1. launched: ns of the launch, -1 if unknown."""
        if self._projections.complete:
            return self._projections.find(start, stream)
        step = self._by_launch.of(launched)
        left = step == NO_STEP
        step[left] = self._by_gpu_time.of(start[left])
        left = step == NO_STEP
        step[left] = self._projections.find(start[left], stream[left])
        return step


class Projections:
    """The steps' spans on the GPU's streams.

    steps: numbered steps; annotations: the CPU annotation of each, in the same order.
    """

    def __init__(
        self, steps: Sequence[Step], cpu: Sequence[Annotation], gpu: Sequence[Annotation]
    ) -> None:
        number_of = {
            (span.external, span.name): step.step
            for step, span in zip(steps, cpu, strict=True)
            if span.external >= 0
        }
        streams: dict[int, list[tuple[int, int, int]]] = {}
        for span in gpu:
            number = number_of.get((span.external, span.name))
            if number is not None and _on_stream(span):
                entry = (span.start, span.start + span.dur, number)
                streams.setdefault(int(span.thread), []).append(entry)
        self.complete = projected(cpu, gpu)
        self._streams: dict[int, tuple[Ints, Ints, Ints]] = {}
        for stream, entries in streams.items():
            # Of equal starts the one that ends last is around the others.
            entries.sort(key=lambda entry: (entry[0], -entry[1]))
            starts, ends, numbers = np.array(entries, dtype=np.int64).T
            first, last, place = apart(starts, ends)
            self._streams[stream] = (first, last, numbers[place])

    def find(self, start: Ints, stream: npt.NDArray[Any]) -> Ints:
        """The step whose projection on the activity's own stream holds its start, else -1."""
        step = np.full(len(start), NO_STEP, dtype=np.int64)
        for which, (first, last, numbers) in self._streams.items():
            rows = np.flatnonzero(stream == which)
            step[rows] = _taken(numbers, holding(first, last, start[rows]), NO_STEP)
        return step


def projected(cpu: Sequence[Annotation], gpu: Sequence[Annotation]) -> bool:
    """Whether the profiler projected the CPU's steps onto the GPU, at least half of them."""
    known = {(span.external, span.name) for span in cpu if span.external >= 0}
    on_gpu = {(span.external, span.name) for span in gpu if _on_stream(span)}
    return len(known & on_gpu) >= PROJECTED_SHARE * len(cpu) > 0


def _on_stream(span: Annotation) -> bool:
    return span.thread.lstrip("-").isdigit()


# Exclude steps in which kernels were compiled or graphs captured.
#
# Both show as calls of the driver. Launches of such a step waited for the host, so it is not
# compared with others; the rank's notes count them.

JIT = "jit compilation"
CAPTURE = "graph capture"
_CALLS = (
    (CAPTURE, re.compile(r"(cuda|cu|hip)(StreamBeginCapture|GraphInstantiate)")),
    (JIT, re.compile(r"(cuda|cu|hip)(Module|Library)Load|(cu|hip)LinkCreate|(nv|hip)rtc[A-Z]")),
)

Call = tuple[int, str]


def interruption(call: str) -> str:
    """ "jit compilation", "graph capture", or "" for any other call's name."""
    return next((what for what, pattern in _CALLS if pattern.match(call)), "")


def with_interruptions(
    label: str,
    steps: Sequence[Step],
    calls: Sequence[Call],
    index_of_time: Callable[[Ints], Ints],
) -> tuple[tuple[Step, ...], list[str]]:
    """The steps, those around one of `calls` excluded, and notes on them.

    calls: (start in ns on the steps' clock, what), what being an answer of `interruption`.
    index_of_time: as that of `TraceSteps`.
    """
    if not calls:
        return tuple(steps), []
    listed = sorted(calls)
    at = index_of_time(np.array([time for time, _ in listed], dtype=np.int64))
    hit: dict[int, str] = {}
    for place, (_, what) in zip(at.tolist(), listed, strict=True):
        if place >= 0:
            hit.setdefault(place, what)
    marked = tuple(
        step.changed(excluded=step.excluded or hit.get(place, ""))
        for place, step in enumerate(steps)
    )
    in_steps = Counter(hit.values())
    notes = [
        f"{label}: {what} inside the window ({count} calls), in {in_steps[what]} steps, "
        "which are not compared"
        for what, count in sorted(Counter(what for _, what in listed).items())
    ]
    return marked, notes


# Drop impossible durations.
#
# A stream runs its kernels in order, so a kernel that contains a whole later kernel of its
# stream is a profiler artefact (seen in real traces). Short overlaps are programmatic
# dependent launch and are fine.


def timelines(
    device: npt.NDArray[Any], context: npt.NDArray[Any], stream: npt.NDArray[Any]
) -> Ints:
    """A number for each stream of each device and context; -1 if stream or device is unknown.

    Two contexts of a process each have their stream 7. AMD's traces name no context (-1).
    """
    known = (device >= 0) & (device < 2**15) & (stream >= 0) & (stream < 2**32)
    number = np.where(known, (device.astype(np.int64) << 32) + stream, -1)
    if not len(context) or (context == context[0]).all():
        return number
    places, place = np.unique(context, return_inverse=True)
    codes = np.unique(number, return_inverse=True)[1]
    return np.where(known, codes * len(places) + place, -1)


def impossible_rows(start: Ints, dur: Ints, timeline: Ints, graph: Flags) -> Flags:
    """Rows (sorted by timeline, then start) that contain a whole later row of their timeline.

    Nodes of graphs, which run side by side, and rows without a timeline (-1) never count.
    """
    return contains_later(start + dur, timeline) & (timeline >= 0) & ~graph


def contains_later(end: Ints, stream: Ints) -> Flags:
    """Rows (sorted by stream, then start) that contain a whole later row of their stream."""
    bad = np.zeros(len(end), dtype=bool)
    edges = np.flatnonzero(np.diff(stream)) + 1
    for first, last in zip([0, *edges], [*edges, len(end)], strict=True):
        if last - first > 1:
            # If any later row ends inside, the one that ends earliest does.
            earliest = np.minimum.accumulate(end[first + 1 : last][::-1])[::-1]
            bad[first : last - 1] = earliest < end[first : last - 1]
    return bad


def excluded(durations: Ints) -> str:
    """The note on kernels that were left out, from their durations (ns)."""
    return (
        f"excluded {len(durations)} kernels ({int(durations.sum()) / 1e6:.3f} ms) that contain a "
        "whole later kernel of their own stream, which is impossible"
    )


# Self time: the time of a span without the spans inside it.
#
# CPU operators and NVTX ranges nest, so the sum of their durations counts time several times;
# the sum of their self times is the length of the union of the outermost spans.


def self_times(start: Ints, dur: Ints, thread: Ints) -> Ints:
    """Self time of each span, ns, shape (spans,).

    Spans of one thread nest. If one overlaps another without lying inside it (clocks are not
    perfect), the overlap belongs to the span that began last, so that the sum over a thread is
    always the length of its union.
    """
    order = np.lexsort((-dur, start, thread))
    times_left = dur[order].tolist()
    starts, ends = start[order].tolist(), (start + dur)[order].tolist()
    threads = thread[order].tolist()
    open_spans: list[int] = []
    for at, (begin, end) in enumerate(zip(starts, ends, strict=True)):
        if at and threads[at] != threads[at - 1]:
            open_spans.clear()
        while open_spans and ends[open_spans[-1]] <= begin:
            open_spans.pop()
        taken = begin  # up to here, the new span's time was taken from the spans around it
        for outer in reversed(open_spans):
            if taken >= end:
                break
            if ends[outer] > taken:
                stop = min(end, ends[outer])
                times_left[outer] -= stop - taken
                taken = stop
        open_spans.append(at)
    times = np.empty(len(times_left), dtype=np.int64)
    times[order] = times_left
    return times


# Add what the server's log says about the window to the steps of its kernel table.

REBALANCE = "eplb rebalance"
GRAPH_SHARE = 0.5  # of a step's kernels; in a replayed decode step a few are not graph nodes
_UNIX_NS = 10**18  # September 2001; clocks that count from a start are far below


def with_server_facts(table: KernelTable, facts: ServerFacts) -> KernelTable:
    """The table with its facts, steps inside a rebalance excluded, and accept lengths filled in.

    The latter two need steps on the Unix clock, as in torch traces. On another clock it is unknown
    which steps a rebalance hit, so all of them are excluded.
    """
    import pandas as pd

    if facts == table.facts:
        return table
    table = replace(table, facts=facts)
    if table.steps.empty:
        return table
    steps = table.steps.copy()
    notes = list(table.notes)
    is_unix = bool((steps["start_ns"] > _UNIX_NS).all())
    if facts.rebalances:
        inside = _inside(steps, facts.rebalances) if is_unix else np.ones(len(steps), bool)
        if inside.any():
            marks = steps["excluded"].astype(object)
            steps["excluded"] = pd.Categorical(marks.mask(inside & (marks == ""), REBALANCE))
            count = steps.loc[inside, "step"].nunique()
            how = "" if is_unix else " (all: their clock is not that of the log)"
            notes.append(f"a rebalance of experts during the window: {count} steps{how} excluded")
    if facts.captures:
        notes.append("graphs were captured during the window, as the server's log says")
    if facts.accepted and is_unix:
        steps["accept_length"] = _accept_lengths(steps, facts.accepted)
    return replace(table, steps=steps, notes=tuple(notes))


def with_settings(table: KernelTable, settings: PassSettings) -> KernelTable:
    """The table with the server's `settings`, and the padded batches that follow from them.

    Under DP attention a batch is padded to a size that depends on all ranks: those stay unknown.
    """
    steps = table.steps
    if settings.capture_sizes and not settings.dp_attention and not steps.empty:
        steps = steps.assign(padded_batch=_padded(steps, settings.capture_sizes))
    return replace(table, steps=steps, settings=settings)


def _padded(steps: pd.DataFrame, batches: Sequence[int]) -> np.ndarray:
    """The batch size of the graph that each step replayed; only of steps made of graph nodes."""
    known = np.array([*batches, -1], dtype=np.int64)
    size = steps["batch_size"].to_numpy()
    padded = steps["padded_batch"].to_numpy().copy()
    replayed = (steps["stage"] == "decode") & (steps["graph_share"] > GRAPH_SHARE)
    chosen = (padded < 0) & (size > 0) & replayed.to_numpy()
    padded[chosen] = known[np.searchsorted(known[:-1], size[chosen])]
    return padded


def _inside(steps: pd.DataFrame, spans: Sequence[tuple[float, float]]) -> np.ndarray:
    """Which steps overlap one of the spans (Unix time, s)."""
    start, end = steps["start_ns"].to_numpy() / 1e9, steps["end_ns"].to_numpy() / 1e9
    inside = np.zeros(len(steps), bool)
    for begins, ends in spans:
        inside |= (start < ends) & (end > begins)
    return inside


def _accept_lengths(steps: pd.DataFrame, accepted: Sequence[AcceptLength]) -> np.ndarray:
    """Of each step the figure of the next log line, which is the mean since the line before."""
    lengths = steps["accept_length"].to_numpy(float).copy()
    end = steps["end_ns"].to_numpy() / 1e9
    drafts = steps["substage"].astype(str).str.startswith("DRAFT")
    verifies = ((steps["stage"] == "decode") & ~drafts).to_numpy()
    labels = steps["rank"].astype(str)
    for label in labels.unique():
        rank = Rank.parse(label)
        samples = [a for a in accepted if a.dp is None or rank is None or rank.dp in (None, a.dp)]
        if not samples:
            continue
        rows = np.flatnonzero((labels == label).to_numpy() & verifies)
        samples.sort(key=lambda sample: sample.time)
        at = np.searchsorted([sample.time for sample in samples], end[rows])
        values = np.array([*(sample.length for sample in samples), -1.0])
        lengths[rows] = values[at]
    return lengths
