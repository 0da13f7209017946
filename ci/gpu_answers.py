"""What the recordings of `ci.gpu_recordings` answer: pure functions of a folder, without a GPU.

Each takes the folder of one recording and what was measured while it was made (`facts.json`), and
reads the recorded files with the readers of this package, so that it tests these as well.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from pytest_sglprof import read_window
from pytest_sglprof._capture.torch_request import EXPORT_BYTES_PER_SECOND
from pytest_sglprof._trace.completeness import EDGE_STEPS, GRAPH_LAUNCH, KERNEL_LAUNCH
from pytest_sglprof._trace.nsys.database import MISSING, table_of
from pytest_sglprof._trace.nsys.report import opened, read_recorded
from pytest_sglprof._trace.steps import TraceSteps, timelines
from pytest_sglprof._trace.table import Flags, Ints, RankActivities, first_of
from pytest_sglprof._trace.torch.assemble import decode_file, read_traces
from pytest_sglprof._trace.torch.events import KERNEL, LAUNCH, Columns

YES, NO, NOT_RUN = "yes", "no", "not run"
TRACE = "window-TP-0.trace.json.gz"
REPORTS = ("window-1.sqlite", "window-2.sqlite")
SLOWER = 0.02  # of the time of a step: less is noise

Facts = Mapping[str, Any]
"""What was planned and measured. graphs: kernels of each captured graph, by batch size."""


class NotRun(Exception):
    """The question was not put to a GPU, or its recording shows nothing. Its text is the reason."""


@dataclass(frozen=True)
class Answer:
    """answer: `YES`, `NO` or `NOT_RUN`. numbers: what it follows from."""

    answer: str
    reason: str
    numbers: Mapping[str, Any] = field(default_factory=dict)


def read_facts(folder: Path) -> Facts:
    """The `facts.json` of a recording. Raises `NotRun` without one, or if it says why not."""
    try:
        facts: Facts = json.loads((folder / "facts.json").read_text())
    except (OSError, ValueError) as error:
        raise NotRun("its recording did not end") from error
    if reason := facts.get("not_run"):
        raise NotRun(reason)
    return facts


def _answer(is_yes: bool, reason: str, **numbers: Any) -> Answer:
    return Answer(YES if is_yes else NO, reason, numbers)


# What a recording holds.


@dataclass(frozen=True)
class Trace:
    """A torch trace: its rank, and all calls of CUDA, arrays of shape (calls,).

    names: of the calls. step: index of the step of the call, -1 outside of steps. recorded: number
    of kernels with the call's correlation. kernels: rows of the file.
    """

    part: RankActivities
    names: Sequence[str]
    step: Ints
    correlation: Ints
    recorded: Ints
    kernels: Columns

    def named(self, *patterns: Any) -> Flags:
        """Which calls one of the patterns matches."""
        return np.array([any(p.match(name) for p in patterns) for name in self.names], bool)

    @property
    def is_inner(self) -> Flags:
        """Which calls are in steps that are not at an edge; raises as `inner` does."""
        return inner(self.step, len(self.part.steps))

    @property
    def without_launch(self) -> int:
        """Number of kernels that no launch call in the trace has launched."""
        launches = self.correlation[self.named(KERNEL_LAUNCH, GRAPH_LAUNCH)]
        return int((~np.isin(self.kernels.correlation, launches)).sum())


def read_trace(path: Path) -> Trace:
    """The trace. Raises `TraceError`; `NotRun` where it has no kernels."""
    content = decode_file(path)
    columns, names = content.columns, content.facts.names
    kernels, calls = (columns.take(columns.kind == kind) for kind in (KERNEL, LAUNCH))
    if not len(kernels):
        raise NotRun("its recording has no kernels: CUPTI did not attach")
    correlation = calls.correlation.astype(np.int64)
    ids, counts = np.unique(kernels.correlation.astype(np.int64), return_counts=True)
    at = first_of(ids, correlation)
    recorded = np.where(at >= 0, counts[at], 0)
    step = TraceSteps(content.facts.annotations).index_of_time(calls.start)
    ((_, part),) = read_traces([path])
    return Trace(
        part=part,
        names=[names[code] for code in calls.name.tolist()],
        step=step,
        correlation=correlation,
        recorded=recorded,
        kernels=kernels,
    )


def inner(step: Ints, steps: int) -> Flags:
    """Which calls are in steps that are not at an edge; all where the recording has no steps.

    step: the index of the step of each call. Raises `NotRun` where all steps are at an edge.
    """
    if not steps:
        return np.ones(len(step), bool)
    if steps <= 2 * EDGE_STEPS:
        raise NotRun(f"its recording has {steps} steps, {2 * EDGE_STEPS + 1} or more are needed")
    chosen: Flags = (step >= EDGE_STEPS) & (step < steps - EDGE_STEPS)
    return chosen


def incomparable(path: Path) -> str:
    """Why this package would not judge the recording; "" if it would. Raises `TraceError`."""
    return read_window(path).incomparable


def _fan_out(part: RankActivities, path: Path, facts: Facts) -> Answer:
    """Whether each replay has as many kernels as its graph: the one of the step's batch size."""
    graphs = {int(batch): kernels for batch, kernels in facts["graphs"].items()}
    launches = part.launches
    if launches is None or not launches.is_graph.any():
        return Answer(NO, "no call that launches a graph has kernels")
    chosen = np.flatnonzero(launches.is_graph & inner(launches.step, len(part.steps)))
    right, seen = 0, Counter[int]()
    for call in chosen.tolist():
        step = int(launches.step[call])
        batch = part.steps[step].batch_size if step >= 0 else -1
        recorded = int(launches.recorded[call])
        right += recorded in ([graphs[batch]] if batch in graphs else graphs.values())
        seen[recorded] += 1
    why = incomparable(path)
    text = f"{right} of {len(chosen)} replays have the captured number of kernels"
    return _answer(
        len(chosen) > 0
        and right == len(chosen)
        and len(seen) == len({*graphs.values()})
        and not why,
        f"{text}; not judged: {why}" if why else text,
        replays=len(chosen),
        right=right,
        captured=sorted(graphs.values()),
        replays_by_kernels={str(kernels): count for kernels, count in sorted(seen.items())},
    )


# Torch traces.


def graph_correlation(folder: Path, facts: Facts) -> Answer:
    """Kernels of graphs have the correlation of the call that launched the graph."""
    trace = read_trace(folder / TRACE)
    replays = trace.named(GRAPH_LAUNCH)
    if not replays.any():
        raise NotRun("its recording has no replay of a graph")
    empty = int((trace.recorded[replays & trace.is_inner] == 0).sum())
    nodes = trace.kernels.correlation[trace.kernels.graph > 0]
    linked = int(np.isin(nodes, trace.correlation[replays]).sum())
    lost = trace.without_launch
    return _answer(
        not empty and linked == len(nodes) and not lost,
        f"{linked} of {len(nodes)} nodes of graphs have the correlation of a replay, "
        f"{lost} kernels that of no launch; {empty} replays are without kernels",
        replays=int(replays.sum()),
        kernels_of_replays=int(trace.recorded[replays].sum()),
        replays_without_kernels=empty,
        nodes=len(nodes),
        nodes_with_launch=linked,
        kernels_without_launch=lost,
    )


def graph_fan_out(folder: Path, facts: Facts) -> Answer:
    """A replay has as many kernels as were captured."""
    path = folder / TRACE
    return _fan_out(read_trace(path).part, path, facts)


def runtime_launches(folder: Path, facts: Facts) -> Answer:
    """Each launch call of the runtime has one kernel."""
    return _one_kernel(read_trace(folder / TRACE), ("cuda", "hip"))


def driver_launches(folder: Path, facts: Facts) -> Answer:
    """Each launch call of the driver has one kernel."""
    return _one_kernel(read_trace(folder / TRACE), ("cuL",))


def _one_kernel(trace: Trace, prefixes: tuple[str, ...]) -> Answer:
    """Whether each inner launch call whose name begins with one of these has one kernel."""
    is_launch = trace.named(KERNEL_LAUNCH)
    asked = np.array([name.startswith(prefixes) for name in trace.names], bool)
    chosen = np.flatnonzero(is_launch & asked & trace.is_inner)
    counts = Counter(trace.recorded[chosen].tolist())
    known = is_launch | trace.named(GRAPH_LAUNCH)
    other = sorted(
        {trace.names[at] for at in np.flatnonzero(~known & (trace.recorded > 0)).tolist()}
    )
    unknown = f"; kernels of calls that are not counted as launches: {', '.join(other)}"
    return _answer(
        len(chosen) > 0 and counts[1] == len(chosen) and not other,
        f"{counts[1]} of {len(chosen)} launch calls have one kernel" + (unknown if other else ""),
        calls=dict(Counter(trace.names[at] for at in chosen.tolist())),
        without_kernel=counts[0],
        with_one=counts[1],
        with_more=len(chosen) - counts[0] - counts[1],
        kernels_without_launch=trace.without_launch,
    )


def edges(folder: Path, facts: Facts) -> Answer:
    """What was launched, but not recorded, lies in the first or last steps."""
    path = folder / TRACE
    trace = read_trace(path)
    part, launches = trace.part, trace.part.launches
    if launches is None or not part.steps:
        raise NotRun("its recording has no launch calls or no steps")
    lost = launches.step[launches.recorded == 0]
    inner(lost, len(part.steps))  # raises where there are too few steps
    front = int(((lost >= 0) & (lost < EDGE_STEPS)).sum())
    end = int((lost >= len(part.steps) - EDGE_STEPS).sum())
    inside = len(lost) - front - end
    why = incomparable(path)
    text = (
        f"launches without kernels: {front} in the first {EDGE_STEPS} steps, {end} in the last "
        f"{EDGE_STEPS}, {inside} elsewhere"
    )
    return _answer(
        not inside and not why,
        f"{text}; not judged: {why}" if why else text,
        launches=len(launches.step),
        lost_in_front=front,
        lost_at_end=end,
        lost_inside=inside,
        steps=len(part.steps),
        kernels_without_launch=trace.without_launch,
    )


def gpu_only(folder: Path, facts: Facts) -> Answer:
    """A window of GPU activities alone has neither steps nor launch calls."""
    trace = read_trace(folder / TRACE)
    launches = int(trace.named(KERNEL_LAUNCH, GRAPH_LAUNCH).sum())
    steps, kernels = len(trace.part.steps), len(trace.kernels)
    return _answer(
        not launches and not steps,
        f"{steps} steps and {launches} launch calls beside {kernels} kernels",
        steps=steps,
        launches=launches,
        kernels=kernels,
    )


def durations(folder: Path, facts: Facts) -> Answer:
    """A kernel ends before the next one of its stream begins (nodes of graphs do not count)."""
    trace = read_trace(folder / TRACE)
    kernels = trace.kernels.take(trace.kernels.graph == 0)
    stream = timelines(kernels.device, kernels.context, kernels.stream)
    order = np.lexsort((kernels.start, stream))
    stream, start = stream[order], kernels.start[order]
    end = start + kernels.dur[order]
    over = (end[:-1] - start[1:])[(stream[:-1] == stream[1:]) & (stream[:-1] >= 0)]
    overlaps = over[over > 0]
    longest = int(overlaps.max(initial=0))
    unusable = trace.part.unusable
    return _answer(
        len(over) > 0 and not len(overlaps) and not unusable,
        f"{len(overlaps)} of {len(over)} kernels run over the next one of their stream, by "
        f"{longest} ns at most; the times of {unusable} cannot be",
        pairs=len(over),
        overlaps=len(overlaps),
        longest_overlap_ns=longest,
        unusable=unusable,
    )


# What was measured while nothing was kept.


def speed_after_window(folder: Path, facts: Facts) -> Answer:
    """A step is as fast after a window as before it."""
    read_trace(folder / TRACE)  # raises where the window recorded nothing
    first, second, after = facts["first_us"], facts["second_us"], facts["after_us"]
    noise, change = abs(second / first - 1), after / second - 1
    if noise > SLOWER:
        raise NotRun(f"two measurements before the window differ by {100 * noise:.1f} %: too noisy")
    return _answer(
        change <= SLOWER,
        f"a step takes {after:.1f} us after the window, {second:.1f} us before it "
        f"({100 * change:+.1f} %, noise {100 * noise:.1f} %)",
        **facts,
    )


def stall(folder: Path, facts: Facts) -> Answer:
    """Stopping and writing is as fast as assumed before a window is opened."""
    read_trace(folder / TRACE)  # raises where the windows recorded nothing
    largest = max(facts["windows"], key=lambda window: window["bytes"])
    seconds = largest["stop_s"] + largest["export_s"]
    megabytes = largest["bytes"] / 1e6
    return _answer(
        largest["bytes"] >= EXPORT_BYTES_PER_SECOND * seconds,
        f"{seconds:.2f} s for {megabytes:.1f} MB of JSON: {seconds / megabytes:.3f} s per MB, "
        f"{1e6 / EXPORT_BYTES_PER_SECOND:.3f} are assumed",
        windows=facts["windows"],
    )


def nvml(folder: Path, facts: Facts) -> Answer:
    """Clocks and throttle reasons can be read, and the process is found by its id."""
    if error := facts.get("error"):
        return Answer(NO, error)
    pid, pids = facts["pid"], [pid for gpu in facts["gpus"] for pid in gpu["pids"]]
    clocks = [gpu["sm_mhz"] for gpu in facts["gpus"]]
    return _answer(
        pid in pids and all(clock > 0 for clock in clocks),
        f"clocks {clocks} MHz; process {pid} is {'' if pid in pids else 'not '}among {pids}",
        **facts,
    )


# Reports of nsys.


def nsys_earlier_graphs(folder: Path, facts: Facts) -> Answer:
    """Kernels of graphs that were captured before `nsys start` are recorded one by one."""
    path = folder / REPORTS[0]
    parts = read_recorded(path)
    incomparable(path)  # raises NoKernels, which says why
    if len(parts) != 1:
        return Answer(NO, f"the report has {len(parts)} ranks instead of one")
    return _fan_out(parts[0], path, facts)


def nsys_graph_ids(folder: Path, facts: Facts) -> Answer:
    """All replays of a graph have the same ids, in one window and in the next."""
    windows = [_nodes_by_graph(folder / name) for name in REPORTS]
    expected = sorted(facts["graphs"].values())
    sizes = [sorted(len(nodes) for sets in window.values() for nodes in sets) for window in windows]
    return _answer(
        all(size == expected for size in sizes) and windows[0] == windows[1],
        f"{[len(window) for window in windows]} graph ids in two windows, with "
        f"{sizes[0]} and {sizes[1]} nodes; {expected} were captured; the ids are "
        f"{'equal' if windows[0] == windows[1] else 'different'} in the two windows",
        nodes_first=sizes[0],
        nodes_second=sizes[1],
        captured=expected,
        equal=windows[0] == windows[1],
    )


def _nodes_by_graph(path: Path) -> dict[int, set[frozenset[int]]]:
    """The sets of nodes that the replays of each graph have; the first and last replay left out."""
    with opened(path, None) as tables:
        columns = ("correlationId", "graphId", "graphNodeId", "start")
        correlation, graph, node, start = tables.integers(table_of("kernel"), columns)
    rows = np.flatnonzero((graph != MISSING) & (node != MISSING) & (node != 0))
    rows = rows[np.argsort(start[rows], kind="stable")]
    replays: dict[tuple[int, int], set[int]] = {}
    triples = zip(
        correlation[rows].tolist(), graph[rows].tolist(), node[rows].tolist(), strict=True
    )
    for call, its_graph, its_node in triples:
        replays.setdefault((call, its_graph), set()).add(its_node)
    sets_of: dict[int, set[frozenset[int]]] = {}
    for (_, its_graph), nodes in list(replays.items())[1:-1]:
        sets_of.setdefault(its_graph, set()).add(frozenset(nodes))
    return sets_of
