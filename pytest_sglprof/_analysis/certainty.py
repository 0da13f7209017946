"""How certain a figure is: intervals by block bootstrap, p by permuted rank labels.

Successive steps are correlated, so the bootstrap draws blocks of consecutive steps, wrapping
around at the end (circular block bootstrap, Politis & Romano 1992). Even in a balanced window
the slowest rank is above the mean by chance, the more so the more ranks there are, and an
interval does not account for that. So p asks: how often are totals this unequal when step
times are permuted between ranks? Correlation between steps would make p too small, so it is
removed first (prewhitening) and whole blocks of steps are permuted.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Annotated

import numpy as np
import numpy.typing as npt
from msgspec import Meta

Floats = npt.NDArray[np.float64]
Interval = tuple[float, float]

RESAMPLES = 1000
SHIFTS = 399  # the smallest p is 1 / 400
MAX_EXACT = 1024  # up to so many permutations all are counted, instead of a sample
MIN_BLOCKS = 8  # with two ranks the smallest p is then 1 / 2**7
MIN_CORRELATED = 8  # steps; the correlation of fewer is noise
MAX_CORRELATION = 0.9
CONFIDENCE = 0.95
MAX_P = 0.01
MIN_STEPS = 2
SEED = 20240229  # fixed: the same trace gives the same verdict


@dataclass(frozen=True)
class Certainty:
    """How certain the figures of one group of ranks are.

    slowdown, factor, lost_share: 95 % intervals (low, high); None where the figure does
    not exist. p_value: probability of totals this unequal if no rank differs, 0 to 1.
    """

    slowdown: Interval | None = None
    factor: Interval | None = None
    lost_share: Interval | None = None
    p_value: float | None = None


def certainty(matrix: npt.NDArray[np.generic]) -> Certainty:
    """Intervals and p for the times in `matrix`, shape (steps, ranks), ns.

    Steps without any time are left out. With fewer than two steps or ranks everything is
    None. The result depends neither on the order of the ranks nor on the unit of time.
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
        p_value=_p_of_range(times),
    )


def excess_certainty(matrix: Floats) -> tuple[Interval, float]:
    """The excess of the slowest rank: its 95 % interval, and p.

    The excess is the largest total minus the median of the others, in the unit of `matrix`,
    which has shape (steps, ranks), at least two of each.
    """
    times = _in_order(np.asarray(matrix, np.float64))
    totals = block_weights(len(times)) @ times
    return interval(totals[:, 0] - np.median(totals[:, 1:], axis=1)), _p_of_range(times)


def interval(values: Floats) -> Interval:
    """The central 95 % of bootstrap `values`, shape (resamples,)."""
    tail = 100 * (1 - CONFIDENCE) / 2
    low, high = np.percentile(values, (tail, 100 - tail))
    return float(low), float(high)


def block_length(steps: int) -> int:
    """Steps in a block: the cube root of `steps`, rounded up, but leaving at least 8 blocks.

    With fewer blocks, two ranks have too few permutations for any p below 0.01.
    """
    return max(1, min(int(np.ceil(round(steps ** (1 / 3), 9))), (steps - 1) // (MIN_BLOCKS - 1)))


@lru_cache(maxsize=16)
def block_weights(steps: int) -> Floats:
    """How often each resample holds each step, shape (RESAMPLES, steps).

    Every row sums to `steps`, so `block_weights(n) @ matrix` is all resampled totals at once.
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
    # Ranks with equal totals are ordered by when they spent their time.
    later = np.arange(1, len(times) + 1) @ times
    ordered: Floats = times[:, np.lexsort((later, -times.sum(axis=0)))]
    return ordered


def _interval_of_ratio(over: Floats, under: Floats) -> Interval | None:
    if not (under > 0).all():
        return None
    return interval(over / under)


def _p_of_range(times: Floats) -> float:
    """Share of permutations in which the ranks' totals lie at least as far apart as here.

    The part that a step inherits from the one before is removed first. A permutation then
    rotates each block of steps around the ring of ranks by some number of places. Rotations
    form a group, so the test is exact if ranks are exchangeable and blocks independent. One
    matrix product for each number of places computes all permutations.
    """
    fresh = _innovations(times)
    blocks = np.add.reduceat(fresh, np.arange(0, len(fresh), block_length(len(fresh))), axis=0)
    shift, is_all = _shifts(*blocks.shape)
    totals = np.zeros((len(shift), times.shape[1]))
    for places in range(times.shape[1]):
        totals += (shift == places).astype(np.float64) @ np.roll(blocks, places, axis=1)
    seen = float(np.ptp(fresh.sum(axis=0)))
    rounding = 1e-12 * float(times.sum(axis=0).max())
    as_far = int((np.ptp(totals, axis=1) >= seen - rounding).sum())
    return as_far / len(shift) if is_all else (1 + as_far) / (1 + len(shift))


def _innovations(times: Floats) -> Floats:
    """Each step's times without the share φ that it inherits from the step before.

    φ is the same for all ranks, so exchangeable ranks stay exchangeable.
    """
    inherited = autocorrelation(times)
    fresh = times.copy()
    fresh[1:] -= inherited * times[:-1]
    fresh[0] *= np.sqrt(1 - inherited**2)  # gives the first step the same variance
    return fresh


def autocorrelation(times: Floats) -> float:
    """φ, how far a rank's deviation from the others carries over to the next step, 0 to 0.9.

    times: shape (steps, ranks). Lag-1 autocorrelation of the deviations from the step's and
    the rank's mean, pooled over ranks, its bias corrected to first order (Marriott and Pope
    1954). Negative values count as 0, which can only make p too large.
    """
    steps = len(times)
    rest = times - times.mean(axis=1, keepdims=True)
    rest = rest - rest.mean(axis=0)
    square = float((rest**2).sum())
    # Only rounding is left: the ranks differ by a constant, or not at all.
    if steps < MIN_CORRELATED or square <= 1e-18 * float((times**2).sum()):
        return 0.0
    estimate = float((rest[1:] * rest[:-1]).sum()) / square
    return float(np.clip((steps * estimate + 1) / (steps - 3), 0.0, MAX_CORRELATION))


@lru_cache(maxsize=16)
def _shifts(blocks: int, ranks: int) -> tuple[npt.NDArray[np.int64], bool]:
    """Rotation of each block in each permutation, shape (permutations, blocks), in places.

    The flag says whether these are all permutations or a sample. Rotating every block by one
    more place only renames the ranks, so the first block can stay where it is.
    """
    shift: npt.NDArray[np.int64]
    is_all = ranks ** (blocks - 1) <= MAX_EXACT
    if is_all:
        shift = np.indices((1,) + (ranks,) * (blocks - 1)).reshape(blocks, -1).T
    else:
        shift = np.random.default_rng(SEED + 1).integers(0, ranks, (SHIFTS, blocks))
    shift.flags.writeable = False
    return shift, is_all


Count = Annotated[int, Meta(ge=0)]


Amount = Annotated[float, Meta(ge=0.0)]


Share = Annotated[float, Meta(ge=0.0, le=1.0)]
