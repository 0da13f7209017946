"""Distributions that comparisons of few lives need. SciPy has them; it is no dependency.

Student's t is in certainty.py.
"""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from pytest_sglprof._analysis.certainty import t_quantile

Floats = npt.NDArray[np.float64]

_CHI_POINTS = 201  # of the integral over the distribution of a standard deviation
_CHI_SPAN = 9.0  # standard deviations on either side that hold all of it


def chi2_below(value: float, freedom: float) -> float:
    """The probability that χ² with so many degrees of freedom is below `value`.

    The series of the incomplete gamma function, which converges for every value.
    """
    if value <= 0:
        return 0.0
    half, x = freedom / 2, value / 2
    term = total = 1.0 / half
    step = 0
    while term > total * 1e-16:
        step += 1
        term *= x / (half + step)
        total += term
    return min(1.0, total * math.exp(half * math.log(x) - x - math.lgamma(half)))


@lru_cache(maxsize=256)
def chi2_quantile(below: float, freedom: float) -> float:
    """The χ² with so many degrees of freedom that is not reached with probability `below`."""
    low, high = 0.0, freedom + 1.0
    while chi2_below(high, freedom) < below:
        high *= 2
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if chi2_below(middle, freedom) < below else (low, middle)
    return (low + high) / 2


@lru_cache(maxsize=256)
def reach(alpha: float, power: float, freedom: float) -> float:
    """How many standard errors an effect must have to be found with probability `power`.

    Found: the t of the one-sided test at level `alpha` is exceeded. The distribution of that t
    is the noncentral one: with s, the estimated standard deviation / the true one, it is
    ∫ Φ(effect − t · s) over the density of s.
    """
    t = t_quantile(alpha, freedom)
    spread = _CHI_SPAN / math.sqrt(2 * freedom)
    s = np.linspace(max(1e-6, 1 - spread), 1 + spread, _CHI_POINTS)
    # The logarithm of the density of s, up to a constant: s² · freedom is χ².
    log_density = (freedom - 1) * np.log(s) - freedom * s**2 / 2
    weights = np.exp(log_density - log_density.max())
    weights /= weights.sum()
    low, high = 0.0, t * (1 + spread) + 10.0
    for _ in range(35):
        middle = (low + high) / 2
        chance = sum(
            weight * normal_below(middle - t * each)
            for each, weight in zip(s.tolist(), weights.tolist(), strict=True)
        )
        low, high = (middle, high) if chance < power else (low, middle)
    return (low + high) / 2


def normal_below(z: float) -> float:
    """The probability that a standard normal number is below `z`."""
    return math.erfc(-z / math.sqrt(2)) / 2
