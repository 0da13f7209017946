"""Finds the onsets in a finished log: where load changed, and where it was then unequal."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from pytest_sglprof._load.onset import (
    KINDS,
    NEARLY,
    Kind,
    Onset,
    OnsetRule,
    idle_ranks,
    imbalance,
    imbalances,
    judged_figures,
    sentence,
)
from pytest_sglprof._load.samples import LOG_STAMP, LoadSample, RankBoard, RankLoad, Servers

Floats = npt.NDArray[np.float64]

MAX_POINTS = 3000  # of the time grid on which changes are searched
FINEST = 0.1  # s between two grid points, in a log with milliseconds
PENALTY = 3.0  # x columns x log(points): squared deviation that a change must explain
FINE_GAP = 10.0  # s; longer gaps between two lines are rounded to the second
FIGURES = 4  # running, waiting, tokens, usage


@dataclass(frozen=True)
class FinishedLoad:
    """The onsets of a finished log. judged_s: seconds with enough requests to judge.

    largest_factor: largest λ of the requests that are judged, averaged between two changes.
    span: Unix times of the first and the last sample; (0, 0) without samples. compared: how
    many ranks of one group the log holds, at most. elsewhere: of each group, the ranks that it
    does not hold.
    """

    onsets: tuple[Onset, ...]
    judged_s: float
    largest_factor: float
    span: tuple[float, float]
    compared: int = 0
    elsewhere: Mapping[str, Sequence[str]] = field(default_factory=dict)


@dataclass
class RankOutline:
    """Sums over the lines of one rank. tokens: sum over the `with_tokens` lines that have them.

    first: the first sample. oldest, newest: times of the lines, Unix s. gaps: seconds between
    lines with different times, and how often each occurs.
    """

    first: LoadSample
    oldest: float = field(init=False)
    newest: float = field(init=False)
    lines: int = 0
    running: int = 0
    waiting: int = 0
    tokens: int = 0
    with_tokens: int = 0
    gaps: Counter[float] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self.oldest = self.newest = self.first.time

    @property
    def interval(self) -> float:
        """The median gap, s; 0 if all lines have the same time."""
        count = sum(self.gaps.values())
        middle = {(count - 1) // 2, count // 2}
        passed = 0
        middle_gaps: list[float] = []
        for gap in sorted(self.gaps):
            middle_gaps += [gap for place in middle if passed <= place < passed + self.gaps[gap]]
            passed += self.gaps[gap]
        return sum(middle_gaps) / len(middle_gaps) if middle_gaps else 0.0

    def add(self, sample: LoadSample) -> None:
        """Takes the next sample of this rank."""
        if sample.time > self.newest:
            gap = sample.time - self.newest
            self.gaps[gap if gap < FINE_GAP else float(round(gap))] += 1
            self.newest = sample.time
        self.oldest = min(self.oldest, sample.time)
        self.lines += 1
        self.running += sample.running
        self.waiting += sample.waiting
        if sample.tokens is not None:
            self.tokens += sample.tokens
            self.with_tokens += 1


class LoadOutline:
    """First pass over the samples of a log: the ranks in it, and the time span of each group.

    Its size does not grow with the number of samples. ranks: by what stands before the stamp
    and the label.
    """

    def __init__(self, samples: Iterable[LoadSample] = ()) -> None:
        self.ranks: dict[tuple[str, str], RankOutline] = {}
        self.servers = Servers()
        for sample in samples:
            self.add(sample)

    def add(self, sample: LoadSample) -> None:
        """Takes the next sample, in the order of the log."""
        key = sample.server, sample.rank
        rank = self.ranks.get(key)
        if rank is None:
            rank = self.ranks[key] = RankOutline(sample)
            self.servers.add(sample)
        rank.add(sample)

    @property
    def groups(self) -> dict[str, list[RankOutline]]:
        """The ranks of each group, see `Servers.group`."""
        groups: dict[str, list[RankOutline]] = {}
        for rank in self.ranks.values():
            groups.setdefault(self.servers.group(rank.first), []).append(rank)
        return groups


def finished_load(
    samples: Iterable[LoadSample],
    rule: OnsetRule,
    *,
    ranks: Sequence[str] = (),
    milliseconds: bool = False,
    outline: LoadOutline | None = None,
) -> FinishedLoad:
    """Every period of imbalance in a log, by change-point detection.

    samples: iterated twice, never held in memory; once if `outline` is given. ranks: labels of
    the DP ranks, if known. milliseconds: whether the log's stamps have them.

    The load is cut by binary segmentation (Scott and Knott 1974) wherever a cut explains more
    squared deviation than `PENALTY` x columns x log(points), with each figure in units of its
    noise. A part counts as unequal if its means are, by the same rule as online. Adjacent
    unequal parts are one onset.
    """
    outline = outline or LoadOutline(samples)
    groups = outline.groups
    if not groups:
        return FinishedLoad((), 0.0, 1.0, (0.0, 0.0))
    stamp = 0.0 if milliseconds else LOG_STAMP
    grids = {
        group: _Grid(outlines, outline.servers.board(outlines[0].first, ranks, stamp))
        for group, outlines in sorted(groups.items())
    }
    for sample in samples:
        if grid := grids.get(outline.servers.group(sample)):
            grid.add(sample)
    onsets: list[Onset] = []
    judged, largest = 0.0, 1.0
    for group, grid in grids.items():
        grid.fill(groups[group])
        if len(grid.ranks) < 2:
            continue
        parts = [_Part(begin, end, grid) for begin, end in _cuts(_scaled(grid.values))]
        busy = [(part, f) for part in parts if (f := judged_figures(part.loads, rule))]
        judged = max(judged, math.fsum(part.seconds for part, _ in busy))
        largest = max([largest, *(imbalance(figures) for _, figures in busy)])
        onsets += _onsets(parts, rule, grid, group)
    ordered = tuple(sorted(onsets, key=lambda onset: onset.time))
    times = [(rank.oldest, rank.newest) for rank in outline.ranks.values()]
    span = min(oldest for oldest, _ in times), max(newest for _, newest in times)
    compared = max(len(grid.ranks) for grid in grids.values())
    elsewhere = {name: absent for name, grid in grids.items() if (absent := grid.elsewhere)}
    return FinishedLoad(ordered, judged, largest, span, compared, elsewhere)


class _Grid:
    """Figures of all ranks on an even time grid; `values` has shape (points, ranks, FIGURES)."""

    def __init__(self, outlines: Sequence[RankOutline], board: RankBoard) -> None:
        self._board = board
        self._stamp = stamp = board.stamp
        begin = min(rank.oldest for rank in outlines)
        end = max(rank.newest for rank in outlines)
        self.step = max(stamp or FINEST, (end - begin) / MAX_POINTS)
        self.times = begin + self.step * np.arange(int((end - begin) / self.step) + 1)
        self._points = self.times.tolist()
        self._cells: dict[str, _Cells] = {}
        self.ranks: tuple[str, ...] = ()
        self.resolution = 0.0
        self.values: Floats = np.empty((0, 0, FIGURES))

    def add(self, sample: LoadSample) -> None:
        """Adds a sample to the cell that ends at the first grid point not before it."""
        self._board.add(sample)
        cells = self._cells.get(sample.rank)
        if cells is None:
            cells = self._cells[sample.rank] = _Cells(len(self._points) + 1)
        cells.add(bisect_left(self._points, sample.time), sample)

    @property
    def elsewhere(self) -> list[str]:
        return self._board.elsewhere

    def fill(self, outlines: Sequence[RankOutline]) -> None:
        """Computes `values` from the samples added."""
        heard = {rank.first.rank: rank.interval for rank in outlines}
        self.ranks = tuple(load.rank for load in self._board.loads(0.0))
        self.resolution = max(self._board.resolution, self.step)
        intervals = [heard.get(rank, 0.0) for rank in self.ranks]
        patience = max(2.0, 2 * self._stamp, 3 * max(intervals, default=0.0))
        pairs = zip(self.ranks, intervals, strict=True)
        columns = [self._column(rank, interval, patience) for rank, interval in pairs]
        self.values = np.stack(columns, axis=1) if columns else self.values

    def _column(self, rank: str, interval: float, patience: float) -> Floats:
        """The newest figures at each point; zeros while the rank was silent."""
        column = np.zeros((len(self.times), FIGURES))
        cells = self._cells.get(rank)
        if cells is None:
            return column
        for figure in range(FIGURES):
            at = _newest(cells.updated[:-1, figure])
            column[at >= 0, figure] = cells.figures[at[at >= 0], figure]
        at = _newest(cells.last[:-1])
        heard = at >= 0
        # The time of the first sample in any later cell, when the rank was heard again.
        again = np.minimum.accumulate(cells.first[::-1])[::-1]
        last = cells.last[np.maximum(at, 0)]
        silent = again[np.arange(1, len(self.times) + 1)] - last > patience
        column[heard & silent & (self.times > last + interval)] = 0.0
        return column


class _Cells:
    """Per cell, samples of one rank: times of the first and the last, and the newest figures."""

    def __init__(self, count: int) -> None:
        self.first = np.full(count, math.inf)
        self.last = np.full(count, -math.inf)
        self.updated = np.full((count, FIGURES), -math.inf)  # time of each figure
        self.figures = np.zeros((count, FIGURES))

    def add(self, cell: int, sample: LoadSample) -> None:
        time = sample.time
        if time < self.first[cell]:
            self.first[cell] = time
        if time >= self.last[cell]:
            self.last[cell] = time
        figures = (sample.running, sample.waiting, sample.tokens, sample.token_usage)
        for at, value in enumerate(figures):
            if value is not None and time >= self.updated[cell, at]:  # prefill lines have no tokens
                self.updated[cell, at] = time
                self.figures[cell, at] = value


def _newest(times: Floats) -> npt.NDArray[np.int64]:
    """For each cell, the last one up to it that has a time; -1 if there is none."""
    places = np.where(times > -math.inf, np.arange(len(times)), -1)
    return np.asarray(np.maximum.accumulate(places), dtype=np.int64)


def _scaled(values: Floats) -> Floats:
    """Shape (points, columns), each column in units of its noise.

    The noise is the scaled median of the absolute differences, with a floor.
    """
    running, waiting, tokens = (values[:, :, at] for at in range(3))
    columns = np.concatenate([running, waiting, tokens], axis=1)
    floor = np.array([0.5] * 2 * running.shape[1] + [1.0] * running.shape[1])
    steps = np.abs(np.diff(columns, axis=0))
    noise = np.median(steps, axis=0) * 1.4826 / math.sqrt(2) if len(steps) else floor * 0
    wide = np.maximum(noise, np.maximum(floor, 0.02 * columns.max(axis=0)))
    return np.asarray(columns / wide, dtype=np.float64)


def _cuts(columns: Floats) -> list[tuple[int, int]]:
    """Binary segmentation: the half-open ranges of points between changes."""
    points, width = columns.shape
    sums = np.concatenate([np.zeros((1, width)), np.cumsum(columns, axis=0)])
    limit = PENALTY * width * math.log(max(points, 2))
    done: list[tuple[int, int]] = []
    todo = [(0, points)]
    while todo:
        begin, end = todo.pop()
        cut, gain = _best_cut(sums, begin, end)
        if cut and gain > limit:
            todo += [(begin, cut), (cut, end)]
        else:
            done.append((begin, end))
    return sorted(done)


def _best_cut(sums: Floats, begin: int, end: int) -> tuple[int, float]:
    """The cut that reduces the sum of squared deviations most, and by how much; 0 for none."""
    if end - begin < 2:
        return 0, 0.0
    left = np.arange(1, end - begin)[:, None]
    before = sums[begin + 1 : end] - sums[begin]
    after = sums[end] - sums[begin + 1 : end]
    whole = (sums[end] - sums[begin]) ** 2 / (end - begin)
    gains = (before**2 / left + after**2 / (end - begin - left) - whole).sum(axis=1)
    best = int(np.argmax(gains))
    return begin + 1 + best, float(gains[best])


class _Part:
    """Points between two changes, and the mean load of each rank in them."""

    def __init__(self, begin: int, end: int, grid: _Grid) -> None:
        self.begin = float(grid.times[begin])
        self.seconds = (end - begin) * grid.step
        average: Any = grid.values[begin:end].mean(axis=0)
        self.loads = tuple(
            RankLoad(rank, *(float(figure) for figure in row))
            for rank, row in zip(grid.ranks, average, strict=True)
        )
        running = [load.running for load in self.loads]
        self.mean_running = sum(running) / len(running)
        self.factor = max(running) / self.mean_running if self.mean_running else 1.0

    def kinds(self, rule: OnsetRule) -> dict[Kind, float]:
        factors = imbalances(self.loads, rule)
        running = [load.running for load in self.loads]
        far = max(running) - min(running) >= rule.min_gap
        if self.mean_running >= rule.min_running and far and idle_ranks(self.loads, NEARLY):
            factors["starved"] = self.factor
        return factors


def _onsets(parts: Sequence[_Part], rule: OnsetRule, grid: _Grid, group: str) -> Iterator[Onset]:
    alive: list[_Part] = []
    for part in [*parts, None]:
        if part is not None and (part.kinds(rule) or (alive and part.kinds(rule.released()))):
            alive.append(part)
            continue
        if math.fsum(member.seconds for member in alive) >= rule.hold:
            yield _onset(alive, rule, grid, group, part)
        alive = []


def _onset(
    parts: Sequence[_Part], rule: OnsetRule, grid: _Grid, group: str, after: _Part | None
) -> Onset:
    main = max((part for part in parts if part.kinds(rule)), key=lambda part: part.seconds)
    kinds = main.kinds(rule)
    kind = next(kind for kind in KINDS if kind in kinds)
    onset = Onset(
        time=parts[0].begin,
        declared=parts[0].begin + rule.hold,
        kind=kind,
        factor=kinds[kind],
        resolution_s=grid.resolution,
        source="log",
        ranks=main.loads,
        group=group,
        ended=None if after is None else after.begin,
    )
    return replace(onset, sentence=sentence(onset))
