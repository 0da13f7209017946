"""All torch traces of a window: large ones are scanned, in processes; small ones decoded.

Scanning looks at the GPU's events only: fast, flat in memory, and blind for defects of
everything else. Decoding reads every event and tells of each defect; a file below
`SCAN_BYTES` is decoded in no time. A large file that holds no GPU activity, or whose
layout cannot be scanned safely, is decoded too. Both give the same table.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import msgspec
import numpy as np
import numpy.typing as npt

from pytest_sglprof.trace.arrays import Ints
from pytest_sglprof.trace.collect import LAUNCHES, Wanted
from pytest_sglprof.trace.collective_calls import calls_of
from pytest_sglprof.trace.columns import Columns
from pytest_sglprof.trace.file_rank import rank_of_file, rank_of_pid
from pytest_sglprof.trace.gpu_steps import TraceSteps, projected
from pytest_sglprof.trace.impossible import excluded, impossible_rows, timelines
from pytest_sglprof.trace.interruptions import Call, interruption, with_interruptions
from pytest_sglprof.trace.kineto import KERNEL, KINDS, LAUNCH, Annotation, FileFacts
from pytest_sglprof.trace.pool import FileContent, read_here, read_in_processes
from pytest_sglprof.trace.steps import launch_times, with_graph_share
from pytest_sglprof.trace.table import RankActivities
from pytest_sglprof.trace.torch_trace import base_time, read_trace

SCAN_BYTES = 2 * 2**20  # stored bytes of a file

Progress = Callable[[int], None]
Jobs = Sequence[tuple[Path, Wanted]]
Reader = Callable[[Jobs, Progress | None], list[FileContent]]


def read_traces(
    files: Sequence[Path],
    *,
    allow_partial: bool = False,
    progress: Progress | None = None,
    processes: int = 1,
    sequences: bool = True,
) -> list[tuple[Path, RankActivities]]:
    """The activities of each rank in each file, in the order of `files`.

    progress: stored bytes read since its last call. processes: at most so many readers at
    once; 1 reads in this process. sequences: look for the numbers of collectives too.
    Raises `NotATrace`, `TraceTruncated` or `TraceError`, all naming the file.
    """
    sizes = {path: path.stat().st_size if path.exists() else 0 for path in files}
    large = [path for path in dict.fromkeys(files) if sizes[path] >= SCAN_BYTES]
    read = _reader(processes)
    wanted = Wanted(partial=allow_partial)
    contents = {c.path: c for c in read([(path, wanted) for path in large], progress)}
    again = [(path, _second_look(content, wanted, sequences)) for path, content in contents.items()]
    seconds = {c.path: c for c in read([(path, look) for path, look in again if look], None)}
    found: list[tuple[Path, RankActivities]] = []
    for path in files:
        content, second = contents.pop(path, None), seconds.pop(path, None)
        unsafe = [c.facts.unsafe for c in (content, second) if c is not None and c.facts.unsafe]
        if content is not None and not unsafe and len(content.columns):
            parts = _assembled(content, second)
        else:
            del content, second
            parts = _decoded(path, unsafe, allow_partial)
            if path not in large and progress is not None:
                progress(sizes[path])
        found += [(path, part) for part in parts]
    return found


def _decoded(path: Path, unsafe: Sequence[str], allow_partial: bool) -> list[RankActivities]:
    """Reads a file the exact way; unsafe: why it could not be scanned."""
    parts = read_trace(path, allow_partial=allow_partial)
    notes = [f"{path.name}: decoded as a whole, since {why}" for why in unsafe]
    return [replace(part, notes=[*part.notes, *notes]) for part in parts]


def _reader(processes: int) -> Reader:
    def read(jobs: Jobs, progress: Progress | None) -> list[FileContent]:
        workers = min(processes, len(jobs))
        if workers < 2:
            return [read_here(*job, progress) for job in jobs]
        return read_in_processes(jobs, workers, progress)

    return read


def _second_look(content: FileContent, wanted: Wanted, sequences: bool) -> Wanted | None:
    """What a file must be read for once more; None for nothing."""
    kinds: frozenset[int] = LAUNCHES if _needs_launches(content) else frozenset()
    calls = content.columns.calls
    sequences = sequences and calls is not None and bool((calls.sequence < 0).any())
    if not kinds and not sequences:
        return None
    return msgspec.structs.replace(wanted, kinds=kinds, sequences=sequences)


def _needs_launches(content: FileContent) -> bool:
    """Whether steps are known on the CPU, and the profiler did not project them."""
    cpu = [a for a in content.facts.annotations if not a.gpu]
    gpu = [a for a in content.facts.annotations if a.gpu]
    if not cpu or not len(content.columns):
        return False
    return not all(
        projected([a for a in cpu if a.owner == owner], [a for a in gpu if a.owner == owner])
        for owner in {a.owner for a in cpu}
    )


def _of(facts: FileFacts, owner: int) -> list[Annotation]:
    return [a for a in facts.annotations if a.owner == owner]


def _assembled(content: FileContent, second: FileContent | None) -> list[RankActivities]:
    facts, path = content.facts, content.path
    base, notes = base_time(path, facts.base.encode())
    if facts.truncated:
        notes.append(f"{path.name}: truncated; only what stands before its end was read")
    labels: dict[str, list[int]] = {}
    for number, pid in enumerate(facts.owners):
        label = rank_of_pid(pid.encode())
        if not label:
            label, contradiction = rank_of_file(path, facts.distributed.encode())
            notes += contradiction
        labels.setdefault(label, []).append(number)
    found = []
    for label, owners in labels.items():
        mine = content.columns
        if len(labels) > 1:
            mine = mine.take(np.isin(mine.owner, owners))
        steps = TraceSteps([a for owner in owners for a in _of(facts, owner)])
        told = [*notes, *(f"{label}: skipped {n} {what}" for n, what in _skipped(facts, owners))]
        known = _launches(second, label)
        calls = _interruptions(second, known)
        numbers = _sequences(second, label)
        found.append(_activities(label, facts, mine, steps, known, calls, base, told, numbers))
    content.columns = content.columns.take(np.zeros(0, np.int64))
    return found


def _skipped(facts: FileFacts, owners: Sequence[int]) -> list[tuple[int, str]]:
    """How much of what these owners lack."""
    sums: dict[str, int] = {}
    for (owner, what), count in facts.skipped.items():
        if owner in owners:
            sums[what] = sums.get(what, 0) + count
    return [(count, what) for what, count in sums.items()]


def _launches(launched: FileContent | None, label: str) -> Columns | None:
    if launched is None or not len(launched.columns):
        return None
    columns = launched.columns
    same = _owners(launched, label)
    if same:
        columns = columns.take(np.isin(columns.owner, same))
    return columns


def _owners(content: FileContent, label: str) -> list[int]:
    """Codes of a merged file's processes that are this rank; none in a rank's own file."""
    pids = content.facts.owners
    return [n for n, pid in enumerate(pids) if rank_of_pid(pid.encode()) == label]


def _sequences(second: FileContent | None, label: str) -> dict[int, int]:
    """External id -> number of a collective."""
    if second is None:
        return {}
    same = _owners(second, label)
    told = second.facts.sequences.items()
    return {external: n for (owner, external), n in told if owner in same or not same}


def _interruptions(launched: FileContent | None, launches: Columns | None) -> list[Call]:
    """Calls that compile or capture; none where the launches were not read."""
    if launched is None or launches is None:
        return []
    what = [interruption(name) for name in launched.facts.names]
    codes = [code for code, word in enumerate(what) if word]
    rows = np.flatnonzero(np.isin(launches.name, codes))
    pairs = zip(launches.start[rows].tolist(), launches.name[rows].tolist(), strict=True)
    return [(start, what[code]) for start, code in pairs]


def _activities(
    label: str,
    facts: FileFacts,
    mine: Columns,
    steps: TraceSteps,
    launches: Columns | None,
    calls: Sequence[Call],
    base: int,
    notes: list[str],
    sequences: Mapping[int, int],
) -> RankActivities:
    mine, excluded = _possible(label, mine)
    launched: Ints = np.full(len(mine), -1, np.int64)
    if launches is not None:
        launched = launch_times(launches.correlation, launches.start, mine.correlation)
    step = steps.of_gpu(mine.start, mine.stream, launched)
    entries = with_graph_share(steps.steps, step, mine.kind == KERNEL, mine.graph > 0)
    entries, told = with_interruptions(label, entries, calls)
    np.add(mine.start, base, out=mine.start)  # in place: it is the largest column
    return RankActivities(
        rank=label,
        names=facts.names,
        name_codes=mine.name,
        kinds=KINDS[:LAUNCH],
        kind_codes=mine.kind,
        start=mine.start,
        dur=mine.dur,
        stream=mine.stream,
        step=step,
        steps=[entry.shifted(base) for entry in entries],
        source="gpu",
        notes=[*notes, *excluded, *told],
        partial=facts.truncated,
        calls=calls_of(mine, facts.groups, sequences),
    )


def _possible(label: str, mine: Columns) -> tuple[Columns, list[str]]:
    """Sorted by device, stream and start, without durations that cannot be true."""
    where = timelines(mine.device, mine.stream)
    if not _ascends(where, mine.start):
        order = np.lexsort((-mine.dur, mine.start, where))
        mine, where = mine.take(order), where[order]
    bad = impossible_rows(mine.start, mine.dur, where, mine.graph > 0)
    if not bad.any():
        return mine, []
    return mine.take(~bad), [f"{label}: {excluded(mine.dur[bad])}"]


def _ascends(first: npt.NDArray[np.int64], second: npt.NDArray[np.int64]) -> bool:
    """Whether rows are ordered by `first`, then strictly by `second`."""
    later = np.diff(first) > 0
    return bool(np.all(later | ((np.diff(first) == 0) & (np.diff(second) > 0))))
