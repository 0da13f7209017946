"""How certain a figure is: intervals by block bootstrap, p by permuted rank labels.

Steps follow each other, so they are drawn in blocks: step s of a block is followed by
step s + 1, around the end (circular block bootstrap, Politis & Romano 1992). The maximum
over ranks of a balanced window is above 1 by chance alone, the more so the more ranks
there are; an interval does not know that. So p asks the other question: how often are
totals as unequal when each step's times are dealt to other ranks?
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Interval = tuple[float, float]

RESAMPLES = 1000
SHIFTS = 399  # the smallest p is 1 / 400
CONFIDENCE = 0.95
MAX_P = 0.01
MIN_STEPS = 2
SEED = 20240229  # fixed: the same trace gives the same verdict


@dataclass(frozen=True)
class Certainty:
    """How certain the figures of one group of ranks are.

    slowdown, factor, lost_share: 95 % intervals (low, high); None where the figure does
    not exist. p_value: probability of totals as unequal when no rank differs, 0 to 1.
    """

    slowdown: Interval | None = None
    factor: Interval | None = None
    lost_share: Interval | None = None
    p_value: float | None = None


def certainty(matrix: npt.NDArray[np.generic]) -> Certainty:
    """The certainty of figures of `matrix`, shape (steps, ranks), times in ns.

    Steps without any time are left out. Less than two steps or ranks tell nothing. The
    answer does not depend on the order of the ranks, nor on the unit of time.
    """
    times = np.asarray(matrix, np.float64)
    times = times[(times > 0).any(axis=1)]
    if len(times) < MIN_STEPS or times.shape[1] < 2:
        return Certainty()
    times = _in_order(times)
    weights = block_weights(len(times))
    totals = weights @ times
    lost = weights @ np.column_stack((times.max(axis=1), times.mean(axis=1)))
    return Certainty(
        slowdown=_interval_of_ratio(totals[:, 0], np.median(totals[:, 1:], axis=1)),
        factor=_interval_of_ratio(totals.max(axis=1), totals.mean(axis=1)),
        lost_share=_interval_of_ratio(lost[:, 0] - lost[:, 1], lost[:, 0]),
        p_value=_p_of_maximum(times),
    )


def excess_certainty(matrix: Floats) -> tuple[Interval, float]:
    """95 % of the largest total minus the median of the others, and its p.

    matrix: shape (steps, ranks); at least two of each.
    """
    times = _in_order(np.asarray(matrix, np.float64))
    totals = block_weights(len(times)) @ times
    return interval(totals[:, 0] - np.median(totals[:, 1:], axis=1)), _p_of_maximum(times)


def interval(values: Floats) -> Interval:
    """The central 95 % of bootstrap `values`, shape (resamples,)."""
    tail = 100 * (1 - CONFIDENCE) / 2
    low, high = np.percentile(values, (tail, 100 - tail))
    return float(low), float(high)


def block_length(steps: int) -> int:
    """Steps of a block: the cube root of their number, rounded up."""
    return max(1, int(np.ceil(round(steps ** (1 / 3), 9))))


@lru_cache(maxsize=16)
def block_weights(steps: int) -> Floats:
    """How often each resample holds each step, shape (RESAMPLES, steps).

    Every row sums to `steps`; `block_weights(n) @ matrix` are all resampled totals at once.
    """
    rng = np.random.default_rng(SEED)
    length = block_length(steps)
    blocks = -(-steps // length)
    starts = rng.integers(0, steps, (RESAMPLES, blocks))
    drawn = (starts[:, :, None] + np.arange(length)) % steps
    drawn = drawn.reshape(RESAMPLES, -1)[:, :steps]
    rows = np.repeat(np.arange(RESAMPLES), steps)
    flat = np.bincount(rows * steps + drawn.ravel(), minlength=RESAMPLES * steps)
    weights: Floats = flat.reshape(RESAMPLES, steps).astype(np.float64)
    weights.flags.writeable = False
    return weights


def _in_order(times: Floats) -> Floats:
    """Ranks by total, largest first, so that no order of the input matters."""
    # Ranks of equal totals are told apart by when they spent their time.
    later = np.arange(1, len(times) + 1) @ times
    ordered: Floats = times[:, np.lexsort((later, -times.sum(axis=0)))]
    return ordered


def _interval_of_ratio(over: Floats, under: Floats) -> Interval | None:
    if not (under > 0).all():
        return None
    return interval(over / under)


def _p_of_maximum(times: Floats) -> float:
    """Share of random deals in which some rank's total is as large as the largest here.

    Each step's times move around the ring of ranks by a random number of places: these
    shifts are a group, so the test is exact where ranks are exchangeable within a step,
    and one matrix product for each number of places does all deals.
    """
    shift = _shifts(*times.shape)
    totals = np.zeros((SHIFTS, times.shape[1]))
    for places in range(times.shape[1]):
        totals += (shift == places).astype(np.float64) @ np.roll(times, places, axis=1)
    seen = times.sum(axis=0).max()
    return float((1 + (totals.max(axis=1) >= seen * (1 - 1e-12)).sum()) / (1 + SHIFTS))


@lru_cache(maxsize=16)
def _shifts(steps: int, ranks: int) -> npt.NDArray[np.int64]:
    """Places by which each deal moves each step, shape (SHIFTS, steps)."""
    rng = np.random.default_rng(SEED + 1)
    shift: npt.NDArray[np.int64] = rng.integers(0, ranks, (SHIFTS, steps))
    shift.flags.writeable = False
    return shift
