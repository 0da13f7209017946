"""Which kernels differ between lives, of hundreds of them.

Whatever makes a whole life slower or faster (clocks, temperature) is taken out first: the median
over kernels of how much longer than usual each lasts in that life. What is left of a kernel is
compared by a moderated t (Smyth 2004, "Linear Models and Empirical Bayes Methods"): the variance
of each kernel is drawn towards the one that kernels have in common, so few lives tell more. A
kernel that varies much more than the others, such as one with two variants between which lives
choose, keeps its own variance and has no part in the common one (as Phipson et al. 2016, "Robust
hyperparameter estimation", do it in another way).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import msgspec
import numpy as np
import numpy.typing as npt

from pytest_sglprof._analysis.certainty import Amount, Share, t_quantile, t_tail
from pytest_sglprof._analysis.lives import MIN_SCAN_LIVES, Design, LifeValue, on_own_hosts

Floats = npt.NDArray[np.float64]
Mask = npt.NDArray[np.bool_]

SCAN_Q = 0.05  # expected share of false ones among the kernels that are listed
INTERVAL_ALPHA = 0.025  # on either side, of the interval of one kernel
OWN_VARIANCE = 4.0  # times the common variance; beyond that a kernel keeps its own
MIN_KERNELS = 5  # fewer tell nothing of a life's own level, or of a common variance
MIN_FREEDOM = 4  # of the variance of a kernel between lives
LEAST_PRIOR, MOST_PRIOR = 0.5, 1e4  # of the common variance: hardly known, as good as known
LABELLINGS = 5000  # permutations that are drawn where there are more
LARGEST = 1e12  # t of lives that do not differ within either side


class KernelChange(msgspec.Struct, frozen=True, kw_only=True):
    """A kernel in new lives beside accepted ones.

    ratio: new / accepted, of the kernel's time as it is; low, high: where that is (95 %).
    relative: new / accepted, less what the whole life is slower by. p: that of no difference in
    `relative`, of either sign; q: the share of false ones if all kernels with so small a p are
    listed (Benjamini–Hochberg). before_ns, now_ns: ns a step, the geometric mean over accepted
    lives of the level compared with, and that times `ratio`. is_slower: q is at most 5 %, and both
    ratios are above the limit; is_faster: both are below its inverse.

    Significance is that of `relative`, since what a whole life is slower by is no news of one
    kernel; users lose what `ratio` says. So it takes both to be listed.
    """

    category: str
    name: str
    ratio: Amount
    low: Amount
    high: Amount
    relative: Amount
    before_ns: Amount
    now_ns: Amount
    p: Share
    q: Share
    is_slower: bool
    is_faster: bool


def scan(
    names: Sequence[tuple[str, str]],
    accepted: Floats,
    fresh: Floats,
    *,
    accepted_lives: Sequence[LifeValue] = (),
    fresh_lives: Sequence[LifeValue] = (),
    limit: float = 1.05,
    min_ns: float = 0.0,
) -> tuple[KernelChange, ...] | str:
    """Compares each kernel; the surest difference comes first. Else why that cannot be done.

    names: category and name of each kernel. accepted, fresh: logarithms of ns a step, shape
    (lives, kernels); kernels that a life lacks are left out. accepted_lives, fresh_lives: their
    hosts and levels, in the same order; none if all are of one host and level. limit: of the
    ratio. min_ns: a slower kernel costs at least so much a step.

    It explains and lists; nothing fails by it. The hypothesis of p and q is *no difference*: the
    kernel surely changed beside the others, and is beyond the limit by estimate.
    """
    if len(accepted) < MIN_SCAN_LIVES:
        return f"{len(accepted)} accepted lives, {MIN_SCAN_LIVES} are needed to list kernels"
    old = accepted_lives or [LifeValue(1.0)] * len(accepted)
    design = on_own_hosts(old, fresh_lives or [LifeValue(1.0)] * len(fresh))
    if isinstance(design, str):
        return design
    if design.freedom < MIN_FREEDOM:
        return "lives of so many hosts and levels are too few to list kernels"
    logs = np.vstack([accepted, fresh])
    has_all = np.isfinite(logs).all(axis=0)
    if has_all.sum() < MIN_KERNELS:
        return f"{int(has_all.sum())} kernels that all lives have, {MIN_KERNELS} are needed"
    kept = [names[index] for index in np.flatnonzero(has_all).tolist()]
    last = max(life.level for life in old)
    before = accepted[[life.level == last for life in old]][:, has_all].mean(axis=0)
    return _compared(kept, logs[:, has_all], before, design, limit, min_ns)


def _compared(
    names: Sequence[tuple[str, str]],
    logs: Floats,
    mean: Floats,
    design: Design,
    limit: float,
    min_ns: float,
) -> tuple[KernelChange, ...]:
    """mean: of the logarithms of each kernel, in the lives compared with."""
    levels = levels_of(logs)
    beside = logs - levels[:, None]
    spread = spread_of(design.variances(beside), design.freedom)
    differences, shifts = design.weights @ logs, design.weights @ beside
    errors = np.sqrt(spread.variances * design.factor)
    chances = np.minimum(1.0, 2 * tails(np.abs(shifts), errors, spread.freedom))
    shares = false_shares(chances)
    before, now = np.exp(mean), np.exp(mean + differences)
    level_variance = float(design.variances(levels)) * design.factor
    changes = []
    for index in np.lexsort((-np.abs(shifts), chances)).tolist():
        ratio, relative = (float(np.exp(each[index])) for each in (differences, shifts))
        half = _half_width(
            float(errors[index] ** 2), float(spread.freedom[index]), level_variance, design.freedom
        )
        is_sure = bool(shares[index] <= SCAN_Q)
        costs = float(now[index] - before[index])
        changes.append(
            KernelChange(
                category=names[index][0],
                name=names[index][1],
                ratio=ratio,
                low=ratio * math.exp(-half),
                high=ratio * math.exp(half),
                relative=relative,
                before_ns=float(before[index]),
                now_ns=float(now[index]),
                p=float(f"{chances[index]:.6g}"),
                q=float(f"{shares[index]:.6g}"),
                is_slower=is_sure and min(ratio, relative) > limit and costs >= min_ns,
                is_faster=is_sure and max(ratio, relative) < 1 / limit and -costs >= min_ns,
            )
        )
    return tuple(changes)


def _half_width(kernel: float, freedom: float, level: float, level_freedom: int) -> float:
    """Of the interval of a logarithm: the variance of the kernel and that of its lives' levels."""
    variance = kernel + level
    if variance <= 0:
        return 0.0
    known = variance**2 / (kernel**2 / freedom + level**2 / level_freedom)
    return t_quantile(INTERVAL_ALPHA, known) * math.sqrt(variance)


def levels_of(logs: Floats) -> Floats:
    """How much longer than usual each life's kernels last: the median over kernels, shape (lives,).

    logs: shape (lives, kernels). The usual is each kernel's mean over all lives, so that it
    depends on no labels.
    """
    levels: Floats = np.median(logs - logs.mean(axis=0), axis=1)
    return levels


def without_levels(logs: Floats) -> Floats:
    """The logarithms of kernels less what each whole life is slower by, shape (lives, kernels)."""
    return logs - levels_of(logs)[:, None]


@dataclass(frozen=True)
class Spread:
    """The moderated variance of each kernel, and its degrees of freedom, shapes (kernels,)."""

    variances: Floats
    freedom: Floats


def spread_of(variances: Floats, freedom: int) -> Spread:
    """Moderated variances from each kernel's own, shape (kernels,)."""
    common, prior, keeps_own = _prior(variances, freedom)
    drawn = (prior * common + freedom * variances) / (prior + freedom)
    return Spread(
        np.where(keeps_own, variances, drawn),
        np.where(keeps_own, float(freedom), prior + freedom),
    )


def _prior(variances: Floats, freedom: int, alike: Mask | None = None) -> tuple[float, float, Mask]:
    """The common variance and its degrees of freedom, and which kernels keep their own.

    Moments of log variance, as Smyth 2004 (6.2) takes them, but of those kernels alone that vary
    as the others do, and compared with what they are of such kernels. alike: those that may have a
    part in the common variance; all if None.
    """
    positive = variances > 0 if alike is None else (variances > 0) & alike
    if positive.sum() < MIN_KERNELS:
        return 0.0, 0.0, np.ones(len(variances), dtype=np.bool_)
    keeps_own = variances > OWN_VARIANCE * float(np.median(variances[positive]))
    logs = np.log(variances[positive & ~keeps_own])
    spread = float(logs.var(ddof=1))
    low, high = math.log(LEAST_PRIOR), math.log(MOST_PRIOR)
    for _ in range(25):
        middle = (low + high) / 2
        is_wider = _usual_moments(freedom, math.exp(middle))[1] > spread
        low, high = (middle, high) if is_wider else (low, middle)
    prior = math.exp(high)
    return math.exp(float(logs.mean()) - _usual_moments(freedom, prior)[0]), prior, keeps_own


def _usual_moments(freedom: int, prior: float) -> tuple[float, float]:
    """Mean and variance of log(variance / common one), of those up to OWN_VARIANCE medians.

    The ratio has the F distribution with `freedom` and `prior` degrees of freedom.
    """

    def density(z: Floats) -> Floats:
        log = freedom / 2 * z - (freedom + prior) / 2 * np.log1p(freedom / prior * np.exp(z))
        weights: Floats = np.exp(log - log.max())
        return weights

    z = np.linspace(-12.0, 20.0, 801)
    below = density(z).cumsum()
    median = float(np.interp(below[-1] / 2, below, z))
    z = np.linspace(median - 10.0, median + math.log(OWN_VARIANCE), 401)
    weights = density(z)
    weights[[0, -1]] /= 2
    mean = float((weights @ z) / weights.sum())
    return mean, float(weights @ (z - mean) ** 2 / weights.sum())


def tails(over: Floats, errors: Floats, freedom: Floats) -> Floats:
    """The probability that Student's t exceeds over / error, for each; over is at least 0."""
    chances = np.where(over > 0, 0.0, 0.5)
    for index in np.flatnonzero(errors > 0).tolist():
        chances[index] = t_tail(float(over[index] / errors[index]), float(freedom[index]))
    return chances


def false_shares(chances: Floats) -> Floats:
    """q of each p (Benjamini and Hochberg 1995)."""
    count = len(chances)
    order = np.argsort(chances, kind="stable")
    scaled = chances[order] * count / np.arange(1, count + 1)
    lowest = np.minimum.accumulate(scaled[::-1])[::-1]
    shares = np.empty(count)
    shares[order] = np.minimum(lowest, 1.0)
    return shares


def max_t(
    a: Floats,
    b: Floats,
    *,
    are_kernels: Mask | None = None,
    is_two_sided: bool = False,
    seed: int = 0,
) -> Floats:
    """p of each column, adjusted for all of them: b is above a (or, two-sided, differs from it).

    a, b: logarithms of figures, shapes (lives, figures), finite. are_kernels: the columns whose
    variance is the common one; all if None. (A share of idle time hardly varies, and would say of
    kernels that few lives tell little of them.) Step-down max-T over labellings
    of the lives (Westfall and Young 1993): all of them, or as many as LABELLINGS, drawn with
    `seed`, and the one at hand. Kernels come as `without_levels` of all lives gives them.
    """
    logs = np.vstack([a, b])
    logs = logs - logs.mean(axis=0)
    labels = _labellings(len(a), len(b), seed)
    size_a, size_b, lives = len(a), len(b), len(logs)
    # One row per labelling: the difference of means, and from it what is left within the sides.
    weights = np.where(labels, 1 / size_b, -1 / size_a)
    differences = weights @ logs
    total = (logs**2).sum(axis=0)
    within = np.maximum(total - differences**2 * (size_a * size_b / lives), 0.0)
    # The prior is that of all lives, whatever their labels, so the test stays exact.
    common, prior, keeps_own = _prior(total / (lives - 1), lives - 1, are_kernels)
    prior_of = np.where(keeps_own, 0.0, prior)
    with np.errstate(divide="ignore", invalid="ignore"):
        variances = (prior_of * common + within) / (prior_of + lives - 2)
        t = differences / np.sqrt(variances)
    t = np.nan_to_num(np.where(differences == 0, 0.0, t), posinf=LARGEST, neginf=-LARGEST)
    return _step_down(np.abs(t) if is_two_sided else t)


def _labellings(size_a: int, size_b: int, seed: int) -> npt.NDArray[np.bool_]:
    """Which lives are taken for b's, shape (labellings, lives); the first is the one at hand."""
    lives = size_a + size_b
    at_hand = np.arange(lives) >= size_a
    if math.comb(lives, size_b) <= LABELLINGS + 1:
        chosen = np.array(list(combinations(range(lives), size_b))[::-1])  # those at hand first
        labels = np.zeros((len(chosen), lives), dtype=np.bool_)
        np.put_along_axis(labels, chosen, True, axis=1)
        return labels
    rng = np.random.default_rng(seed)
    drawn = rng.permuted(np.tile(at_hand, (LABELLINGS, 1)), axis=1)
    return np.vstack([at_hand, drawn])


def _step_down(t: Floats) -> Floats:
    """Adjusted p from statistics, shape (labellings, figures), those at hand first."""
    order = np.argsort(-t[0], kind="stable")
    ordered = t[:, order]
    largest = np.maximum.accumulate(ordered[:, ::-1], axis=1)[:, ::-1]
    # Equal sums in another order differ by rounding.
    reached = largest >= ordered[0] - 1e-9 * np.maximum(1.0, np.abs(ordered[0]))
    adjusted = np.empty(t.shape[1])
    adjusted[order] = np.maximum.accumulate(reached.mean(axis=0))
    return adjusted
