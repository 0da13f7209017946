"""How certain a figure is: estimates with a standard error, and the ends of what it may be.

A figure of ranks is the mean over steps of something: of the logarithm of how much longer than
its peers a rank takes (`typical_ratio`), or of the terms of a ratio of sums (`ratio_of_sums`).
Successive steps are correlated, so the standard error of the mean is the larger of two:

- that of an autoregressive process of order 1. φ is the lag-1 correlation, pooled over ranks, its
  bias corrected (Marriott and Pope 1954); n steps are worth n (1 − φ) / (1 + φ) independent ones.
- the equal-weighted-cosine estimate of the long-run variance, which assumes no model (Lazarus,
  Lewis, Stock and Watson 2018, "HAR Inference").

Student's t of the independent steps gives the ends. Variances are pooled over ranks, except that a
much noisier rank keeps its own.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Annotated

import msgspec
import numpy as np
import numpy.typing as npt
from msgspec import Meta

Floats = npt.NDArray[np.float64]
Interval = tuple[float, float]
Count = Annotated[int, Meta(ge=0)]
Amount = Annotated[float, Meta(ge=0.0)]
Share = Annotated[float, Meta(ge=0.0, le=1.0)]

ALPHA = 0.005  # one-sided; half of the 1 % of wrong verdicts that is promised
LOOKS_ALPHA = 0.01  # one-sided, of all looks at 2, 3, … windows; they depend on each other
TRIM = 0.2  # of the steps, at each end
MIN_EFFECTIVE = 6.0  # independent steps; of fewer the error is not known
STRAY = 10.0  # errors within which a figure may be where they are hardly known
DOUBT = 1.5  # standard errors of φ that are added before the independent steps are counted
HIDDEN = 16  # steps that tell nothing of φ: short windows show less than there is
MAX_CORRELATION = 0.98
CARRIED = 0.3  # correlation of lag 1 from which its ratio to lag 2 says more
NOISIER = 2.0  # times the median variance of the ranks: then a rank keeps its own
ROUNDING = 1e-9  # of a figure; steps that differ by less are equal
SHIFT = 10.0  # standard errors; a change of level beyond that is no noise
SIDE = 10  # steps on either side of a change of level, at least
SPIKE = 1.3  # times what is typical of the rank


class Estimate(msgspec.Struct, frozen=True):
    """A figure and its standard error, for each rank or for all together.

    values: the figures; the natural logarithm of ratios where `is_log`. errors: their standard
    errors. freedom: degrees of freedom of each error. effective: how many independent steps the
    window is worth at least. steps: how many it has. comparisons: how many of the figures may be
    the largest by chance; two ranks have only one ratio, since that of the other is its inverse.
    is_shared: the noise of one rank is that of the others too.
    """

    values: tuple[float, ...]
    errors: tuple[Amount, ...]
    freedom: tuple[Amount, ...]
    effective: Amount
    steps: Count
    comparisons: Count
    is_log: bool = False
    is_shared: bool = False

    @property
    def value(self) -> float:
        """The largest figure."""
        return self._shown(max(self.values))

    @property
    def top(self) -> int | None:
        """The index of the largest figure; None if two share it."""
        largest = max(self.values)
        return self.values.index(largest) if self.values.count(largest) == 1 else None

    @property
    def interval(self) -> Interval | None:
        """The largest lower end, and the largest upper end.

        The lower end is lowered for the number of ranks, one of which is the largest by chance.
        The upper end needs no such correction: all must be below a limit for all to be below it.
        None if the window is worth too few independent steps.
        """
        return self.ends() if self.effective >= MIN_EFFECTIVE else None

    def ends(self, alpha: float = ALPHA) -> Interval | None:
        """What a verdict takes the figure for: `interval`, with its lower end at level `alpha`.

        Where the window is worth too few independent steps, its errors are hardly known: then
        only what is STRAY errors away is decided. None with fewer than 6 steps.
        """
        if self.effective >= MIN_EFFECTIVE:
            return self.low(alpha), self.high()
        if self.steps < MIN_EFFECTIVE:
            return None
        top, far = max(self.values), STRAY * max(self.errors)
        return self._shown(top - far), self._shown(top + far)

    def low(self, alpha: float = ALPHA) -> float:
        """The largest lower end, at level `alpha` for all ranks together."""
        ends = self._ends(-1.0, alpha / self.comparisons)
        return self._shown(float(ends.max()))

    def high(self, alpha: float = ALPHA) -> float:
        """The largest upper end, at level `alpha` for each rank."""
        return self._shown(float(self._ends(1.0, alpha).max()))

    def lows(self) -> tuple[float, ...]:
        """The lower end of each figure, at a level that holds for all of them together."""
        ends = self._ends(-1.0, ALPHA / self.comparisons)
        return tuple(self._shown(float(end)) for end in ends)

    def chance(self, best: float) -> float:
        """p: how probable figures this large are if all are `best`, at most; 0 to 1."""
        ratio = self._scale(best)
        smallest = 1.0
        for value, error, freedom in zip(self.values, self.errors, self.freedom, strict=True):
            if value > ratio:
                far = (value - ratio) / error if error else math.inf
                smallest = min(smallest, t_tail(far, freedom))
        return float(f"{min(1.0, self.comparisons * smallest):.6g}")

    def found_from(self, limit: float, power: float) -> float:
        """The smallest true figure whose lower end is above `limit` with probability `power`."""
        return self._shown(self._scale(limit) + self._span(power))

    def steps_to_find(self, figure: float, limit: float, power: float) -> float:
        """How many steps like these find a true `figure` above `limit` with that probability."""
        room = self._scale(figure) - self._scale(limit)
        return self.steps * (self._span(power) / room) ** 2

    def _span(self, power: float) -> float:
        """How far above a limit the least certain figure must be to be found."""
        at = max(range(len(self.errors)), key=self.errors.__getitem__)
        level = t_quantile(ALPHA / self.comparisons, self.freedom[at])
        miss = t_quantile(min(1 - power, 0.5), self.freedom[at])
        return self.errors[at] * (level + miss)

    def _scale(self, figure: float) -> float:
        return math.log(figure) if self.is_log else figure

    def _ends(self, side: float, alpha: float) -> Floats:
        reach = [t_quantile(alpha, freedom) for freedom in self.freedom]
        ends: Floats = np.array(self.values) + side * np.array(reach) * np.array(self.errors)
        return ends

    def _shown(self, value: float) -> float:
        return round(math.exp(min(value, 700.0)) if self.is_log else value, 12)


def pool(windows: Sequence[Estimate], alpha: float) -> Estimate:
    """The mean over windows of the figures of each rank, at least two windows of the same ranks.

    The error is the larger, by its reach at level `alpha`, of that of all steps and that of the
    spread between windows, which is pooled over ranks: where the speeds of ranks move between
    windows, the steps of each know nothing of it.
    """
    count, ranks = len(windows), len(windows[0].values)
    values = np.array([window.values for window in windows])
    squares = np.array([window.errors for window in windows]) ** 2
    freedom = np.array([window.freedom for window in windows])
    within = squares.sum(axis=0) / count**2
    # Welch and Satterthwaite's degrees of freedom of a sum of variances.
    known = (squares**2 / freedom).sum(axis=0)
    degrees = np.where(
        known > 0, squares.sum(axis=0) ** 2 / np.maximum(known, 1e-300), freedom.sum(axis=0)
    )
    spread = np.full(ranks, float(values.var(axis=0, ddof=1).mean()) / count)
    apart = 1 if windows[0].is_shared else max(1, ranks - 1)
    between = np.full(ranks, float((count - 1) * apart))
    wider = _reach(spread, between, alpha) > _reach(within, degrees, alpha)
    return Estimate(
        tuple(values.mean(axis=0).tolist()),
        tuple(np.sqrt(np.where(wider, spread, within)).tolist()),
        tuple(np.where(wider, between, degrees).tolist()),
        sum(window.effective for window in windows),
        sum(window.steps for window in windows),
        windows[0].comparisons,
        windows[0].is_log,
        windows[0].is_shared,
    )


def look_alpha(count: int, most: int) -> float:
    """The level of the look at `count` windows, 2 to `most`: in proportion to count − 1.

    Later looks spend more, since the first ones know little of the spread between windows.
    """
    return LOOKS_ALPHA * (count - 1) / sum(range(most))


def disagreeing(windows: Sequence[Estimate]) -> tuple[int, ...]:
    """Which windows differ from the mean of all by more than their steps explain."""
    values = np.array([window.values for window in windows])
    far = np.abs(values - values.mean(axis=0))
    apart = []
    for number, window in enumerate(windows):
        squares = np.array(window.errors) ** 2
        reach = _reach(squares, np.array(window.freedom), ALPHA / values.size)
        if (far[number] > reach + ROUNDING).any():
            apart.append(number)
    return tuple(apart)


def _reach(variance: Floats, freedom: Floats, alpha: float) -> Floats:
    """How far the ends lie from the figure at level `alpha`."""
    quantiles = np.array([t_quantile(alpha, each) for each in freedom])
    reach: Floats = np.sqrt(variance) * quantiles
    return reach


def typical_ratio(times: npt.NDArray[np.generic]) -> Estimate | None:
    """How much longer than its peers each rank takes in a typical step.

    times: shape (steps, ranks), of which ranks may be 0 in some steps. A rank's level is the 20 %
    trimmed mean over steps of log(time / median of all ranks): one step that took three times as
    long moves a mean, not this. The figure is its level less the median of the others' levels;
    were it the mean of ratios to the median of the others in each step, noise would blur that
    median wherever many ranks are slow. The deviations are those of the winsorised ratios to the
    others, divided by the share that is left (Tukey and McLaughlin 1963). None where a rank or
    its peers have no time in more than a fifth of the steps, and with fewer than two ranks.
    """
    steps, ranks = times.shape
    if ranks < 2 or not steps:
        return None
    exact = np.asarray(times, np.float64)
    typical, _ = trimmed(_log_of_ratio(exact, np.median(exact, axis=1)[:, None]))
    ratios = log_ratios(exact)
    low, high = trimmed(ratios)[1]
    if not np.isfinite([typical, low, high]).all():
        return None
    cut = int(TRIM * steps)
    deviations = np.clip(ratios, low, high)
    deviations = (deviations - deviations.mean(axis=0)) / (1 - 2 * cut / steps)
    others = median_of_others(np.exp(typical)[None])[0]
    return _estimate(typical - np.log(others), deviations, is_log=True)


def trimmed(values: Floats) -> tuple[Floats, tuple[Floats, Floats]]:
    """The trimmed mean of each column, and the smallest and largest value that it is made of."""
    cut = int(TRIM * len(values))
    inner = np.sort(values, axis=0)[cut : len(values) - cut]
    with np.errstate(invalid="ignore"):
        return inner.mean(axis=0), (inner[0], inner[-1])


def log_ratios(times: Floats) -> Floats:
    """log(time / median of the other ranks), shape (steps, ranks).

    Infinite where only one of the two is 0, and 0 where both are.
    """
    return _log_of_ratio(times, median_of_others(times))


def median_of_others(values: npt.NDArray[np.int64] | Floats) -> Floats:
    """For each value the median of the other ranks', shape (steps, ranks), at least two ranks."""
    ranks = values.shape[1]
    order = np.argsort(values, axis=1, kind="stable")
    place = np.argsort(order, axis=1, kind="stable")
    ordered = np.take_along_axis(values, order, axis=1).astype(np.float64)
    # The others are the ordered ranks without the one at `place`.
    upper, lower = (ranks - 1) // 2, (ranks - 2) // 2
    middle: Floats = np.take_along_axis(ordered, upper + (place <= upper), axis=1)
    if lower != upper:
        middle = (middle + np.take_along_axis(ordered, lower + (place <= lower), axis=1)) / 2
    return middle


def _log_of_ratio(times: Floats, middle: Floats) -> Floats:
    """log(times / middle); infinite where only one of the two is 0, and 0 where both are."""
    with np.errstate(divide="ignore", invalid="ignore"):
        ratios: Floats = np.log(times) - np.log(middle)
    ratios[(times == 0) & (middle == 0)] = 0.0
    return ratios


def ratio_of_sums(
    over: Floats,
    under: Floats,
    *,
    less: float = 0.0,
    less_error: float = 0.0,
    are_inverse: bool = True,
) -> Estimate | None:
    """Σ over / Σ under − less, of each column of `over`, shape (steps, columns).

    under: shape (steps,). The errors are those of the mean of (over − ratio · under) / mean under
    (delta method). less_error: standard error of `less`.
    """
    mean = float(under.mean()) if len(under) else 0.0
    if mean <= 0:
        return None
    ratio = over.mean(axis=0) / mean
    deviations = (over - ratio * under[:, None]) / mean
    estimate = _estimate(ratio - less, deviations, are_inverse=are_inverse)
    errors = tuple(math.hypot(error, less_error) for error in estimate.errors)
    return msgspec.structs.replace(estimate, errors=errors)


def mean_of(values: Floats) -> Estimate:
    """The mean of each column of `values`, shape (steps, columns)."""
    mean = values.mean(axis=0)
    return _estimate(mean, values - mean, are_inverse=False)


def side_by_side(estimates: Sequence[Estimate]) -> Estimate:
    """The figures of ranks that were estimated one by one, at least one, as one estimate.

    Ranks that wait for each other share their noise: together they know no more than one of them.
    """
    return Estimate(
        tuple(value for each in estimates for value in each.values),
        tuple(error for each in estimates for error in each.errors),
        tuple(freedom for each in estimates for freedom in each.freedom),
        min(each.effective for each in estimates),
        min(each.steps for each in estimates),
        sum(each.comparisons for each in estimates),
        estimates[0].is_log,
        is_shared=True,
    )


def share_of_mean(times: Floats) -> Estimate | None:
    """Each rank's total / the mean of the totals; the largest is λ."""
    return ratio_of_sums(times, times.mean(axis=1))


def lost_share(times: Floats) -> Estimate | None:
    """What perfect balance would save, beyond what noise alone loses: Σ (max − mean) / Σ max."""
    peak = times.max(axis=1)
    noise = noise_share(times)
    uncertain = noise / math.sqrt(2.0 * max(times.size, 1))
    lost = (peak - times.mean(axis=1))[:, None]
    return ratio_of_sums(lost, peak, less=noise, less_error=uncertain)


def noise_share(times: Floats) -> float:
    """The share that noise alone makes ranks lose, 0 to 1: σ e / (1 + σ e).

    σ: standard deviation of a step's time in proportion to the other ranks', robust (from the
    median of the absolute deviations of all ranks). e: expected largest of as many standard normal
    numbers as there are ranks.
    """
    ranks = times.shape[1]
    left = _beside_usual(times)
    left = left[np.isfinite(left).all(axis=1)]
    if not len(left):
        return 0.0
    # Half of normal numbers lie within 0.6745 σ; the median of the others adds to the variance.
    spread = float(np.median(np.abs(left))) / 0.6745 / math.sqrt(1 + _median_variance(ranks - 1))
    loss = spread * expected_largest(ranks)
    return loss / (1 + loss)


def spike_shares(times: Floats) -> Estimate | None:
    """For each rank the share of the time that it loses in its spikes.

    Σ of (time − what is typical of it beside the others' median), over the steps in which that
    exceeds 1.3 times the typical / Σ max.
    """
    return ratio_of_sums(spikes(times), times.max(axis=1), are_inverse=False)


def spikes(times: Floats) -> Floats:
    """How far each step of each rank exceeds what is typical, where it is a spike; else 0.

    Same shape and unit as `times`.
    """
    excess = _beside_usual(times)
    with np.errstate(invalid="ignore", over="ignore"):
        usual = times * np.exp(-excess)
    spiked = excess > math.log(SPIKE)
    longer: Floats = np.where(spiked, times - np.where(spiked, usual, 0.0), 0.0)
    return longer


def _beside_usual(times: Floats) -> Floats:
    """log(time / what is usual of the rank beside the others), shape (steps, ranks)."""
    ratios = log_ratios(times)
    with np.errstate(invalid="ignore"):
        beside: Floats = ratios - np.median(ratios, axis=0)
    return beside


def mean_excess(values: Floats) -> Estimate:
    """Each rank's mean of (value − median of the others), in the unit of `values`.

    values: shape (steps, ranks), at least two ranks.
    """
    over = values - median_of_others(values)
    return _estimate(over.mean(axis=0), over - over.mean(axis=0))


def error_of_mean(series: Floats) -> tuple[float, float]:
    """Standard error of the mean of a series of steps, and its degrees of freedom.

    series: less its mean, shape (steps,).
    """
    estimate = _estimate(np.zeros(1), series[:, None])
    return estimate.errors[0], estimate.freedom[0]


def _estimate(
    values: Floats, deviations: Floats, *, is_log: bool = False, are_inverse: bool = True
) -> Estimate:
    """The estimate of means. deviations: of each step from them, shape (steps, figures).

    are_inverse: of two figures one follows from the other.
    """
    steps, figures = deviations.shape
    square = (deviations**2).sum(axis=0)
    if square.sum() <= steps * (ROUNDING * max(1.0, float(np.abs(values).max()))) ** 2:
        deviations = np.zeros_like(deviations)
    deviations = _without_shifts(deviations)
    square = (deviations**2).sum(axis=0)
    pooled = max(1, figures - 1)  # each figure is compared with the others
    phi = correlation(deviations)
    effective = effective_steps(steps, phi)
    # Some standard errors more, since a short window often shows less correlation than there is.
    uncertain = math.sqrt((1 - phi**2) / (max(steps - HIDDEN, 1) * pooled))
    surely = min(phi + DOUBT * uncertain, MAX_CORRELATION) if phi else 0.0
    known = effective_steps(steps, surely)
    # The spectrum is flat, as the mean needs it, up to periods of about 8 / (1 − φ) steps.
    terms = _cosines(steps, max(4, int((1 - phi) * steps / 4)))
    noisy = square > NOISIER * np.median(square)
    autoregressive, long_run = (
        np.where(noisy, variance, variance[~noisy].mean())
        for variance in (
            square / max(steps - 1, 1) / effective,
            ((terms @ deviations) ** 2).mean(axis=0) / steps,
        )
    )
    errors = np.sqrt(np.maximum(autoregressive, long_run))
    freedom = np.where(noisy, 1.0, float(pooled)) * max(known - 1, 1e-3)
    return Estimate(
        tuple(values.tolist()),
        tuple(errors.tolist()),
        tuple(freedom.tolist()),
        known,
        steps,
        1 if figures == 2 and are_inverse else figures,
        is_log,
    )


def effective_steps(steps: float, phi: float) -> float:
    """How many independent steps so many are worth, each of which resembles the one before."""
    return steps * (1 - phi) / (1 + phi)


def _without_shifts(deviations: Floats) -> Floats:
    """Deviations from one level before and another after a moment, where that is no noise.

    A rank whose GPU is throttled from some step on does not vary as noise does. The best moment
    is that of least squares; a shift must be SHIFT times its standard error, given how much the
    steps on either side resemble each other. deviations: shape (steps, ranks).
    """
    steps = len(deviations)
    split = np.arange(SIDE, steps - SIDE + 1)
    if not len(split):
        return deviations
    before = np.cumsum(deviations, axis=0)[split - 1]
    explained = before**2 * (steps / (split * (steps - split)))[:, None]
    best = explained.argmax(axis=0)
    at, sums = split[best], np.take_along_axis(before, best[None], axis=0)[0]
    after = np.arange(steps)[:, None] >= at
    left = deviations - np.where(after, -sums / (steps - at), sums / at)
    phi = correlation(left)
    noise = (left**2).sum(axis=0) / (steps - 2) * (1 + phi) / (1 - phi)
    is_clear = explained.max(axis=0) > SHIFT**2 * noise
    rest: Floats = np.where(is_clear, left, deviations)
    return rest


def correlation(deviations: Floats) -> float:
    """φ, how far a deviation carries over to the next step, 0 to `MAX_CORRELATION`.

    deviations: shape (steps, ranks), the mean of each column 0. Noise that does not carry over
    lowers the correlations of lag 1 and lag 2 by the same factor, so their ratio is φ too; it is
    used where it is larger, unless lag 1 is so small that the ratio is noise.
    """
    steps = len(deviations)
    square = float((deviations**2).sum())
    if square <= 0 or steps < 4:
        return 0.0
    lags = [float((deviations[k:] * deviations[:-k]).sum()) / square for k in (1, 2)]
    first, second = (lag + (1 + 3 * lag) / steps for lag in lags)
    phi = max(first, second / first) if first > CARRIED else first
    return min(max(phi, 0.0), MAX_CORRELATION)


@lru_cache(maxsize=64)
def _cosines(steps: int, number: int) -> Floats:
    """The first `number` cosines of so many steps, shape (number, steps), each of length 1."""
    number = max(1, min(number, steps - 1))
    angle = math.pi * np.outer(np.arange(1, number + 1), np.arange(steps) + 0.5) / max(steps, 1)
    cosines: Floats = np.sqrt(2 / max(steps, 1)) * np.cos(angle)
    cosines.flags.writeable = False
    return cosines


# Student's t and normal numbers. SciPy has them; importing it takes longer than judging a window.

_ANGLES = np.linspace(0.0, math.pi / 2, 4001)


@lru_cache(maxsize=512)
def _log_tails(freedom: float) -> Floats:
    """Logarithms of the upper tails of t = √freedom · tan(angle), for each of `_ANGLES`.

    The density of the angle is proportional to cos(angle)^(freedom − 1).
    """
    density = np.cos(_ANGLES) ** (freedom - 1)
    tails = np.cumsum((density[1:] + density[:-1])[::-1])[::-1]
    logs: Floats = np.log(np.maximum(tails / (2 * tails[0]), 1e-300))
    return logs


def _usable(freedom: float) -> float:
    """Beyond 5,000 degrees the distribution no longer changes; fewer than 2 are never used."""
    return float(min(max(round(freedom, 1), 2.0), 5000.0))


@lru_cache(maxsize=512)
def t_quantile(alpha: float, freedom: float) -> float:
    """The t that Student's distribution exceeds with probability `alpha`, 0 to 0.5."""
    freedom = _usable(freedom)
    angle = np.interp(-math.log(alpha), -_log_tails(freedom), _ANGLES[:-1])
    return math.sqrt(freedom) * math.tan(float(angle))


def t_tail(t: float, freedom: float) -> float:
    """The probability that Student's distribution exceeds `t`, which is positive."""
    freedom = _usable(freedom)
    angle = math.atan(t / math.sqrt(freedom))
    return math.exp(float(np.interp(angle, _ANGLES[:-1], _log_tails(freedom))))


@lru_cache(maxsize=64)
def expected_largest(count: int) -> float:
    """The expected largest of `count` standard normal numbers: ∫ 1 − Φⁿ − (1 − Φ)ⁿ over x > 0."""
    x = np.linspace(0.0, 9.0, 1801)
    below = 0.5 * (1 + np.array([math.erf(each / math.sqrt(2)) for each in x]))
    terms = 1 - below**count - (1 - below) ** count
    return float(((terms[1:] + terms[:-1]) / 2).sum() * (x[1] - x[0]))


def _median_variance(count: int) -> float:
    """The variance of the median of `count` standard normal numbers, about π / 2 count."""
    return math.pi / (2 * count + math.pi - 2)
