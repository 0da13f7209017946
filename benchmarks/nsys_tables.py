"""How fast an nsys export becomes sums: `python -m benchmarks.nsys_tables [--kernels 4130000]`.

Runs each way in a process of its own, in turn, and prints CPU seconds (children included),
wall seconds, peak memory and whether every sum equals the generator's truth; for ways that
do not split by device, the truth added up over devices. Rows in no order are the same rows as
nsys may write them since 2025.6.
"""

from __future__ import annotations

import argparse
import csv
import io
import os
import sqlite3
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import closing, redirect_stderr, redirect_stdout
from pathlib import Path

from benchmarks.child import Figures, measured, report
from benchmarks.nsys_generate import nsys_inputs, shuffled, truth_of

# (device or "", full name, kind) -> (count, total ns)
Sums = dict[tuple[str, str, str], tuple[int, int]]
ROOT = Path(__file__).resolve().parents[1]
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


def ours_shuffled(folder: Path) -> Sums:
    """The totals of the same rows in no order."""
    return _ours(shuffled(folder) / "report.sqlite")


def check(folder: Path) -> Sums:
    """`sglprof check`: the verdict on all ranks. No sums."""
    from pytest_sglprof._cli.main import main

    out = io.StringIO()
    with redirect_stdout(out), redirect_stderr(out):
        main(["check", str(folder / "report.sqlite")])
    assert "slowdown" in out.getvalue(), out.getvalue()
    return {}


def check_shuffled(folder: Path) -> Sums:
    return check(shuffled(folder))


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
    command = [*words, "--quiet", str(folder.resolve() / "report.sqlite")]
    # Debian's package finds its own modules only in the folder where they lie.
    modules = Path(os.environ[NSYS]).resolve().parent / "python" / "lib"
    cwd = modules if modules.is_dir() else None
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=cwd)
    table = done.stdout[done.stdout.index("Time (%)") :]
    return {
        ("", row["Name"], "kernel"): (int(row["Instances"]), int(row["Total Time (ns)"]))
        for row in csv.DictReader(io.StringIO(table))
    }


def _ours(path: Path) -> Sums:
    from pytest_sglprof._trace.nsys.sums import read_sums

    sums = read_sums(path)
    keys = zip(sums.rank, sums.full_name, sums.kind, strict=True)
    return dict(zip(keys, zip(sums.count, sums.total_ns, strict=True), strict=True))


def nsys_cases() -> dict[str, Callable[[Path], Sums]]:
    """Every way that can be measured here; pytest-sglprof's SQLite way is the first."""
    cases: dict[str, Callable[[Path], Sums]] = {
        "sglprof sums, SQLite": ours_sqlite,
        "sglprof sums, in no order": ours_shuffled,
        "sglprof sums, Parquet": ours_parquet,
        "sglprof table, SQLite": ours_table,
        "sglprof check, SQLite": check,
        "sglprof check, in no order": check_shuffled,
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


def judged(sums: Sums, folder: Path) -> tuple[bool | None, str]:
    return (right(sums, folder) if sums else None), ""


def measure(folder: Path, repeat: int) -> dict[str, list[Figures]]:
    """The figures of each way, every time in a fresh process, by turns.

    None of a way that does not run here: nsys as Debian packs it lacks parts of its stats.
    """
    results: dict[str, list[Figures]] = {way: [] for way in nsys_cases()}
    for _ in range(repeat):
        for way, runs in results.items():
            command = [sys.executable, "-m", "benchmarks.nsys_tables", "--here", way]
            try:
                runs.append(measured([*command, "--folder", str(folder)], ROOT))
            except RuntimeError as error:
                write(f"{way} does not run here: {str(error).splitlines()[-1]}")
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--folder", type=Path, default=Path(tempfile.gettempdir()) / "sglprof-bench"
    )
    parser.add_argument("--kernels", type=int, default=4_130_000)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--here", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.here:
        report(nsys_cases()[args.here], args.folder, judged)
        return
    folder = nsys_inputs(args.folder / f"nsys-{args.kernels}", kernels=args.kernels)
    nsys_inputs(shuffled(folder), kernels=args.kernels, parquet=False, in_order=False)
    rows = sum(count for count, _ in truth_of(folder).values())
    size = (folder / "report.sqlite").stat().st_size / 1e6
    write(f"{rows / 1e6:.2f} M rows, {size:.0f} MB of SQLite, median of {args.repeat}")
    results = {way: runs for way, runs in measure(folder, args.repeat).items() if runs}
    base = statistics.median(run.cpu_s for run in next(iter(results.values())))
    heads = f"{'CPU s':>8}{'wall s':>8}{'peak MB':>9}{'M rows/CPU s':>14}{'x ours':>8}  right"
    write(f"{'way':26}{heads}")
    for way, runs in results.items():
        cpu = statistics.median(run.cpu_s for run in runs)
        wall = statistics.median(run.wall_s for run in runs)
        peak = max(max(run.parent_mb, run.child_mb) for run in runs)
        figures = f"{cpu:8.2f}{wall:8.2f}{peak:9.0f}{rows / cpu / 1e6:14.2f}{cpu / base:8.2f}"
        verdict = {True: "yes", False: "no", None: "-"}[runs[0].right]
        write(f"{way:26}{figures}  {verdict}")


def write(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
