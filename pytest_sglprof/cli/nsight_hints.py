"""`sglprof nsight-hints PATH…`: which rows to pin in Nsight Systems, and how."""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict
from typing import Any

from pytest_sglprof.cli.formats import Column, add_format_option, render
from pytest_sglprof.errors import NotATrace

HOW = """\
To pin them: open the report in Nsight Systems, unfold each row's path in the timeline,
right-click the stream's name and choose "Pin row" (or click the pin beside the name).
Pinned rows stay on top in the order in which they were pinned: take the streams of the same
place of all ranks one after the other.
"""


def add_parser(subparsers: Any) -> None:
    """Registers the command."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "nsight-hints",
        help="which rows to pin in Nsight Systems to see the ranks' kernels",
        description="The streams with kernels of every process in nsys reports: the rows to "
        "pin so that the ranks stand under each other.",
    )
    parser.add_argument("paths", nargs="+", metavar="PATH", help="a report, an export, a folder")
    parser.add_argument(
        "--rank",
        action="append",
        default=[],
        type=_pair,
        metavar="PID=LABEL",
        help="the rank of a process, for example --rank 31205=TP0 (a report does not know it)",
    )
    parser.add_argument("--nsys", metavar="NSYS", help="command that exports .nsys-rep")
    add_format_option(parser)


def run(args: argparse.Namespace) -> int:
    """Prints the rows; 0."""
    from pytest_sglprof.trace.nsys_rows import stream_rows
    from pytest_sglprof.trace.window_files import is_nsys, window_files

    files = window_files(args.paths)
    traces = [file for file in files if not is_nsys(file)]
    if traces:
        raise NotATrace(
            f"{traces[0]} is a torch trace, which Nsight Systems does not open",
            expected="*.nsys-rep, *.sqlite or a folder of them",
            hint="for torch traces: sglprof perfetto, whose open.html pins the rows itself",
        )
    records: list[dict[str, Any]] = []
    notes: list[str] = []
    for file in files:
        for row in stream_rows(file, pid_ranks=dict(args.rank), nsys=args.nsys, notes=notes):
            record = {"file": file.name, **asdict(row)}
            records.append({**record, "row": _row(row.pid, row.device, row.stream)})
    columns: tuple[Column, ...] = (
        Column("rank", left=True),
        Column("row", "row in the timeline", left=True),
        Column("kernels"),
        Column("total_ns", "total ms", _milliseconds),
        Column("file", left=True),
    )
    if args.format != "table":
        keys = ("file", "rank", "pid", "device", "stream", "kernels", "total_ns", "row")
        columns = tuple(Column(key) for key in keys)
    sys.stdout.write(render(records, columns, args.format))
    if args.format == "table" and records:
        sys.stdout.write(f"\n{HOW}")
    if not records:
        notes.append(f"no kernels in {', '.join(path.name for path in files)}")
    sys.stderr.write("".join(f"note: {note}\n" for note in dict.fromkeys(notes)))
    return 0


def _row(pid: int, device: int, stream: int) -> str:
    return f"Processes > [{pid}] > CUDA HW (device {device}) > Stream {stream}"


def _pair(text: str) -> tuple[int, str]:
    pid, _, label = text.partition("=")
    if not pid.isdigit() or not label:
        raise argparse.ArgumentTypeError("must be PID=LABEL, for example 31205=TP0")
    return int(pid), label


def _milliseconds(ns: Any) -> str:
    return f"{int(ns) / 1e6:.3f}"
