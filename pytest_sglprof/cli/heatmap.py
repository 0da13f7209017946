"""`sglprof export --to svg|png`: rank × category of a window as a picture."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from pytest_sglprof.errors import SettingsError, SglprofError


def write_picture(args: argparse.Namespace) -> None:
    """Draws `args.window`, or the worst window of the run."""
    from pytest_sglprof.cli.output import refuse_inputs
    from pytest_sglprof.cli.recorded import results_file
    from pytest_sglprof.cli.report import recorded
    from pytest_sglprof.files import atomic_write
    from pytest_sglprof.report.heat_map import heat_map_svg, worst_window
    from pytest_sglprof.report.heat_map_png import heat_map_png
    from pytest_sglprof.report.results import load_results

    kind = args.output.suffix.lower()
    if kind != f".{args.to}":
        raise SettingsError(
            f"-o {args.output} with --to {args.to}: pictures are written as SVG or PNG",
            expected="a name that ends in .svg or .png, as --to says",
        )
    if len(args.paths) != 1:
        raise SettingsError(f"--to {args.to} with {len(args.paths)} paths", expected="one run")
    file = results_file(Path(args.paths[0]))
    document = load_results(file)
    refuse_inputs(args.output, recorded(file, document))
    windows = document.windows
    if args.window:
        windows = tuple(window for window in windows if window.id == args.window)
    window = worst_window(windows)
    if window is None:
        known = ", ".join(each.id for each in document.windows) or "none"
        raise SglprofError(
            f"{args.paths[0]} has no window to draw"
            + (f" with the id {args.window}" if args.window else ""),
            expected=f"a window with findings; its windows: {known}",
            hint="look at the reasons in results.json",
        )
    atomic_write(args.output, heat_map_png(window) if kind == ".png" else heat_map_svg(window))
    sys.stdout.write(f"{args.output}\n")
