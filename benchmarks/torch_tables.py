"""How fast kernel tables are made of torch traces, beside other tools, in one run:

    python -m benchmarks.torch_tables [--megabytes 200] [--ranks 8] [--other WAY=PYTHON]...

Runs each way in a process of its own, in turn, and prints the median of its figures: CPU
seconds (imports and children included), wall seconds, peak memory of the process and of its
largest child, CPU time as a multiple of the plugin's, and whether every sum equals the generator's
truth. HolisticTraceAnalysis (which needs pandas before 3) and TraceLens run where they can be
imported; `--other HolisticTraceAnalysis=/venv/bin/python` names an interpreter that has one.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks.child import Figures, measured
from benchmarks.generate import torch_window
from benchmarks.torch_ways import OTHERS, WAYS

ROOT = Path(__file__).resolve().parents[1]
OURS = "pytest-sglprof"


def main() -> None:
    """Reads the command line, generates the input once, measures and prints."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    scratch = Path(tempfile.gettempdir()) / "sglprof-bench"
    parser.add_argument("--folder", type=Path, default=scratch, help="where inputs are kept")
    parser.add_argument("--megabytes", type=int, default=200, help="of JSON a rank")
    parser.add_argument("--ranks", type=int, default=8)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--way", choices=WAYS, action="append", help="only this one; repeatable")
    parser.add_argument("--other", metavar="WAY=PYTHON", action="append", default=[])
    args = parser.parse_args()
    folder = args.folder / f"torch-{args.ranks}x{args.megabytes}"
    torch_window(folder, ranks=args.ranks, megabytes=args.megabytes)
    pythons = dict.fromkeys(args.way or WAYS, sys.executable)
    given = dict(pair.split("=", 1) for pair in args.other)
    for way in pythons.keys() & OTHERS.keys():
        here = sys.executable if importlib.util.find_spec(OTHERS[way]) else ""
        pythons[way] = given.get(way, here)
    runs: dict[str, list[Figures]] = {way: [] for way, python in pythons.items() if python}
    for _ in range(args.repeat):
        for way, figures in runs.items():
            command = [pythons[way], "-m", "benchmarks.torch_ways", way, str(folder)]
            figures.append(measured(command, ROOT))
    megabytes = args.ranks * args.megabytes
    write(f"{args.ranks} ranks of {args.megabytes} MB of JSON, {os.cpu_count()} processors, "
          f"median of {args.repeat}")  # fmt: skip
    write_table(runs, megabytes)


def write_table(runs: Mapping[str, Sequence[Figures]], megabytes: int) -> None:
    """One line a way. MB/s: of JSON, for each second of CPU time."""
    base = statistics.median(run.cpu_s for run in runs.get(OURS, ())) if OURS in runs else None
    write(f"{'way':24}{'CPU s':>8}{'MB/s':>7}{'wall s':>8}{'parent MB':>11}{'child MB':>10}"
          f"{'x ours':>8}  right")  # fmt: skip
    for way, figures in runs.items():
        cpu = statistics.median(run.cpu_s for run in figures)
        wall = statistics.median(run.wall_s for run in figures)
        parent = max(run.parent_mb for run in figures)
        child = max(run.child_mb for run in figures)
        ratio = f"{cpu / base:8.2f}" if base else f"{'':8}"
        right = {True: "yes", False: "no", None: "-"}[figures[0].right]
        note = f": {figures[0].note}" if figures[0].note else ""
        write(f"{way:24}{cpu:8.2f}{megabytes / cpu:7.0f}{wall:8.2f}{parent:11.0f}{child:10.0f}"
              f"{ratio}  {right}{note}")  # fmt: skip


def write(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
