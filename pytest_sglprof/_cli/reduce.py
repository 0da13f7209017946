"""`sglprof reduce PATH… -o FILE`: what the figures of a window need, in one small file."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pytest_sglprof._cli.inputs import Recorded, recorded_by
from pytest_sglprof._cli.options import (
    PATHS,
    NewParser,
    input_options,
    refuse_inputs,
    settings_of,
    settings_options,
    write_notes,
)
from pytest_sglprof._errors import ExitStatus, SettingsError, TraceError, in_shell
from pytest_sglprof._verdict.wording import count

if TYPE_CHECKING:
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
    from pytest_sglprof._files import atomic_write
    from pytest_sglprof._trace.one_window import copies
    from pytest_sglprof._trace.paths import REDUCED_ENDING
    from pytest_sglprof._trace.read import read_parts
    from pytest_sglprof._trace.reduced import Beside, reduced

    if not args.output.name.endswith(REDUCED_ENDING):
        raise SettingsError(
            f"-o {args.output}: unknown file type",
            expected=f"a name that ends in {REDUCED_ENDING}",
            hint=f"for example -o node1{REDUCED_ENDING}",
        )
    recorded = recorded_by(args)
    refuse_inputs(args.output, recorded.inputs.recorded)
    settings = settings_of(args, recorded.inputs.places)
    files = recorded.files
    listed, parts = read_parts(
        files.paths,
        pid_ranks=files.pid_ranks,
        gpu_ranks=files.gpu_ranks,
        file_ranks=files.file_ranks,
        allow_partial=args.allow_partial,
        nsys=settings.nsys or None,
    )
    unlike = [*copies(listed), *([in_shell(recorded.doubt)] if recorded.doubt else [])]
    beside = Beside(
        server_info=_server_info(recorded, listed), settle_s=files.settle, unlike=tuple(unlike)
    )
    content = reduced(parts, beside)
    atomic_write(args.output, content)
    sys.stdout.write(_summary(args.output, len(content), listed, parts))
    write_notes([*unlike, *_left_out(listed)])
    return ExitStatus.DONE


def _server_info(recorded: Recorded, listed: list[Path]) -> dict[str, Any] | None:
    """The settings that are given, or stand beside the traces."""
    from pytest_sglprof._server.sizes import SERVER_INFO
    from pytest_sglprof._trace.beside import beside_of_traces, read_settings

    file = recorded.files.server_info or beside_of_traces(listed, SERVER_INFO)
    if file is None:
        return None
    try:
        read_settings(file)
    except TraceError:
        if recorded.files.server_info is not None:
            raise
        return None
    info: dict[str, Any] = json.loads(file.read_bytes())
    return info


def _summary(output: Path, size: int, listed: list[Path], parts: Activities) -> str:
    """`node1.parquet: 8 ranks, 6.1 MiB of 1,656 MiB`."""
    whole = sum(
        each.stat().st_size
        for path in listed
        for each in (path.rglob("*") if path.is_dir() else [path])
        if each.is_file()
    )
    ranks = count(len({part.rank for _, part in parts}), "rank")
    mib = 2**20
    return f"{output}: {ranks}, {size / mib:,.2f} MiB of {whole / mib:,.1f} MiB\n"


def _left_out(listed: list[Path]) -> list[str]:
    from pytest_sglprof._server.sizes import EXPERTS
    from pytest_sglprof._trace.beside import beside_of_traces

    experts = beside_of_traces(listed, EXPERTS)
    return [f"{experts} is not part of it: keep a copy beside it"] if experts else []
