"""How fast kernel tables are made: `python -m benchmarks.tables [--megabytes 200] [--ranks 8]`.

Runs each way in a process of its own, in turn, and prints CPU seconds (children included),
wall seconds, peak memory of the parent and of a worker, and whether every sum equals the
generator's truth. `floor` is what no reader can undercut: inflating, and one search a needle.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from benchmarks.generate import torch_window, truth_of

Sums = dict[tuple[str, str], tuple[int, int]]
NEEDLES = (b'"kernel"', b'"gpu_mem', b'user_annotation"')


def ours(folder: Path) -> Sums:
    from pytest_sglprof import read_window

    table = read_window(folder)
    table.frame["dur_ns"].sum()
    return _sums(table.by("rank", "full_name").to_numpy().tolist())


def json_and_pandas(folder: Path) -> Sums:
    """What people write: every file as a whole, one after the other."""
    import gzip

    import pandas as pd

    frames = []
    for path in sorted(folder.glob("*.gz")):
        with gzip.open(path) as stream:
            events = json.load(stream)["traceEvents"]
        rows = [
            (path.name.split("-")[2].split(".")[0], e["name"], round(e["dur"] * 1000))
            for e in events
            if e.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")
        ]
        frames.append(pd.DataFrame(rows, columns=["rank", "name", "ns"]))
    grouped = pd.concat(frames).groupby(["rank", "name"])["ns"].agg(["size", "sum"]).reset_index()
    rows = [("TP" + rank, name, count, ns) for rank, name, count, ns in grouped.to_numpy().tolist()]
    return _sums(rows)


def floor(folder: Path) -> Sums:
    from pytest_sglprof.trace.inflate import pieces

    for path in sorted(folder.glob("*.gz")):
        for piece in pieces(path):
            for needle in NEEDLES:
                at = piece.find(needle)
                while at >= 0:
                    at = piece.find(needle, at + 1)
    return {}


def _sums(rows: list[tuple[str, str, int, int]]) -> Sums:
    return {(str(rank), str(name)): (int(count), int(ns)) for rank, name, count, ns in rows}


WAYS: dict[str, Callable[[Path], Sums]] = {
    "floor": floor,
    "pytest-sglprof": ours,
    "gzip + json + pandas": json_and_pandas,
}


def measure_here(way: str, folder: Path) -> None:
    """Runs one way in this process and prints its figures as JSON."""
    begin = time.monotonic()
    sums = WAYS[way](folder)
    wall = time.monotonic() - begin
    usage = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    print(
        json.dumps(
            {
                "cpu_s": sum(one.ru_utime + one.ru_stime for one in usage),
                "wall_s": wall,
                "parent_mb": usage[0].ru_maxrss / 1024,
                "right": sums == truth_of(folder) if sums else None,
            }
        )
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--folder", type=Path, default=Path(tempfile.gettempdir()) / "sglprof-bench"
    )
    parser.add_argument("--megabytes", type=int, default=200, help="of JSON a rank")
    parser.add_argument("--ranks", type=int, default=8)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--only", choices=WAYS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.only:
        measure_here(args.only, args.folder)
        return
    folder = args.folder / f"torch-{args.ranks}x{args.megabytes}"
    torch_window(folder, ranks=args.ranks, megabytes=args.megabytes)
    results: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
    for _ in range(args.repeat):
        for way in WAYS:
            command = [sys.executable, "-m", "benchmarks.tables", "--only", way]
            done = subprocess.run(
                [*command, "--folder", str(folder)], capture_output=True, text=True, check=True
            )
            results[way].append(json.loads(done.stdout))
    print(f"{args.ranks} ranks of {args.megabytes} MB, {os.cpu_count()} processors, median of "
          f"{args.repeat}")  # fmt: skip
    base = statistics.median(run["cpu_s"] for run in results["pytest-sglprof"])
    print(f"{'way':24}{'CPU s':>8}{'wall s':>8}{'parent MB':>11}{'x ours':>8}  right")
    for way, runs in results.items():
        middle = {key: statistics.median(run[key] for run in runs) for key in runs[0]
                  if key != "right"}  # fmt: skip
        print(
            f"{way:24}{middle['cpu_s']:8.2f}{middle['wall_s']:8.2f}{middle['parent_mb']:11.0f}"
            f"{middle['cpu_s'] / base:8.2f}  {runs[0]['right']}"
        )


if __name__ == "__main__":
    main()
