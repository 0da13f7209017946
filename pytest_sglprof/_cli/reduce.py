"""`sglprof reduce PATH… -o FILE`: what the figures of a window need, in one small file."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from pytest_sglprof._cli.inputs import recorded_by
from pytest_sglprof._cli.options import (
    PATHS,
    NewParser,
    input_options,
    refuse_inputs,
    settings_of,
    settings_options,
    write_notes,
)
from pytest_sglprof._errors import ExitStatus, SettingsError, in_shell
from pytest_sglprof._verdict.wording import count

if TYPE_CHECKING:
    from pytest_sglprof._config.load import Settings
    from pytest_sglprof._run.measure import WindowFiles
    from pytest_sglprof._trace.paths import Activities


def add_parser(new_parser: NewParser) -> None:
    """Adds the options of the command."""
    parser = new_parser(
        description="Reads the traces or reports of a window where they lie, on each node, and "
        "writes what figures need of them into one file, about a hundredth as large: activities, "
        "steps, collectives, launches. check, kernels, compare and report read it like the traces "
        "themselves, several of them together (sglprof check NODE1.parquet NODE2.parquet), with "
        "the same figures and verdicts. Needs pyarrow: pip install 'pytest-sglprof[parquet]'.",
        epilog="exit status: 0 written, 2 wrong usage, unreadable input or unwritable output",
        parents=[input_options(PATHS), settings_options()],
    )
    parser.add_argument(
        "-o",
        "--output",
        type=Path,
        required=True,
        metavar="FILE",
        help="file to write, for example node1.parquet",
    )


def run(args: argparse.Namespace) -> ExitStatus:
    """Reads the window, writes the file, and prints its size and its ranks."""
    from msgspec.structs import replace

    from pytest_sglprof._files import atomic_writer
    from pytest_sglprof._run.measure import where_they_lie
    from pytest_sglprof._trace.paths import REDUCED_ENDING
    from pytest_sglprof._trace.reduced import join_reduced, write_reduced
    from pytest_sglprof._trace.tasks import surveyed

    if not args.output.name.endswith(REDUCED_ENDING):
        raise SettingsError(
            f"-o {args.output}: unknown file type",
            expected=f"a name that ends in {REDUCED_ENDING}",
            hint=f"for example -o node1{REDUCED_ENDING}",
        )
    recorded = recorded_by(args)
    refuse_inputs(args.output, recorded.inputs.recorded)
    settings = settings_of(args, recorded.inputs.places)
    files, partial = recorded.files, args.allow_partial
    with where_they_lie(files, settings, allow_partial=partial) as elsewhere:
        survey = elsewhere.survey if elsewhere else surveyed(files.paths, files.server_info)
        beside = replace(
            survey.beside,
            settle_s=max(files.settle, survey.beside.settle_s),
            unlike=(*survey.beside.unlike, *([in_shell(recorded.doubt)] if recorded.doubt else [])),
        )
        with atomic_writer(args.output) as out:
            if elsewhere:
                ranks = join_reduced(out, elsewhere.paths, beside)
            else:
                ranks = write_reduced(out, _parts(files, settings, partial=partial), beside)
    sys.stdout.write(_summary(args.output, ranks, survey.size))
    write_notes([*beside.unlike, *_left_out(survey.listed)])
    return ExitStatus.DONE


def _parts(files: WindowFiles, settings: Settings, *, partial: bool) -> Activities:
    from pytest_sglprof._trace.paths import ReadOptions
    from pytest_sglprof._trace.read import read_parts

    options = ReadOptions(
        pid_ranks=files.pid_ranks,
        gpu_ranks=files.gpu_ranks,
        allow_partial=partial,
        nsys=settings.nsys or None,
    )
    return read_parts(files.paths, options, files.file_ranks)[1]


def _summary(output: Path, ranks: int, size: int) -> str:
    """`node1.parquet: 8 ranks, 6.1 MiB of 1,656 MiB`."""
    mib = 2**20
    small = output.stat().st_size / mib
    return f"{output}: {count(ranks, 'rank')}, {small:,.2f} MiB of {size / mib:,.1f} MiB\n"


def _left_out(listed: list[Path]) -> list[str]:
    from pytest_sglprof._server.sizes import EXPERTS
    from pytest_sglprof._trace.beside import beside_of_traces

    experts = beside_of_traces(listed, EXPERTS)
    return [f"{experts} is not part of it: keep a copy beside it"] if experts else []
