"""Read all torch traces of a window: large files are scanned in processes, small ones decoded.

Scanning parses GPU events only: it is fast and needs little memory, but does not see defects
elsewhere in the file. Decoding parses every event and reports each defect. It is used for
files below `SCAN_BYTES`, for files without GPU activities, and for those whose layout cannot
be scanned safely. Both give the same table.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence, Set
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from pytest_sglprof._trace.paths import rank_of_file, rank_of_pid
from pytest_sglprof._trace.steps import (
    Call,
    TraceSteps,
    excluded,
    impossible_rows,
    interruption,
    launch_times,
    projected,
    self_times,
    timelines,
    with_graph_share,
    with_interruptions,
)
from pytest_sglprof._trace.table import (
    CPU_OPERATORS,
    GPU,
    Ints,
    RankActivities,
    calls_of,
)
from pytest_sglprof._trace.times import base_time
from pytest_sglprof._trace.torch.absence import refuse_other_programs, unrecorded
from pytest_sglprof._trace.torch.collect import Collector, ScanRequest
from pytest_sglprof._trace.torch.events import (
    ANNOUNCEMENT,
    KERNEL,
    KIND_OF_CATEGORY,
    KINDS,
    LAUNCH,
    OPERATOR,
    OTHER_DEVICES,
    Batch,
    Columns,
    FullEvent,
    ProcessName,
    joined,
)
from pytest_sglprof._trace.torch.pool import FileContent, read_here, read_in_processes
from pytest_sglprof._trace.torch.salvage import Document, read_whole

SCAN_BYTES = 2 * 2**20  # stored bytes of a file
POOL_BYTES = 8 * 2**20  # of all files; with less, starting processes costs more than it saves

Jobs = Sequence[tuple[Path, ScanRequest]]


def read_traces(
    files: Sequence[Path],
    *,
    allow_partial: bool = False,
    processes: int | None = None,
    sequences: bool = True,
) -> list[tuple[Path, RankActivities]]:
    """The activities of each rank in each file, in the order of `files`.

    processes: the maximum number of reader processes, by default one for each processor; 1
    reads in this process. sequences: whether to read the numbers of collectives.
    Raises `NotATrace`, `TraceTruncated` or `TraceError`, all naming the file.
    """
    sizes = {path: path.stat().st_size if path.exists() else 0 for path in files}
    large = [path for path in dict.fromkeys(files) if sizes[path] >= SCAN_BYTES]
    total = sum(sizes[path] for path in files)
    readers = (processes or os.cpu_count() or 1) if total >= POOL_BYTES else 1
    request = ScanRequest(partial=allow_partial)
    contents = {c.path: c for c in _read([(path, request) for path in large], readers)}
    again = [
        (path, _second_look(content, request, sequences)) for path, content in contents.items()
    ]
    seconds = {c.path: c for c in _read([(path, look) for path, look in again if look], readers)}
    parts: list[tuple[Path, RankActivities]] = []
    for path in files:
        content, second = contents.pop(path, None), seconds.pop(path, None)
        unsafe = [c.facts.unsafe for c in (content, second) if c is not None and c.facts.unsafe]
        if content is None or unsafe or not len(content.columns):
            content = second = None  # their memory is needed
            content, second = decode_file(path, allow_partial=allow_partial)
            whys = [f"{path.name}: decoded as a whole, since {why}" for why in unsafe]
            content.facts.notes += whys
        parts += [(path, part) for part in _assembled(content, second)]
    return parts


def _read(jobs: Jobs, processes: int) -> list[FileContent]:
    workers = min(processes, len(jobs))
    if workers < 2:
        return [read_here(*job) for job in jobs]
    return read_in_processes(jobs, workers)


def _second_look(content: FileContent, request: ScanRequest, sequences: bool) -> ScanRequest | None:
    """What a second scan of the file must read; None if it is not needed."""
    kinds = frozenset({LAUNCH} if _needs_launches(content) else ())
    calls = content.columns.calls
    sequences = sequences and calls is not None and bool((calls.sequence < 0).any())
    if not kinds and not sequences:
        return None
    return msgspec.structs.replace(request, kinds=kinds, sequences=sequences)


def _needs_launches(content: FileContent) -> bool:
    """Whether launches tell something: of which step a kernel is, or that kernels are missing.

    The former where steps on the CPU were not projected onto the GPU by the profiler.
    """
    if len(content.columns) and _ranks_without_kernels(content):
        return True
    cpu = [a for a in content.facts.annotations if not a.gpu]
    gpu = [a for a in content.facts.annotations if a.gpu]
    if not cpu or not len(content.columns):
        return False
    return not all(
        projected([a for a in cpu if a.owner == owner], [a for a in gpu if a.owner == owner])
        for owner in {a.owner for a in cpu}
    )


def _ranks_without_kernels(content: FileContent) -> set[str]:
    """Of a merged file the ranks, of any other one "" for its only rank."""
    ranks = [rank_of_pid(pid.encode()) for pid in content.facts.owners]
    columns = content.columns
    return set(ranks) - {ranks[code] for code in np.unique(columns.owner[columns.kind == KERNEL])}


def _assembled(content: FileContent, second: FileContent | None) -> list[RankActivities]:
    """The activities of each rank. Empties the columns of `content`, to save memory."""
    facts, path = content.facts, content.path
    base, unclear = base_time(path, facts.base)
    notes = [*facts.notes, *unclear]
    if facts.truncated:
        notes.append(f"{path.name}: truncated; only what stands before its end was read")
    on_gpu = bool((content.columns.kind < LAUNCH).any())
    pids: dict[str, set[str]] = {}  # rank -> the ranks in its pids, "" for a pid without
    for pid in facts.owners:
        named = label = rank_of_pid(pid.encode())
        if not label:
            label, contradiction = rank_of_file(path, facts.distributed.encode())
            notes += contradiction
        pids.setdefault(label, set()).add(named)
    parts = []
    for label, named_ranks in pids.items():
        part = _of_processes(content, named_ranks)
        launches = FileContent(path) if second is None else _of_processes(second, named_ranks)
        parts.append(_activities(label, part, launches, base, notes, on_gpu=on_gpu))
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
    missing = unrecorded(columns, facts, launches.columns, launches.facts.names)
    notes = [*notes, *(f"{label}: skipped {n} {what}" for what, n in skipped.items())]
    steps = TraceSteps(facts.annotations)
    entries = steps.steps
    if on_gpu:
        columns, impossible = _possible(label, columns)
        notes += impossible
        known = launches.columns
        launched = launch_times(known.correlation, known.start, columns.correlation)
        step = steps.of_gpu(columns.start, columns.stream, launched)
        entries = with_graph_share(entries, step, columns.kind == KERNEL, columns.graph > 0)
        kinds, dur, stream = KINDS[:LAUNCH], columns.dur, columns.stream
    else:
        step = steps.of_time(columns.start)
        kinds, dur = KINDS[OPERATOR:], _cpu_times(columns)
        stream = np.full(len(columns), -1, np.int64)
    entries, interrupted = with_interruptions(label, entries, _interruptions(launches))
    np.add(columns.start, base, out=columns.start)  # in place: it is the largest column
    names, name_codes = _used(facts.names, columns.name)
    sequences = {external: number for (_, external), number in launches.facts.sequences.items()}
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
        calls=calls_of(columns, facts.groups, sequences),
        unrecorded=missing,
    )


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
    """The rows with possible durations, sorted by device, stream and start; and a note."""
    where = timelines(columns.device, columns.stream)
    if not _ascends(where, columns.start):
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
_DEVICES = msgspec.json.Decoder(list[msgspec.Raw])


def decode_file(path: Path, *, allow_partial: bool = False) -> tuple[FileContent, FileContent]:
    """The activities and the launches of a file, as from two scans, by decoding all of it.

    The activities are those of the GPU; in a file without any, operators and collectives of
    the CPU. Raises `NotATrace`, `TraceTruncated` or `TraceError`, all naming the file.
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
    facts.base, facts.distributed = trace.base, trace.distributed
    facts.truncated = trace.truncated
    if not trace.valid:
        facts.notes.append(
            f"{path.name}: invalid JSON; {trace.skipped} events that cannot be read were skipped"
        )
    columns = joined(batches)
    on_gpu = columns.kind < LAUNCH
    if not on_gpu.any():
        refuse_other_programs(path, trace.events, categories)
        facts.devices = _count_devices(trace.devices)
        facts.elsewhere = {name: n for name, n in categories.items() if name in OTHER_DEVICES}
    activities = columns.take(on_gpu if on_gpu.any() else columns.kind > LAUNCH)
    launches = columns.take(columns.kind == LAUNCH)
    return (
        FileContent(path, columns=activities, facts=facts),
        FileContent(path, columns=launches, facts=facts),
    )


def _count_devices(text: str) -> int:
    try:
        return len(_DEVICES.decode(text.encode())) if text else 0
    except msgspec.DecodeError:  # null, or no list
        return 0


def _merged_pid(raw: bytes) -> str | None:
    """A process id that is a string, as in merged files; None for any other."""
    return str(msgspec.json.decode(raw)) if raw.startswith(b'"') else None


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
