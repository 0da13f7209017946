"""Ways to get from a folder of torch traces to count and time of each rank's kernels.

`python -m benchmarks.torch_ways WAY FOLDER` goes one of them and prints what it cost. It
imports little itself, since imports count.
"""

from __future__ import annotations

import gzip
import io
import json
import os
import sys
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

from benchmarks.child import report

Sums = dict[tuple[str, str], tuple[int, int]]
"""(rank, full kernel name) -> (count, total ns)."""

NEEDLES = (b'"kernel"', b'"gpu_mem', b'user_annotation"')
GPU = ("kernel", "gpu_memcpy", "gpu_memset")


def ours(folder: Path) -> Sums:
    """The public API, with the pandas table."""
    from pytest_sglprof import read_window

    table = read_window(folder)
    rows = table.by("rank", "full_name")
    return {(str(rank), str(name)): (int(n), int(ns)) for rank, name, n, ns in rows.to_numpy()}


def kernels_command(folder: Path) -> Sums:
    """`sglprof kernels`, by rank and full name."""
    rows = json.loads(_printed("kernels", "--by", "rank,full_name", "--format", "json", folder))
    return {(row["rank"], row["full_name"]): (row["count"], row["total_ns"]) for row in rows}


def check_command(folder: Path) -> Sums:
    """`sglprof check`: the verdict on all ranks, whose kernel times are compared. No sums."""
    document = json.loads(_printed("check", "--metric", "slowdown", "--format", "json", folder))
    ranks = {figures["rank"] for figures in document["checks"][0]["ranks"]}
    assert ranks == {rank_of(path) for path in folder.glob("*.gz")}, document
    return {}


def _printed(*words: str | Path) -> str:
    from pytest_sglprof._cli.main import main

    out = io.StringIO()
    with redirect_stdout(out):
        main([*map(str, words)])
    return out.getvalue()


def json_and_pandas(folder: Path) -> Sums:
    """What people write: whole files, one process a processor."""
    from multiprocessing import Pool

    import pandas as pd

    with Pool(os.cpu_count()) as pool:
        frames = pool.map(_json_frame, sorted(folder.glob("*.gz")), chunksize=1)
        pool.close()
        pool.join()
    grouped = pd.concat(frames).groupby(["rank", "name"])["ns"].agg(["size", "sum"]).reset_index()
    return {(rank, name): (int(n), int(ns)) for rank, name, n, ns in grouped.to_numpy()}


def _json_frame(path: Path) -> Any:
    import pandas as pd

    with gzip.open(path) as stream:
        events = json.load(stream)["traceEvents"]
    rank = rank_of(path)
    rows = [(rank, e["name"], round(e["dur"] * 1000)) for e in events if e.get("cat") in GPU]
    return pd.DataFrame(rows, columns=["rank", "name", "ns"])


def holistic(folder: Path) -> Sums:
    """HolisticTraceAnalysis' kernel breakdown, which gives no counts."""
    # Where it is installed: here, or for the interpreter that `--other` names.
    from hta.trace_analysis import TraceAnalysis  # type: ignore[import-not-found]

    analysis = TraceAnalysis(trace_dir=str(folder))
    _, kernels = analysis.get_gpu_kernel_breakdown(
        visualize=False, duration_ratio=1.0, num_kernels=100_000
    )
    columns = zip(kernels["rank"], kernels["name"], kernels["sum (us)"], strict=True)
    return {(f"TP{rank}", str(name)): (0, round(us * 1000)) for rank, name, us in columns}


def tracelens(folder: Path) -> Sums:
    """AMD's TraceLens: the kernels of one rank after the other; it leaves copies and fills out."""
    from TraceLens import TreePerfAnalyzer  # type: ignore[import-not-found]  # see `holistic`

    sums: dict[tuple[str, str], tuple[int, int]] = {}
    with redirect_stdout(sys.stderr):
        for path in sorted(folder.glob("*.gz")):
            analyzer = TreePerfAnalyzer.from_file(str(path))
            kernels = analyzer.get_df_kernels(launcher_detail=False, cpu_op_detail=False)
            totals = kernels.groupby("Kernel name")["Kernel duration (µs)"].agg(["size", "sum"])
            for name, n, us in totals.itertuples():
                sums[rank_of(path), str(name)] = (int(n), round(us * 1000))
    return sums


def floor(folder: Path) -> Sums:
    """Inflating, and one pass of `bytes.find` for each needle, in one process. No sums."""
    from pytest_sglprof._trace.torch.stream import pieces

    for path in sorted(folder.glob("*.gz")):
        for piece in pieces(path):
            for needle in NEEDLES:
                at = piece.find(needle)
                while at >= 0:
                    at = piece.find(needle, at + 1)
    return {}


def fast_floor(folder: Path) -> Sums:
    """The same with the search that we use."""
    from pytest_sglprof._trace.torch.stream import offsets, pieces

    for path in sorted(folder.glob("*.gz")):
        for piece in pieces(path):
            for needle in NEEDLES:
                offsets(needle, piece, 0, len(piece))
    return {}


def rank_of(path: Path) -> str:
    """`TP3` of `1-TP-3.trace.json.gz`."""
    return "TP" + path.name.split("-")[2].split(".")[0]


WAYS: dict[str, Callable[[Path], Sums]] = {
    "floor, bytes.find": floor,
    "floor, StringZilla": fast_floor,
    "sglprof check": check_command,
    "sglprof kernels": kernels_command,
    "read_window, its API": ours,
    "gzip + json + pandas": json_and_pandas,
    "HolisticTraceAnalysis": holistic,
    "TraceLens": tracelens,
}

OURS = ("sglprof check", "sglprof kernels", "read_window, its API")

# Those that are not ours to install, and the module by which they are recognised.
OTHERS = {"HolisticTraceAnalysis": "hta", "TraceLens": "TraceLens"}


def judged(sums: Sums, folder: Path) -> tuple[bool | None, str]:
    """Whether the sums are right (None without sums), and how far off they are."""
    from benchmarks.generate import truth_of

    truth = truth_of(folder)
    if not sums or sums == truth:
        return (True if sums else None), ""
    total, whole = sum(ns for _, ns in sums.values()), sum(ns for _, ns in truth.values())
    worst = min((sums.get(key, (0, 0))[1] / ns - 1 for key, (_, ns) in truth.items()), default=0)
    return False, f"total {100 * (total / whole - 1):+.1f} %, worst name {100 * worst:+.0f} %"


if __name__ == "__main__":
    report(WAYS[sys.argv[1]], Path(sys.argv[2]), judged)
