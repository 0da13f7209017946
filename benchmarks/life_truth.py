"""Whether changes between server lives are judged rightly, on lives whose truth is planted:

    python -m benchmarks.life_truth [--seeds 500] [--nights 700] [--cells TEXT]
                                    [--write docs/truth.md]

Each cell is a way to compare lives, so many of them, and what is planted
(`standin.life_model`: lives differ by 1 % in everything and by 1.5 % in each of 200 kernels,
unless a cell says otherwise). Each life becomes a record, and the night is judged as pytest judges
it. gate: so many new lives, whatever they show; confirm: up to so many, as the first one asks for;
scan: the kernels that are listed as slower; A/B: the same of two servers by turns, by permutation.
What each column asks, in % of the nights:

- fail, pass: the verdict;
- found: the planted kernel is in the list; first: it heads it;
- false: the list has a kernel that was not changed;
- faster: the new lives are faster than the accepted ones;
- by steps: a test whether there is any difference rejects at 1 % if each step counts as a life;
- KS p: that p of the test whether lives are slower is uniform (Kolmogorov–Smirnov);
- new lives: how many a night took (a number);
- sees: what the gate says that it sees (95 % of the nights), median.

`--nights` are of the cells "same version", `--seeds` of each other one. `--cells` takes only cells
whose name holds the text. The exit status is 1 if a bound is missed: what is promised must be seen;
what happens at most so often by chance may be missed by chance (exact binomial, 1 %).
"""

from __future__ import annotations

import argparse
import os
import sys
import time
import zlib
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from math import comb, exp, inf, nan, sqrt
from multiprocessing import get_context
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from benchmarks.damage import rewrite, write
from benchmarks.life_judge import Night, by_steps, compared, judged
from pytest_sglprof._analysis.lives import LifeChange
from pytest_sglprof.standin.life_model import Change, Life, LifePlan, draw

BEGIN = "<!-- tables of benchmarks.life_truth: begin -->"
Way = Literal["gate", "confirm", "scan", "A/B"]
CHANCE = 0.01  # of a cell that keeps a bound on chance to miss it here
BY_STEPS = 0.01  # level of the test that takes steps for lives
OF_ONE_VERSION = "same version"


class Bound(NamedTuple):
    """A share of the nights, 0 to 1, that must be within low and high. is_of_chance: it is a
    probability that holds on average."""

    figure: str
    low: float = 0.0
    high: float = inf
    is_of_chance: bool = False

    @property
    def text(self) -> str:
        """`at least 90 %`."""
        if self.low and self.high < inf:
            return f"{percent(self.low)} to {percent(self.high)} %"
        return f"at least {percent(self.low)} %" if self.low else f"at most {percent(self.high)} %"


def least(figure: str, share: float) -> Bound:
    return Bound(figure, low=share)


def most(figure: str, share: float) -> Bound:
    return Bound(figure, high=share, is_of_chance=True)


class Cell(NamedTuple):
    """name: what is planted. factor, of: what is planted, in compute or in one kernel. limit: of
    the gate, and of what is listed. hosts: of the accepted lives, in turn, where there are several;
    the new ones run on another. bounds: what the cell promises.
    """

    name: str
    way: Way
    accepted: int
    fresh: int
    limit: float
    plan: LifePlan
    factor: float = 1.0
    of: Literal["", "compute", "kernel"] = ""
    hosts: int = 1
    is_new_host: bool = False
    bounds: tuple[Bound, ...] = ()

    @property
    def key(self) -> str:
        """`scan 10 + 4, +5 % in one kernel`."""
        return f"{self.way} {self.accepted} + {self.fresh}, {self.name}"

    def lives(self) -> tuple[Life, ...]:
        """The accepted lives, then the new ones."""
        old = tuple(Life(at % self.hosts) for at in range(self.accepted))
        host = self.hosts if self.is_new_host else 0
        return (*old, *[Life(host, bool(self.of))] * self.fresh)


USUAL = LifePlan()
CALM = replace(USUAL, kernel_sd=0.010)
BISTABLE = replace(USUAL, bistable=0.05)
TAILED = replace(USUAL, freedom=5)
ON_HOSTS = replace(USUAL, host_sd=0.01)
NO_FALSE = (most("false", 0.05), most("fail", 0.01))
CELLS = (
    Cell(
        OF_ONE_VERSION, "gate", 10, 1, 1.05, USUAL,
        bounds=(
            least("judged", 0.90), Bound("fail", high=2 / 700), Bound("faster", 0.45, 0.55),
            least("KS p", 0.01), least("by steps", 0.20),
        ),
    ),
    Cell("+5 %, at the limit", "gate", 10, 1, 1.05, USUAL, 1.05, "compute",
         bounds=(most("fail", 0.01),)),
    Cell("+7.5 %, at the bound of pass", "gate", 10, 1, 1.05, USUAL, 1.075, "compute",
         bounds=(most("pass", 0.05),)),
    Cell("+6 %", "gate", 10, 2, 1.02, USUAL, 1.06, "compute", bounds=(least("fail", 0.95),)),
    Cell("+3 %", "gate", 10, 2, 1.02, USUAL, 1.03, "compute"),
    Cell("no change", "gate", 10, 2, 1.02, USUAL, bounds=(most("fail", 0.01),)),
    Cell("no change, heavy tails", "gate", 10, 2, 1.02, TAILED, bounds=(most("fail", 0.01),)),
    Cell("no change, first life on its host", "gate", 10, 1, 1.02, ON_HOSTS, is_new_host=True,
         bounds=(Bound("judged", high=0.0),)),
    Cell("no change, 5 hosts and a new one", "gate", 10, 1, 1.02, ON_HOSTS, hosts=5,
         is_new_host=True, bounds=(most("fail", 0.01),)),
    Cell("no change", "confirm", 10, 4, 1.02, USUAL, bounds=(most("fail", 0.01),)),
    Cell("+2 %, at the limit", "confirm", 10, 4, 1.02, USUAL, 1.02, "compute",
         bounds=(most("fail", 0.01),)),
    Cell("+5 %, at the limit", "confirm", 10, 4, 1.05, USUAL, 1.05, "compute",
         bounds=(most("fail", 0.01),)),
    Cell("+6 %", "confirm", 10, 4, 1.02, USUAL, 1.06, "compute"),
    Cell("+5 % in one kernel", "scan", 10, 4, 1.02, USUAL, 1.05, "kernel",
         bounds=(least("found", 0.90), least("first", 0.90))),
    Cell("+5 % in one kernel", "scan", 10, 2, 1.02, USUAL, 1.05, "kernel",
         bounds=(least("found", 0.65),)),
    Cell("no change", "scan", 10, 4, 1.02, USUAL, bounds=NO_FALSE),
    Cell("no change", "scan", 10, 2, 1.02, USUAL, bounds=NO_FALSE),
    Cell("no change, bistable kernels", "scan", 10, 4, 1.02, BISTABLE, bounds=NO_FALSE),
    Cell("no change, bistable kernels", "scan", 10, 2, 1.02, BISTABLE, bounds=NO_FALSE),
    Cell("+6 % in compute", "scan", 10, 2, 1.02, USUAL, 1.06, "compute"),
    Cell("+5 % in one kernel", "A/B", 5, 5, 1.02, USUAL, 1.05, "kernel",
         bounds=(least("found", 0.70),)),
    Cell("+5 % in one kernel, sd 1 %", "A/B", 5, 5, 1.02, CALM, 1.05, "kernel",
         bounds=(least("found", 0.95),)),
    Cell("no change", "A/B", 5, 5, 1.02, USUAL, bounds=NO_FALSE),
    Cell("no change, bistable kernels", "A/B", 5, 5, 1.02, BISTABLE, bounds=NO_FALSE),
)  # fmt: skip


@dataclass
class Tally:
    """Of how many nights each is true. lives: new ones. p: of the test whether lives are slower,
    sees: smallest ratio that the gate says it sees, of each night. whys: how often lives could not
    be compared, by reason."""

    nights: int = 0
    judged: int = 0
    fail: int = 0
    passed: int = 0
    faster: int = 0
    listed: int = 0
    first: int = 0
    false: int = 0
    by_steps: int = 0
    lives: int = 0
    p: list[float] = field(default_factory=list)
    sees: list[float] = field(default_factory=list)
    whys: dict[str, int] = field(default_factory=dict)

    def add(self, other: Tally) -> None:
        """Adds other nights."""
        for name, value in vars(other).items():
            if name != "whys":
                setattr(self, name, getattr(self, name) + value)
        for why, count in other.whys.items():
            self.whys[why] = self.whys.get(why, 0) + count

    def figure(self, name: str) -> float:
        """A column of the table as a share, 0 to 1; not a number where nothing was counted."""
        if name == "KS p":
            return ks_p(self.p)
        count = {"pass": self.passed, "by steps": self.by_steps, "found": self.listed}.get(name)
        if count is None:
            count = getattr(self, name)
        return count / self.nights if self.nights else nan


def tally_of(cell: Cell, seeds: Iterable[int], *, unit: str = "life") -> Tally:
    """Judges the nights of a cell. unit: "step" takes p as if each step were a life."""
    tally = Tally()
    for seed in seeds:
        kernel = seed % cell.plan.kernels
        change = None
        if cell.of:
            change = Change(cell.factor, kernel=kernel if cell.of == "kernel" else None)
        lives = draw(cell.plan, cell.lives(), [zlib.crc32(cell.key.encode()), seed], change)
        night = judged(lives, cell.accepted, cell.limit, confirm=cell.way == "confirm")
        of_steps = by_steps(lives, cell.accepted)
        _count(tally, night, of_steps if unit == "step" else night.change)
        tally.by_steps += of_steps.difference_p <= BY_STEPS
        if cell.way == "A/B":
            night = night._replace(slower=compared(lives, cell.accepted, cell.limit))
        planted = {kernel} if cell.of == "kernel" else set()
        if cell.of == "compute":
            planted = set(range(cell.plan.kernels))
        tally.listed += bool(planted & set(night.slower))
        tally.first += bool(night.slower) and night.slower[0] in planted
        tally.false += bool(set(night.slower) - planted)
    return tally


def _count(tally: Tally, night: Night, change: LifeChange | None) -> None:
    tally.nights += 1
    tally.judged += night.word in ("pass", "fail")
    tally.fail += night.word == "fail"
    tally.passed += night.word == "pass"
    tally.lives += night.fresh
    if night.sees is not None:
        tally.sees.append(night.sees)
    if change is None:
        tally.whys[night.sentence] = tally.whys.get(night.sentence, 0) + 1
    else:
        tally.faster += change.ratio < 1
        tally.p.append(change.chance(1.0))


def ks_p(values: Sequence[float]) -> float:
    """The p of Kolmogorov and Smirnov's test that values are uniform, with Stephens' correction."""
    count = len(values)
    if not count:
        return nan
    ordered, steps = np.sort(values), np.arange(count + 1) / count
    distance = max(float((steps[1:] - ordered).max()), float((ordered - steps[:-1]).max()))
    scaled = distance * (sqrt(count) + 0.12 + 0.11 / sqrt(count))
    terms = ((-1) ** (k - 1) * exp(-2 * k**2 * scaled**2) for k in range(1, 101))
    return min(1.0, max(0.0, 2 * sum(terms)))


def tail(count: int, of: int, rate: float) -> float:
    """How probable so many or more of `of` are at a rate (binomial, exact)."""
    return sum(comb(of, k) * rate**k * (1 - rate) ** (of - k) for k in range(count, of + 1))


def missed(cell: Cell, tally: Tally) -> list[str]:
    """The bounds that a cell misses."""
    texts = []
    for bound in cell.bounds:
        value = tally.figure(bound.figure)
        if bound.is_of_chance:
            is_kept = tail(round(value * tally.nights), tally.nights, bound.high) >= CHANCE
        else:
            is_kept = bound.low <= value <= bound.high
        if not is_kept:
            texts.append(f"{cell.key}: {bound.figure} {percent(value)} %, {bound.text} asked")
    return texts


# The table.


def percent(share: float) -> str:
    """`98`, or `0.4` near the ends."""
    value = 100 * share
    return f"{value:.1f}".removesuffix(".0") if value < 2 or value > 98 else f"{value:.0f}"


COLUMNS = ("judged", "fail", "pass", "found", "first", "false", "faster", "by steps", "KS p")


def table_lines(rows: Iterable[tuple[Cell, Tally]]) -> Iterator[str]:
    """The table of all cells, in %."""
    yield f"| lives | limit | nights | {' | '.join(COLUMNS)} | new lives | sees | promised |"
    yield f"|{' --- |' * (len(COLUMNS) + 6)}"
    for cell, tally in rows:
        shown = [percent(tally.figure(name)) if _is_asked(cell, name) else "–" for name in COLUMNS]
        shown.append(f"{tally.lives / tally.nights:.1f}" if tally.nights else "–")
        shown.append(f"+{100 * (np.median(tally.sees) - 1):.1f} %" if tally.sees else "–")
        promised = ", ".join(f"{bound.figure} {bound.text}" for bound in cell.bounds) or "nothing"
        yield (
            f"| {cell.key} | {cell.limit:g} | {tally.nights} | {' | '.join(shown)} | {promised} |"
        )


def _is_asked(cell: Cell, name: str) -> bool:
    if name in ("faster", "by steps", "KS p"):
        return not cell.of and not cell.is_new_host and cell.way != "confirm"
    if name in ("found", "first"):
        return cell.way in ("scan", "A/B") and bool(cell.of)
    return name != "false" or cell.way in ("scan", "A/B")


def document(rows: Sequence[tuple[Cell, Tally]]) -> tuple[list[str], int]:
    """The table, what it misses, and why lives could not be compared."""
    wrong = [line for cell, tally in rows for line in missed(cell, tally)]
    whys = [
        f"- {cell.key}: not compared in {count} of {tally.nights}: {why}"
        for cell, tally in rows
        for why, count in tally.whys.items()
    ]
    lines = [
        f"{len(rows)} cells. Bounds missed: {len(wrong)}.",
        "",
        *(f"- {line}" for line in wrong),
        *([""] if wrong else []),
        *table_lines(rows),
        *(["", *whys] if whys else []),
    ]
    return lines, len(wrong)


PIECE = 50  # nights of a job


def _worker(job: tuple[Cell, int, int]) -> Tally:
    cell, first, last = job
    return tally_of(cell, range(first, last))


def measured(chosen: Sequence[Cell], seeds: int, nights: int) -> Iterator[tuple[Cell, Tally]]:
    """Each cell with its tally, in order."""
    os.environ["OPENBLAS_NUM_THREADS"] = "1"  # of the new processes: one works on each core
    jobs = []
    for cell in chosen:
        count = nights if cell.name == OF_ONE_VERSION else seeds
        for first in range(0, count, PIECE):
            jobs.append((cell, first, min(first + PIECE, count)))
    tallies = {cell: Tally() for cell in chosen}
    with ProcessPoolExecutor(os.cpu_count(), mp_context=get_context("spawn")) as pool:
        for (cell, *_), tally in zip(jobs, pool.map(_worker, jobs), strict=True):
            tallies[cell].add(tally)
    yield from tallies.items()


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the table; returns 1 if a bound is missed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=500, help="nights of a cell")
    parser.add_argument("--nights", type=int, default=700, help="of the cells of one version")
    parser.add_argument("--cells", default="", help="only those whose name holds this text")
    parser.add_argument("--write", type=Path, help="the file whose table is rewritten")
    options = parser.parse_args(arguments)
    began = time.monotonic()
    chosen = [cell for cell in CELLS if options.cells in cell.key]
    lines, misses = document(list(measured(chosen, options.seeds, options.nights)))
    write("\n".join(lines))
    write(f"{time.monotonic() - began:.0f} s")
    if options.write:
        rewrite(options.write, lines, BEGIN)
    return int(misses > 0)


if __name__ == "__main__":
    sys.exit(main())
