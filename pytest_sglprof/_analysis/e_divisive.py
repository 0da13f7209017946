"""Since when a history of figures is at another level: E-divisive with a t-test.

The method of "Hunter: Using Change Point Detection to Hunt for Performance Regressions" (Fleming
et al. 2023), on top of Matteson and James 2014, as Apache Otava 0.8.0 does it, with the same
results: a window of 50 points slides by 25; in it the split with the largest energy distance is
taken as long as a t-test finds it at 1 %; of all these the least significant is removed until each
has p < 0.001 beside its neighbours. Two oddities of Otava are kept, so that results can be
compared: standard deviations of n, not n − 1, are taken for those of samples, which makes p
somewhat too small; and when a split is removed, only the two after it are tested anew.

In 1,000 independent points it finds 0.9 changes that are none; where points resemble the one
before, many more (24 at a correlation of 0.6). So a change point is shown, and fails nothing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from pytest_sglprof._analysis.certainty import t_tail

Floats = npt.NDArray[np.float64]
_Split = tuple[float, int, int, int]  # energy distance; start, index and end of the split

WINDOW = 50  # points that are looked at together
MAX_P = 0.001
FIRST_MAX_P = 0.01  # of a split that may become a change point


def change_points(series: Sequence[float] | Floats) -> list[int]:
    """The indices at which a new level begins, in order. series: finite, the oldest first."""
    values = np.asarray(series, dtype=np.float64)
    if len(values):  # below 1 by a power of two, which changes no digit: sums cannot overflow
        values = np.ldexp(values, -math.frexp(np.abs(values).max())[1])
    weak: set[int] = set()
    start = 0
    while start < len(values):
        fresh = _in_window(values[start : start + WINDOW])
        weak.update(start + index for index in fresh)
        start = max(start + max(fresh, default=0), start + WINDOW // 2)
    return _merged(values, sorted(weak))


def _in_window(values: Floats) -> list[int]:
    """Splits of a window, the clearest first, until one is not significant."""
    indices: list[int] = []
    open_splits = _split(values, 0, len(values))
    while open_splits:
        best = max(open_splits, key=lambda split: (split[0], -split[1]))
        _, start, index, end = best
        if not _p(values, start, index, end) <= FIRST_MAX_P:
            break
        indices.append(index)
        open_splits.remove(best)
        open_splits += _split(values, start, index) + _split(values, index, end)
    return sorted(indices)


def _split(values: Floats, start: int, end: int) -> list[_Split]:
    """The best split of values[start:end], none of a single point.

    Best: at `index`, with any end of the right side, the energy distance of both sides is largest:
    2 n m / (n + m) · (mean distance across − mean distances within / 2).
    """
    count = end - start
    if count < 2:
        return []
    part = values[start:end]
    sums = np.zeros((count + 1, count + 1))
    sums[1:, 1:] = np.abs(part[:, None] - part).cumsum(axis=0).cumsum(axis=1)
    left = np.arange(1, count)[:, None]
    stop = np.arange(2, count + 1)[None, :]
    right = stop - left
    of_left = sums[left, left]
    across = sums[left, stop] - of_left
    of_right = sums[stop, stop] - 2 * sums[left, stop] + of_left
    distance = 2 * across - right * of_left / np.maximum(left - 1, 1)
    distance -= left * of_right / np.maximum(right - 1, 1)
    distance = np.where(right > 0, distance / stop, -math.inf)
    best = int(distance.argmax())
    return [(float(distance.flat[best]), start, start + best // (count - 1) + 1, end)]


def _p(values: Floats, start: int, index: int, end: int) -> float:
    """p of equal means before and after the index, two-sided; 1.0 if nothing differs."""
    before, after = values[start:index], values[index:end]
    freedom = len(before) + len(after) - 2
    difference = abs(float(before.mean() - after.mean()))
    if freedom < 1 or not difference:
        return 1.0
    squares = (len(before) - 1) * float(before.var()) + (len(after) - 1) * float(after.var())
    error = math.sqrt(squares / freedom * (1 / len(before) + 1 / len(after)))
    if not error:
        return 0.0
    if freedom == 1:
        return 1 - 2 / math.pi * math.atan(difference / error)
    return 2 * t_tail(difference / error, float(freedom))


def _merged(values: Floats, indices: list[int]) -> list[int]:
    """Without those that are not significant beside their neighbours, the weakest first."""

    def p_at(place: int) -> float:
        ends = [0, *indices, len(values)]
        return _p(values, ends[place], ends[place + 1], ends[place + 2])

    chances = [p_at(place) for place in range(len(indices))]
    while chances and max(chances) >= MAX_P:
        weakest = chances.index(max(chances))
        del indices[weakest], chances[weakest]
        for place in range(weakest, min(weakest + 2, len(indices))):
            chances[place] = p_at(place)
    return indices
