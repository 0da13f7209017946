"""Read all torch traces of a window: large files are scanned in processes, small ones decoded.

Scanning parses GPU events only: it is fast and needs little memory, but does not see defects
elsewhere in the file. Decoding parses every event and reports each defect. It is used for
files below `SCAN_BYTES`, for files without GPU activities, and for those whose layout cannot
be scanned safely. Both give the same table.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence, Set
from pathlib import Path
from typing import Any, Protocol

import msgspec
import numpy as np
import numpy.typing as npt

from pytest_sglprof._trace.completeness import (
    ANY_LAUNCH,
    CALLS,
    GRAPH_LAUNCH,
    KERNEL_LAUNCH,
    Unrecorded,
    counted,
)
from pytest_sglprof._trace.foreign import refuse_dialect
from pytest_sglprof._trace.paths import FileRanks, rank_of_pid
from pytest_sglprof._trace.steps import (
    Call,
    TraceSteps,
    excluded,
    impossible_rows,
    interruption,
    launch_times,
    self_times,
    timelines,
    with_graph_share,
    with_interruptions,
)
from pytest_sglprof._trace.table import (
    CPU_OPERATORS,
    GPU,
    Flags,
    Ints,
    Launches,
    RankActivities,
    calls_of,
    first_of,
)
from pytest_sglprof._trace.torch.collect import Collector, ScanRequest
from pytest_sglprof._trace.torch.events import (
    ANNOUNCEMENT,
    GPU_KINDS,
    KERNEL,
    KIND_OF_CATEGORY,
    KINDS,
    LAUNCH,
    OPERATOR,
    OTHER_DEVICES,
    Batch,
    Columns,
    FileFacts,
    FullEvent,
    ProcessName,
    base_time,
    joined,
    string_of,
    take_header,
)
from pytest_sglprof._trace.torch.pool import FileContent, read_here, read_in_processes
from pytest_sglprof._trace.torch.salvage import Document, read_whole

SCAN_BYTES = 2 * 2**20  # stored bytes of a file
POOL_BYTES = 8 * 2**20  # of all files; with less, starting processes costs more than it saves

Jobs = Sequence[tuple[Path, ScanRequest]]


def read_traces(
    files: Sequence[Path],
    *,
    file_ranks: Mapping[Path, str] | None = None,
    allow_partial: bool = False,
    processes: int | None = None,
    launches: bool = True,
    notes: Sequence[str] = (),
    among: Sequence[Path] = (),
) -> list[tuple[Path, RankActivities]]:
    """The activities of each rank in each file, in the order of `files`.

    file_ranks: label of each file for which one is given. notes: on files that were left out.
    among: all files of the window, if these are some of them.
    processes: how many processes read at most, this one included; by default one for each
    processor. launches: whether to read launches and the numbers of collectives, which
    only a comparison of ranks and the steps of some traces need.
    Raises `NotATrace`, `TraceTruncated` or `TraceError`, all naming the file.
    """
    file_rank = FileRanks(among or files, file_ranks or {})
    sizes = {path: path.stat().st_size if path.exists() else 0 for path in files}
    large = [path for path in dict.fromkeys(files) if sizes[path] >= SCAN_BYTES]
    total = sum(sizes[path] for path in files)
    readers = (processes or os.cpu_count() or 1) if total >= POOL_BYTES else 1
    kinds = GPU_KINDS | {LAUNCH} if launches else GPU_KINDS
    request = ScanRequest(partial=allow_partial, kinds=kinds, sequences=launches)
    contents = {c.path: c for c in _read([(path, request) for path in large], readers)}
    parts: list[tuple[Path, RankActivities]] = []
    for path in files:
        content = contents.pop(path, None)
        unsafe = content.facts.unsafe if content is not None else ""
        if content is None or unsafe or not bool((content.columns.kind == KERNEL).any()):
            content = None  # its memory is needed
            content = decode_file(path, allow_partial=allow_partial)
            if unsafe:
                content.facts.notes.append(f"{path.name}: decoded as a whole, since {unsafe}")
        content.facts.notes = [*notes, *content.facts.notes]
        parts += [(path, part) for part in _assembled(content, file_rank)]
    return parts


def _read(jobs: Jobs, processes: int) -> list[FileContent]:
    workers = min(processes, len(jobs))
    if workers < 2:
        return [read_here(*job) for job in jobs]
    return read_in_processes(jobs, workers)


def _assembled(content: FileContent, ranks: FileRanks) -> list[RankActivities]:
    """The activities of each rank. Empties the columns of `content`, to save memory."""
    facts, path = content.facts, content.path
    kind = content.columns.kind
    launches = FileContent(path, columns=content.columns.take(kind == LAUNCH), facts=facts)
    content.columns = content.columns.take(
        kind < LAUNCH if (kind < LAUNCH).any() else kind > LAUNCH
    )
    base, unclear = base_time(path, facts.base)
    notes = [*facts.notes, *unclear]
    if facts.truncated:
        notes.append(f"{path.name}: truncated; only what stands before its end was read")
    on_gpu = bool((content.columns.kind < LAUNCH).any())
    pids: dict[str, set[str]] = {}  # rank -> the ranks in its pids, "" for a pid without
    for pid in facts.owners:
        named = label = rank_of_pid(pid.encode())
        if not label:
            label, contradiction = ranks.of(path, facts.distributed.encode())
            notes += contradiction
        pids.setdefault(label, set()).add(named)
    parts = []
    for label, named_ranks in pids.items():
        part = _of_processes(content, named_ranks)
        calls = _of_processes(launches, named_ranks)
        parts.append(_activities(label, part, calls, base, notes, on_gpu=on_gpu))
    content.columns = content.columns.take(np.zeros(0, np.int64))
    return parts


def _of_processes(content: FileContent, named_ranks: Set[str]) -> FileContent:
    """The part of a merged file's content whose pids name one of these ranks."""
    facts = content.facts
    ranks = [rank_of_pid(pid.encode()) for pid in facts.owners]
    owners = {number for number, rank in enumerate(ranks) if rank in named_ranks}
    if len(owners) == len(ranks):
        return content
    return FileContent(
        content.path,
        columns=content.columns.take(np.isin(content.columns.owner, [*owners])),
        facts=msgspec.structs.replace(
            facts,
            annotations=[span for span in facts.annotations if span.owner in owners],
            sequences={key: n for key, n in facts.sequences.items() if key[0] in owners},
            skipped={key: n for key, n in facts.skipped.items() if key[0] in owners},
        ),
    )


def _interruptions(launches: FileContent) -> list[Call]:
    """Calls that compile or capture; empty if the launches were not read."""
    columns = launches.columns
    what = [interruption(name) for name in launches.facts.names]
    codes = [code for code, word in enumerate(what) if word]
    rows = np.flatnonzero(np.isin(columns.name, codes))
    pairs = zip(columns.start[rows].tolist(), columns.name[rows].tolist(), strict=True)
    return [(start, what[code]) for start, code in pairs]


def _activities(
    label: str,
    part: FileContent,
    launches: FileContent,
    base: int,
    notes: Sequence[str],
    *,
    on_gpu: bool,
) -> RankActivities:
    """The activities of one rank.

    on_gpu: whether any rank of the file has GPU activities; one without any was then idle.
    """
    facts, columns = part.facts, part.columns
    skipped: Counter[str] = Counter()
    for (_, what), count in facts.skipped.items():
        skipped[what] += count
    unusable = sum(count for what, count in skipped.items() if what.startswith("kernel "))
    missing = unrecorded(columns, facts, launches.columns, launches.facts.names)
    notes = [*notes, *(f"{label}: skipped {n} {what}" for what, n in skipped.items())]
    steps = TraceSteps(facts.annotations)
    entries = steps.steps
    if on_gpu:
        columns, impossible = _possible(label, columns)
        notes += impossible
        unusable += len(part.columns) - len(columns)
        known = launches.columns
        launched = launch_times(known.correlation, known.start, columns.correlation)
        step = steps.of_gpu(columns.start, columns.stream, launched)
        entries = with_graph_share(entries, step, columns.kind == KERNEL, columns.graph > 0)
        kinds, dur, stream = KINDS[:LAUNCH], columns.dur, columns.stream
    else:
        step = steps.of_time(columns.start)
        kinds, dur = KINDS[OPERATOR:], _cpu_times(columns)
        stream = np.full(len(columns), -1, np.int64)
    calls = _interruptions(launches)
    entries, interrupted = with_interruptions(label, entries, calls, steps.index_of_time)
    np.add(columns.start, base, out=columns.start)  # in place: it is the largest column
    names, name_codes = _used(facts.names, columns.name)
    numbers = {external: number for (_, external), number in facts.sequences.items()}
    return RankActivities(
        rank=label,
        names=names,
        name_codes=name_codes,
        kinds=kinds,
        kind_codes=columns.kind if on_gpu else columns.kind - OPERATOR,
        start=columns.start,
        dur=dur,
        stream=stream,
        step=step,
        steps=[entry.shifted(base) for entry in entries],
        source=GPU if on_gpu else CPU_OPERATORS,
        notes=[*notes, *interrupted],
        partial=facts.truncated,
        calls=calls_of(columns, facts, numbers),
        launches=launched_kernels(steps, launches, columns) if on_gpu else None,
        unusable=unusable,
        run=facts.run,
        recording=facts.recording if len(facts.owners) == 1 else "",
        unrecorded=missing,
        host=facts.host if len(facts.owners) == 1 else "",
    )


def launched_kernels(
    steps: TraceSteps, launches: FileContent, activities: Columns
) -> Launches | None:
    """What the calls of one rank launched and what of it was recorded.

    None without calls, or where the ids of calls and kernels have nothing in common.
    """
    columns, names = launches.columns, launches.facts.names
    codes = {word: [n for n, name in enumerate(names) if word.match(name)] for word in CALLS}
    is_graph = np.isin(columns.name, codes[GRAPH_LAUNCH])
    rows = np.flatnonzero(is_graph | np.isin(columns.name, codes[KERNEL_LAUNCH]))
    ids, first = np.unique(columns.correlation[rows], return_index=True)
    rows = rows[first[ids >= 0]]
    rows = rows[~captured(launches, columns.start[rows])]
    if not len(rows):
        return None
    start, ids = columns.start[rows], columns.correlation[rows]
    kernels = activities.correlation[activities.kind == KERNEL]
    known, counts = np.unique(kernels, return_counts=True)
    at = first_of(known, ids)
    recorded = np.where(at >= 0, counts[at], 0) if len(known) else np.zeros(len(ids), np.int64)
    if len(known) and not recorded.any():
        return None
    unknown = np.zeros(len(start), np.int64)
    return Launches(steps.index_of_time(start), start, recorded, is_graph[rows], unknown)


def captured(launches: FileContent, times: Ints) -> Flags:
    """Which launches only built a graph: those between the begin and the end of a capture."""
    columns, names = launches.columns, launches.facts.names
    edges = (
        [n for n, name in enumerate(names) if re.match(rf"(cuda|cu|hip)Stream{word}Capture", name)]
        for word in ("Begin", "End")
    )
    begins, ends = (np.sort(columns.start[np.isin(columns.name, codes)]) for codes in edges)
    inside: Flags = np.searchsorted(begins, times) > np.searchsorted(ends, times)
    return inside


def _used(names: Sequence[str], codes: npt.NDArray[Any]) -> tuple[Sequence[str], npt.NDArray[Any]]:
    """The names that occur in `codes`, and the codes renumbered: other events have names too."""
    used = np.zeros(len(names), bool)
    used[codes] = True
    if used.all():
        return names, codes
    place = (np.cumsum(used) - 1).astype(codes.dtype)
    return [name for name, is_used in zip(names, used, strict=True) if is_used], place[codes]


def _cpu_times(columns: Columns) -> Ints:
    """Self time of operators, whole time of collectives; ns."""
    dur = columns.dur.astype(np.int64)
    nests = columns.kind == OPERATOR
    thread = columns.stream[nests].astype(np.int64)
    dur[nests] = self_times(columns.start[nests], dur[nests], thread)
    return dur


def _possible(label: str, columns: Columns) -> tuple[Columns, list[str]]:
    """The rows with possible durations, sorted by device, context, stream and start; and a note."""
    where = timelines(columns.device, columns.context, columns.stream)
    if not _ascends(where, columns.start):
        order = np.lexsort((columns.start, where))
        if not _ascends(where[order], columns.start[order]):  # of equal starts the longest first
            order = np.lexsort((-columns.dur, columns.start, where))
        columns, where = columns.take(order), where[order]
    bad = impossible_rows(columns.start, columns.dur, where, columns.graph > 0)
    if not bad.any():
        return columns, []
    return columns.take(~bad), [f"{label}: {excluded(columns.dur[bad])}"]


def _ascends(first: npt.NDArray[np.int64], second: npt.NDArray[np.int64]) -> bool:
    """Whether rows are ordered by `first`, then strictly by `second`."""
    later = np.diff(first) > 0
    return bool(np.all(later | ((np.diff(first) == 0) & (np.diff(second) > 0))))


# Decode a whole trace: every event is parsed, every defect reported.
#
# Times are converted to integer ns from the text of the file; floats are never summed.

_CATEGORIES = {name.lower(): name for name in KIND_OF_CATEGORY}
_EVERYTHING = frozenset(range(len(KINDS)))


class _Event(msgspec.Struct, gc=False):
    ph: str | None = ""
    cat: str | None = ""
    name: str | int | float | bool | None = ""
    ts: msgspec.Raw = msgspec.Raw(b"")
    dur: msgspec.Raw = msgspec.Raw(b"")
    pid: msgspec.Raw = msgspec.Raw(b"")
    tid: msgspec.Raw = msgspec.Raw(b"")
    args: msgspec.Raw = msgspec.Raw(b"")


_DOCUMENT = msgspec.json.Decoder(Document[_Event] | list[_Event])


def decode_file(path: Path, *, allow_partial: bool = False) -> FileContent:
    """All activities, launches and operators of a file, by decoding all of it.

    Raises `NotATrace`, `TraceTruncated` or `TraceError`, all naming the file.
    """
    trace = read_whole(path, _DOCUMENT, allow_partial=allow_partial)
    batches: list[Batch] = []
    collector = Collector(ScanRequest(kinds=_EVERYTHING), batches.append)
    pids: dict[bytes, str | None] = {}
    categories: Counter[str] = Counter()
    for event in trace.events:
        raw = bytes(event.pid)
        if raw not in pids:
            pids[raw] = _merged_pid(raw)
            if rank_of_pid(raw):  # lists a rank of a merged file even if it has no activities
                collector.add_process(ProcessName(pids[raw]))
        if event.ph != "X":
            continue
        lowered = (event.cat or "").lower()
        categories[lowered] += 1
        category = _CATEGORIES.get(lowered)
        if category is not None:
            _add(collector, event, category, pids[raw])
    facts = collector.finish()
    take_header(trace.header, facts)
    facts.truncated = trace.truncated
    if not trace.valid:
        facts.notes.append(
            f"{path.name}: invalid JSON; {trace.skipped} events that cannot be read were skipped"
        )
    columns = joined(batches)
    if not (columns.kind < LAUNCH).any():
        refuse_other_programs(path, trace.events, categories)
        facts.elsewhere = {name: n for name, n in categories.items() if name in OTHER_DEVICES}
    return FileContent(path, columns=columns, facts=facts)


def _merged_pid(raw: bytes) -> str | None:
    """A process id that is a string, as in merged files; None for any other."""
    return string_of(raw) if raw.startswith(b'"') else None


def _add(collector: Collector, event: _Event, category: str, pid: str | None) -> None:
    full = FullEvent(
        name=str(event.name),
        ts=event.ts,
        args=event.args,
        dur=event.dur,
        cat=category,
        ph="X",
        pid=pid,
        tid=bytes(event.tid).decode("ascii", "replace").strip('"'),
    )
    collector.add_full(full)
    if full.name == ANNOUNCEMENT:
        collector.add_announced(full)


# What shows that a trace without kernels is not one of a CPU, and not one of torch at all.

SAMPLE = 2_000  # events whose names and arguments are searched for those of other programs

CAUSES = (
    "the profiler did not get the GPU's activities: CUPTI failed to attach (look for CUPTI in "
    "the server's log: another profiler such as nsys, ncu or DCGM holds it, no rights to GPU "
    "counters, a CUPTI that does not fit the driver), or only activities of the CPU were asked "
    "for. Record the window again, or with nsys."
)
_NAMED = " If this server runs on its CPU, hide the GPUs from it: CUDA_VISIBLE_DEVICES=''."
_NOT_READ = (
    "sglprof reads kernels, copies and sets of the categories kernel, gpu_memcpy and gpu_memset, "
    "which Kineto writes for NVIDIA, AMD, Intel and PrivateUse1 devices."
)
# Of categories that are not looked at otherwise; lower case.
_OTHERS = frozenset(
    {
        *("python_function", "trace", "overhead", "ac2g", "fwdbwd", "cpu_instant_event"),
        *("cuda_sync", "cuda_event", "cuda_profiler_range", "collective_comm"),
        *("external_correlation", "glow_runtime"),
    }
)
TORCH_CATEGORIES = _OTHERS | {name.lower() for name in KIND_OF_CATEGORY} | OTHER_DEVICES.keys()


class EventText(Protocol):
    """What is looked at of an event, whichever way it was decoded."""

    ph: Any
    cat: Any
    name: Any
    args: Any


def refuse_other_programs(
    path: Path, events: Sequence[EventText], categories: Counter[str]
) -> None:
    """Raises `NotATrace` for a file of another program. categories: of its spans, lower case."""
    texts = [b"%b %b" % (str(e.name).encode(), bytes(e.args)) for e in _telling(events)]
    is_torch = not TORCH_CATEGORIES.isdisjoint(categories)
    refuse_dialect(path, texts, is_torch=is_torch, count=categories.total())


def _telling(events: Sequence[EventText]) -> Iterable[EventText]:
    """Events that name processes, and the first ones."""
    yield from events[:SAMPLE]
    yield from (event for event in events[SAMPLE:] if event.name == "process_name")


def unrecorded(
    columns: Columns, facts: FileFacts, launches: Columns, names: Sequence[str]
) -> Unrecorded | None:
    """Why a rank's kernels are missing; None where it has some, or where it ran on a CPU.

    columns, facts: its activities. launches: its calls of the runtime; names: what they are
    called.
    """
    if (columns.kind == KERNEL).any():
        return None
    calls = [code for code, name in enumerate(names) if ANY_LAUNCH.match(name)]
    rows = (launches.kind == LAUNCH) & np.isin(launches.name, calls)
    if count := int(rows.sum()):
        return Unrecorded(counted(count, "launch", "launches"), CAUSES)
    if facts.elsewhere:
        pairs = [f"{count} {category}" for category, count in facts.elsewhere.items()]
        device = OTHER_DEVICES[next(iter(facts.elsewhere))]
        return Unrecorded(f"events of {device} ({', '.join(pairs)})", _NOT_READ)
    if spans := sum(span.gpu for span in facts.annotations):
        return Unrecorded(counted(spans, "span on the GPU", "spans on the GPU"), CAUSES)
    if facts.devices and (columns.kind > LAUNCH).any():
        return Unrecorded(counted(facts.devices, "GPU", "GPUs"), CAUSES + _NAMED, certain=False)
    return None
