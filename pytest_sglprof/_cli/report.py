"""`sglprof report PATH…`: one HTML page about runs, with the lanes of any step."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pytest_sglprof._cli.options import (
    NewParser,
    choose_window,
    input_options,
    read_table,
    refuse_foreign,
    refuse_inputs,
    results_file,
    settings_of,
    settings_options,
    window_files,
)
from pytest_sglprof._errors import ExitStatus, SglprofError

if TYPE_CHECKING:
    from pytest_sglprof._report.model import RecordedWindow, Results
    from pytest_sglprof._report.series import Lanes

PAGE = "report.html"


def add_parser(new_parser: NewParser) -> None:
    """Adds the options of the command."""
    parser = new_parser(
        description="Writes one HTML file that needs no network: the verdicts, which rank is slow, "
        "since which step and in which kernel, and the kernels of all ranks on one time axis. The "
        'options under "input" are for --step.',
        epilog="exit status: 0 written, 2 wrong usage or unreadable input",
        parents=[input_options("results.json of a run, or the run's folder"), settings_options()],
    )
    parser.add_argument(
        "-o",
        "--output",
        type=Path,
        metavar="FILE",
        help=f"page to write (default: {PAGE} beside the first results.json)",
    )
    parser.set_defaults(exit_zero=True)
    parser.add_argument(
        "--baseline",
        metavar="PATH",
        help="earlier run (its results.json or folder) to compare with: the page shows which "
        "kernels got slower, among steps with equal batches",
    )
    parser.add_argument(
        "--step",
        type=int,
        action="append",
        default=[],
        metavar="N",
        help="draw the kernels of step N, a lane for each rank, instead of the steps chosen by "
        "default; can be repeated up to 8 times; reads the traces of the window again",
    )


def run(args: argparse.Namespace) -> ExitStatus:
    """Writes the page and prints where it is."""
    from pytest_sglprof._report.page.page import write_page
    from pytest_sglprof._report.results import load_results

    files = [results_file(Path(path)) for path in args.paths]
    documents = [load_results(file) for file in files]
    folders = [file.resolve().parent for file in files]
    output = args.output or files[0].parent / PAGE
    baseline = None
    if args.baseline:
        baseline = _baseline(Path(args.baseline))
        refuse_inputs(output, recorded(results_file(Path(args.baseline)), baseline))
    for file, document in zip(files, documents, strict=True):
        refuse_inputs(output, recorded(file, document))
    if not args.output:
        refuse_foreign(output, hint="choose another file with -o")
    if args.step:
        documents = _redrawn(documents, folders, args)
    write_page(documents, folders, output.resolve(), baseline=baseline)
    sys.stdout.write(f"{output}\n")
    return ExitStatus.DONE


def _baseline(path: Path) -> Results:
    from pytest_sglprof._report.results import load_results

    document = load_results(results_file(path))
    if not document.windows:
        raise SglprofError(
            f"--baseline: {path} has no profile window",
            expected="the results of a run that recorded windows",
            hint="the runs of pytest are in .sglprof",
        )
    return document


def recorded(results: Path, document: Results) -> list[Path]:
    """What no page may replace: the results of a run, their folder, and the files they name."""
    folder = results.resolve().parent
    artifacts = [folder / item.path for window in document.windows for item in window.artifacts]
    return [results, folder, *artifacts]


def _redrawn(
    documents: Sequence[Results], folders: Sequence[Path], args: argparse.Namespace
) -> list[Results]:
    """The documents, in which one window has the lanes of `args.step`."""
    from msgspec.structs import replace

    window, folder = choose_window(documents, folders, args.window)
    redrawn = replace(window, lanes=_lanes(window, folder, args))
    return [
        replace(run, windows=tuple(redrawn if one is window else one for one in run.windows))
        for run in documents
    ]


def _lanes(window: RecordedWindow, folder: Path, args: argparse.Namespace) -> Lanes:
    """The lanes of `args.step`, from the window's own traces."""
    from msgspec.structs import replace

    from pytest_sglprof._analysis.times import sum_times
    from pytest_sglprof._report.model import storable
    from pytest_sglprof._report.series import lanes

    table = read_table(window_files(window, folder, args), args, settings_of(args, args.paths))
    steps = list(dict.fromkeys(args.step))
    known = {int(step) for step in table.steps["step"]}
    unknown = [step for step in steps if step not in known]
    if unknown:
        span = f"{min(known)} to {max(known)}" if known else "but its source has no steps"
        raise SglprofError(
            f"window {window.id} has no step {unknown[0]}",
            expected=f"one of its steps, {span}",
            hint="the page shows the numbers of steps under Lanes and When",
        )
    drawn = lanes(table, sum_times(table), steps=steps)
    # Categories as recorded: without run.json the patterns of the run are not known.
    recorded_categories = {row.name: row.category for row in window.table}
    pairs = zip(drawn.names, drawn.categories, strict=True)
    categories = tuple(recorded_categories.get(name, category) for name, category in pairs)
    return storable(replace(drawn, categories=categories))
