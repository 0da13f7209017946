"""Kineto traces of the torch profiler, read whole: every event is decoded, every defect told.

Times are converted to integer ns from the text of the file; floats are never summed. A file
is used only when its end was reached and every checksum was right, unless `allow_partial`.
"""

from __future__ import annotations

from pathlib import Path

import msgspec

from pytest_sglprof.trace.collect import Collector, ScanRequest
from pytest_sglprof.trace.columns import joined
from pytest_sglprof.trace.file_rank import rank_of_pid
from pytest_sglprof.trace.kineto import (
    ANNOUNCEMENT,
    KIND_OF_CATEGORY,
    KINDS,
    LAUNCH,
    Batch,
    FullEvent,
    ProcessName,
)
from pytest_sglprof.trace.pool import FileContent
from pytest_sglprof.trace.salvage import Document, read_whole

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


_DOCUMENT = msgspec.json.Decoder(Document[_Event])


def decode_file(path: Path, *, allow_partial: bool = False) -> tuple[FileContent, FileContent]:
    """What scanning a file gives, by decoding all of it: its activities, and its launches.

    The activities are the GPU's, or of a file without any those of the CPU: operators and
    collectives. Raises `NotATrace`, `TraceTruncated` or `TraceError`, all naming the file.
    """
    trace = read_whole(path, _DOCUMENT, allow_partial=allow_partial)
    batches: list[Batch] = []
    collector = Collector(ScanRequest(kinds=_EVERYTHING), batches.append)
    pids: dict[bytes, str | None] = {}
    for event in trace.events:
        raw = bytes(event.pid)
        if raw not in pids:
            pids[raw] = _merged_pid(raw)
            if rank_of_pid(raw):  # a rank of a merged file, even when it did nothing
                collector.add_process(ProcessName(pids[raw]))
        category = _CATEGORIES.get((event.cat or "").lower())
        if event.ph == "X" and category is not None:
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
    activities = columns.take(on_gpu if on_gpu.any() else columns.kind > LAUNCH)
    launches = columns.take(columns.kind == LAUNCH)
    return (
        FileContent(path, columns=activities, facts=facts),
        FileContent(path, columns=launches, facts=facts),
    )


def _merged_pid(raw: bytes) -> str | None:
    """A process id that is a text, as those of merged files are; None for any other."""
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
