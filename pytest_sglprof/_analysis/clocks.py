"""How far the clocks of the ranks are apart, and how exactly that is known.

A symmetric collective ends on all ranks at about the same moment, so a rank's ends tell its
clock: a line through their differences to the ends of a middle rank has an offset, a drift, and
an interval for both. A constant difference of the ends themselves looks like an offset.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from pytest_sglprof._analysis.certainty import correlation, effective_steps, t_quantile

Floats = npt.NDArray[np.float64]
Flags = npt.NDArray[np.bool_]

MIN_ENDS = 20
MAX_PIECES = 16
ENDS_OF_PIECE = 20
CERTAIN_SHARE = 95.0
CHANCE = 0.01  # that any clock of a group is outside of its interval
OUTLIER = 4.0  # standard deviations: a rank that was held up inside a collective ends it late
CURVED = 5.0  # standard errors by which a piece is off the line only if the clock is curved
OF_NORMAL = 1.4826  # standard deviation / median of the absolute deviations
OF_MEDIAN = 1.2533  # standard error of a median / that of a mean
PER_MILLION = 1e6
SHARED_NS = 20_000.0  # how far the clocks of processes of one host may be apart, unless measured
TIMES_UNCERTAINTY = 3.0  # a wait below so many times the uncertainty of the clocks counts as 0


@dataclass(frozen=True)
class ClockFit:
    """Offsets of the ranks' clocks.

    offsets: how far each clock is ahead of the median, shape (collectives, ranks), ns. at_middle,
    margin: the same in the middle of the window, and what it may be more or less (99 %, of all
    ranks together), shape (ranks,), ns. drift, drift_margin: how much faster each clock runs,
    and the same of it, parts per million. reach_ns: the largest margin of an offset at any time.
    uncertainty_ns: how far ends differ from these offsets, 95th percentile of the rank with the
    largest. is_measured: False for the shared clock of one host.
    """

    offsets: Floats
    at_middle: Floats
    margin: Floats
    drift: Floats
    drift_margin: Floats
    reach_ns: float
    uncertainty_ns: float
    is_measured: bool = True


def clocks_of(ends: Floats, hosts: Sequence[str], telling: Flags | None = None) -> ClockFit | None:
    """As `fit_clocks`, but ranks of one host share its clock unless ends tell more of it.

    hosts: of each rank, "" where it is not known.
    """
    fit = fit_clocks(ends, telling)
    if "" in hosts or len(set(hosts)) != 1:
        return fit
    if fit is not None:
        differ = np.abs(fit.at_middle) - fit.margin > SHARED_NS
        if fit.reach_ns <= SHARED_NS or differ.any():
            return fit
    none = np.zeros(len(hosts))
    return ClockFit(
        offsets=np.zeros(ends.shape),
        at_middle=none,
        margin=none + SHARED_NS,
        drift=none,
        drift_margin=none,
        reach_ns=SHARED_NS,
        uncertainty_ns=fit.uncertainty_ns if fit else SHARED_NS,
        is_measured=False,
    )


def fit_clocks(ends: Floats, telling: Flags | None = None) -> ClockFit | None:
    """Fits clocks to the ends of matched collectives; None for fewer than 20.

    ends: shape (collectives, ranks), ns, in order of time. telling: which of them are at the same
    moment on all ranks, None for all.
    """
    ranks = ends.shape[1]
    every, ends = ends, ends if telling is None else ends[telling]
    if len(ends) < MIN_ENDS:
        return None
    # Of always the same ranks, so that differences are lines; the others are compared with them.
    apart = ends - np.median(ends, axis=1, keepdims=True)
    order = np.lexsort((apart.mean(axis=0), np.median(apart, axis=0)))
    middle = order[(ranks - 1) // 2 : ranks // 2 + 1]
    when = ends[:, middle].mean(axis=1)
    ahead = ends - when[:, None]
    at = every[:, middle].mean(axis=1) - when.mean()
    lines = [_line(when - when.mean(), column, CHANCE / 2 / ranks, at) for column in ahead.T]
    left = np.column_stack([line.left for line in lines])
    return ClockFit(
        offsets=np.column_stack([line.values for line in lines]),
        at_middle=np.array([line.offset for line in lines]),
        margin=np.array([line.margin for line in lines]),
        drift=np.array([line.slope * PER_MILLION for line in lines]),
        drift_margin=np.array([line.slope_margin * PER_MILLION for line in lines]),
        reach_ns=max(line.reach for line in lines),
        # The middle rank has no residual at all, so the largest of the ranks counts.
        uncertainty_ns=float(np.percentile(np.abs(left), CERTAIN_SHARE, axis=0).max()),
    )


class _Line(NamedTuple):
    """A line through differences of ends, and half of the intervals of its figures.

    values: at the times that were asked for, ns. left: what the differences are off it. offset:
    at time 0. reach: of the values.
    """

    values: Floats
    left: Floats
    offset: float
    margin: float
    slope: float
    slope_margin: float
    reach: float


def _line(when: Floats, ahead: Floats, alpha: float, asked: Floats) -> _Line:
    """Fits a line. when: times around 0, ns. alpha: probability of a value above its interval.

    asked: the times at which its values are asked for.
    """
    pieces = np.array_split(np.arange(len(when)), min(MAX_PIECES, len(when) // ENDS_OF_PIECE))
    at = np.array([np.median(when[piece]) for piece in pieces])
    middles = np.array([np.median(ahead[piece]) for piece in pieces])
    # Where many ends are late for other reasons, no line through medians is better than one.
    tries = [np.polyfit(at, middles, min(1, len(pieces) - 1)), np.array([np.median(ahead)])]
    fit = min(tries, key=lambda each: float(np.median(np.abs(ahead - np.polyval(each, when)))))
    kept = np.ones(len(when), bool)
    for _ in range(3):
        left = ahead - np.polyval(fit, when)
        left -= np.median(left)
        kept = np.abs(left) <= OUTLIER * OF_NORMAL * np.median(np.abs(left)) + 1.0
        fit = np.polyfit(when[kept], ahead[kept], 1)
    slope, offset = (float(each) for each in fit)
    left = ahead - np.polyval(fit, when)
    # Ends that resemble those before them count for fewer.
    carried = correlation(left[kept][:, None])
    effective = max(3.0, effective_steps(float(kept.sum()), carried))
    error = float(np.sqrt((left[kept] ** 2).sum() / max(1, kept.sum() - 2) / effective))
    margin = t_quantile(alpha, effective - 2.0) * error
    slope_margin = margin / max(float(when[kept].std()), 1.0)
    far = float(max(np.abs(when).max(), np.abs(asked).max()))
    values: Floats = np.polyval(fit, asked).astype(np.float64)
    bends = _bends([left[piece] for piece in pieces])
    bend = float(np.abs(bends).max())
    if len(pieces) < 3 or not bend:
        reach = margin + slope_margin * far
        return _Line(values, left, offset, margin, slope, slope_margin, reach)
    # A clock that was set, or runs unevenly: it is followed from piece to piece.
    return _Line(
        values + _interpolated(asked, at, bends),
        left - _interpolated(when, at, bends),
        offset,
        margin + bend,
        slope,
        slope_margin + 2 * bend / far,
        margin * len(pieces) ** 0.5,
    )


def _bends(pieces: Sequence[Floats]) -> Floats:
    """By how much each piece is off the line, ns; 0 for all if none surely is.

    A clock that is off is so for all ends alike, while ranks are held up by as much as it happens:
    a piece whose ends scatter much more than those of the others says nothing.
    """
    middles = np.array([np.median(piece) for piece in pieces])
    around = [piece - middle for piece, middle in zip(pieces, middles, strict=True)]
    scatter = OF_NORMAL * np.array([np.median(np.abs(each)) for each in around])
    carried = correlation(np.concatenate(around)[:, None])
    shrunk = np.sqrt([effective_steps(len(piece), carried) for piece in pieces])
    common = float(np.median(scatter))
    is_off = np.abs(middles) > CURVED * OF_MEDIAN * np.maximum(scatter, common) / shrunk + 1.0
    is_clear = scatter <= OUTLIER * common + 1.0
    bends: Floats = np.where(is_clear & (is_off & is_clear).any(), middles, 0.0)
    return bends


def _interpolated(when: Floats, at: Floats, values: Floats) -> Floats:
    """Interpolates `values` at times `at` to the times `when`; extrapolates the outer lines."""
    line = np.interp(when, at, values)
    for outside, a, b in ((when < at[0], 0, 1), (when > at[-1], -2, -1)):
        slope = (values[b] - values[a]) / (at[b] - at[a])
        line[outside] = values[a] + slope * (when[outside] - at[a])
    return np.asarray(line, np.float64)
