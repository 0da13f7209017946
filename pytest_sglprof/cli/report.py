"""`sglprof report results.json…`: one HTML page, also with lanes of steps that it had not."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pytest_sglprof.cli.output import refuse_foreign, refuse_inputs
from pytest_sglprof.errors import SglprofError, TraceError

if TYPE_CHECKING:
    from pytest_sglprof.report.lanes import Lanes
    from pytest_sglprof.report.model import RecordedWindow, Results
    from pytest_sglprof.trace.table import KernelTable

RESULTS = "results.json"
PAGE = "report.html"


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the command's options."""
    parser = subparsers.add_parser(
        "report",
        help="one HTML page of one or more results.json",
        description="Writes one HTML file that needs no network: verdicts, who is slow, since "
        "which step, in which kernel, and the kernels of all ranks on one time axis.",
        epilog="exit status: 0 written, 2 usage or unreadable input",
    )
    parser.add_argument(
        "paths", nargs="+", metavar="PATH", help="a results.json, or the folder of a run"
    )
    parser.add_argument(
        "-o",
        "--output",
        metavar="FILE",
        help="where the page is written (default: report.html beside the first results.json)",
    )
    parser.add_argument(
        "--baseline",
        metavar="PATH",
        help="the results.json (or the folder) of an earlier run: what got slower since, kernel by "
        "kernel, in steps of equal work",
    )
    parser.add_argument(
        "--step",
        type=int,
        action="append",
        default=[],
        metavar="N",
        help="draw the lanes of this step instead of the chosen ones, up to 8 times; reads the "
        "traces of the window again",
    )
    parser.add_argument(
        "--window", metavar="ID", help="the window that --step is about (default: the only one)"
    )
    parser.add_argument("--nsys", metavar="PATH", help="the nsys that exports reports")


def run(args: argparse.Namespace) -> int:
    """Writes the page and prints where it is."""
    from pytest_sglprof.report.html import write_page
    from pytest_sglprof.report.results import load_results

    files = [results_file(Path(path)) for path in args.paths]
    documents = [load_results(file) for file in files]
    folders = [file.resolve().parent for file in files]
    output = Path(args.output) if args.output else files[0].parent / PAGE
    baseline = None
    if args.baseline:
        baseline = _baseline(Path(args.baseline))
        refuse_inputs(output, recorded(results_file(Path(args.baseline)), baseline))
    for file, document in zip(files, documents, strict=True):
        refuse_inputs(output, recorded(file, document))
    if not args.output:
        refuse_foreign(output, hint="say with -o where the page is to be written")
    if args.step:
        documents = _redrawn(documents, folders, args.window, args.step, args.nsys)
    write_page(documents, folders, output.resolve(), baseline=baseline)
    sys.stdout.write(f"{output}\n")
    return 0


def _baseline(path: Path) -> Results:
    from pytest_sglprof.report.results import load_results

    document = load_results(results_file(path))
    if not document.windows:
        raise SglprofError(
            f"--baseline: {path} has no profile window",
            expected="the results of a run that recorded windows",
            hint="the runs that have some stand under .sglprof",
        )
    return document


def recorded(results: Path, document: Results) -> list[Path]:
    """What a run recorded: its results, the files that these name, and all beside them."""
    folder = results.resolve().parent
    named = [folder / item.path for window in document.windows for item in window.artifacts]
    return [results, folder, *named]


def results_file(path: Path) -> Path:
    """The results of a run, given as that file or as the run's folder."""
    return path / RESULTS if path.is_dir() else path


def _redrawn(
    documents: Sequence[Results],
    folders: Sequence[Path],
    wanted: str | None,
    steps: Sequence[int],
    nsys: str | None,
) -> list[Results]:
    """The documents with the lanes of one window replaced by those of `steps`."""
    from msgspec.structs import replace

    window, folder = _window(documents, folders, wanted)
    redrawn = replace(window, lanes=_lanes(window, folder, steps, nsys))
    return [
        replace(run, windows=tuple(redrawn if one is window else one for one in run.windows))
        for run in documents
    ]


def _lanes(window: RecordedWindow, folder: Path, steps: Sequence[int], nsys: str | None) -> Lanes:
    """The lanes of `steps`, from the window's own traces."""
    from msgspec.structs import replace

    from pytest_sglprof.analysis.cells import measure
    from pytest_sglprof.report.lanes import lanes
    from pytest_sglprof.report.plain import storable

    table = _read(window, folder, nsys)
    known = {int(step) for step in table.steps["step"]}
    unknown = [step for step in steps if step not in known]
    if unknown:
        span = f"{min(known)} to {max(known)}" if known else "none: its source tells no steps"
        raise SglprofError(
            f"window {window.id} has no step {unknown[0]}",
            expected=f"one of its steps, {span}",
            hint="the page shows the number of each step under Lanes and When",
        )
    drawn = lanes(table, measure(table), steps=list(dict.fromkeys(steps)))
    # Categories as the run told them: its sglprof.toml may have patterns of its own.
    recorded_categories = {row.name: row.category for row in window.table}
    pairs = zip(drawn.names, drawn.categories, strict=True)
    categories = tuple(recorded_categories.get(name, category) for name, category in pairs)
    return storable(replace(drawn, categories=categories))


def _window(
    documents: Sequence[Results], folders: Sequence[Path], wanted: str | None
) -> tuple[RecordedWindow, Path]:
    found = [
        (window, folder)
        for document, folder in zip(documents, folders, strict=True)
        for window in document.windows
        if wanted in (None, window.id)
    ]
    if len(found) != 1:
        every = [window.id for document in documents for window in document.windows]
        what = f"no window {wanted}" if wanted else f"{len(found)} windows"
        raise SglprofError(
            f"--step: there {'is' if wanted else 'are'} {what} in these results",
            expected="one window",
            hint=f"choose with --window: {', '.join(every) or 'there is none'}",
        )
    return found[0]


def _read(window: RecordedWindow, folder: Path, nsys: str | None) -> KernelTable:
    from pytest_sglprof.trace.read import read_window

    kinds = {artifact.kind for artifact in window.artifacts}
    exported = kinds & {"sqlite", "parquet"}  # a report and its export are the same data
    paths = [
        folder / artifact.path
        for artifact in window.artifacts
        if not exported or artifact.kind in exported
    ]
    if not paths or not all(path.exists() for path in paths):
        raise TraceError(
            f"--step: the traces of window {window.id} are not there",
            expected="the files that results.json names, beside it",
            hint="keep the traces of windows that pass with --sglprof-keep=all",
        )
    return read_window(
        paths,
        pid_ranks={int(pid): rank for pid, rank in window.pid_ranks.items()} or None,
        gpu_ranks={int(gpu): rank for gpu, rank in window.gpu_ranks.items()} or None,
        settle_s=window.spec.settle,
        nsys=nsys,
    )
