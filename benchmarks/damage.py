"""Whether verdicts on damaged or foreign traces mislead:

    python -m benchmarks.damage [--windows 200] [--files 5] [--cells TEXT] [--write docs/truth.md]

Each cell is a kind of damage, its share, a number of ranks, and whether one of them is slow
(`benchmarks.damage_model`). Its windows are judged from the columns of their events on; `--files`
more of them are written as traces and judged by `sglprof check`. A cell misses its bound where a
healthy rank is blamed, a slow one passes, or too many windows have another verdict than
`Kind` says. `--cells` takes only cells whose key holds the text. `--write` puts the table between
the markers of a file. The exit status is 1 if any cell misses its bound.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import re
import sys
import tempfile
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, fields, replace
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

import msgspec
import numpy as np

from benchmarks.damage_model import (
    AT_ANOTHER_TIME,
    CALLS,
    COPY,
    NAMES,
    OF_ANOTHER_SIZE,
    ON_ANOTHER_GPU,
    Apply,
    Foreign,
    RankTrace,
    Rng,
    Window,
    bad_durations,
    counts_of,
    file_name,
    lost_every_nth,
    lost_front,
    lost_scattered,
    lost_stream,
    over_the_next,
    planned,
    projections,
    sound_window,
    write_trace,
)
from pytest_sglprof._cli.main import main as sglprof
from pytest_sglprof._config.model import Threshold
from pytest_sglprof._errors import TraceError
from pytest_sglprof._trace.paths import FileRanks
from pytest_sglprof._trace.read import build_table
from pytest_sglprof._trace.torch.assemble import _assembled
from pytest_sglprof._trace.torch.events import (
    KERNEL,
    LAUNCH,
    MEMCPY,
    Annotation,
    Columns,
    FileFacts,
    Header,
    run_facts,
)
from pytest_sglprof._trace.torch.pool import FileContent
from pytest_sglprof._verdict.judge import judge

LIMIT = Threshold(metric="slowdown", limit=1.10, scope="compute")
SHARES = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5)
RANKS = (2, 8)
EIGHT_SHARES = (0.0, 0.005, 0.01, 0.02, 0.1, 0.3)  # of eight ranks, whose windows take longest
COUNTED = re.compile(r"(TP\d+): ([\d,]+)")  # of kernels, in a reason
BEGIN, END = "<!-- table of benchmarks.damage: begin -->", "<!-- end -->"


class Kind(NamedTuple):
    """One kind of damage.

    apply: to the trace of one rank; foreign: makes it of that of another run. undecided_from: the
    share from which a verdict must be inconclusive. certain_below, likely_to: the shares below
    and up to which a slow rank must fail. is_cut: whether balanced windows must pass likewise.
    in_columns: whether columns of events show it, not only files. is_off: whether nothing looks for
    it. shown_on: on what a kept bound is shown.
    """

    name: str
    apply: Apply | None = None
    foreign: Foreign | None = None
    shares: tuple[float, ...] = SHARES
    undecided_from: float = 0.02
    certain_below: float = 0.005
    likely_to: float = 0.01
    is_cut: bool = False
    vendor: str = "cuda"
    in_columns: bool = True
    is_off: bool = False
    shown_on: str = "planted model"


NEVER = 2.0  # a share that no damage has
_NO_VERDICT = {"shares": (0.0,), "undecided_from": 0.0, "certain_below": 0.0, "likely_to": -1.0}
KINDS = (
    Kind("nothing lost", shares=(0.0,), undecided_from=NEVER, is_cut=True),
    Kind("lost front", lost_front, undecided_from=0.31, likely_to=0.3, is_cut=True),
    Kind("lost stream", lost_stream, undecided_from=0.1),
    Kind("lost every nth", lost_every_nth),
    Kind("lost scattered", lost_scattered),
    Kind("bad durations", bad_durations),
    Kind("over the next", over_the_next, vendor="hip"),
    Kind("run of another size", foreign=OF_ANOTHER_SIZE, **_NO_VERDICT),
    Kind("run at another time", foreign=AT_ANOTHER_TIME, **_NO_VERDICT),
    Kind("run on another GPU", foreign=ON_ANOTHER_GPU, in_columns=False, **_NO_VERDICT),
    Kind("swapped files", **_NO_VERDICT),
    Kind("lost front, detection off", lost_front, shares=(0.1, 0.2, 0.3, 0.5), is_off=True),
    Kind("lost every nth, detection off", lost_every_nth, shares=(0.1, 0.2, 0.3), is_off=True),
)


class Cell(NamedTuple):
    """What is judged many times. of: the kind."""

    of: Kind
    share: float
    ranks: int
    is_slow: bool

    @property
    def key(self) -> str:
        """`lost front 10 % 2 ranks slow`."""
        slow = "slow" if self.is_slow else "balanced"
        return f"{self.of.name} {100 * self.share:g} % {self.ranks} ranks {slow}"


def cells(text: str = "") -> list[Cell]:
    """All cells whose key holds `text`."""
    listed = [
        Cell(kind, share, ranks, is_slow)
        for kind in KINDS
        for ranks in RANKS
        for share in kind.shares
        if ranks == 2 or (share in EIGHT_SHARES and not kind.is_off)
        for is_slow in (False, True)
    ]
    return [cell for cell in listed if text in cell.key]


# One window.


class Planted(NamedTuple):
    """A damaged window. places: the ranks whose files were exchanged or damaged; counts: what a
    reason may say is missing on the damaged one. swapped: whether the two files have each
    other's names.
    """

    window: Window
    places: tuple[int, ...] = ()
    counts: frozenset[int] = frozenset()
    swapped: bool = False

    def named(self) -> Iterator[tuple[str, RankTrace]]:
        """Each trace with the name of its file."""
        names = [file_name(rank) for rank in range(len(self.window.traces))]
        if self.swapped:
            one, other = self.places
            names[one], names[other] = names[other], names[one]
        yield from zip(names, self.window.traces, strict=True)


def planted(cell: Cell, rng: Rng, *, is_small: bool = False) -> Planted:
    """A window of the cell; a slow rank is the damaged one in half of its windows."""
    kind = cell.of
    slow = int(rng.integers(cell.ranks)) if cell.is_slow else None
    plan = planned(rng, cell.ranks, kind.vendor, is_small=is_small)
    window = sound_window(rng, plan, ranks=cell.ranks, slow=slow)
    place = int(rng.integers(cell.ranks))
    if slow is not None and rng.random() < 0.5:
        place = slow
    sound = window.traces[place]
    if kind.apply is not None:
        damaged = kind.apply(sound, cell.share, rng)
        counts = frozenset(counts_of(sound, damaged))
        return Planted(window.with_trace(place, damaged), (place,), counts)
    if kind.foreign is not None:
        pace = kind.foreign.pace
        other = sound_window(rng, plan, ranks=cell.ranks, slow=slow, pace=pace).traces[place]
        return Planted(window.with_trace(place, kind.foreign.apply(other, rng)), (place,))
    if kind.name == "swapped files":
        return Planted(window, (place, (place + 1) % cell.ranks), swapped=True)
    return Planted(window)


def content_of(name: str, trace: RankTrace) -> FileContent:
    """What the reader has after it parsed the file of a trace."""
    kernels, calls = trace.kernels, trace.calls
    readable = kernels.take(kernels.is_readable)
    count, launches = len(readable.start), len(calls.start)

    def column(of_kernels: object, of_calls: object, kind: str) -> np.ndarray:
        both = np.empty(count + launches, kind)
        both[:count], both[count:] = of_kernels, of_calls
        return both

    is_copy = readable.name == NAMES.index(COPY)
    columns = Columns(
        start=column(readable.start, calls.start, "i8"),
        dur=column(readable.dur, 2_000, "i8"),
        name=column(readable.name, calls.name + len(NAMES), "i4"),
        kind=column(np.where(is_copy, MEMCPY, KERNEL), LAUNCH, "i1"),
        stream=column(readable.stream, 1, "i4"),
        correlation=column(readable.correlation, calls.correlation, "i4"),
        graph=column(readable.is_node & trace.has_nodes, 0, "i1"),
        device=column(trace.rank, 0, "i2"),
        context=column(1, 0, "i4"),
        owner=column(0, 0, "i2"),
    )
    unreadable = len(kernels.start) - count
    on_cpu = [Annotation(0, s.name, s.start, s.dur, False, "1", s.number) for s in trace.spans]
    on_gpu = [
        Annotation(0, span.name, start, end - start, True, str(stream), span.number)
        for stream, start, end, span in projections(trace)
    ]
    info = {"backend": "nccl", "rank": trace.rank, "world_size": trace.world_size}
    facts = FileFacts(
        names=[*NAMES, *CALLS[trace.vendor]],
        owners=[""],
        annotations=[*on_cpu, *on_gpu],
        base=str(trace.base),
        distributed=json.dumps(info),
        run=run_facts(Header(distributed=msgspec.Raw(json.dumps(info).encode()))),
        skipped={(0, "kernel events with a negative time"): unreadable} if unreadable else {},
    )
    return FileContent(Path(name), columns=columns, facts=facts)


class Judged(NamedTuple):
    """word: of the verdict, "refused" for an error; blamed: the slowest rank of a failure."""

    word: str
    blamed: str
    reason: str


def judged_columns(planted: Planted, *, is_off: bool = False) -> Judged:
    """By the functions of `sglprof check`, from the columns of events on.

    is_off: without what tells that kernels are missing.
    """
    named = list(planted.named())
    ranks = FileRanks([Path(name) for name, _ in named], {})
    try:
        parts = [
            (Path(name), part)
            for name, trace in named
            for part in _assembled(content_of(name, trace), ranks)
        ]
        if is_off:
            parts = [(at, replace(part, launches=None, unusable=0)) for at, part in parts]
        table = build_table(parts)
        if table.incomparable:  # `judge` then needs its figures for the report only
            return Judged("inconclusive", "", table.incomparable)
        verdict = judge(table, [LIMIT])
    except TraceError as error:
        return Judged("refused", "", str(error))
    finding = verdict.deciding.finding if verdict.deciding is not None else None
    return Judged(verdict.word, (finding.slowest or "") if finding else "", verdict.reason)


def judged_files(planted: Planted, rng: Rng) -> Judged:
    """By `sglprof check`, of files."""
    with tempfile.TemporaryDirectory() as folder:
        for name, trace in planted.named():
            write_trace(trace, Path(folder) / name, rng)
        output, errors = Path(folder) / "verdict", io.StringIO()
        limit = ("--metric", LIMIT.metric, "--limit", str(LIMIT.limit), "--scope", LIMIT.scope)
        with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(io.StringIO()):
            sglprof(["check", folder, *limit, "--format", "json", "--output", str(output)])
        if not output.exists():
            return Judged("refused", "", errors.getvalue())
        document = json.loads(output.read_text())
    blamed = document["checks"][0]["slowest"] if document["checks"] else ""
    return Judged(document["verdict"], blamed or "", document["reason"])


# A cell.


@dataclass
class Tally:
    """How many windows of a cell had each outcome. counted: inconclusive ones whose reason has
    the right number of kernels, of the right rank alone. on_slow: windows in which the slow rank is
    the damaged one. samples: a reason of each outcome.
    """

    windows: int = 0
    fail_right: int = 0
    fail_wrong: int = 0
    passed: int = 0
    undecided: int = 0
    counted: int = 0
    on_slow: int = 0
    samples: dict[str, str] = field(default_factory=dict)

    def add(self, planted: Planted, judged: Judged) -> None:
        """Counts one window."""
        slow = planted.window.slow
        outcome = {"pass": "passed", "fail": "fail_wrong"}.get(judged.word, "undecided")
        if judged.word == "fail" and slow is not None and judged.blamed == f"TP{slow}":
            outcome = "fail_right"
        self.windows += 1
        self.on_slow += slow in planted.places
        setattr(self, outcome, getattr(self, outcome) + 1)
        right = outcome == "undecided" and is_counted(planted, judged.reason)
        self.counted += right
        key = "counted wrong" if outcome == "undecided" and not right else outcome
        self.samples.setdefault(key, f"{judged.reason} (planted: {sorted(planted.counts)})")

    def __add__(self, other: Tally) -> Tally:
        numbers = [each.name for each in fields(self) if each.name != "samples"]
        sums = {name: getattr(self, name) + getattr(other, name) for name in numbers}
        return Tally(**sums, samples={**other.samples, **self.samples})


def is_counted(planted: Planted, reason: str) -> bool:
    """Whether the reason says how many kernels are missing, ± 1, and of that rank alone."""
    counts = [(rank, int(n.replace(",", ""))) for rank, n in COUNTED.findall(reason)]
    ranks = {f"TP{place}" for place in planted.places}
    is_right = any(abs(n - count) <= 1 for _, n in counts for count in planted.counts)
    return is_right and {rank for rank, _ in counts} == ranks


def tally_of(cell: Cell, first: int, last: int, files: int) -> tuple[Tally, Tally]:
    """Windows `first` to `last` of a cell, and the first `files` of the same as files."""
    columns, written = Tally(), Tally()
    for number in range(first, last) if cell.of.in_columns else ():
        window = planted(cell, _rng(cell, number))
        columns.add(window, judged_columns(window, is_off=cell.of.is_off))
    for number in range(first, min(last, files)) if not cell.of.is_off else ():
        rng = _rng(cell, number)
        window = planted(cell, rng, is_small=True)
        written.add(window, judged_files(window, rng))
    return columns, written


def _rng(cell: Cell, number: int) -> Rng:
    return np.random.default_rng([zlib.crc32(cell.key.encode()), number])


# Bounds.

ALMOST_ALL, MOST, NEARLY_ALL = 0.95, 0.80, 0.99
MISLED_OFF = 0.30  # of the windows of some cell, where nothing looks for what is missing


def misses(cell: Cell, tally: Tally) -> list[str]:
    """Which bounds a cell misses."""
    if cell.of.is_off or not tally.windows:
        return []
    right = (tally.fail_right if cell.is_slow else tally.passed) / tally.windows
    is_bound = cell.is_slow or cell.of.is_cut
    least = NEARLY_ALL if cell.share >= cell.of.undecided_from else 0.0
    bounds = (
        (tally.fail_wrong > 0, "a wrong rank is blamed"),
        (cell.is_slow and tally.passed > 0, "a slow rank passes"),
        (tally.undecided < least * tally.windows, "too few inconclusive"),
        (bool(cell.of.apply) and tally.counted < least * tally.windows, "wrong counts"),
        (is_bound and cell.share <= cell.of.likely_to and right < MOST, "too few right verdicts"),
        (is_bound and cell.share < cell.of.certain_below and MOST <= right < ALMOST_ALL,
         "too few right verdicts"),
    )  # fmt: skip
    return [text for is_missed, text in bounds if is_missed]


def misled_share(results: dict[Cell, Tally], kind: Kind) -> float:
    """The largest share of a cell's verdicts that blame a healthy rank or pass a slow one."""
    wrong = (
        (tally.fail_wrong + (tally.passed if cell.is_slow else 0)) / tally.windows
        for cell, tally in results.items()
        if cell.of == kind and tally.windows
    )
    return max(wrong, default=0.0)


# The command.

COLUMNS = (
    *("damage", "share", "ranks", "slow?", "fail right", "fail wrong", "pass", "inconclusive"),
    *("count right", "of files: right / wrong / pass / inconclusive", "shown on", "bound"),
)
HEAD = (f"| {' | '.join(COLUMNS)} |", f"| {' | '.join(['---'] * len(COLUMNS))} |")


def row(cell: Cell, columns: Tally, written: Tally) -> str:
    """One line of the table. Counts are windows."""
    outcomes = "fail_right", "fail_wrong", "passed", "undecided"
    numbers = [str(getattr(columns, name)) if columns.windows else "–" for name in outcomes]
    files = " / ".join(str(getattr(written, name)) for name in outcomes) if written.windows else "–"
    is_count = cell.of.apply is not None and columns.undecided > 0 and not cell.of.is_off
    counted = f"{columns.counted} of {columns.undecided}" if is_count else "–"
    missed = dict.fromkeys([*misses(cell, columns), *misses(cell, written)])
    slow = "no"
    if cell.is_slow:
        slow = f"yes, damaged in {columns.on_slow}" if columns.on_slow else "yes"
    share = f"{100 * cell.share:g} %" if cell.share else "–"
    bound = f"**missed**: {', '.join(missed)}" if missed else "–" if cell.of.is_off else "kept"
    shown_on = "not shown" if missed else cell.of.shown_on
    entries = (cell.of.name, share, str(cell.ranks), slow, *numbers, counted, files,
               shown_on, bound)  # fmt: skip
    return f"| {' | '.join(entries)} |"


PIECE = 25  # windows that a process judges at once


def measured(
    chosen: Sequence[Cell], windows: int, files: int
) -> Iterator[tuple[Cell, Tally, Tally]]:
    """Each cell with the tally of its windows and of its files, in order."""
    os.environ["OPENBLAS_NUM_THREADS"] = "1"  # of the new processes: one works on each core
    with ProcessPoolExecutor(os.cpu_count(), get_context("spawn")) as pool:
        jobs = [
            [
                pool.submit(tally_of, cell, first, min(first + PIECE, count), files)
                for first in range(0, count, PIECE)
            ]
            for cell in chosen
            for count in [windows if cell.ranks == 2 else max(windows // 2, 1)]
        ]
        for cell, parts in zip(chosen, jobs, strict=True):
            columns, written = Tally(), Tally()
            for part in parts:
                more = part.result()
                columns, written = columns + more[0], written + more[1]
            yield cell, columns, written


def main() -> int:
    """Judges, prints, writes; the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--windows", type=int, default=200, help="of a cell of two ranks, in memory"
    )
    parser.add_argument("--files", type=int, default=5, help="of each cell, written as traces")
    parser.add_argument("--cells", default="", help="only those whose key holds this text")
    parser.add_argument("--write", type=Path, help="the file whose table is rewritten")
    parser.add_argument("--samples", action="store_true", help="print a reason of each outcome")
    args = parser.parse_args()
    lines = [*HEAD]
    write("\n".join(HEAD))
    results: dict[Cell, Tally] = {}
    missed = 0
    for cell, columns, written in measured(cells(args.cells), args.windows, args.files):
        results[cell] = columns
        missed += bool(misses(cell, columns) or misses(cell, written))
        lines.append(row(cell, columns, written))
        write(lines[-1])
        for where, tally in (("", columns), ("files: ", written)) if args.samples else ():
            write("".join(f"    {where}{key}: {tally.samples[key]}\n" for key in tally.samples))
    off = [kind for kind in KINDS if kind.is_off and any(cell.of == kind for cell in results)]
    closing = [
        f"{args.windows} windows a cell, half as many of eight ranks, {args.files} as files; "
        f"{missed} of {len(results)} cells miss a bound."
    ]
    for kind in off:
        misled = misled_share(results, kind)
        missed += misled < MISLED_OFF
        closing.append(
            f"{kind.name}: {100 * misled:.0f} % of the verdicts of its worst cell are wrong "
            f"(expected: at least {100 * MISLED_OFF:.0f} %)."
        )
    lines += ["", *closing]
    write("\n".join(closing))
    if args.write is not None:
        rewrite(args.write, lines)
    return int(missed > 0)


def rewrite(path: Path, lines: Sequence[str], begin: str = BEGIN) -> None:
    """Puts the lines between the markers of a file."""
    before, rest = path.read_text().split(begin)
    after = rest.split(END, 1)[1]
    path.write_text("\n".join((f"{before}{begin}", *lines, f"{END}{after}")))


def write(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
