"""nsys reports and their exports, one `RankActivities` a process and device.

One report holds all ranks of a node on one clock. Where it has GPU activities, they are
what is read; the report of a CPU server has NVTX ranges instead, of which each counts
with its self time.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from pytest_sglprof._trace.completeness import ANY_LAUNCH, Unrecorded, counted, no_kernels
from pytest_sglprof._trace.nsys.database import (
    KINDS,
    MISSING,
    NO_NAME,
    PREFIX,
    Owner,
    ReportName,
    label_owners,
    not_recorded,
)
from pytest_sglprof._trace.nsys.files import readable
from pytest_sglprof._trace.nsys.rows import (
    RUN_BATCH,
    Calls,
    GpuRows,
    Ranges,
    launch_times,
    read_calls,
    read_gpu_rows,
    read_ranges,
    read_whole_graphs,
    run_batches,
)
from pytest_sglprof._trace.nsys.tables import (
    ParquetTables,
    ReportTables,
    coded,
    open_sqlite,
    pid_of,
    process_of,
)
from pytest_sglprof._trace.steps import StepIndex, self_times, with_graph_share
from pytest_sglprof._trace.table import (
    BOTH_WAYS,
    GPU,
    NO_STEP,
    NVTX,
    CollectiveCalls,
    Ints,
    Launches,
    RankActivities,
    Step,
    first_of,
)

_THREAD = 0xFFFFFF


def read_report(
    path: Path,
    *,
    pid_ranks: Mapping[int, str] | None = None,
    gpu_ranks: Mapping[int, str] | None = None,
    name: ReportName = NO_NAME,
    nsys: str | None = None,
) -> list[RankActivities]:
    """The activities of each rank in a `.sqlite` export, a `.nsys-rep` or a Parquet folder.

    pid_ranks, gpu_ranks: the rank of a process id, else of a device, as the server had
    them; processes of pid_ranks come back even without any activity. name: what the report's
    name says of its rank or node. nsys: the command
    that exports a `.nsys-rep` (see `nsys.files.readable`).

    Raises `NotATrace` or `TraceError`; `NsysError` (`NsysMissing`) when the export fails.
    """
    with opened(path, nsys) as tables:
        return _read(tables, pid_ranks or {}, gpu_ranks or {}, name)


def read_recorded(
    path: Path,
    *,
    pid_ranks: Mapping[int, str] | None = None,
    gpu_ranks: Mapping[int, str] | None = None,
    name: ReportName = NO_NAME,
    nsys: str | None = None,
) -> list[RankActivities]:
    """As `read_report`, for whoever compares: `unrecorded` says why a rank has no kernels.

    Raises `NoKernels` besides, for a report without any activity.
    """
    pid_ranks = pid_ranks or {}
    with opened(path, nsys) as tables:
        run, clock_ns, host = _run_facts(tables), _clock(tables), _environment(tables, "Hostname")
        parts = [
            replace(part, run=run, clock_ns=clock_ns, host=host) if part.is_timeline else part
            for part in _read(tables, pid_ranks, gpu_ranks or {}, name, launches=True)
        ]
        if any(part.is_timeline and len(part.start) for part in parts):
            return [_with_launches(part, tables, pid_ranks) for part in parts]
        if any("skipped" in note for part in parts for note in part.notes):
            return parts  # there are activities, but all without a possible time
        missing = unrecorded(tables)
    if missing is not None and not parts:
        raise no_kernels([(path.name, missing)])
    return [replace(part, unrecorded=missing) for part in parts]


def _with_launches(
    part: RankActivities, tables: ReportTables, pid_ranks: Mapping[int, str]
) -> RankActivities:
    """The part; without activities, but with launches, its kernels were not recorded."""
    pids = [pid for pid, label in pid_ranks.items() if label == part.rank]
    if len(part.start) or not pids:
        return part
    return replace(part, unrecorded=unrecorded(tables, pids))


@contextlib.contextmanager
def opened(path: Path, nsys: str | None) -> Iterator[ReportTables]:
    """The tables of a report, an export or a Parquet folder. Raises as `read_report` does."""
    with readable(path, nsys) as export:
        if export.is_dir():
            yield ParquetTables(export)
        else:
            with open_sqlite(export) as tables:
                yield tables


def _read(
    tables: ReportTables,
    pid_ranks: Mapping[int, str],
    gpu_ranks: Mapping[int, str],
    name: ReportName,
    *,
    launches: bool = False,
) -> list[RankActivities]:
    ranges = read_ranges(tables)
    rows = read_gpu_rows(tables, correlated=launches or RUN_BATCH in ranges.names)
    graphs = read_whole_graphs(tables)
    notes = [*rows.notes, *graphs.notes]
    pairs = rows.owners() | graphs.owners
    if not pairs and not len(ranges.start):
        pairs = rows.unusable
    on_gpu = {Owner(pid, device) for pid, device in pairs}
    if on_gpu:
        owners = sorted(on_gpu)
    else:
        owners, more = _without_strangers(ranges, pid_ranks)
        notes += [*more, *ranges.notes]
    recorded = _recorded(tables)
    labels, how = label_owners(
        owners, pid_ranks=pid_ranks, gpu_ranks=gpu_ranks, name=name, recorded=recorded
    )
    seen = recorded | {owner.pid for owner in owners}
    notes += how
    notes += not_recorded(pid_ranks, seen)
    members: dict[str, list[Owner]] = {}
    for owner in owners:
        members.setdefault(labels[owner], []).append(owner)
    pids = {label: {owner.pid for owner in its_owners} for label, its_owners in members.items()}
    for pid, label in pid_ranks.items():
        pids.setdefault(label, {pid})
    own_ranges = {label: ranges.of_pids(its_owners) for label, its_owners in pids.items()}
    if not on_gpu:
        return [_of_ranges(label, its_owners, notes) for label, its_owners in own_ranges.items()]
    steps = {label: run_batches(its_owners) for label, its_owners in own_ranges.items()}
    calls = read_calls(tables) if launches or any(steps.values()) else None
    launched = launch_times(calls, rows) if calls and any(steps.values()) else None
    parts = []
    for label, its_steps in steps.items():
        chosen = rows.of_owners(members.get(label, []))
        part = _of_gpu(label, rows, chosen, launched, its_steps, notes)
        pids_here = {owner.pid for owner in members.get(label, [])}
        others = {o.pid for other, its in members.items() if other != label for o in its}
        if launches and calls is not None and not pids_here & others:
            launched_here = _launched_kernels(rows, chosen, its_steps, calls)
            part = replace(part, launches=launched_here)
        part = replace(part, calls=_exchanges(part, own_ranges[label]))
        parts.append(part)
    return parts


def _run_facts(tables: ReportTables) -> dict[str, str]:
    """What a report says of its run, by the names of `_trace.torch.events.FACTS`."""
    models = sorted(set(tables.texts("TARGET_INFO_GPU", "name")[1]))
    facts = {"GPU": ", ".join(models)} if models else {}
    facts["CUDA driver"] = _environment(tables, "CudaDriverVersion")
    return {name: value for name, value in facts.items() if value}


def _environment(tables: ReportTables, key: str) -> str:
    """What a report says of the machine that recorded it; "" if nothing."""
    names, keys = tables.texts("TARGET_INFO_SYSTEM_ENV", "name")
    values, texts = tables.texts("TARGET_INFO_SYSTEM_ENV", "value")
    if key not in keys or not len(values):  # a column may be missing
        return ""
    codes = values[names == keys.index(key)]
    matches = [texts[code] for code in codes.tolist() if code >= 0]
    return matches[-1] if matches else ""


def _clock(tables: ReportTables) -> int | None:
    """See `RankActivities.clock_ns`.

    Newer versions of nsys write times of the system's clock, older ones since their session began.
    """
    began = tables.integers("TARGET_INFO_SESSION_START_TIME", ["utcEpochNs", "systemClockNs"])
    if not began.shape[1] or began[0, 0] == MISSING:
        return None
    utc, system = began[:, 0].tolist()
    return int(utc - (system if system != MISSING else 0))


def _recorded(tables: ReportTables) -> frozenset[int]:
    (process,) = tables.integers("PROCESSES", ["globalPid"])
    return frozenset(pid_of(process[process != MISSING]).tolist())


def _without_strangers(
    ranges: Ranges, pid_ranks: Mapping[int, str]
) -> tuple[list[Owner], list[str]]:
    """The processes with ranges; only the known ones where any of them is known."""
    pids, counts = np.unique(pid_of(ranges.thread[ranges.nests]), return_counts=True)
    ranges_of = dict(zip(pids.tolist(), counts.tolist(), strict=True))
    known = [pid for pid in ranges_of if pid in pid_ranks]
    strangers = [pid for pid in ranges_of if pid not in pid_ranks] if known else []
    notes = [
        f"left out {ranges_of[pid]} NVTX ranges of process {pid}, which is not a rank"
        for pid in strangers
    ]
    return [Owner(pid) for pid in ranges_of if pid not in strangers], notes


def _of_gpu(
    label: str,
    rows: GpuRows,
    chosen: Ints,
    launched: Ints | None,
    steps: tuple[Step, ...],
    notes: Sequence[str],
) -> RankActivities:
    chosen = chosen[np.argsort(rows.start[chosen], kind="stable")]
    step = np.full(len(chosen), NO_STEP, dtype=np.int64)
    if launched is not None:
        step = StepIndex(steps).of(launched[chosen])
    steps = with_graph_share(steps, step, rows.kind[chosen] == 0, rows.graph[chosen])
    return RankActivities(
        rank=label,
        names=rows.names,
        name_codes=rows.name[chosen],
        kinds=KINDS,
        kind_codes=rows.kind[chosen],
        start=rows.start[chosen],
        dur=rows.dur[chosen],
        stream=rows.stream[chosen],
        step=step,
        steps=steps,
        source=GPU,
        notes=notes,
    )


def _launched_kernels(
    rows: GpuRows, chosen: Ints, steps: Sequence[Step], calls: Calls
) -> Launches | None:
    """What the calls of a rank's processes launched, and what of it was recorded.

    chosen: its rows.
    """
    kernels = chosen[(rows.kind[chosen] == 0) & (rows.correlation[chosen] != MISSING)]
    process_of_kernel = process_of(rows.process[kernels])
    every: list[int] = []
    columns: list[Ints] = []
    for process in np.unique(process_of_kernel):
        its_calls = calls.of_process(int(process))
        is_launch = calls.is_kernel[its_calls] | calls.is_graph[its_calls]
        at = np.flatnonzero(is_launch) + its_calls.start
        of_process = kernels[process_of_kernel == process]
        ids, first, counts = np.unique(
            rows.correlation[of_process], return_index=True, return_counts=True
        )
        place = first_of(ids, calls.correlation[at])
        graph = np.maximum(rows.graph_id[of_process[first]], 0)
        every += at.tolist()
        columns.append(np.where(place >= 0, np.stack([counts[place], graph[place]]), 0))
    recorded, graph = np.concatenate([np.zeros((2, 0), np.int64), *columns], axis=1)
    if not recorded.any():
        return None
    start, is_graph = calls.start[every], calls.is_graph[every]
    graph = np.where(is_graph, graph, 0)
    return Launches(StepIndex(steps).holding(start), start, recorded, is_graph, graph)


MOST_OF_TWO = 1.8  # ranges of a kernel that sends and receives, on average


def _exchanges(part: RankActivities, ranges: Ranges) -> CollectiveCalls | None:
    """The calls of SendRecv in which a rank both sends and receives; None if it may do one only.

    NCCL marks each `ncclSend` and `ncclRecv` by a range, several of which make one kernel.
    """
    sendrecv = [code for code, name in enumerate(part.names) if "SendRecv" in name]
    rows = np.flatnonzero(np.isin(part.name_codes, sendrecv) & part.is_kernel)
    sent, received = (
        int((ranges.name == ranges.names.index(word)).sum()) if word in ranges.names else 0
        for word in ("ncclSend", "ncclRecv")
    )
    # At the edges of a window ranges and kernels are not those of the same calls.
    if not len(rows) or sent != received or sent + received < MOST_OF_TWO * len(rows):
        return None
    none = np.full(len(rows), -1, np.int64)
    count = len(rows)
    return CollectiveCalls(rows, [""] * count, none, [BOTH_WAYS] * count, none)


def _of_ranges(label: str, ranges: Ranges, notes: Sequence[str]) -> RankActivities:
    steps = run_batches(ranges)
    nested = ranges.take(ranges.nests)
    nested = nested.take(np.argsort(nested.start, kind="stable"))
    return RankActivities(
        rank=label,
        names=nested.names,
        name_codes=nested.name,
        kinds=("range",),
        kind_codes=np.zeros(len(nested.start), dtype=np.int64),
        start=nested.start,
        dur=self_times(nested.start, nested.dur, nested.thread),
        stream=nested.thread & _THREAD,
        step=StepIndex(steps).of(nested.start),
        steps=steps,
        source=NVTX,
        notes=notes,
    )


# The rows of an nsys report that hold kernels: process, device and stream.


@dataclass(frozen=True)
class StreamRow:
    """One stream of one process. total_ns: sum of its kernels' durations."""

    rank: str
    pid: int
    device: int
    stream: int
    kernels: int
    total_ns: int


def stream_rows(
    path: Path,
    *,
    pid_ranks: Mapping[int, str] | None = None,
    name: ReportName = NO_NAME,
    nsys: str | None = None,
    notes: list[str] | None = None,
) -> list[StreamRow]:
    """All streams with kernels, by process and device, the busiest stream first.

    Counted are the kernels that the kernel table holds. pid_ranks: the rank of a process id;
    without it a row is labelled as the kernel table labels it. notes: gets what was left
    out. Raises what `read_recorded` raises.
    """
    with opened(path, nsys) as tables:
        rows = read_gpu_rows(tables, correlated=False)
        kernels = rows.kind == KINDS.index("kernel")
        missing = None if kernels.any() or rows.notes else unrecorded(tables)
    if missing is not None:
        raise no_kernels([(path.name, missing)])
    if notes is not None:
        notes += rows.notes
    columns = (pid_of(rows.process), rows.device, rows.stream)
    keys = np.stack([column[kernels] for column in columns], axis=1)
    distinct, place = np.unique(keys, axis=0, return_inverse=True)
    counts = np.bincount(place.ravel(), minlength=len(distinct))
    totals = np.zeros(len(distinct), np.int64)
    np.add.at(totals, place.ravel(), rows.dur[kernels])
    streams = distinct.tolist()
    owners = sorted({Owner(pid, device) for pid, device, _ in streams})
    recorded = {owner.pid for owner in owners}
    labels, _ = label_owners(
        owners, pid_ranks=pid_ranks or {}, gpu_ranks={}, name=name, recorded=recorded
    )
    summed = [
        StreamRow(labels[Owner(pid, device)], pid, device, stream, int(count), int(total))
        for (pid, device, stream), count, total in zip(streams, counts, totals, strict=True)
    ]
    return sorted(summed, key=lambda row: (row.pid, row.device, -row.total_ns, row.stream))


# Say why a report has no kernels: each way in which that happens has its own sentence.

CAUSES = (
    "known causes: collection that began later (--capture-range, nsys start) on Blackwell with "
    "some versions of nsys; the option CuptiUseRawGpuTimestamps of nsys's config.ini; no rights "
    "to GPU activities (a container, MIG, another profiler that holds CUPTI); a process that was "
    "killed before nsys had its buffers. Record again, with another version of nsys or with the "
    "torch profiler."
)
_NO_CUDA = (
    "record with --trace=cuda,nvtx, and start the server itself under nsys: processes that "
    "are there already are not traced."
)
_GRAPHS = "record with --cuda-graph-trace=node."


def unrecorded(tables: ReportTables, pids: Sequence[int] = ()) -> Unrecorded | None:
    """Why a report, or these processes of it, have no GPU activity.

    Calls of CUDA tell that there was some, graphs that were recorded as a whole as well. None
    for a report of a CPU server: NVTX ranges without launches. `certain` is False where a GPU
    may have been idle.
    """
    thread, name = tables.integers(f"{PREFIX}RUNTIME", ["globalTid", "nameId"])
    if pids:
        name = name[np.isin(pid_of(thread), list(pids))]
    launches = _launches(tables, name)
    if launches:
        return Unrecorded(counted(launches, "launch", "launches"), CAUSES)
    if pids:
        return None
    (graphs,) = tables.integers(f"{PREFIX}GRAPH_TRACE", ["start"])
    if len(graphs):
        return Unrecorded(
            counted(len(graphs), "launch", "launches") + " of whole CUDA graphs", _GRAPHS
        )
    (ranges,) = tables.integers("NVTX_EVENTS", ["start"])
    if len(ranges):
        return None
    if calls := len(name):
        return Unrecorded(counted(calls, "CUDA call", "CUDA calls"), CAUSES)
    return Unrecorded("recorded without CUDA, or while nothing ran", _NO_CUDA, certain=False)


def _launches(tables: ReportTables, names: Ints) -> int:
    """How many of the calls of these names start work on a GPU."""
    known = names[names != MISSING]
    if not len(known):
        return 0
    ids, at = coded(known)
    texts = tables.strings(int(number) for number in ids)
    starts = [bool(ANY_LAUNCH.match(texts.get(int(number), ""))) for number in ids]
    return int(np.array(starts)[at].sum())
