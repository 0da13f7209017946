"""Whether ranks with different input are judged rightly, on windows whose truth is planted:

    python -m benchmarks.dp_truth [--windows 200] [--windows-of-64 50] [--files 5] [--cases abc]
                                  [--ranks 2 8 64] [--write docs/truth.md]

Each cell is a case of `standin.dp_model`, a number of ranks and a size of noise (φ 0.6). The truth
of a window is what is realised in it: what the laws say for the rank's work less what they say for
the others' (load), and the planted factor (speed). Asked of the rank that the case is about, in %:

- blamed: a rank that is not slow fails (`slowdown` across sync, limit 1.05); at most 0.5;
- slow fails: the planted slow rank does;
- not known: its load, or (cases d, i, j) its speed;
- driver: that of the planted part explains most of the load, or (d, i, j) dense gemm is named slow;
- part: in µs a pass, within 10 % of what is planted;
- speed: within 0.02 of the planted factor;
- holds: the 95 % interval of the part holds what is planted.

`--windows` are of a cell of up to 8 ranks, `--windows-of-64` of one of 64, which takes long.
`--files` windows of a cell (8 ranks: two; 64: one, of the quieter noise) are also written as traces
and judged by `sglprof check`; case f is right if it is inconclusive.
The exit status is 1 if a bound is missed.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, fields, replace
from math import comb
from multiprocessing import get_context
from pathlib import Path

import numpy as np

from benchmarks.damage import rewrite, write
from benchmarks.dp_windows import keys_of, table_of
from pytest_sglprof._analysis.imbalance import estimate, imbalance_of_groups
from pytest_sglprof._analysis.load_split import Part, added
from pytest_sglprof._analysis.passes import SyncGroup
from pytest_sglprof._analysis.sums import Sums
from pytest_sglprof._analysis.sync import RankSplit, SyncFinding, cells_across, sync_finding
from pytest_sglprof._cli.main import main as main_of_sglprof
from pytest_sglprof._config.model import Threshold
from pytest_sglprof._verdict.judge import judge_finding
from pytest_sglprof.standin.dp_model import CASES, Case, DpWindow, make, split
from pytest_sglprof.standin.dp_traces import server_info, write_traces

LIMIT = Threshold(limit=1.05)
RANKS = (2, 8, 64)
NOISE = (0.02, 0.05)
PHI = 0.6
HAS_LOAD = frozenset("abeh")  # in attention
HAS_SPEED = frozenset("deij")
KNOWN = frozenset("abde")  # of which the answer is to be known
FROM_FILES = frozenset("j")  # ids that begin anew and spans without ids are read from files only
PART, SPEED = 0.10, 0.02
BLAMED, UNKNOWN, RIGHT, HOLDS = 0.005, 0.10, 0.95, 0.93
BEGIN = "<!-- tables of benchmarks.dp_truth: begin -->"
CHANCE = 0.01  # of a cell that keeps its bound to miss it here


@dataclass
class Tally:
    """Of how many windows each is true; *_of: of how many it was asked."""

    windows: int = 0
    blamed: int = 0
    named: int = 0
    unknown: int = 0
    known: int = 0
    category: int = 0
    part: int = 0
    speed: int = 0
    speed_of: int = 0
    holds: int = 0

    def add(self, other: Tally) -> None:
        """Adds the counts of other windows."""
        for field in fields(self):
            setattr(self, field.name, getattr(self, field.name) + getattr(other, field.name))


@dataclass(frozen=True)
class Cell:
    """One case with so many ranks and so much noise. with_counts: of experts, recorded."""

    case: Case
    ranks: int
    sd: float
    with_counts: bool

    @property
    def key(self) -> str:
        """`b, 8 ranks, sd 2 %`."""
        counts = ", experts recorded" if self.with_counts and self.case.name == "c" else ""
        return f"{self.case.name}, {self.ranks} ranks, sd {100 * self.sd:g} %{counts}"


def cells(names: str, ranks: Sequence[int]) -> Iterator[Cell]:
    """The cells of the chosen cases."""
    for case in CASES:
        for count in ranks:
            for sd in NOISE:
                if case.name in names:
                    if case.name == "c":
                        yield Cell(case, count, sd, with_counts=False)
                    yield Cell(case, count, sd, with_counts=True)


def measured(
    window: DpWindow, *, with_counts: bool
) -> tuple[SyncGroup, SyncFinding, str, str | None]:
    """The passes of a window, the finding, the verdict on `slowdown` and the slowest rank."""
    sums = Sums(table_of(window, with_counts=with_counts))
    (group,) = sums.synced
    finding = sync_finding(group)
    cells = cells_across(sums, "typical_ratio", "compute", "")
    (imbalance,) = imbalance_of_groups(cells)
    judgement = judge_finding(imbalance, LIMIT, estimate(cells[0], "typical_ratio"))
    return group, finding, judgement.verdict, imbalance.slowest


def tally_of(cell: Cell, seeds: range) -> Tally:
    """Judges the windows of a cell."""
    tally = Tally()
    for seed in seeds:
        window = make(cell.case.make(cell.ranks, seed, cell.sd, PHI))
        tally.add(_tally(cell, window))
    return tally


def _tally(cell: Cell, window: DpWindow) -> Tally:
    group, finding, verdict, slowest = measured(window, with_counts=cell.with_counts)
    about = window.plan.about
    name, label = cell.case.name, f"DP{about} TP{about}"
    is_slow = name in HAS_SPEED
    tally = Tally(windows=1)
    tally.blamed = int(verdict == "fail" and not (is_slow and slowest == label))
    tally.named = int(verdict == "fail" and is_slow and slowest == label)
    if finding.reason or not finding.ranks:
        tally.unknown = 1
        return tally
    rank = finding.ranks[about]
    truth = split(window, about, np.isin(keys_of(window)[:, about], group.passes.numbers))
    category = "moe" if name == "c" else "attention"
    if is_slow and name not in HAS_LOAD:
        is_known = rank.speed_ratio is not None
        sought = ("gemm", "attention")
        planted = sum(truth[each].speed for each in sought)
        got = _sum_of(rank, sought, "speed", finding)
        is_right = "gemm" in rank.slower_in
    else:
        planted, got = truth[category].load, _sum_of(rank, (category,), "load", finding)
        is_known = got is not None
        is_right = _largest_load(rank) == category
    if rank.speed_ratio is not None:
        factor = window.plan.gpu_factor[about] if window.plan.gpu_factor else 1.0
        tally.speed_of = 1
        tally.speed = int(abs(rank.speed_ratio - factor) <= SPEED)
    if not is_known or got is None:
        tally.unknown = 1
        return tally
    tally.known = 1
    tally.category = int(is_right)
    tally.part = int(abs(got.ns / 1000 - planted) <= PART * abs(planted))
    tally.holds = int(got.bounds[0] <= 1000 * planted <= got.bounds[1])
    return tally


def _sum_of(
    rank: RankSplit, categories: Sequence[str], part: str, finding: SyncFinding
) -> Part | None:
    """A part of a rank's difference in some categories, ns a pass; None if some is not known.

    A kind of pass in which the rank hardly differs may be unknown.
    """
    every = sum(finding.kinds.values())
    lines = [each for each in rank.categories if each.category in categories]
    known = [(each.passes / every, getattr(each, part)) for each in lines]
    left = sum(
        share * abs(each.difference_ns)
        for (share, value), each in zip(known, lines, strict=True)
        if value is None
    )
    whole = sum(
        share * abs(each.difference_ns) for (share, _), each in zip(known, lines, strict=True)
    )
    if not lines or left > 0.1 * whole:
        return None
    parts = [(share, value) for share, value in known if value is not None]
    return added(parts, are_independent=part != "speed")


def _largest_load(rank: RankSplit) -> str | None:
    known = [each for each in rank.categories if each.load is not None]
    return (
        max(known, key=lambda each: each.load.ns if each.load else 0.0).category if known else None
    )


# From files: all of the reader, the alignment and the command.


def fails_from_files(cell: Cell, seed: int) -> tuple[str, str]:
    """The verdict of `sglprof check` on a window as files, and the sentence about its ranks."""
    plan = replace(cell.case.make(cell.ranks, seed, cell.sd, PHI), layers=2)
    with tempfile.TemporaryDirectory() as folder:
        window = make(plan)
        write_traces(window, Path(folder))
        (Path(folder) / "server_info.json").write_text(json.dumps(server_info(window)))
        output = io.StringIO()
        with contextlib.redirect_stdout(output):
            main_of_sglprof(["check", folder, "--limit", "1.05", "--format", "json"])
    document = json.loads(output.getvalue())
    slowest = document["checks"][0]["slowest"] or ""
    return document["verdict"], slowest


def _from_files(cell: Cell, seeds: range) -> Tally:
    tally = Tally()
    for seed in seeds:
        verdict, slowest = fails_from_files(cell, seed)
        about = seed % cell.ranks
        is_it = cell.case.name in HAS_SPEED and slowest.startswith(f"DP{about} ")
        tally.windows += 1
        if cell.case.name == "f":
            tally.blamed += verdict != "inconclusive"
            continue
        tally.blamed += verdict == "fail" and not is_it
        tally.named += verdict == "fail" and is_it
    return tally


# The table.


def _share(count: int, of: int) -> str:
    return "–" if not of else f"{100 * count / of:.1f}".removesuffix(".0")


def missed(cell: Cell, tally: Tally) -> list[str]:
    """The bounds that a cell misses, beyond what chance makes of that many windows."""
    name, is_quiet = cell.case.name, cell.sd <= NOISE[0]
    asked = [("not blamed", tally.windows - tally.blamed, tally.windows, 1 - BLAMED)]
    if name in KNOWN:
        asked.append(("known", tally.windows - tally.unknown, tally.windows, 1 - UNKNOWN))
    if is_quiet:
        asked.append(("driver", tally.category, tally.known, RIGHT))
        asked.append(("part", tally.part, tally.known, RIGHT))
        asked.append(("speed", tally.speed, tally.speed_of, RIGHT))
    else:
        asked.append(("holds", tally.holds, tally.known, HOLDS))
    return [
        f"{cell.key}: {what} {_share(count, of)} %, at least {100 * bound:g} asked"
        for what, count, of, bound in asked
        if of and tail(of - count, of, 1 - bound) < CHANCE
    ]


def tail(count: int, of: int, rate: float) -> float:
    """How probable so many or more of `of` are at a rate (binomial, exact)."""
    return sum(comb(of, k) * rate**k * (1 - rate) ** (of - k) for k in range(count, of + 1))


def table_lines(rows: Iterable[tuple[Cell, Tally, Tally]]) -> Iterator[str]:
    """The table of all cells, in %."""
    yield (
        "| window | blamed | slow fails | not known | driver | part | speed | holds | of files | "
        "shown on |"
    )
    yield "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |"
    for cell, tally, files in rows:
        is_slow = cell.case.name in HAS_SPEED
        right = files.named if is_slow else files.windows - files.blamed
        yield (
            f"| {cell.key} | {_share(tally.blamed, tally.windows)} | "
            f"{_share(tally.named, tally.windows) if is_slow else '–'} | "
            f"{_share(tally.unknown, tally.windows)} | {_share(tally.category, tally.known)} | "
            f"{_share(tally.part, tally.known)} | {_share(tally.speed, tally.speed_of)} | "
            f"{_share(tally.holds, tally.known)} | "
            f"{f'{right} of {files.windows}' if files.windows else '–'} | "
            f"{'planted model' if not missed(cell, tally) else 'not shown'} |"
        )


Job = tuple[str, int, float, bool, int, int]
PIECE = 25  # windows of a job
MANY = 64  # ranks


def _worker(job: Job) -> tuple[Tally, Tally]:
    name, ranks, sd, with_counts, first, files = job
    case = next(each for each in CASES if each.name == name)
    cell = Cell(case, ranks, sd, with_counts)
    if files:
        return Tally(), _from_files(cell, range(first, first + files))
    return tally_of(cell, range(first, first + PIECE)), Tally()


def jobs_of(cell: Cell, windows: int, files: int) -> Iterator[Job]:
    """The pieces of a cell of so many windows."""
    place = (cell.case.name, cell.ranks, cell.sd, cell.with_counts)
    if cell.case.name not in FROM_FILES:
        for first in range(0, windows, PIECE):
            yield (*place, first, 0)
    if not (cell.case.name == "c" and cell.with_counts):
        few = min(files, 2) if cell.ranks < MANY else min(files, int(cell.sd == NOISE[0]))
        if number := files if cell.ranks == RANKS[0] else few:
            yield (*place, 0, number)


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the table; returns 1 if a bound is missed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--windows", type=int, default=200, help="of a cell")
    parser.add_argument("--windows-of-64", type=int, default=50, help="of a cell of 64 ranks")
    parser.add_argument("--files", type=int, default=5, help="of a cell, as traces")
    parser.add_argument("--cases", default="abcdefghij", help="letters")
    parser.add_argument("--ranks", type=int, nargs="+", default=list(RANKS))
    parser.add_argument("--write", type=Path, help="the file whose table is rewritten")
    options = parser.parse_args(arguments)
    began = time.monotonic()
    chosen = list(cells(options.cases, options.ranks))
    windows = {
        cell: options.windows if cell.ranks < MANY else options.windows_of_64 for cell in chosen
    }
    jobs = [(cell, job) for cell in chosen for job in jobs_of(cell, windows[cell], options.files)]
    rows = {cell: (Tally(), Tally()) for cell in chosen}
    with ProcessPoolExecutor(os.cpu_count(), mp_context=get_context("spawn")) as pool:
        results = pool.map(_worker, [job for _, job in jobs])
        for (cell, _), (matrices, files) in zip(jobs, results, strict=True):
            rows[cell][0].add(matrices)
            rows[cell][1].add(files)
    wrong = [line for cell, (tally, _) in rows.items() for line in missed(cell, tally)]
    lines = [
        f"{options.windows} windows a cell (64 ranks: {options.windows_of_64}), "
        f"{len(chosen)} cells. Bounds missed: {len(wrong)}.",
        "",
        *(f"- {line}" for line in wrong),
        *([""] if wrong else []),
        *table_lines((cell, *both) for cell, both in rows.items()),
    ]
    for line in lines:
        write(line)
    write(f"{time.monotonic() - began:.0f} s")
    if options.write:
        rewrite(options.write, lines, BEGIN)
    return int(bool(wrong))


if __name__ == "__main__":
    raise SystemExit(main())
