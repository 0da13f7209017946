"""`sglprof heatmap results.json -o heat.png`: rank × category as a picture."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from pytest_sglprof.errors import SettingsError, SglprofError


def add_parser(subparsers: Any) -> None:
    """Registers the command."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "heatmap",
        help="rank × category of a window as a picture, PNG or SVG",
        description="Busy time of each rank and category over the mean of its work group, "
        "as numbers and shades. Of several windows the worst is drawn.",
    )
    parser.add_argument(
        "results", type=Path, metavar="RESULTS", help="a results.json, or the folder of a run"
    )
    parser.add_argument(
        "-o",
        "--output",
        type=Path,
        required=True,
        metavar="OUT",
        help="a name that ends in .svg or .png (PNG needs the extra png)",
    )
    parser.add_argument("--window", default="", metavar="ID", help="draw this window")


def run(args: argparse.Namespace) -> int:
    """Writes the picture; 0."""
    from pytest_sglprof.cli.output import refuse_inputs
    from pytest_sglprof.cli.report import recorded, results_file
    from pytest_sglprof.files import atomic_write
    from pytest_sglprof.report.heat_map import heat_map_svg, worst_window
    from pytest_sglprof.report.heat_map_png import heat_map_png
    from pytest_sglprof.report.results import load_results

    kind = args.output.suffix.lower()
    if kind not in (".svg", ".png"):
        raise SettingsError(
            f"-o {args.output}: pictures are written as SVG or PNG",
            expected="a name that ends in .svg or .png",
        )
    file = results_file(args.results)
    document = load_results(file)
    refuse_inputs(args.output, recorded(file, document))
    windows = document.windows
    if args.window:
        windows = tuple(window for window in windows if window.id == args.window)
    window = worst_window(windows)
    if window is None:
        known = ", ".join(each.id for each in document.windows) or "none"
        raise SglprofError(
            f"{args.results} has no window to draw"
            + (f" with the id {args.window}" if args.window else ""),
            expected=f"a window with findings; its windows: {known}",
            hint="look at the reasons in results.json",
        )
    atomic_write(args.output, heat_map_png(window) if kind == ".png" else heat_map_svg(window))
    sys.stdout.write(f"{args.output}\n")
    return 0
