"""How much of the time in which ranks differ is load: more input, or slower at the same input.

For one category of kernels and one kind of pass the time of a rank is f · (a + b · x): x is what
prices the category (`Driver`), f how slow the rank is. The law a + b · x is fitted to the passes
of all other ranks; where their x does not reach the rank's, to those of all ranks, and only where
the slope within the ranks agrees with the slope between them. From the law follow, in ns a pass:

- the load part, b · (x − mean x of the others);
- the speed part, (f − 1) · (a + b · x), less the same of the others;
- the rest, what the law leaves.

f is that of the kernels whose shapes are the same on all ranks. Errors are those of means of
correlated passes (`certainty`): each figure is a mean over passes of its influence function.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import msgspec
import numpy as np

from pytest_sglprof._analysis.certainty import (
    Amount,
    Floats,
    Interval,
    error_of_mean,
    log_ratios,
    t_quantile,
    trimmed,
)

Driver = Literal[
    "KV tokens", "query-key pairs", "graph batch", "tokens", "expert tokens", "requests"
]

MIN_PASSES = 20  # of a kind of pass; a law of fewer is not looked for
COVERED = 0.8  # of a rank's passes have an input that the others have too: no extrapolation
FARTHEST = 2.0  # times the others' largest input, up to which a linear law is continued
SURELY = 0.05  # one-sided level at which a slope must be above 0
DISAGREEING = 0.0005  # level, on either side, at which two slopes differ
SHOWN = 0.0125  # one-sided; half of the 2.5 % promised at each end, as errors are estimates too
STEADY = 1e-6  # of the input: what varies less within a rank does not vary
HUBER = 2.5  # standard deviations beyond which a pass counts less
ROUNDS = 4  # of the robust fit


class Part(msgspec.Struct, frozen=True):
    """A part of a difference, ns a pass, and what it may be (95 %).

    interval: None in a document that was read, where it was not finite.
    """

    ns: float
    interval: Interval | None

    @property
    def bounds(self) -> Interval:
        """The interval; without one it may be anything."""
        return self.interval or (-math.inf, math.inf)


class CategorySplit(msgspec.Struct, frozen=True, kw_only=True):
    """Why one rank differs from the mean of the others in one category, in one kind of pass.

    kind: of the passes ("decode", "eager", ...); passes: how many. driver: what prices the
    category, ratio: the rank's mean of it / the others'. difference_ns: its time less the others',
    a pass; load, speed, rest: the parts, which add up to it; None where they are not known, for
    `reason`.
    """

    category: str
    kind: str
    passes: int
    driver: Driver | None
    ratio: Amount | None
    difference_ns: float
    load: Part | None = None
    speed: Part | None = None
    rest: Part | None = None
    reason: str = ""


@dataclass(frozen=True)
class Speeds:
    """How slow each rank is at the same work.

    levels: logarithms of their typical time beside the median of all, shape (ranks,).
    deviations: of their ratio to the others, of each pass from the mean, shape (passes, ranks).
    errors: standard errors of the levels, freedom: their degrees of freedom, shape (ranks,).
    """

    levels: Floats
    deviations: Floats
    errors: Floats
    freedom: Floats

    def beside_others(self, rank: int) -> float:
        """How many times as long as the median of the others a rank takes."""
        return float(np.exp(self.levels[rank] - np.median(np.delete(self.levels, rank))))

    def interval_of(self, rank: int) -> Interval:
        """What that may be (95 %)."""
        ratio = self.beside_others(rank)
        reach = t_quantile(SHOWN, float(self.freedom[rank])) * float(self.errors[rank])
        return ratio * math.exp(-reach), ratio * math.exp(reach)


def speeds_of(times: Sequence[Floats]) -> Speeds | None:
    """The speeds by kernels that have the same shapes on all ranks.

    times: of each category of such kernels, shape (passes, ranks), ns. Categories count by the
    inverse of their variance. None with fewer than two ranks or `MIN_PASSES` passes.
    """
    logs = []
    for each in times:
        if each.shape[1] > 1 and len(each) >= MIN_PASSES and (each > 0).all():
            logs.append(np.log(each / np.median(each, axis=1)[:, None]))
    if not logs:
        return None
    weights = [1.0 / max(float(_spread(each).mean()) ** 2, 1e-12) for each in logs]
    together: Floats = np.average(logs, axis=0, weights=weights)
    levels, _ = trimmed(together)
    # Every pass counts in an error, but what is far off only up to three deviations.
    deviations = log_ratios(np.exp(together))
    middle, reach = np.median(deviations, axis=0), 3 * _spread(deviations)
    deviations = np.clip(deviations, middle - reach, middle + reach)
    deviations = deviations - deviations.mean(axis=0)
    errors, freedom = np.array([error_of_mean(each) for each in deviations.T]).T
    return Speeds(levels - np.median(levels), deviations, errors, freedom)


def _spread(values: Floats) -> Floats:
    """The standard deviation of each column, by the median of the absolute deviations."""
    spread: Floats = np.median(np.abs(values - np.median(values, axis=0)), axis=0) / 0.6745
    return spread


def split(
    times: Floats,
    inputs: Floats | None,
    speeds: Speeds | None,
    *,
    category: str,
    kind: str,
    driver: Driver | None,
    unknown: str = "",
    is_paired: bool = False,
) -> tuple[CategorySplit, ...]:
    """The split of each rank, for one category in the passes of one kind.

    times: shape (passes, ranks), ns. inputs: x, same shape, None where not known, for the reason
    `unknown`. speeds: of the ranks, None where not known; is_paired: from the same passes.
    """
    passes, ranks = times.shape
    mean = times.mean(axis=0)
    differences = mean - mean_of_others(mean)
    reason = unknown
    if not reason and passes < MIN_PASSES:
        reason = f"{passes} passes, at least {MIN_PASSES} are needed"
    if not reason and (inputs is None or not np.isfinite(inputs).all() or (inputs < 0).any()):
        reason = f"the {driver or 'input'} of some passes is not known"
    base = [
        CategorySplit(
            category=category,
            kind=kind,
            passes=passes,
            driver=driver,
            ratio=None,
            difference_ns=float(differences[rank]),
            reason=reason,
        )
        for rank in range(ranks)
    ]
    if reason or inputs is None:
        return tuple(base)
    law = _Law(times, inputs, speeds, is_paired=is_paired)
    return tuple(_parts(each, law, rank) for rank, each in enumerate(base))


def mean_of_others(values: Floats) -> Floats:
    """For each rank the mean of the others' values; shape of `values`, ranks last."""
    others: Floats = (values.sum(axis=-1, keepdims=True) - values) / max(1, values.shape[-1] - 1)
    return others


class _Law:
    """t = f · (a + b · x), fitted to all ranks, with what is needed to leave one out."""

    def __init__(
        self, times: Floats, inputs: Floats, speeds: Speeds | None, *, is_paired: bool
    ) -> None:
        self.passes, self.ranks = times.shape
        self.times, self.x = times, inputs.astype(np.float64)
        self.speeds = speeds
        self.is_paired = is_paired
        self.factor = np.ones(self.ranks) if speeds is None else np.exp(speeds.levels)
        self.y = times / self.factor
        self.centre = float(self.x.mean())
        self.is_constant = bool(np.ptp(self.x) <= 1e-9 * max(1.0, abs(self.centre)))
        self.weights = self._weights()

    def _weights(self) -> Floats:
        """Weights of relative residuals, smaller beyond `HUBER` deviations."""
        size = max(float(np.median(self.y)), 1e-9)
        weights = np.full(self.y.shape, 1.0 / size**2)
        for _ in range(ROUNDS):
            a, b = self.fit(weights, np.ones(self.ranks, bool))
            law = np.maximum(a + b * (self.x - self.centre), 0.01 * size)
            relative = self.y / law - 1
            # Around each rank's own level: a rank that is off as a whole is no outlier of passes.
            beside = relative - np.median(relative, axis=0)
            spread = float(np.median(np.abs(beside))) / 0.6745
            far = np.abs(beside) / max(HUBER * spread, 1e-12)
            weights = 1.0 / (law**2 * np.maximum(far, 1.0))
        return weights

    def fit(self, weights: Floats, chosen: np.ndarray) -> tuple[float, float]:
        """(a, b) of the chosen ranks; a at the mean of all x."""
        w = weights * chosen
        x = self.x - self.centre
        total = float(w.sum())
        if not total:
            return 0.0, 0.0
        mx, my = float((w * x).sum()) / total, float((w * self.y).sum()) / total
        sxx = float((w * (x - mx) ** 2).sum())
        b = 0.0 if self.is_constant or sxx <= 0 else float((w * (x - mx) * self.y).sum()) / sxx
        return my - b * mx, b

    def without(self, rank: int) -> np.ndarray:
        """Mask of the other ranks."""
        chosen = np.ones(self.ranks, bool)
        chosen[rank] = False
        return chosen

    def covers(self, rank: int) -> bool:
        """Whether the others have inputs like those of most passes of the rank."""
        others = self.x[:, self.without(rank)]
        low, high = float(others.min()), float(others.max())
        margin = 1e-9 * max(1.0, abs(high))
        inside = (self.x[:, rank] >= low - margin) & (self.x[:, rank] <= high + margin)
        return bool(inside.mean() >= COVERED)

    def influence_of_slope(
        self, chosen: np.ndarray, left: Floats | None = None
    ) -> tuple[Floats, float]:
        """What each pass adds to the slope of the chosen ranks, shape (passes,), and more error.

        Its mean is 0. left: what the law leaves, shape (passes, ranks); None for that of the chosen
        ranks. More error: that of the speeds, where they are of other passes.
        """
        a, b = self.fit(self.weights, chosen)
        w = self.weights * chosen
        x = self.x - self.centre
        x = x - float((w * x).sum()) / max(float(w.sum()), 1e-300)
        sxx = float((w * x**2).sum())
        if sxx <= 0:
            return np.zeros(self.passes), 0.0
        if left is None:
            left = self.y - a - b * (self.x - self.centre)
        series: Floats = (w * x * left).sum(axis=1) * self.passes / sxx
        more = 0.0
        if self.speeds is not None:
            # y = t / f: a rank taken for slower than it is has too small a y.
            share = (w * x * self.y).sum(axis=0) / sxx
            if self.is_paired:
                series = series - self.speeds.deviations @ share
            else:
                more = math.hypot(*(share * self.speeds.errors).tolist())
        return series - series.mean(), more

    def within(self) -> tuple[float, Floats, Floats]:
        """The slope within ranks, what each pass adds to it, and what is noise; 0 if unknown.

        Noise is what a line of each rank's own leaves.
        """
        w = self.weights
        total = w.sum(axis=0)
        x = self.x - (w * self.x).sum(axis=0) / total
        y = self.y - (w * self.y).sum(axis=0) / total
        sxx = float((w * x**2).sum())
        if sxx <= STEADY**2 * float((w * self.x**2).sum()):
            return 0.0, np.zeros(self.passes), y
        slope = float((w * x * y).sum()) / sxx
        lines = (w * x * y).sum(axis=0) / np.maximum((w * x**2).sum(axis=0), 1e-300)
        left = y - lines * x
        series = (w * x * left).sum(axis=1) * self.passes / sxx
        return slope, series - series.mean(), left

    @cached_property
    def scale(self) -> float:
        """What slopes are multiplied by, to be of the size of times."""
        return max(self.centre, 1e-9)

    @cached_property
    def why_not_linear(self) -> str:
        """Why one slope does not hold beyond what the ranks have; "" if it does."""
        within, series, left = self.within()
        error, freedom = error_of_mean(self.scale * series)
        if self.scale * within <= t_quantile(SURELY, freedom) * error:
            return (
                "its input is beyond that of its peers, and how time grows with it is not known: "
                "it varies too little within a rank"
            )
        every = np.ones(self.ranks, bool)
        _, pooled = self.fit(self.weights, every)
        # What a common law leaves would hide how far the rank is off it, so only noise counts.
        between, more = self.influence_of_slope(every, left)
        apart, freedom = error_of_mean(self.scale * (between - series))
        apart = math.hypot(apart, self.scale * more)
        if self.scale * abs(pooled - within) > t_quantile(DISAGREEING, freedom) * apart:
            return (
                "between ranks time grows with the input otherwise than within them: the rank "
                "differs by more than its load"
            )
        return ""


def _parts(base: CategorySplit, law: _Law, rank: int) -> CategorySplit:
    others = law.without(rank)
    x_rank, x_others = float(law.x[:, rank].mean()), float(law.x[:, others].mean())
    ratio = x_rank / x_others if x_others > 0 else None
    base = msgspec.structs.replace(base, ratio=ratio)
    if law.is_constant or law.covers(rank):
        chosen = others
    else:
        reason = _why_not_continued(law, rank)
        if reason:
            return msgspec.structs.replace(base, reason=reason)
        chosen = np.ones(law.ranks, bool)
    a, b = law.fit(law.weights, chosen)
    left = law.times - law.factor * (a + b * (law.x - law.centre))
    # The law is that of ranks as slow as the median of the others.
    scale = float(np.median(law.factor[others]))
    apart = scale * (x_rank - x_others)
    load = b * apart
    series, more = law.influence_of_slope(chosen)
    load_error, freedom = error_of_mean(apart * series)
    load_error = math.hypot(load_error, apart * more)
    at_rank = scale * (a + b * (x_rank - law.centre))
    # Beside slow ranks, a rank as fast as most is faster than their mean.
    slower = (law.factor / scale - 1) * scale * (a + b * (law.x.mean(axis=0) - law.centre))
    speed = float(slower[rank] - slower[others].mean())
    speed_error = 0.0 if law.speeds is None else float(law.speeds.errors[rank]) * at_rank
    beyond = left[:, rank] - mean_of_others(left)[:, rank]
    rest = base.difference_ns - load - speed
    rest_error, rest_freedom = error_of_mean(beyond - beyond.mean())
    rest_error = math.hypot(rest_error, load_error)
    # Without speeds all factors are 1: what is not load is the rank's, for whatever reason.
    unknown = "no kernel has the same shapes on all ranks: its speed is not known"
    return msgspec.structs.replace(
        base,
        load=_part(load, load_error, freedom),
        speed=None if law.speeds is None else _part(speed, speed_error, freedom),
        rest=_part(rest, rest_error, rest_freedom),
        reason=unknown if law.speeds is None else "",
    )


def _why_not_continued(law: _Law, rank: int) -> str:
    """Why the law may not be continued to the inputs of a rank; "" if it may."""
    if law.speeds is None:
        return "its input is beyond that of its peers, and its speed at the same work is not known"
    others = law.x[:, law.without(rank)]
    inputs = law.x[:, rank]
    if np.median(inputs) > FARTHEST * others.max() or np.median(inputs) < others.min() / FARTHEST:
        return f"its input is more than {FARTHEST:g} times beyond that of its peers"
    return law.why_not_linear


def _part(ns: float, error: float, freedom: float) -> Part:
    reach = t_quantile(SHOWN, freedom) * error
    return Part(float(ns), (float(ns - reach), float(ns + reach)))


def added(parts: Sequence[tuple[float, Part]], *, are_independent: bool = True) -> Part:
    """Σ share · part; a share is that of the kind of pass among all.

    are_independent: False for parts whose errors have one source, as all speed parts of a rank.
    """
    ns = sum(share * part.ns for share, part in parts)
    together = math.hypot if are_independent else lambda *reaches: sum(map(abs, reaches))
    low = together(*(share * (part.ns - part.bounds[0]) for share, part in parts))
    high = together(*(share * (part.bounds[1] - part.ns) for share, part in parts))
    return Part(ns, (ns - low, ns + high))


def price_of_input(times: Floats, inputs: Floats) -> float | None:
    """By how much the time of a pass grows with one more of its input, ns; None where not known.

    times, inputs: shape (passes, ranks).
    """
    law = _Law(times, inputs, None, is_paired=False)
    if law.is_constant or law.passes < MIN_PASSES:
        return None
    every = np.ones(law.ranks, bool)
    _, slope = law.fit(law.weights, every)
    error, freedom = error_of_mean(law.scale * law.influence_of_slope(every)[0])
    return slope if law.scale * slope > t_quantile(SURELY, freedom) * error else None
