"""Do verdicts on damaged or foreign traces mislead? `python -m benchmarks.damage`

Windows with a known truth (`benchmarks.damage_model`) are damaged on one rank, drawn at random,
and judged as `sglprof check` judges them: in memory from the reader's own type on, and a few of
each cell as files. The table says how often the slow rank is blamed, another one is, and how
often there is no verdict at all; its last columns say whether what docs/truth.md promises is
kept. `--write` puts it into that page. The status is 1 if a promise is not kept.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
import tempfile
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from unittest import mock

import numpy as np

from benchmarks.damage_model import HARMS, SLOW, Damage, Window, window, write
from pytest_sglprof import SglprofError
from pytest_sglprof._config.model import Threshold
from pytest_sglprof._trace.read import build_table, read_window
from pytest_sglprof._trace.table import KernelTable, RankActivities
from pytest_sglprof._verdict.judge import judge

LIMIT = Threshold(metric="slowdown", limit=1.10, scope="compute")
SHARES = (0.001, 0.002, 0.0045, 0.009, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5)
FRONT_LIMIT, SHARE_LIMIT = 0.3, 0.01
LARGE_EVERY = 20  # of so many windows one has a graph of 1,000 kernels
SWAPPED, OTHER_SIZE, OTHER_HOUR = "files swapped", "other run: size", "other run: an hour apart"
FOREIGN = (SWAPPED, OTHER_SIZE, OTHER_HOUR)
PAGE = Path(__file__).resolve().parents[1] / "docs" / "truth.md"
BEGIN, END = "<!-- benchmarks.damage -->", "<!-- end -->"


@dataclass(frozen=True)
class Cell:
    """One kind of damage, in windows of two and of eight ranks by turns.

    share: of the rank's kernels, of its steps for a lost front; 0 for foreign files. slow: whether
    one rank is slow. on_files: whether windows are written and read. off: whether detection is
    switched off.
    """

    kind: str
    share: float
    slow: bool
    on_files: bool = False
    off: bool = False

    @property
    def is_judged(self) -> bool:
        """Whether damage of this size may still get a verdict."""
        if self.kind == "lost front":
            return self.share <= FRONT_LIMIT
        return self.share <= SHARE_LIMIT and self.kind not in FOREIGN


@dataclass(frozen=True)
class Outcome:
    """How the windows of a cell were judged.

    right: the slow rank is blamed, or a balanced window passes. wrong: a healthy rank is blamed,
    or a window with a slow rank passes. counted: of those without a verdict, in how many the reason
    has the number of damaged kernels, ± 1. windows: how many were judged.
    """

    right: int
    wrong: int
    none: int
    counted: int
    windows: int


def cells() -> list[Cell]:
    """All cells of the table, in its order."""
    grid = [Cell(kind, share, slow) for kind in HARMS for share in SHARES for slow in (False, True)]
    off = [Cell("lost front", 0.2, True, off=True), Cell("lost front", 0.5, False, off=True)]
    foreign = [Cell(kind, 0.0, slow, on_files=True) for kind in FOREIGN for slow in (False, True)]
    return [*grid, *(replace(cell, on_files=True) for cell in grid), *off, *foreign]


def outcome(cell: Cell, windows: int) -> Outcome:
    """Judges so many windows of a cell; the same ones in every run."""
    rng = np.random.default_rng(zlib.crc32(repr(cell).encode()))
    words: Counter[str] = Counter()
    counted = 0
    for number in range(windows):
        ranks = 8 if number % 2 and not cell.off else 2
        large = ranks == 2 and number % LARGE_EVERY == 0
        sound = window(rng, ranks, slow=cell.slow, large=large)
        victim = int(rng.integers(ranks))
        word, blamed, reason, count = _judged(cell, sound, victim)
        if word == "inconclusive":
            words["none"] += 1
            counted += _has_count(reason, count)
        elif cell.slow:
            is_right = word == "fail" and blamed == f"TP{sound.slow}"
            words["right" if is_right else "wrong"] += 1
        else:
            words["right" if word == "pass" else "wrong"] += 1
    return Outcome(words["right"], words["wrong"], words["none"], counted, windows)


def _judged(cell: Cell, sound: Window, victim: int) -> tuple[str, str | None, str, int]:
    """The verdict, the slowest rank, the reason, and how many kernels were damaged."""
    part, call = sound.parts[victim], sound.call[victim]
    harm = Damage(part, 0, part, call)
    if cell.kind in HARMS:
        harm = HARMS[cell.kind](part, call, cell.share)
    try:
        table = (_by_files if cell.on_files else _in_memory)(cell, sound, victim, harm)
    except SglprofError as error:
        return "inconclusive", None, str(error), harm.count
    if table.incomparable:  # then the judge has no verdict, for that reason
        return "inconclusive", None, table.incomparable, harm.count
    verdict = judge(table, [LIMIT])
    finding = verdict.judgements[0].finding if verdict.judgements else None
    return verdict.word, finding.slowest if finding else None, verdict.reason, harm.count


def _in_memory(cell: Cell, sound: Window, victim: int, harm: Damage) -> KernelTable:
    parts = [harm.part if rank == victim else part for rank, part in enumerate(sound.parts)]
    listed = [(Path(f"{part.rank}.json"), part) for part in parts]
    if not cell.off:
        return build_table(listed)
    with mock.patch("pytest_sglprof._trace.read.with_lost_steps", _unchecked):
        return build_table(listed)


def _unchecked(
    parts: Sequence[RankActivities],
) -> tuple[list[RankActivities], list[str], str]:
    return list(parts), [], ""


def _by_files(cell: Cell, sound: Window, victim: int, harm: Damage) -> KernelTable:
    with tempfile.TemporaryDirectory() as folder:
        for rank, pair in enumerate(zip(sound.parts, sound.call, strict=True)):
            part, call = (harm.recorded, harm.call) if rank == victim else pair
            name = len(sound.parts) - 1 - rank if cell.kind == SWAPPED else rank
            size = len(sound.parts) + (cell.kind == OTHER_SIZE and rank == victim)
            later_s = 3600 if cell.kind == OTHER_HOUR and rank == victim else 0
            path = Path(folder) / f"1790000000.1-TP-{name}.trace.json"
            write(path, part, call, size=size, later_s=later_s)
        return read_window(folder)


def _has_count(reason: str, count: int) -> bool:
    """Whether a reason names a number of kernels that is this one, or one more or less."""
    numbers = re.findall(r"([\d,]+)(?= of [\d,]+ launch| kernels \()", reason)
    return any(abs(int(number.replace(",", "")) - count) <= 1 for number in numbers)


# What is promised of a cell.


def broken(cell: Cell, seen: Outcome) -> str:
    """Which promise a cell does not keep; "" if it keeps all of them."""
    right, none = seen.right / seen.windows, seen.none / seen.windows
    if cell.off:
        return "" if seen.wrong / seen.windows >= 0.3 else "detection is not needed"
    if seen.wrong:
        return "wrong verdict"
    if not cell.is_judged:
        if none < 0.99:
            return "verdict in spite of the damage"
        return "" if cell.kind in FOREIGN or seen.counted >= 0.99 * seen.none else "wrong count"
    if cell.kind == "lost front":
        return "" if right >= 0.8 else "no verdict"
    needed = 0.95 if cell.share < SHARE_LIMIT / 2 else 0.8
    return "" if right >= needed or not cell.slow else "no verdict"


# The table.


def rows(results: Sequence[tuple[Cell, Outcome]]) -> Iterator[str]:
    """The lines of the table, in Markdown: ranks and files of one kind and share in one row."""
    head = (
        "damage",
        "share",
        "slow rank",
        "windows",
        "right",
        "wrong",
        "no verdict",
        "count",
        "kept",
    )
    yield f"| {' | '.join(head)} | shown on |"
    yield "| --- | ---: | --- | ---: | ---: | ---: | ---: | ---: | --- | --- |"
    grouped: dict[tuple[str, float, bool, bool], list[tuple[Cell, Outcome]]] = {}
    for cell, seen in results:
        grouped.setdefault((cell.kind, cell.share, cell.slow, cell.off), []).append((cell, seen))
    for (kind, share, slow, off), same in grouped.items():
        total = {
            name: sum(getattr(seen, name) for _, seen in same)
            for name in ("windows", "right", "wrong", "none", "counted")
        }
        faults = "; ".join(dict.fromkeys(filter(None, (broken(*pair) for pair in same))))
        percent = {
            name: f"{100 * total[name] / total['windows']:.1f} %"
            for name in ("right", "wrong", "none")
        }
        counted = f"{100 * total['counted'] / total['none']:.0f} %" if total["none"] else "–"
        texts = (
            f"{kind}, detection off" if off else kind,
            f"{100 * share:g} %" if share else "–",
            f"{SLOW}×" if slow else "none",
            f"{total['windows']:,}",
            *percent.values(),
            counted if share and not off else "–",
            faults or "yes",
        )
        yield f"| {' | '.join(texts)} | planted model |"


def main() -> int:
    """Runs all cells, prints the table, and says which promises are not kept."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--windows", type=int, default=200, help="of a cell, in memory")
    parser.add_argument("--files", type=int, default=5, help="windows of a cell by files")
    parser.add_argument("--kind", help="only this kind of damage")
    parser.add_argument("--write", action="store_true", help="put the table into docs/truth.md")
    args = parser.parse_args()
    chosen = [cell for cell in cells() if args.kind in (None, cell.kind)]
    counts = [args.files if cell.on_files else args.windows for cell in chosen]
    seen = []
    os.environ["OPENBLAS_NUM_THREADS"] = "1"  # for the new processes: one works on each core
    with ProcessPoolExecutor(os.cpu_count(), get_context("spawn")) as pool:
        for result in pool.map(outcome, chosen, counts):
            seen.append(result)
            if len(seen) % 10 == 0:
                print(f"{len(seen)} of {len(chosen)} cells", file=sys.stderr, flush=True)
    lines = list(rows(list(zip(chosen, seen, strict=True))))
    print("\n".join(lines))
    if args.write:
        text = PAGE.read_text()
        before, after = text.partition(BEGIN)[0], text.partition(END)[2]
        PAGE.write_text("\n".join([f"{before}{BEGIN}", *lines, f"{END}{after}"]))
    return int(any(broken(cell, result) for cell, result in zip(chosen, seen, strict=True)))


if __name__ == "__main__":
    sys.exit(main())
