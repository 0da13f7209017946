"""Onsets in a finished log: where its load changed, and which of the parts are unequal."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from pytest_sglprof.analysis.rank_board import LOG_STAMP, RankBoard, RankLoad, group_of
from pytest_sglprof.analysis.unequal import (
    KINDS,
    NEARLY,
    Kind,
    Onset,
    OnsetRule,
    excess,
    idle_ranks,
    sentence,
)
from pytest_sglprof.values import LoadSample

Floats = npt.NDArray[np.float64]

MAX_POINTS = 3000  # of the grid on which changes are looked for
FINEST = 0.1  # s between two points of a log with milliseconds
PENALTY = 3.0  # x columns x log(points): what a change must explain, in squared deviations
FIGURES = 4  # running, waiting, tokens, usage


@dataclass(frozen=True)
class FinishedLoad:
    """What a finished log tells. judged_s: seconds with min_running requests a rank.

    worst: largest λ of running requests, averaged over a part without a change. span: Unix
    times of the first and the last sample; (0, 0) of none.
    """

    onsets: tuple[Onset, ...]
    judged_s: float
    worst: float
    span: tuple[float, float]


def finished_load(
    samples: Sequence[LoadSample],
    rule: OnsetRule,
    *,
    ranks: Sequence[str] = (),
    milliseconds: bool = False,
) -> FinishedLoad:
    """Every period of imbalance in a log, by change-point detection.

    The load is cut by binary segmentation (Scott and Knott 1974) where a cut explains more
    squared deviation than `PENALTY` x columns x log(points), each figure in units of its own
    noise; a part is unequal when its means are, by the same rule as online, and unequal
    parts that touch are one onset.
    """
    if not samples:
        return FinishedLoad((), 0.0, 1.0, (0.0, 0.0))
    found: list[Onset] = []
    judged, worst = 0.0, 1.0
    for group in sorted({group_of(sample.rank) for sample in samples}):
        mine = [sample for sample in samples if group_of(sample.rank) == group]
        known = [rank for rank in ranks if group_of(rank) == group]
        grid = _Grid(mine, known, 0.0 if milliseconds else LOG_STAMP)
        if len(grid.ranks) < 2:
            continue
        parts = [_Part(begin, end, grid) for begin, end in _cuts(_scaled(grid.values))]
        busy = [part for part in parts if part.mean_running >= rule.min_running]
        judged = max(judged, math.fsum(part.seconds for part in busy))
        worst = max([worst, *(part.factor for part in busy)])
        found += _onsets(parts, rule, grid, group)
    times = [sample.time for sample in samples]
    ordered = tuple(sorted(found, key=lambda onset: onset.time))
    return FinishedLoad(ordered, judged, worst, (min(times), max(times)))


class _Grid:
    """Figures of all ranks at even distances; `values` is points x ranks x FIGURES."""

    def __init__(self, samples: Sequence[LoadSample], known: Sequence[str], stamp: float) -> None:
        board = RankBoard(known, falls_silent=True, stamp=stamp)
        for sample in samples:
            board.add(sample)
        self.ranks = tuple(load.rank for load in board.loads(0.0))
        self.begin = min(sample.time for sample in samples)
        span = max(sample.time for sample in samples) - self.begin
        self.step = max(stamp or FINEST, span / MAX_POINTS)
        self.resolution = max(board.resolution, self.step)
        self.times = self.begin + self.step * np.arange(int(span / self.step) + 1)
        by_rank = [[s for s in samples if s.rank == rank] for rank in self.ranks]
        intervals = [_interval(mine) for mine in by_rank]
        patience = max(2.0, 2 * stamp, 3 * max(intervals))
        pairs = zip(by_rank, intervals, strict=True)
        columns = [self._column(mine, each, patience) for mine, each in pairs]
        self.values = np.stack(columns, axis=1)

    def _column(self, samples: Sequence[LoadSample], interval: float, patience: float) -> Floats:
        """The newest figures at each point; nothing where the rank was silent."""
        column = np.zeros((len(self.times), FIGURES))
        if not samples:
            return column
        ordered = sorted(samples, key=lambda sample: sample.time)
        moments = np.array([sample.time for sample in ordered])
        at = np.searchsorted(moments, self.times, side="right") - 1
        figures = np.array([_figures(sample) for sample in ordered])
        for row in range(1, len(figures)):  # prefill lines tell no tokens
            unknown = np.isnan(figures[row])
            figures[row][unknown] = figures[row - 1][unknown]
        figures = np.nan_to_num(figures)
        following = np.append(moments[1:], math.inf)
        heard = at >= 0
        column[heard] = figures[at[heard]]
        last = moments[np.maximum(at, 0)]
        silent = following[np.maximum(at, 0)] - last > patience
        column[heard & silent & (self.times > last + interval)] = 0.0
        return column


def _figures(sample: LoadSample) -> tuple[float, float, float, float]:
    tokens = math.nan if sample.tokens is None else float(sample.tokens)
    usage = math.nan if sample.token_usage is None else sample.token_usage
    return float(sample.running), float(sample.waiting), tokens, usage


def _interval(samples: Sequence[LoadSample]) -> float:
    gaps = np.diff(sorted({sample.time for sample in samples}))
    return float(np.median(gaps)) if len(gaps) else 0.0


def _scaled(values: Floats) -> Floats:
    """Points x columns, each in units of its noise (of the differences, robustly)."""
    running, waiting, tokens = (values[:, :, at] for at in range(3))
    columns = np.concatenate([running, waiting, tokens], axis=1)
    floor = np.array([0.5] * 2 * running.shape[1] + [1.0] * running.shape[1])
    steps = np.abs(np.diff(columns, axis=0))
    noise = np.median(steps, axis=0) * 1.4826 / math.sqrt(2) if len(steps) else floor * 0
    wide = np.maximum(noise, np.maximum(floor, 0.02 * columns.max(axis=0)))
    return np.asarray(columns / wide, dtype=np.float64)


def _cuts(columns: Floats) -> list[tuple[int, int]]:
    """Binary segmentation: half-open ranges of points between two changes."""
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
    """The cut that lowers the sum of squared deviations most, and by how much."""
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
        found = excess(self.loads, rule)
        running = [load.running for load in self.loads]
        far = max(running) - min(running) >= rule.min_gap
        if self.mean_running >= rule.min_running and far and idle_ranks(self.loads, NEARLY):
            found["starved"] = self.factor
        return found


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
    found = Onset(
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
    return Onset(**{**found.__dict__, "sentence": sentence(found)})
