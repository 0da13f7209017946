"""`sglprof export --to nsight`: which rows to pin in Nsight Systems, and how."""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict
from typing import Any

from pytest_sglprof.cli.formats import Column, milliseconds, render, write_text
from pytest_sglprof.cli.recorded import recorded_by
from pytest_sglprof.errors import NotATrace
from pytest_sglprof.settings import Settings

HOW = """\
To pin them: open the report in Nsight Systems, unfold each row's path in the timeline,
right-click the stream's name and choose "Pin row" (or click the pin beside the name).
Pinned rows stay on top in the order in which they were pinned: take the streams of the same
place of all ranks one after the other.
"""


def write_hints(args: argparse.Namespace, settings: Settings) -> None:
    """Prints the rows, or writes them to `args.output`."""
    from pytest_sglprof.trace.nsys_rows import stream_rows
    from pytest_sglprof.trace.window_files import is_nsys, window_files

    recorded = recorded_by(args)
    files = window_files(recorded.paths)
    recorded_ranks = recorded.window.pid_ranks if recorded.window else {}
    known = {int(pid): rank for pid, rank in recorded_ranks.items()}
    pid_ranks = {**known, **dict(args.rank)}
    nsys = settings.nsys or None
    traces = [file for file in files if not is_nsys(file)]
    if traces:
        raise NotATrace(
            f"{traces[0]} is a torch trace, which Nsight Systems does not open",
            expected="*.nsys-rep, *.sqlite or a folder of them",
            hint="for torch traces: sglprof export --to perfetto, whose open.html pins the rows",
        )
    records: list[dict[str, Any]] = []
    notes: list[str] = []
    for file in files:
        for row in stream_rows(file, pid_ranks=pid_ranks, nsys=nsys, notes=notes):
            record = {"file": file.name, **asdict(row)}
            records.append({**record, "row": _row(row.pid, row.device, row.stream)})
    columns: tuple[Column, ...] = (
        Column("rank", left=True),
        Column("row", "row in the timeline", left=True),
        Column("kernels"),
        Column("total_ns", "total ms", milliseconds),
        Column("file", left=True),
    )
    if args.format != "table":
        keys = ("file", "rank", "pid", "device", "stream", "kernels", "total_ns", "row")
        columns = tuple(Column(key) for key in keys)
    how = f"\n{HOW}" if args.format == "table" and records else ""
    write_text(render(records, columns, args.format) + how, args.output, [*files, *args.paths])
    if not records:
        notes.append(f"no kernels in {', '.join(path.name for path in files)}")
    sys.stderr.write("".join(f"note: {note}\n" for note in dict.fromkeys(notes)))


def _row(pid: int, device: int, stream: int) -> str:
    return f"Processes > [{pid}] > CUDA HW (device {device}) > Stream {stream}"
