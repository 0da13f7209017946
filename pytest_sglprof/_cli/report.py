"""`sglprof report PATH…`: one HTML page about runs or traces, with the lanes of any step."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pytest_sglprof._cli.inputs import Inputs, InputWindow, inputs_of
from pytest_sglprof._cli.measured import Measured, measured
from pytest_sglprof._cli.options import (
    PATHS,
    NewParser,
    input_options,
    read_table,
    refuse_foreign,
    refuse_inputs,
    select_options,
    settings_of,
    settings_options,
    write_notes,
)
from pytest_sglprof._errors import ExitStatus, SettingsError, SglprofError
from pytest_sglprof._files import JOURNAL, RESULTS, unwritten
from pytest_sglprof._ranks import FILE_END

if TYPE_CHECKING:
    from pytest_sglprof._config.load import Settings
    from pytest_sglprof._report.model import RecordedWindow, Results
    from pytest_sglprof._report.series import Lanes

PAGE = "report.html"


def add_parser(new_parser: NewParser) -> None:
    """Adds the options of the command."""
    parser = new_parser(
        description="Writes one HTML file that needs no network: the verdicts, which rank is slow, "
        "since which step and in which kernel, and the kernels of all ranks on one time axis. "
        "Windows of runs are shown as they were judged. Traces alone are measured, and judged by "
        "--limit or the thresholds of a configuration. A run that was killed also gets its "
        "results.json.",
        epilog="exit status: 0 written, 2 wrong usage or unreadable input",
        parents=[input_options(PATHS), select_options(), settings_options()],
    )
    parser.add_argument(
        "-o",
        "--output",
        type=Path,
        metavar="FILE",
        help=f"page to write (default: {PAGE} in the first PATH; NAME.{PAGE} beside a file)",
    )
    parser.set_defaults(exit_zero=True)
    parser.add_argument(
        "--baseline",
        metavar="PATH",
        help="earlier run, window or traces to compare with: the page shows which "
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
    from pytest_sglprof._cli.selection import is_selected
    from pytest_sglprof._report.page.page import write_page

    inputs = inputs_of(args)
    write_notes(inputs.notes)
    if inputs.baselines:
        raise SettingsError(
            f"report {inputs.baselines[0]}: accepted lives have no page of their own",
            expected="runs, windows or traces",
            hint="sglprof baseline show lists them; sglprof history --page FILE draws nights",
        )
    if is_selected(args) and all(each.window is not None for each in inputs.windows):
        raise SettingsError(
            "a limit for windows that were judged when they were recorded",
            expected="traces, reports or exports alone",
            hint="sglprof check judges a window of a run anew",
        )
    output = args.output or _page_of(inputs.paths[0])
    refuse_inputs(output, inputs.recorded)
    baseline = _baseline(args, output) if args.baseline else None
    if not args.output:
        refuse_foreign(output, hint="choose another file with -o")
    made = measured(inputs, args, is_judged=True)
    _write_results(inputs, made)
    documents = [each.document for each in made]
    if args.step:
        documents = _redrawn(documents, inputs, args)
    homes = [each.home.resolve() for each in made]
    write_page(documents, homes, output.resolve(), baseline=baseline)
    sys.stdout.write(f"{output}\n")
    return ExitStatus.DONE


def _write_results(inputs: Inputs, made: Sequence[Measured]) -> None:
    """Gives a run that was killed its results.json; one in an archive stays as it is."""
    from pytest_sglprof._run.interrupted import write_interrupted

    for run, measured_run in zip(inputs.runs, made, strict=False):  # runs come first
        if run.file.name == JOURNAL and run.folder.resolve() == run.home.resolve():
            try:
                if file := write_interrupted(measured_run.document, run.folder):
                    sys.stdout.write(f"{file}\n")
            except OSError as error:
                write_notes([unwritten(str(run.folder / RESULTS), error)])


def _page_of(path: Path) -> Path:
    """The default page: in a folder, beside results.json, or named after another file."""
    if path.is_dir():
        return path / PAGE
    if path.name in (RESULTS, JOURNAL):
        return path.parent / PAGE
    name = FILE_END.sub("", path.name)
    for ending in (".zip", ".nsys-rep", ".sqlite"):
        name = name.removesuffix(ending)
    return path.parent / f"{name}.{PAGE}"


def _baseline(args: argparse.Namespace, output: Path) -> Results:
    """The earlier run to compare with: its results, or what its traces measure."""
    inputs = inputs_of(args, [args.baseline])
    refuse_inputs(output, inputs.recorded)
    made = measured(inputs, args) if inputs.windows else []
    if len(made) != 1:
        raise SglprofError(
            f"--baseline: {args.baseline} has {'several runs' if made else 'no profile window'}",
            expected="the results of a run that recorded windows",
            hint="the runs of pytest are in .sglprof",
        )
    return made[0].document


def _redrawn(
    documents: Sequence[Results], inputs: Inputs, args: argparse.Namespace
) -> list[Results]:
    """The documents, in which one window has the lanes of `args.step`."""
    from msgspec.structs import replace

    from pytest_sglprof._report.stored import heads_of, whole, with_window

    chosen = inputs.one(args.window)
    settings = settings_of(args, inputs.places)
    drawn: list[Results] = []
    for document in documents:
        of_chosen = chosen.run is None or chosen.run.document.run.id == document.run.id
        for head in heads_of(document) if of_chosen else ():
            if head.id == chosen.id:
                window = whole(head, document)
                lanes = _lanes(window, chosen, args, settings)
                document = with_window(document, head, replace(window, lanes=lanes))
        drawn.append(document)
    return drawn


def _lanes(
    window: RecordedWindow, chosen: InputWindow, args: argparse.Namespace, settings: Settings
) -> Lanes:
    """The lanes of `args.step`, from the window's own traces."""
    from msgspec.structs import replace

    from pytest_sglprof._analysis.times import sum_times
    from pytest_sglprof._report.model import storable
    from pytest_sglprof._report.series import lanes

    table = read_table(chosen.files(args), args, settings)
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
