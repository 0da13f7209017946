"""How often verdicts are right, against an oracle:

    python -m benchmarks.truth [--windows 200] [--tables 50] [--cells TEXT] [--write docs/truth.md]

Each cell is a number of ranks and of steps, a kind and size of noise, and a planted slowdown
(`benchmarks.truth_model`). Its windows are judged as matrices of step times, those of some cells
(`--tables` of each) also as kernel tables, by all of the judge. The truth of a window is its
realised ratio: what was planted, without the noise of the steps. At or below the limit a fail is
false; from 1.5 times its excess on a pass is. The oracle is a z-test that knows the noise.
`--cells` takes only cells whose key holds the text. `--write` puts the tables between the
markers of a file. The exit status is 1 if a bound is missed.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, fields
from multiprocessing import get_context
from pathlib import Path

from benchmarks.damage import rewrite, write
from benchmarks.truth_judge import MUTANTS, decide, decide_many, judged_table, mutant, oracle
from benchmarks.truth_model import (
    NOISE,
    Cell,
    Floats,
    at_the_edge,
    batch,
    grid,
    lives,
    repeated,
    residuals,
)
from pytest_sglprof._config.model import MOST_WINDOWS
from pytest_sglprof._metrics import PASS_MARGIN

BEGIN = "<!-- tables of benchmarks.truth: begin -->"


@dataclass
class Tally:
    """How many windows of a cell (or lives) had each outcome.

    healthy, slow: those whose truth is at or below the limit, and at or above PASS_MARGIN times its
    excess; false_fail, false_pass: of these. named, wrong: fails in which one planted rank alone is
    above the limit, and those that name another. oracle_fail, oracle_pass: of the oracle.
    looks: windows that lives took. tables, unlike: judged as kernel tables too, and how many
    of them have another verdict than their matrix.
    """

    windows: int = 0
    failed: int = 0
    passed: int = 0
    healthy: int = 0
    slow: int = 0
    false_fail: int = 0
    false_pass: int = 0
    named: int = 0
    wrong: int = 0
    oracle_fail: int = 0
    oracle_pass: int = 0
    looks: int = 0
    tables: int = 0
    unlike: int = 0

    def add(self, cell: Cell, word: str, named: int | None, truth: Floats) -> None:
        """Counts one window. truth: log ratio of each rank."""
        top, excess = float(truth.max()), cell.limit - 1
        is_healthy = top <= math.log(cell.limit) + 1e-12
        is_slow = excess > 0 and top >= math.log1p(PASS_MARGIN * excess) - 1e-12
        is_fail, is_pass = word == "fail", word == "pass"
        self.windows += 1
        self.failed += is_fail
        self.passed += is_pass
        self.healthy += is_healthy
        self.slow += is_slow
        self.false_fail += is_fail and is_healthy
        self.false_pass += is_pass and is_slow
        if is_fail and cell.slow == 1 and cell.effect > 2:
            self.named += 1
            self.wrong += named != 0

    def __add__(self, other: Tally) -> Tally:
        names = [each.name for each in fields(self)]
        return Tally(**{name: getattr(self, name) + getattr(other, name) for name in names})


Results = dict[Cell, Tally]


def tally_of(cell: Cell, first: int, last: int, tables: int = 0, without: str = "") -> Tally:
    """Windows (or lives) `first` to `last` of a cell. tables: the first ones that are judged as
    kernel tables too. without: the mutant that judges them.
    """
    tally = Tally()
    with mutant(without):
        if cell.is_repeated:
            for matrices, truth in lives(cell, first, last, MOST_WINDOWS):
                word, named, looks = decide_many(matrices, cell.limit)
                tally.add(cell, word, named, truth)
                tally.looks += looks
            return tally
        drawn = batch(cell, first, last)
        fails, passes = oracle(cell, drawn)
        tally.oracle_fail, tally.oracle_pass = int(fails.sum()), int(passes.sum())
        for number, (matrix, truth) in enumerate(zip(drawn.matrices(), drawn.truth, strict=True)):
            word, named = decide(matrix, cell.limit)
            tally.add(cell, word, named, truth)
            if first + number < tables:
                tally.tables += 1
                tally.unlike += judged_table(matrix, cell.limit) != word
    return tally


PIECE = 50  # windows that a process judges at once
IN_TABLES = 12  # cells, evenly from the grid, that are judged as kernel tables too


def measured(
    chosen: Sequence[Cell], windows: int, tables: int = 0, without: str = ""
) -> Iterator[tuple[Cell, Tally]]:
    """Each cell with its tally, in order; half as many lives as windows."""
    os.environ["OPENBLAS_NUM_THREADS"] = "1"  # of the new processes: one works on each core
    whole = set(grid()[:: len(grid()) // IN_TABLES + 1])
    with ProcessPoolExecutor(os.cpu_count(), get_context("spawn")) as pool:
        jobs = [
            [
                pool.submit(tally_of, cell, first, min(first + PIECE, count),
                            tables if cell in whole else 0, without)
                for first in range(0, count, PIECE)
            ]
            for cell in chosen
            for count in [max(windows // 2, 1) if cell.is_repeated else windows]
        ]  # fmt: skip
        for cell, parts in zip(chosen, jobs, strict=True):
            yield cell, sum((part.result() for part in parts), Tally())


# Bounds.

FALSE, FALSE_OF_FEW = 0.01, 0.03  # rates that a cell may have; of few effective steps
FEW_EFFECTIVE, ENOUGH_EFFECTIVE = 10, 20  # steps
BEHIND_ORACLE = 0.15  # of the slow windows
FAMILY = 0.01  # chance that some cell is significantly off, if none is
WRONG = 0.001  # of the fails


def at_least(count: int, windows: int, rate: float) -> float:
    """Chance of `count` or more of `windows`, each with the chance `rate`."""
    if count <= 0 or rate >= 1:
        return 1.0
    if rate <= 0:
        return 0.0
    return math.fsum(
        math.exp(
            math.lgamma(windows + 1) - math.lgamma(k + 1) - math.lgamma(windows - k + 1)
            + k * math.log(rate) + (windows - k) * math.log1p(-rate)
        )
        for k in range(count, windows + 1)
    )  # fmt: skip


def least_found(cell: Cell) -> float | None:
    """The share of fails that is promised by number; None without a promise."""
    is_calm = cell.noise in ("white", "AR 0.6")
    if cell.limit != 1.02 or cell.slow > 1:
        return None
    if cell.is_repeated:
        least = 0.6 if cell.ranks == 2 else 0.99
        return least if cell.effect == 5 and is_in_reach(cell) else None
    if cell.steps != 100:
        return None
    if (cell.ranks, cell.effect) == (8, 5) and cell.sd <= 0.02:
        return 0.95 if is_calm or cell.noise in ("spikes", "Pareto") else None
    if (cell.ranks, cell.effect) == (8, 10) and cell.sd == 0.05:
        return 0.95 if is_calm else None
    if (cell.ranks, cell.effect) == (2, 5) and cell.sd <= 0.02:
        return 0.80 if is_calm else None
    return None


def is_in_reach(cell: Cell) -> bool:
    """Whether eight windows can be certain. Of ranks that move by 1 % and correlated steps of 5 %
    noise even an oracle leaves up to half of the lives open.
    """
    return cell.moving == 0 or cell.sd <= 0.02 or cell.noise == "white"


def misses(cell: Cell, tally: Tally, cells: int) -> list[str]:
    """Which bounds a cell misses. cells: how many are looked at."""
    level = FAMILY / max(cells, 1)
    allowed = FALSE_OF_FEW if cell.effective < FEW_EFFECTIVE else FALSE
    if NOISE[cell.noise].hidden and cell.effective < FEW_EFFECTIVE:
        allowed = 1.0  # so few independent steps do not show how they hang together
    failed, missed = tally.failed / max(tally.windows, 1), []
    for word, count, among in (
        ("fail", tally.false_fail, tally.healthy),
        ("pass", tally.false_pass, tally.slow),
    ):
        if at_least(count, among, allowed) < level:
            missed.append(f"{count} of {among} {word} falsely")
    least = least_found(cell)
    if least is not None and failed < least:
        missed.append(f"{percent(failed)} % found, {percent(least)} promised")
    if cell.is_repeated:
        passed = tally.passed / max(tally.windows, 1)
        least = 0.6 if cell.ranks == 2 else 0.95
        if cell.effect == 0 and is_in_reach(cell) and passed < least:
            missed.append(f"{percent(passed)} % pass, {percent(least)} promised")
    elif cell.effective >= ENOUGH_EFFECTIVE and cell.effect >= 5:
        reachable = tally.oracle_fail / max(tally.windows, 1)
        lacks = tally.windows - tally.failed
        if at_least(lacks, tally.windows, 1 - (reachable - BEHIND_ORACLE)) < level:
            missed.append(f"{percent(failed)} % found, {percent(reachable)} by the oracle")
    if tally.unlike:
        missed.append(f"{tally.unlike} of {tally.tables} otherwise as kernel tables")
    return missed


# The tables.


def percent(share: float) -> str:
    """`98`, or `0.5` near the ends."""
    value = 100 * share
    is_near_end = 0 < value < 2 or 98 < value < 100
    return f"{value:.1f}" if is_near_end else f"{value:.0f}"


def rates(tally: Tally, *, is_repeated: bool = False) -> str:
    """fail / pass / inconclusive in %, then fail / pass of the oracle."""
    count = max(tally.windows, 1)
    open_ = tally.windows - tally.failed - tally.passed
    judged = " / ".join(percent(each / count) for each in (tally.failed, tally.passed, open_))
    if is_repeated:
        return f"{judged} ({tally.looks / count:.1f})"
    of_oracle = (tally.oracle_fail, tally.oracle_pass)
    return f"{judged} ({' / '.join(percent(each / count) for each in of_oracle)})"


def table(results: Results) -> list[str]:
    """One line for each row of cells, one column for each effect."""
    rows: dict[str, dict[float, tuple[Cell, Tally]]] = {}
    for cell, tally in results.items():
        rows.setdefault(cell.row, {})[cell.effect] = cell, tally
    effects = sorted({cell.effect for cell in results})
    head = ("ranks × steps, noise", *(f"+{effect:g} %" for effect in effects))
    lines = [f"| {' | '.join(head)} |", f"| {' | '.join(['---'] * len(head))} |"]
    for row, cells in rows.items():
        entries = [
            rates(cells[effect][1], is_repeated=cells[effect][0].is_repeated)
            if effect in cells
            else "–"
            for effect in effects
        ]
        lines.append(f"| {row} | {' | '.join(entries)} |")
    return lines


def pooled(results: Results) -> list[str]:
    """False rates of all cells of a kind of noise together."""
    lines = ["| noise | false fails at the limit | false passes |", "| --- | --- | --- |"]
    kinds = dict.fromkeys((cell.noise, cell.is_repeated) for cell in results)
    for noise, is_repeated in kinds:
        of_kind = [
            (cell, tally)
            for cell, tally in results.items()
            if (cell.noise, cell.is_repeated) == (noise, is_repeated)
        ]
        at_limit = [tally for cell, tally in of_kind if tally.healthy and cell.effect in (0, 2)
                    and (cell.effect == 2 or cell.limit == 1)]  # fmt: skip
        fails = _share((tally.false_fail, tally.healthy) for tally in at_limit)
        passes = _share((tally.false_pass, tally.slow) for _, tally in of_kind)
        name = f"{noise}, until certain" if is_repeated else noise
        lines.append(f"| {name} | {fails} | {passes} |")
    return lines


def _share(counts: Iterable[tuple[int, int]]) -> str:
    pairs = list(counts)
    some, every = sum(pair[0] for pair in pairs), sum(pair[1] for pair in pairs)
    return f"{100 * some / every:.2f} % of {every:,}" if every else "–"


def closing(results: Results, windows: int) -> tuple[list[str], int]:
    """What to say below the tables, and how many bounds are missed."""
    missed = {cell: misses(cell, tally, len(results)) for cell, tally in results.items()}
    listed = [f"- {cell.key}: {'; '.join(texts)}" for cell, texts in missed.items() if texts]
    named = sum(tally.named for tally in results.values())
    wrong = sum(tally.wrong for tally in results.values())
    if wrong > WRONG * named:
        listed.append(f"- {wrong} of {named:,} fails name a wrong rank")
    half = 100 * 1.96 * math.sqrt(0.25 / windows)
    near = 100 * 1.96 * math.sqrt(0.01 * 0.99 / windows)
    lines = [
        f"{windows:,} windows a cell (half as many lives), {len(results):,} cells. With 95 % "
        f"certainty a rate is right within {half:.1f} points, near 1 % within {near:.1f}. "
        f"{wrong} of {named:,} fails name a wrong rank. Bounds missed: {len(listed)}.",
        *(["", *listed] if listed else []),
    ]
    if not residuals():
        lines.append("Recorded noise was left out: there are no recordings.")
    return lines, len(listed)


def document(results: Results, windows: int) -> tuple[list[str], int]:
    """All tables and what they say, and how many bounds are missed."""
    ending, missed = closing(results, windows)
    lines = [*ending, "", *pooled(results)]
    for name, listed in (
        ("of one window", grid()),
        ("at the edge", at_the_edge()),
        ("until certain", repeated()),
    ):
        part = {cell: results[cell] for cell in listed if cell in results}
        lines += ["", f"**Verdicts {name}**", "", *table(part)] if part else []
    return lines, missed


def cells(text: str = "") -> list[Cell]:
    """All cells whose key holds `text`; without recorded noise where there are no recordings."""
    every = [*grid(), *at_the_edge(), *repeated()]
    is_known = bool(residuals())
    return [each for each in every if text in each.key and (is_known or each.noise != "recorded")]


def main() -> int:
    """Judges, prints, writes; the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--windows", type=int, default=200, help="of a cell")
    parser.add_argument("--tables", type=int, default=50, help="of some cells, as kernel tables")
    parser.add_argument("--cells", default="", help="only those whose key holds this text")
    parser.add_argument("--without", default="", choices=("", *MUTANTS), help="a rule")
    parser.add_argument("--write", type=Path, help="the file whose tables are rewritten")
    args = parser.parse_args()
    began = time.monotonic()
    results = dict(measured(cells(args.cells), args.windows, args.tables, args.without))
    lines, missed = document(results, args.windows)
    write("\n".join(lines))
    write(f"{time.monotonic() - began:.0f} s")
    if args.write is not None:
        rewrite(args.write, lines, BEGIN)
    return int(missed > 0)


if __name__ == "__main__":
    sys.exit(main())
