"""`sglprof report results.json…`: one HTML page, also with lanes of steps that it had not."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pytest_sglprof._cli.options import (
    choose_window,
    input_options,
    read_table,
    results_file,
    settings_of,
    settings_options,
    window_files,
)
from pytest_sglprof._cli.tables import refuse_foreign, refuse_inputs
from pytest_sglprof._errors import ExitStatus, SglprofError

if TYPE_CHECKING:
    from pytest_sglprof._report.model import RecordedWindow, Results
    from pytest_sglprof._report.series import Lanes

PAGE = "report.html"


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the command's options."""
    parser = subparsers.add_parser(
        "report",
        help="one HTML page of one or more results.json",
        description="Writes one HTML file that needs no network: verdicts, who is slow, since "
        "which step, in which kernel, and the kernels of all ranks on one time axis.",
        epilog="exit status: 0 written, 2 usage or unreadable input",
        parents=[input_options("a results.json, or the folder of a run"), settings_options()],
    )
    parser.add_argument(
        "-o",
        "--output",
        type=Path,
        metavar="FILE",
        help="where the page is written (default: report.html beside the first results.json)",
    )
    parser.set_defaults(exit_zero=True)
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
        refuse_foreign(output, hint="say with -o where the page is to be written")
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
            hint="the runs that have some stand under .sglprof",
        )
    return document


def recorded(results: Path, document: Results) -> list[Path]:
    """What a run recorded: its results, the files that these name, and all beside them."""
    folder = results.resolve().parent
    named = [folder / item.path for window in document.windows for item in window.artifacts]
    return [results, folder, *named]


def _redrawn(
    documents: Sequence[Results], folders: Sequence[Path], args: argparse.Namespace
) -> list[Results]:
    """The documents with the lanes of one window replaced by those of `args.step`."""
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

    from pytest_sglprof._analysis.times import measure
    from pytest_sglprof._report.model import storable
    from pytest_sglprof._report.series import lanes

    table = read_table(window_files(window, folder, args), args, settings_of(args, args.paths))
    steps = list(dict.fromkeys(args.step))
    known = {int(step) for step in table.steps["step"]}
    unknown = [step for step in steps if step not in known]
    if unknown:
        span = f"{min(known)} to {max(known)}" if known else "none: its source tells no steps"
        raise SglprofError(
            f"window {window.id} has no step {unknown[0]}",
            expected=f"one of its steps, {span}",
            hint="the page shows the number of each step under Lanes and When",
        )
    drawn = lanes(table, measure(table), steps=steps)
    # As the run named them: its folder may come without its run.json, and with it the patterns.
    recorded_categories = {row.name: row.category for row in window.table}
    pairs = zip(drawn.names, drawn.categories, strict=True)
    categories = tuple(recorded_categories.get(name, category) for name, category in pairs)
    return storable(replace(drawn, categories=categories))
