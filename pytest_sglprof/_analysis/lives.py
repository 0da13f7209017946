"""How a figure of new server lives differs from that of accepted ones.

The unit is the server life: a figure of one life is one number, and what is uncertain about it
is how much lives of one version differ, whatever the number of steps.

The logarithm of a figure is level + host + life. A level is what was accepted at one time; the
latest one is compared with, those before it tell only how much lives differ, and hosts. Where new
lives ran on hosts that accepted ones know, each is compared on its own host, so what hosts differ
by is no part of the error (least squares, exact). Where they did not, or nearly every life has a
host of its own, hosts are random: what they differ by is estimated (Henderson 1953, method 3) and
is a part of the error, with the degrees of freedom of hosts. Which of the two is taken depends on
the degrees of freedom alone, never on the figures.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import msgspec
import numpy as np
import numpy.typing as npt

from pytest_sglprof._analysis.certainty import ROUNDING, Amount, Count, t_quantile, t_tail
from pytest_sglprof._analysis.distributions import chi2_quantile, reach

Floats = npt.NDArray[np.float64]

MIN_LIVES = 5  # accepted ones that a verdict needs
MIN_SCAN_LIVES = 8  # accepted ones that the scan over kernels needs
FAIL_ALPHA = 0.01  # probability of a failure by chance
PASS_ALPHA = 0.05  # probability that what passes is beyond the pass bound
FLOOR_ALPHA = 0.005  # one-sided, of what lives of one version differ by
MIN_FLOOR_LIVES = 3  # A/A ones that tell how much lives differ
POWER = 0.95  # of the smallest change that is said to be seen
MIN_FREEDOM = 2  # of an error; with less it is not known
RANK = 1e-9  # of the largest singular value; what is smaller is rounding
MAX_LIVES = 100  # a search for how many lives are needed ends there


@dataclass(frozen=True)
class LifeValue:
    """A figure of one life. value: above 0. level: which level an accepted life belongs to, 0, 1,
    …: the highest is compared with, lower ones count for the variance alone. Of a new life it
    has no meaning."""

    value: float
    host: str = ""
    level: int = 0


class LifeChange(msgspec.Struct, frozen=True, kw_only=True):
    """The difference of mean logarithms, new − accepted, and how certain it is.

    error: its standard error; freedom: degrees of freedom of that. sd: between lives, of the
    logarithm; of lives on one host where they are compared on it, else hosts are in it.
    accepted, fresh: numbers of lives. of_level: accepted ones that give the mean.
    """

    accepted: Count
    fresh: Count
    log_ratio: float
    error: Amount
    freedom: Amount
    sd: Amount
    of_level: Count | None = None

    @property
    def ratio(self) -> float:
        """New / accepted."""
        return math.exp(self.log_ratio)

    @property
    def interval(self) -> tuple[float, float]:
        """What the ratio surely is, at the levels of one verdict alone."""
        return self.ends()

    def ends(
        self, low_alpha: float = FAIL_ALPHA, high_alpha: float = PASS_ALPHA
    ) -> tuple[float, float]:
        """The ratio is surely above the first and below the second, each with its own level."""
        low = self.log_ratio - t_quantile(low_alpha, self.freedom) * self.error
        high = self.log_ratio + t_quantile(high_alpha, self.freedom) * self.error
        return math.exp(low), math.exp(high)

    def chance(self, limit: float) -> float:
        """p: how probable so high a ratio is if the true one is `limit`, at most."""
        return _tail(self.log_ratio - math.log(limit), self.error, self.freedom)

    @property
    def difference_p(self) -> float:
        """p: how probable so large a difference, up or down, is if there is none."""
        return min(1.0, 2 * _tail(abs(self.log_ratio), self.error, self.freedom))

    def detects(self, limit: float, alpha: float = FAIL_ALPHA) -> float:
        """The smallest ratio that fails `limit` in 95 % of nights with so many lives."""
        return limit * math.exp(reach(alpha, POWER, self.freedom) * self.error)


def _tail(over: float, error: float, freedom: float) -> float:
    if error <= 0:
        return 0.0 if over > 0 else 1.0
    far = t_tail(abs(over) / error, freedom)
    return float(f"{far if over >= 0 else 1 - far:.6g}")


@dataclass(frozen=True)
class Design:
    """How lives are compared, whatever their values: accepted ones first, then the new ones.

    weights: of each life in the difference new − accepted. known: what levels and hosts explain,
    orthogonal columns of length 1, shape (lives, explained).
    """

    weights: Floats
    known: Floats

    @property
    def factor(self) -> float:
        """Variance of the difference / variance of a life."""
        return float((self.weights**2).sum())

    @property
    def freedom(self) -> int:
        """Degrees of freedom of what is not explained."""
        return len(self.known) - len(self.known.T)

    def variances(self, logs: Floats) -> Floats:
        """Of lives, of each column of logarithms, shape (columns,)."""
        variances: Floats = _beyond(self.known, logs) / self.freedom
        return variances


def on_own_hosts(accepted: Sequence[LifeValue], fresh: Sequence[LifeValue]) -> Design | str:
    """New lives compared with accepted ones on the same hosts; else why that cannot be done."""
    levels, hosts = _levels(accepted, fresh), _hosts(accepted, fresh)
    columns = np.hstack([levels, hosts])
    inverse = np.linalg.pinv(columns, rcond=RANK)
    contrast = _contrast(levels, hosts.shape[1])
    if not np.allclose(contrast @ inverse @ columns, contrast, atol=1e-9):
        known = sorted({each.host for each in accepted})
        unknown = sorted({each.host for each in fresh} - set(known))
        if unknown:
            return f"first life on {_few(unknown)}; accepted ones ran on {_few(known)}"
        return "new lives ran on hosts that no accepted life connects with those of its level"
    return Design(contrast @ inverse, _span(columns))


def _levels(accepted: Sequence[LifeValue], fresh: Sequence[LifeValue]) -> Floats:
    """Which level each life is of, one column each, the last one of the new lives."""
    labels = [each.level for each in accepted]
    kept = sorted(set(labels))
    last = len(kept)
    of = [kept.index(label) for label in labels] + [last] * len(fresh)
    columns: Floats = np.eye(last + 1)[of]
    return columns


def _hosts(accepted: Sequence[LifeValue], fresh: Sequence[LifeValue]) -> Floats:
    """Which host each life ran on, one column each."""
    labels = [each.host for each in (*accepted, *fresh)]
    kept = sorted(set(labels))
    columns: Floats = np.eye(len(kept))[[kept.index(label) for label in labels]]
    return columns


def _contrast(levels: Floats, hosts: int) -> Floats:
    """New level − the last accepted one, as weights of all columns."""
    contrast = np.zeros(levels.shape[1] + hosts)
    contrast[levels.shape[1] - 2 : levels.shape[1]] = -1.0, 1.0
    return contrast


def _span(columns: Floats) -> Floats:
    """What the columns span: orthogonal columns of length 1."""
    left, sizes, _ = np.linalg.svd(columns, full_matrices=False)
    spanned: Floats = left[:, sizes > RANK * sizes.max()]
    return spanned


def _beyond(known: Floats, values: Floats) -> Floats:
    """The sum of squares that is not explained, of each column of `values`."""
    squares: Floats = ((values - known @ (known.T @ values)) ** 2).sum(axis=0)
    return squares


def _few(names: Sequence[str]) -> str:
    names = [name or "an unknown host" for name in names]
    return ", ".join(names[:3]) + (f" and {len(names) - 3} others" if len(names) > 3 else "")


def change_between(accepted: Sequence[LifeValue], fresh: Sequence[LifeValue]) -> LifeChange | str:
    """Compares the lives; else the reason why that cannot be done."""
    if not fresh:
        return "no new life"
    if len(accepted) < MIN_LIVES:
        return f"{len(accepted)} accepted lives, {MIN_LIVES} are needed for a verdict"
    values = np.array([each.value for each in (*accepted, *fresh)])
    if not (np.isfinite(values).all() and (values > 0).all()):
        return "the figure is not above 0 in every life"
    logs = np.log(values)
    design, random = on_own_hosts(accepted, fresh), _with_random_hosts(accepted, fresh, logs)
    if isinstance(design, Design) and design.freedom >= max(MIN_FREEDOM, random.freedom):
        variance = float(design.variances(logs))
        difference, error = float(design.weights @ logs), math.sqrt(variance * design.factor)
        sd, freedom = math.sqrt(variance), design.freedom
    elif random.freedom < MIN_FREEDOM:
        return design if isinstance(design, str) else _too_few(accepted)
    else:
        difference, error, sd, freedom = random
    last = max(each.level for each in accepted)
    return LifeChange(
        accepted=len(accepted),
        fresh=len(fresh),
        log_ratio=_beyond_rounding(difference),
        error=_beyond_rounding(error),
        freedom=float(freedom),
        sd=_beyond_rounding(sd),
        of_level=sum(each.level == last for each in accepted),
    )


def change_of_logs(accepted: Floats, fresh: Floats) -> LifeChange:
    """Compares logarithms of lives that all ran on one machine, at least 3 of them together."""
    freedom = len(accepted) + len(fresh) - 2
    squares = ((accepted - accepted.mean()) ** 2).sum() + ((fresh - fresh.mean()) ** 2).sum()
    sd = math.sqrt(squares / freedom)
    return LifeChange(
        accepted=len(accepted),
        fresh=len(fresh),
        log_ratio=float(fresh.mean() - accepted.mean()),
        error=sd * math.sqrt(1 / len(accepted) + 1 / len(fresh)),
        freedom=float(freedom),
        sd=sd,
    )


def _beyond_rounding(value: float) -> float:
    return value if abs(value) > ROUNDING else 0.0


def _too_few(accepted: Sequence[LifeValue]) -> str:
    hosts = len({each.host for each in accepted})
    return f"{len(accepted)} accepted lives on {hosts} hosts are too few to know how hosts differ"


class _Random(NamedTuple):
    """A difference of means whose error has hosts in it. sd: between lives of any host."""

    difference: float
    error: float
    sd: float
    freedom: int


def _with_random_hosts(
    accepted: Sequence[LifeValue], fresh: Sequence[LifeValue], logs: Floats
) -> _Random:
    """The difference of means, and its error if hosts are drawn at random as lives are.

    The sum of squares that hosts explain beyond levels is on average (its freedom) · variance of
    lives + `counted` · variance of hosts. Of few hosts the latter is hardly known, so the degrees
    of freedom are theirs alone (Satterthwaite's fail twice as often as they say, with 3 hosts).
    """
    levels, hosts = _levels(accepted, fresh), _hosts(accepted, fresh)
    coarse, fine = _span(levels), _span(np.hstack([levels, hosts]))
    weights = levels[:, -1] / levels[:, -1].sum() - levels[:, -2] / levels[:, -2].sum()
    difference, size = float(weights @ logs), float((weights**2).sum())
    freedom, life_freedom = fine.shape[1] - coarse.shape[1], len(logs) - fine.shape[1]
    if not freedom:
        return _Random(difference, 0.0, 0.0, 0)
    inner = float(_beyond(fine, logs))
    between = max(0.0, float(_beyond(coarse, logs)) - inner)
    life = inner / life_freedom if life_freedom else 0.0
    counted = float(_beyond(coarse, hosts).sum())
    share = float(((weights @ hosts) ** 2).sum()) / counted
    if not life_freedom:  # every life as if on a host of its own, so that nothing cancels
        share = max(share, size / freedom)
    variance = share * between + max(0.0, size - share * freedom) * life
    host_variance = max(0.0, between - freedom * life) / counted
    return _Random(difference, math.sqrt(variance), math.sqrt(life + host_variance), freedom)


def holm(chances: Sequence[float]) -> list[float]:
    """p of each of several hypotheses, adjusted so that all hold together (Holm 1979)."""
    order = sorted(range(len(chances)), key=lambda index: chances[index])
    adjusted, largest = [0.0] * len(chances), 0.0
    for place, index in enumerate(order):
        largest = max(largest, min(1.0, (len(chances) - place) * chances[index]))
        adjusted[index] = largest
    return adjusted


def lives_needed(
    sd: float, limit: float, effect: float, *, accepted: int | None = None
) -> int | None:
    """The fewest new lives that find a true ratio `effect` above `limit` in 95 % of nights.

    accepted: lives on the other side; None for as many as new ones (A/B). None if more than 100
    would be needed.
    """

    def is_seen(fresh: int) -> bool:
        other = fresh if accepted is None else accepted
        freedom = other + fresh - 2
        if freedom < MIN_FREEDOM:
            return False
        error = sd * math.sqrt(1 / other + 1 / fresh)
        return reach(FAIL_ALPHA, POWER, float(freedom)) * error <= math.log(effect / limit)

    numbers = range(1, MAX_LIVES + 1)
    place = bisect_left(numbers, True, key=is_seen)
    return numbers[place] if place < len(numbers) else None


@dataclass(frozen=True)
class Noise:
    """What lives of one version differ by, from A/A lives on one machine.

    sd: of the logarithm, between lives. upper: factor of its upper end (95 %).
    """

    lives: int
    sd: float
    upper: float


def floor_of(logs: Sequence[float] | Floats) -> Noise | str:
    """The noise of a figure, from its logarithms in A/A lives; else why they do not tell it."""
    if len(logs) < MIN_FLOOR_LIVES:
        return f"{len(logs)} lives, at least {MIN_FLOOR_LIVES} are needed for a floor"
    return Noise(len(logs), float(np.std(logs, ddof=1)), upper_factor(len(logs)))


def upper_factor(lives: int) -> float:
    """Upper end (95 %) of a standard deviation / its estimate from so many lives."""
    return math.sqrt((lives - 1) / chi2_quantile(0.05, float(lives - 1)))


def floor_ratio(sd: float, lives: int, *, accepted: int, fresh: int) -> float:
    """The ratio that lives of one version reach by chance in 1 of 200 comparisons.

    sd: between lives, estimated from so many A/A lives. accepted, fresh: lives that a comparison
    has on either side. A limit below it says nothing.
    """
    t = t_quantile(FLOOR_ALPHA, float(lives - 1))
    return math.exp(t * sd * math.sqrt(1 / accepted + 1 / fresh))
