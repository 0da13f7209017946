"""`sglprof export --to perfetto`: traces of many ranks as one file for Perfetto."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from pytest_sglprof.cli.recorded import Recorded, read_table, recorded_by
from pytest_sglprof.errors import NotATrace, SettingsError, TraceError, TraceTruncated

if TYPE_CHECKING:
    from pytest_sglprof.settings import Settings
    from pytest_sglprof.trace.table import KernelTable

BATCH = 10_000  # events that are encoded at once
PROGRESS_S = 1.0  # between two lines of progress


def write_perfetto(args: argparse.Namespace, settings: Settings) -> None:
    """Writes the merged trace and a page that opens it, and says what they hold."""
    from pytest_sglprof.cli.output import refuse_foreign, refuse_inputs
    from pytest_sglprof.report.open_page import NAME, write_open_page
    from pytest_sglprof.trace.window_files import is_nsys, window_files

    if not args.output.name.endswith((".json", ".json.gz")):
        raise SettingsError(
            f"-o {args.output}: unknown kind of file",
            expected="a name that ends in .json.gz or .json",
            hint="for example -o merged.json.gz",
        )
    recorded = recorded_by(args)
    files = window_files(recorded.paths)
    reports = [file for file in files if is_nsys(file)]
    if reports and args.only != "kernels":
        raise TraceError(
            f"{reports[0]} is a report of nsys, whose events are no torch trace's",
            expected="torch traces (*.trace.json.gz), or --only kernels",
            hint="add --only kernels: it makes a file of any report's kernels",
        )
    refuse_inputs(args.output, [*files, *args.paths], which="to merge")
    refuse_foreign(args.output.parent / NAME, hint="write OUT into another folder, with its page")
    events, notes, ranks, gpu = (_kernels if args.only else _everything)(
        args, settings, replace(recorded, paths=tuple(files))
    )
    page = write_open_page(args.output, ranks, gpu=gpu)
    for rank, count in events.items():
        sys.stdout.write(f"{rank}: {count} events\n")
    sys.stdout.write(f"{args.output}\n{page}\n")
    for note in notes:
        sys.stderr.write(f"note: {note}\n")


Outcome = tuple[dict[str, int], Sequence[str], Sequence[str], bool]


def _everything(args: argparse.Namespace, settings: Settings, recorded: Recorded) -> Outcome:
    from pytest_sglprof.report.perfetto import streams_of, summary_events
    from pytest_sglprof.trace.merge_files import merge_files

    table, notes = _table(args, settings, recorded)
    merged = merge_files(
        recorded.paths,
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
    args: argparse.Namespace, settings: Settings, recorded: Recorded
) -> tuple[KernelTable | None, Sequence[str]]:
    """The kernel table for the summary; None, and why, when only that cannot be made."""
    try:
        table = read_table(recorded, args, settings)
    except (NotATrace, TraceTruncated):
        raise
    except TraceError as error:
        return None, [f"no summary rows: {error.what}"]
    return table, table.notes


def _kernels(args: argparse.Namespace, settings: Settings, recorded: Recorded) -> Outcome:
    import msgspec

    from pytest_sglprof.report.perfetto import kernel_events, summary_events
    from pytest_sglprof.trace.trace_writer import TraceWriter

    table = read_table(recorded, args, settings)
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
