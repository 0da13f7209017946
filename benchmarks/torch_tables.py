"""How fast torch traces become kernel tables and verdicts, beside other tools, in one run:

    python -m benchmarks.torch_tables [--ranks 2] [--many 8] [--other WAY=PYTHON]...

Runs each way in a process of its own, in turn, and prints the median of its figures: CPU
seconds (imports and children included), wall seconds, peak memory of the process and of its
largest child, CPU time as a multiple of that of `sglprof check`, and whether every sum equals the
generator's truth. All ways run over `--ranks` traces, then ours alone over `--many`.
HolisticTraceAnalysis (which needs pandas before 3) and TraceLens run where they can be
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
from benchmarks.torch_ways import OTHERS, OURS, WAYS

ROOT = Path(__file__).resolve().parents[1]


def main() -> None:
    """Reads the command line, generates the inputs once, measures and prints."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    scratch = Path(tempfile.gettempdir()) / "sglprof-bench"
    parser.add_argument("--folder", type=Path, default=scratch, help="where inputs are kept")
    parser.add_argument("--megabytes", type=int, default=207, help="of JSON a rank")
    parser.add_argument("--ranks", type=int, default=2, help="for all ways; 0: not at all")
    parser.add_argument("--many", type=int, default=8, help="for ours alone; 0: not at all")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--way", choices=WAYS, action="append", help="only this one; repeatable")
    parser.add_argument("--other", metavar="WAY=PYTHON", action="append", default=[])
    args = parser.parse_args()
    ways = args.way or [*WAYS]
    given = dict(pair.split("=", 1) for pair in args.other)
    for ranks, chosen in ((args.ranks, ways), (args.many, [way for way in ways if way in OURS])):
        if not ranks:
            continue
        folder = torch_window(args.folder, ranks=ranks, megabytes=args.megabytes)
        runs = measure(folder, pythons(chosen, given), args.repeat)
        write(f"{ranks} ranks of {args.megabytes} MB of JSON, {os.cpu_count()} processors, "
              f"median of {args.repeat}")  # fmt: skip
        write_table(runs, ranks * args.megabytes)


def pythons(ways: Sequence[str], given: Mapping[str, str]) -> dict[str, str]:
    """The interpreter of each way that can run. given: those for ways of other tools."""
    interpreters = dict.fromkeys(ways, sys.executable)
    for way in interpreters.keys() & OTHERS.keys():
        here = sys.executable if importlib.util.find_spec(OTHERS[way]) else ""
        interpreters[way] = given.get(way, here)
    return {way: python for way, python in interpreters.items() if python}


def measure(folder: Path, pythons: Mapping[str, str], repeat: int) -> dict[str, list[Figures]]:
    """The figures of each way, every time in a fresh process, by turns."""
    runs: dict[str, list[Figures]] = {way: [] for way in pythons}
    for _ in range(repeat):
        for way, figures in runs.items():
            command = [pythons[way], "-m", "benchmarks.torch_ways", way, str(folder)]
            figures.append(measured(command, ROOT))
    return runs


def write_table(runs: Mapping[str, Sequence[Figures]], megabytes: int) -> None:
    """One line a way. MB/s: of JSON, for each second of CPU time."""
    base = statistics.median(run.cpu_s for run in runs[OURS[0]]) if OURS[0] in runs else None
    write(f"{'way':24}{'CPU s':>8}{'MB/s':>7}{'wall s':>8}{'parent MB':>11}{'child MB':>10}"
          f"{'x check':>8}  right")  # fmt: skip
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
