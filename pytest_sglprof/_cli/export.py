"""`sglprof export PATH… --to KIND`: files for Perfetto and Nsight Systems, and pictures."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

from pytest_sglprof._cli.inputs import Recorded, inputs_of, recorded_by
from pytest_sglprof._cli.options import (
    PATHS,
    Column,
    NewParser,
    input_options,
    milliseconds,
    ordered,
    output_options,
    read_table,
    render,
    settings_of,
    settings_options,
    table_options,
    write_notes,
    write_text,
)
from pytest_sglprof._config.load import Settings
from pytest_sglprof._errors import (
    ExitStatus,
    NoKernels,
    NotATrace,
    SettingsError,
    SglprofError,
    TraceError,
    TraceTruncated,
)

if TYPE_CHECKING:
    from pytest_sglprof._run.measure import WindowFiles
    from pytest_sglprof._trace.table import KernelTable


ROW_KEYS = ("rank", "pid", "device", "stream", "kernels", "total_ns", "file")
KINDS = ("perfetto", "nsight", "svg", "png")


def add_parser(new_parser: NewParser) -> None:
    """Adds the options of the command."""
    parser = new_parser(
        description="perfetto: merges the torch traces of all ranks into one file (*.json.gz or "
        "*.json) with sorted ranks, summary rows on top and findings as instant events, and "
        "writes a page beside it (NAME.open.html) that shows it in the Perfetto UI with the kernel "
        "rows of all ranks pinned. nsight: lists the streams with kernels in nsys reports, which "
        "are the rows to pin in Nsight Systems. svg, png: draws a heat map of one "
        "window of a run, the worst unless --window is given: the busy time of each rank in each "
        "category, divided by the mean of the ranks that get the same input.",
        epilog="exit status: 0 written, 2 wrong usage, unreadable input or unwritable output",
        parents=[
            input_options(PATHS),
            output_options("file to write; only nsight prints without it", "nsight: "),
            table_options(ROW_KEYS, "rows of nsight"),
            settings_options(),
        ],
    )
    parser.add_argument("--to", choices=KINDS, required=True, help="what to write")
    parser.add_argument(
        "--only",
        choices=("kernels",),
        help="perfetto: a small file with only kernels, copies and summary rows, also from nsys "
        "reports; of a window around an onset, with those before and after it, each from time 0",
    )
    parser.set_defaults(exit_zero=True)


def run(args: argparse.Namespace) -> ExitStatus:
    """Writes what `--to` says."""
    if args.output is None and args.to != "nsight":
        raise SettingsError(
            f"--to {args.to} without -o",
            expected="-o FILE",
            hint="for example -o merged.json.gz" if args.to == "perfetto" else f"-o heat.{args.to}",
        )
    if args.to in ("svg", "png"):
        write_picture(args)
    elif args.to == "nsight":
        write_hints(args)
    else:
        write_perfetto(args)
    return ExitStatus.DONE


# --to perfetto.

BATCH = 10_000  # events that are encoded at once
PROGRESS_S = 1.0  # between two lines of progress
AROUND = ("before", "at", "after")  # an onset


def write_perfetto(args: argparse.Namespace) -> None:
    """Writes the merged trace and a page that opens it, and prints how many events they hold."""
    from pytest_sglprof._cli.options import refuse_foreign, refuse_inputs
    from pytest_sglprof._report.perfetto import open_page_of, write_open_page
    from pytest_sglprof._trace.paths import is_nsys, is_reduced, window_files

    if not args.output.name.endswith((".json", ".json.gz")):
        raise SettingsError(
            f"-o {args.output}: unknown file type",
            expected="a name that ends in .json.gz or .json",
            hint="for example -o merged.json.gz",
        )
    recorded = recorded_by(args)
    settings = settings_of(args, recorded.inputs.places)
    files = window_files(recorded.files.paths)
    reports = [file for file in files if is_nsys(file) or is_reduced(file)]
    if reports and args.only != "kernels":
        is_of_nsys = is_nsys(reports[0])
        raise TraceError(
            f"{reports[0]} is {'an nsys report' if is_of_nsys else 'reduced'}, not a torch trace",
            expected="torch traces (*.trace.json.gz), or --only kernels",
            hint="add --only kernels, which also takes nsys reports",
        )
    refuse_inputs(args.output, [*files, *recorded.inputs.recorded], which="to merge")
    refuse_foreign(open_page_of(args.output), hint="choose another name or folder with -o")
    whole = replace(recorded.files, paths=tuple(files))
    if args.only:
        outcome = _kernels(args, settings, _around(args, recorded) or {"": whole})
    else:
        outcome = _everything(args, settings, whole)
    events, notes, ranks, gpu = outcome
    page = write_open_page(args.output, ranks, gpu=gpu)
    for rank, count in events.items():
        sys.stdout.write(f"{rank}: {count} events\n")
    sys.stdout.write(f"{args.output}\n{page}\n")
    write_notes(notes)


# Events of each rank, notes, ranks with kernel rows, and whether these are those of a GPU.
Outcome = tuple[dict[str, int], Sequence[str], Sequence[str], bool]


def _everything(args: argparse.Namespace, settings: Settings, recorded: WindowFiles) -> Outcome:
    from pytest_sglprof._report.perfetto import streams_of, summary_events
    from pytest_sglprof._trace.merge.files import merge_files
    from pytest_sglprof._trace.paths import given_labels

    table, notes = _table(args, settings, recorded)
    merged = merge_files(
        recorded.paths,
        args.output,
        file_ranks=given_labels(recorded.paths, recorded.file_ranks),
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
    args: argparse.Namespace, settings: Settings, recorded: WindowFiles
) -> tuple[KernelTable | None, Sequence[str]]:
    """The kernel table for the summary rows, and notes; None if only the summary is impossible."""
    try:
        table = read_table(recorded, args, settings)
    except (NotATrace, NoKernels, TraceTruncated):
        raise
    except TraceError as error:
        return None, [f"no summary rows: {error.what}"]
    return table, table.notes


def _around(args: argparse.Namespace, recorded: Recorded) -> dict[str, WindowFiles]:
    """The files of the windows around an onset by their moment, in order of time; else nothing."""
    chosen = recorded.window
    if chosen is None or chosen.moment not in AROUND:
        return {}
    around = sorted(
        (each.window.opened, each.window.moment, each.id, each.files(args))
        for each in recorded.inputs.windows
        if each.window is not None
        and each.window.moment in AROUND
        and each.window.moment_of == chosen.moment_of
    )
    is_unique = len({moment for _, moment, *_ in around}) == len(around)
    return {moment if is_unique else name: files for _, moment, name, files in around}


def _kernels(
    args: argparse.Namespace, settings: Settings, windows: Mapping[str, WindowFiles]
) -> Outcome:
    """Summary and kernels of one window; of several, by their names, the kernels side by side."""
    import msgspec

    from pytest_sglprof._report.perfetto import kernel_events, side_by_side, summary_events
    from pytest_sglprof._trace.merge.files import TraceWriter

    tables = {name: read_table(files, args, settings) for name, files in windows.items()}
    table = side_by_side(tables) if len(tables) > 1 else next(iter(tables.values()))
    starts = table.frame["start_ns"]
    base = int(starts.min()) if len(starts) else 0
    counts = table.frame["rank"].value_counts()
    events = {rank: int(counts.get(rank, 0)) for rank in table.ranks}
    with TraceWriter(args.output, base_ns=base) as writer:
        summary = summary_events(table, base) if len(tables) == 1 else iter(())
        for written in (summary, kernel_events(table, base)):
            for batch in _batches(written):
                writer.add(msgspec.json.encode(batch)[1:-1])
        writer.close({"sglprof": {"ranks": events, "notes": list(table.notes)}})
    return events, table.notes, table.ranks, table.is_timeline


def _batches(events: Iterator[Any]) -> Iterator[list[Any]]:
    from itertools import islice

    while batch := list(islice(events, BATCH)):
        yield batch


def _progress() -> Callable[[int, int], None] | None:
    """Shows progress in bytes on a terminal; None if standard error is not one."""
    if not sys.stderr.isatty():
        return None
    last = 0.0

    def show(done: int, total: int) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last >= PROGRESS_S or done == total:
            last = now
            end = "\n" if done == total else ""
            sys.stderr.write(f"\r{done / 1e6:.0f} of {total / 1e6:.0f} MB{end}")
            sys.stderr.flush()

    return show


# --to svg, --to png.


def write_picture(args: argparse.Namespace) -> None:
    """Draws `args.window`, or the worst window."""
    from pytest_sglprof._cli.measured import measured
    from pytest_sglprof._cli.options import refuse_inputs
    from pytest_sglprof._files import atomic_write
    from pytest_sglprof._report.heat_map import heat_map_png, heat_map_svg, worst_window
    from pytest_sglprof._report.stored import heads_of, whole

    kind = args.output.suffix.lower()
    if kind != f".{args.to}":
        raise SettingsError(
            f"-o {args.output} with --to {args.to}: the file is not of that type",
            expected=f"a name that ends in .{args.to}",
        )
    inputs = inputs_of(args)
    write_notes(inputs.notes)
    refuse_inputs(args.output, inputs.recorded)
    if args.window:
        inputs = replace(inputs, windows=tuple(inputs.chosen(args.window)))
    chosen = {each.id for each in inputs.windows}
    documents = [made.document for made in measured(inputs, args)]
    heads = [(head, document) for document in documents for head in heads_of(document)]
    window = worst_window(whole(head, run) for head, run in heads if head.id in chosen)
    if window is None:
        known = ", ".join(head.id for head, _ in heads) or "none"
        raise SglprofError(
            f"{args.paths[0]} has no window to draw"
            + (f" with the id {args.window}" if args.window else ""),
            expected=f"a window with findings; its windows: {known}",
            hint="results.json says why its windows have no findings",
        )
    atomic_write(args.output, heat_map_png(window) if kind == ".png" else heat_map_svg(window))
    sys.stdout.write(f"{args.output}\n")


# --to nsight.

HOW = """\
To pin them: open the report in Nsight Systems, unfold each row's path in the timeline,
right-click the stream's name and choose "Pin row" (or click the pin beside the name).
Pinned rows stay on top in the order of pinning: pin the corresponding streams of all ranks
one after the other.
"""


def write_hints(args: argparse.Namespace) -> None:
    """Prints the rows to pin, or writes them to `args.output`."""
    from pytest_sglprof._trace.nsys.ranks import known_ranks
    from pytest_sglprof._trace.nsys.report import stream_rows
    from pytest_sglprof._trace.paths import given_labels, is_nsys, names_of_reports, window_files

    chosen = recorded_by(args)
    settings, recorded = settings_of(args, chosen.inputs.places), chosen.files
    files = window_files(recorded.paths)
    traces = [file for file in files if not is_nsys(file)]
    if traces:
        raise NotATrace(
            f"{traces[0]} is a torch trace, which Nsight Systems does not open",
            expected="*.nsys-rep, *.sqlite or a folder of them",
            hint="for torch traces: sglprof export --to perfetto, whose page pins the rows",
        )
    records: list[dict[str, Any]] = []
    notes: list[str] = []
    names = names_of_reports(files, given_labels(files, recorded.file_ranks))
    for file in files:
        ranks = known_ranks(file, names[file], recorded.pid_ranks, recorded.gpu_ranks)
        for row in stream_rows(
            file,
            pid_ranks=ranks.pid_ranks,
            name=names[file],
            nsys=settings.nsys or None,
            notes=notes,
        ):
            record = {"file": file.name, **asdict(row)}
            records.append({**record, "row": _row(row.pid, row.device, row.stream)})
    records = ordered(records, args.sort, args.top)
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
    write_text(
        render(records, columns, args.format) + how, args.output, [*files, *chosen.inputs.recorded]
    )
    if not records:
        notes.append(f"no kernels in {', '.join(path.name for path in files)}")
    write_notes(dict.fromkeys(notes))


def _row(pid: int, device: int, stream: int) -> str:
    return f"Processes > [{pid}] > CUDA HW (device {device}) > Stream {stream}"
