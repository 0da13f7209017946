"""How often `KernelImbalance` opens for nothing, and how soon it sees a rank that became slower.

    python -m benchmarks.kernel_imbalance [--days 20] [--seeds 200] [--find]

A sample is what a window of a few steps gives: the log of each rank's compute in each step is
noise that resembles itself from step to step (AR(1): `within` its standard deviation, φ `phi`)
plus one shift a rank and sample (`between`); the sample's figure is that of the plugin,
`typical_ratio`. A day has 24 h of samples, `--every` s apart. Printed for each noise and number of
ranks: false openings a day, and the share of seeds in which a rank 1.15 times slower is seen within
4 samples. `--find` prints the smallest threshold, in units of log(limit), that has at most one
false opening a day in every row. Exit status 1 where `ALARM` does not keep what its docstring says.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pytest_sglprof._analysis.certainty import TRIM, typical_ratio
from pytest_sglprof._load.cusum import ALARM, Cusum

LIMIT, SLOWER, WITHIN_SAMPLES = 1.1, 1.15, 4
MOST_FALSE, LEAST_SEEN = 1.0, 0.9
DAY = 86_400.0
CHECKED = 50  # samples of each row that are compared with the plugin's own figure
Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Noise:
    """Of log compute. within: sd of a step; phi: from step to step; between: sd of a sample."""

    within: float
    between: float
    phi: float = 0.6


NOISES = (Noise(0.02, 0.005), Noise(0.03, 0.01), Noise(0.05, 0.01))  # the last is the harshest
RANKS = (2, 4, 8)


def samples(
    rng: np.random.Generator, noise: Noise, ranks: int, count: int, *, steps: int, slower: float
) -> Floats:
    """Log ratios of `count` samples, shape (count, ranks); rank 0 is `slower` times slower."""
    chance = rng.normal(size=(count, steps, ranks))
    logs = np.empty_like(chance)
    logs[:, 0] = chance[:, 0]
    for step in range(1, steps):
        logs[:, step] = noise.phi * logs[:, step - 1]
        logs[:, step] += math.sqrt(1 - noise.phi**2) * chance[:, step]
    logs *= noise.within
    logs += noise.between * rng.normal(size=(count, 1, ranks))
    logs[:, :, 0] += math.log(slower)
    figures = typical_ratios(logs)
    for number in range(min(count, CHECKED)):
        typical = typical_ratio(np.exp(logs[number]))
        assert typical is not None
        assert np.allclose(figures[number], typical.values), "not the plugin's figure"
    return figures


def typical_ratios(logs: Floats) -> Floats:
    """What `typical_ratio` gives of each sample, for many at once; shape (samples, ranks)."""
    steps, ranks = logs.shape[1:]
    cut = int(TRIM * steps)
    middle = np.log(np.median(np.exp(logs), axis=2, keepdims=True))
    level = np.sort(logs - middle, axis=1)
    typical = level[:, cut : steps - cut].mean(axis=1)
    figures = np.empty_like(typical)
    for rank in range(ranks):
        others = np.exp(np.delete(typical, rank, axis=1))
        figures[:, rank] = typical[:, rank] - np.log(np.median(others, axis=1))
    return figures


def openings(figures: Floats) -> int:
    """How often the trigger would open in these samples."""
    sums = Cusum(LIMIT)
    labels = [f"TP{rank}" for rank in range(figures.shape[1])]
    return sum(
        sums.add(dict(zip(labels, map(float, row), strict=True)), float(at + 1)) is not None
        for at, row in enumerate(figures)
    )


def least_threshold(figures: Floats) -> float:
    """The smallest threshold, in units of log(limit), at which these samples open once at most."""
    unit = math.log(LIMIT)
    low, high = 0.0, 20.0
    while high - low > 0.01:
        middle = (low + high) / 2
        low, high = (low, middle) if _above(figures, middle * unit) <= 1 else (middle, high)
    return high


def _above(figures: Floats, threshold: float) -> int:
    held, count = np.zeros(figures.shape[1]), 0
    for row in figures:
        held = np.maximum(0.0, held + row - math.log(LIMIT) / 2)
        if held.max() > threshold:
            held[held.argmax()], count = 0.0, count + 1
    return count


def main(argv: Sequence[str] | None = None) -> int:
    """Simulates and prints; the exit status."""
    parser = argparse.ArgumentParser(description="False and true openings of KernelImbalance.")
    parser.add_argument("--days", type=int, default=20)
    parser.add_argument("--seeds", type=int, default=200)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--every", type=float, default=60.0)
    parser.add_argument("--find", action="store_true", help="also find the threshold")
    options = parser.parse_args(argv)
    a_day = round(DAY / options.every)
    least, holds = 0.0, True
    print(f"limit {LIMIT}, threshold {ALARM:g} x log(limit)")
    print("ranks  within  between  false a day  seen within 4 samples")
    for ranks in RANKS:
        for noise in NOISES:
            rng = np.random.default_rng([ranks, round(1e4 * noise.within)])
            alike = samples(
                rng, noise, ranks, options.days * a_day, steps=options.steps, slower=1.0
            )
            false = openings(alike) / options.days
            slow = samples(
                rng,
                noise,
                ranks,
                options.seeds * WITHIN_SAMPLES,
                steps=options.steps,
                slower=SLOWER,
            ).reshape(options.seeds, WITHIN_SAMPLES, ranks)
            seen = sum(openings(each) > 0 for each in slow) / options.seeds
            print(
                f"{ranks:5}  {noise.within:6.1%}  {noise.between:7.1%}  {false:11.2f}  {seen:.1%}"
            )
            holds = holds and false <= MOST_FALSE and seen >= LEAST_SEEN
            if options.find:
                days = alike.reshape(options.days, a_day, ranks)
                least = max(least, float(np.median([least_threshold(day) for day in days])))
    if options.find:
        print(f"at most one false opening on half of all days from {least:.2f} x log(limit) on")
    return 0 if holds else 1


if __name__ == "__main__":
    raise SystemExit(main())
