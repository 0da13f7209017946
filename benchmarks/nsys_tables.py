"""How fast an nsys export becomes sums: `python -m benchmarks.nsys_tables [--kernels 4130000]`.

Runs each way in a process of its own, in turn, and prints CPU seconds (children included),
wall seconds, peak memory and whether every sum equals the generator's truth; for ways that
do not split by device, the truth added up over devices.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import os
import resource
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

from benchmarks.nsys_generate import nsys_inputs, truth_of

# (device or "", full name, kind) -> (count, total ns)
Sums = dict[tuple[str, str, str], tuple[int, int]]
NSYS = "SGLPROF_NSYS"
"""Names the nsys whose `nsys stats` is measured, too."""
_RANK_AND_NAME = (
    "SELECT 'GPU' || k.deviceId, s.value, COUNT(*), SUM(k.end - k.start) "
    "FROM CUPTI_ACTIVITY_KIND_KERNEL k JOIN StringIds s ON s.id = k.demangledName GROUP BY 1, 2"
)
_ROWS = (
    "SELECT 'GPU' || k.deviceId AS rank, s.value AS name, k.end - k.start AS ns "
    "FROM CUPTI_ACTIVITY_KIND_KERNEL k JOIN StringIds s ON s.id = k.demangledName"
)


def ours_sqlite(folder: Path) -> Sums:
    return _ours(folder / "report.sqlite")


def ours_parquet(folder: Path) -> Sums:
    return _ours(folder / "report.parquet")


def ours_table(folder: Path) -> Sums:
    """The whole kernel table, row by row with steps, as windows are judged on."""
    from pytest_sglprof import read_window

    sums = read_window(folder / "report.sqlite").by("rank", "full_name", "kind")
    rows = sums.astype(object).to_numpy().tolist()
    return {(rank, name, kind): (count, ns) for rank, name, kind, count, ns in rows}


def group_by(folder: Path) -> Sums:
    """What people write."""
    with closing(sqlite3.connect(folder / "report.sqlite")) as database:
        rows = database.execute(_RANK_AND_NAME).fetchall()
    return {(rank, name, "kernel"): (count, ns) for rank, name, count, ns in rows}


def pandas_read_sql(folder: Path) -> Sums:
    import pandas as pd

    with closing(sqlite3.connect(folder / "report.sqlite")) as database:
        frame = pd.read_sql(_ROWS, database)
    sums = frame.groupby(["rank", "name"])["ns"].agg(["size", "sum"]).reset_index()
    rows = sums.astype(object).to_numpy().tolist()
    return {(rank, name, "kernel"): (count, ns) for rank, name, count, ns in rows}


def nsys_stats(folder: Path) -> Sums:
    words = [os.environ[NSYS], "stats", "--report", "cuda_gpu_kern_sum", "--format", "csv"]
    command = [*words, "--quiet", str(folder / "report.sqlite")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    table = done.stdout[done.stdout.index("Time (%)") :]
    return {
        ("", row["Name"], "kernel"): (int(row["Instances"]), int(row["Total Time (ns)"]))
        for row in csv.DictReader(io.StringIO(table))
    }


def _ours(path: Path) -> Sums:
    from pytest_sglprof.trace.nsys_sums import read_sums

    found = read_sums(path)
    keys = zip(found.rank, found.full_name, found.kind, strict=True)
    return dict(zip(keys, zip(found.count, found.total_ns, strict=True), strict=True))


def nsys_cases() -> dict[str, Callable[[Path], Sums]]:
    """Every way that can be measured here; pytest-sglprof's SQLite way is the first."""
    cases: dict[str, Callable[[Path], Sums]] = {
        "sglprof sums, SQLite": ours_sqlite,
        "sglprof sums, Parquet": ours_parquet,
        "sglprof table, SQLite": ours_table,
        "GROUP BY, names joined": group_by,
        "pandas.read_sql, groupby": pandas_read_sql,
    }
    if os.environ.get(NSYS):
        cases["nsys stats"] = nsys_stats
    return cases


def right(sums: Sums, folder: Path) -> bool:
    """Whether sums are the truth: of what they tell apart, and of kernels where only those."""
    truth: Sums = {}
    kinds = {kind for _, _, kind in sums}
    devices = {rank for rank, _, _ in sums} != {""}
    for (rank, name, kind), (count, ns) in truth_of(folder).items():
        if kind in kinds:
            key = (rank if devices else "", name, kind)
            before = truth.get(key, (0, 0))
            truth[key] = (before[0] + count, before[1] + ns)
    return sums == truth


def measure_here(way: str, folder: Path) -> dict[str, Any]:
    """Runs one way in this process; its figures."""
    begin = time.monotonic()
    sums = nsys_cases()[way](folder)
    wall = time.monotonic() - begin
    usage = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return {
        "cpu_s": sum(one.ru_utime + one.ru_stime for one in usage),
        "wall_s": wall,
        "peak_mb": max(one.ru_maxrss for one in usage) / 1024,
        "right": right(sums, folder),
    }


def measure(folder: Path, repeat: int) -> dict[str, list[dict[str, Any]]]:
    """The figures of each way, every time in a fresh process, by turns.

    None of a way that does not run here: nsys as Debian packs it lacks parts of its stats.
    """
    results: dict[str, list[dict[str, Any]]] = {way: [] for way in nsys_cases()}
    for _ in range(repeat):
        for way, runs in results.items():
            command = [sys.executable, "-m", "benchmarks.nsys_tables", "--only", way]
            done = subprocess.run(
                [*command, "--folder", str(folder)], capture_output=True, text=True
            )
            if done.returncode == 0:
                runs.append(json.loads(done.stdout))
            else:
                print(f"{way} does not run here: {done.stderr.strip().splitlines()[-1]}")
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--folder", type=Path, default=Path(tempfile.gettempdir()) / "sglprof-bench"
    )
    parser.add_argument("--kernels", type=int, default=4_130_000)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--only", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.only:
        print(json.dumps(measure_here(args.only, args.folder)))
        return
    folder = nsys_inputs(args.folder / f"nsys-{args.kernels}", kernels=args.kernels)
    rows = sum(count for count, _ in truth_of(folder).values())
    size = (folder / "report.sqlite").stat().st_size / 1e6
    print(f"{rows / 1e6:.2f} M rows, {size:.0f} MB of SQLite, median of {args.repeat}")
    results = measure(folder, args.repeat)
    middle = {
        way: {key: statistics.median(run[key] for run in runs) for key in runs[0]}
        for way, runs in results.items()
        if runs
    }
    base = next(iter(middle.values()))["cpu_s"]
    heads = f"{'CPU s':>8}{'wall s':>8}{'peak MB':>9}{'M rows/CPU s':>14}{'x ours':>8}  right"
    print(f"{'way':26}{heads}")
    for way, run in middle.items():
        speed, ratio = rows / run["cpu_s"] / 1e6, run["cpu_s"] / base
        figures = f"{run['cpu_s']:8.2f}{run['wall_s']:8.2f}{run['peak_mb']:9.0f}"
        print(f"{way:26}{figures}{speed:14.2f}{ratio:8.2f}  {results[way][0]['right']}")


if __name__ == "__main__":
    main()
