"""`sglprof export PATH… --to KIND`: what was recorded, for other programs and for chats."""

from __future__ import annotations

import argparse

from pytest_sglprof.cli.options import (
    input_options,
    output_options,
    settings_of,
    settings_options,
)
from pytest_sglprof.errors import ExitStatus, SettingsError

KINDS = ("perfetto", "nsight", "svg", "png")


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the command's options."""
    parser = subparsers.add_parser(
        "export",
        help="traces merged for Perfetto, rows to pin in Nsight Systems, a picture",
        description="perfetto: every event of the torch traces of all ranks in one file "
        "(*.json.gz or *.json), ranks labelled and sorted, summary rows of all ranks first, "
        "findings as instant events; beside it an open.html opens it in the Perfetto UI with the "
        "ranks' kernel rows pinned. nsight: the streams with kernels of every process in nsys "
        "reports, which are the rows to pin in Nsight Systems. svg, png: busy time of each rank "
        "and category of a run's worst window (or of --window), over the mean of its work group.",
        epilog="exit status: 0 written, 2 usage, unreadable input or unwritable output",
        parents=[
            input_options("traces, reports, exports, a window's folder, or a run"),
            output_options(),
            settings_options(),
        ],
    )
    parser.add_argument("--to", choices=KINDS, required=True, help="what is written")
    parser.add_argument(
        "--only",
        choices=("kernels",),
        help="perfetto: a small file of kernels, copies and summary rows; also for nsys reports",
    )
    parser.set_defaults(exit_zero=True)


def run(args: argparse.Namespace) -> ExitStatus:
    """Writes it."""
    if args.output is None and args.to != "nsight":
        raise SettingsError(
            f"--to {args.to} without -o",
            expected="-o FILE",
            hint="for example -o merged.json.gz" if args.to == "perfetto" else f"-o heat.{args.to}",
        )
    if args.to in ("svg", "png"):
        from pytest_sglprof.cli.heatmap import write_picture

        write_picture(args)
    elif args.to == "nsight":
        from pytest_sglprof.cli.nsight_hints import write_hints

        write_hints(args, settings_of(args, args.paths))
    else:
        from pytest_sglprof.cli.perfetto import write_perfetto

        write_perfetto(args, settings_of(args, args.paths))
    return ExitStatus.DONE
