"""`sglprof perfetto PATH… -o OUT`: traces of many ranks as one file for Perfetto."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pytest_sglprof.errors import NotATrace, SettingsError, TraceError, TraceTruncated

if TYPE_CHECKING:
    from pytest_sglprof.trace.table import KernelTable

BATCH = 10_000  # events that are encoded at once
PROGRESS_S = 1.0  # between two lines of progress


def add_parser(subparsers: Any) -> None:
    """Registers the command."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "perfetto",
        help="merge the traces of all ranks into one file for Perfetto",
        description="Every event of the traces, ranks labelled and sorted, summary rows of all "
        "ranks first, findings as instant events. Beside OUT an open.html is written that "
        "opens it in the Perfetto UI with the ranks' kernel rows pinned.",
    )
    parser.add_argument("paths", nargs="+", metavar="PATH")
    parser.add_argument(
        "-o", "--output", type=Path, required=True, metavar="OUT", help="*.json.gz or *.json"
    )
    parser.add_argument(
        "--only",
        choices=("kernels",),
        help="a small file: kernels, copies and summary rows; also for nsys reports",
    )
    parser.add_argument(
        "--allow-partial", action="store_true", help="take what a truncated trace still holds"
    )
    parser.add_argument("--nsys", metavar="NSYS", help="command that exports .nsys-rep")


def run(args: argparse.Namespace) -> int:
    """Writes both files and says what they hold; 0."""
    from pytest_sglprof.cli.output import refuse_foreign, refuse_inputs
    from pytest_sglprof.report.open_page import NAME, write_open_page
    from pytest_sglprof.trace.window_files import is_nsys, window_files

    if not args.output.name.endswith((".json", ".json.gz")):
        raise SettingsError(
            f"-o {args.output}: unknown kind of file",
            expected="a name that ends in .json.gz or .json",
            hint="for example -o merged.json.gz",
        )
    files = window_files(args.paths)
    reports = [file for file in files if is_nsys(file)]
    if reports and args.only != "kernels":
        raise TraceError(
            f"{reports[0]} is a report of nsys, whose events are no torch trace's",
            expected="torch traces (*.trace.json.gz), or --only kernels",
            hint="add --only kernels: it makes a file of any report's kernels",
        )
    refuse_inputs(args.output, [*files, *args.paths], which="to merge")
    refuse_foreign(args.output.parent / NAME, hint="write OUT into another folder, with its page")
    events, notes, ranks, gpu = (_kernels if args.only else _everything)(args, files)
    page = write_open_page(args.output, ranks, gpu=gpu)
    for rank, count in events.items():
        sys.stdout.write(f"{rank}: {count} events\n")
    sys.stdout.write(f"{args.output}\n{page}\n")
    for note in notes:
        sys.stderr.write(f"note: {note}\n")
    return 0


Outcome = tuple[dict[str, int], Sequence[str], Sequence[str], bool]


def _everything(args: argparse.Namespace, files: Sequence[Path]) -> Outcome:
    from pytest_sglprof.report.perfetto import streams_of, summary_events
    from pytest_sglprof.trace.merge_files import merge_files

    table, notes = _table(args, files)
    merged = merge_files(
        files,
        args.output,
        ranks=table.ranks if table is not None else (),
        streams=streams_of(table) if table is not None else {},
        extra=lambda base: summary_events(table, base) if table is not None else (),
        allow_partial=args.allow_partial,
        progress=_progress(),
    )
    ranks = tuple(merged.events)
    gpu = table is None or table.is_timeline
    return merged.events, (*notes, *merged.notes), ranks, gpu


def _table(
    args: argparse.Namespace, files: Sequence[Path]
) -> tuple[KernelTable | None, Sequence[str]]:
    """The kernel table for the summary; None, and why, when only that cannot be made."""
    from pytest_sglprof.trace.read import read_window

    try:
        table = read_window(files, allow_partial=args.allow_partial, nsys=args.nsys)
    except (NotATrace, TraceTruncated):
        raise
    except TraceError as error:
        return None, [f"no summary rows: {error.what}"]
    return table, table.notes


def _kernels(args: argparse.Namespace, files: Sequence[Path]) -> Outcome:
    import msgspec

    from pytest_sglprof.report.perfetto import kernel_events, summary_events
    from pytest_sglprof.trace.read import read_window
    from pytest_sglprof.trace.trace_writer import TraceWriter

    table = read_window(files, allow_partial=args.allow_partial, nsys=args.nsys)
    starts = table.frame["start_ns"]
    base = int(starts.min()) if len(starts) else 0
    counts = table.frame["rank"].value_counts()
    events = {rank: int(counts.get(rank, 0)) for rank in table.ranks}
    with TraceWriter(args.output, base_ns=base) as writer:
        for found in (summary_events(table, base), kernel_events(table, base)):
            for batch in _batches(found):
                writer.add(msgspec.json.encode(batch)[1:-1])
        writer.close({"sglprof": {"ranks": events, "notes": list(table.notes)}})
    return events, table.notes, table.ranks, table.is_timeline


def _batches(events: Iterator[Any]) -> Iterator[list[Any]]:
    from itertools import islice

    while batch := list(islice(events, BATCH)):
        yield batch


def _progress() -> Callable[[int, int], None] | None:
    """A line on the terminal, by bytes; none where nobody looks."""
    if not sys.stderr.isatty():
        return None
    last = 0.0

    def tell(done: int, total: int) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last >= PROGRESS_S or done == total:
            last = now
            end = "\n" if done == total else ""
            sys.stderr.write(f"\r{done / 1e6:.0f} of {total / 1e6:.0f} MB{end}")
            sys.stderr.flush()

    return tell
