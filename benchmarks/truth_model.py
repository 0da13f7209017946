"""Matrices of step times whose realised ratios are known, in many kinds of noise.

A window is drawn in logarithms: what is planted (one rank's slowdown, biases, drifts) plus the
noise of the steps. Its truth is the planted part alone: the ratio of each rank to the median of
the others. Nothing here knows how verdicts are made.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from pytest_sglprof._analysis.times import sum_times
from pytest_sglprof._errors import SglprofError
from pytest_sglprof._trace.read import read_window

Floats = npt.NDArray[np.float64]
Rng = np.random.Generator
Shape = tuple[int, int, int]  # windows, steps, ranks

LIMIT = 1.02
RANKS, STEPS, DEVIATIONS, EFFECTS = (2, 8, 64), (30, 100, 300), (0.01, 0.02, 0.05), (0, 2, 5, 10)
BESIDE = 0.007  # sd of white noise on top of an autoregressive process, which hides its φ
SPIKES, SPIKE = 0.02, 3.0  # share of the steps, and how many times as long they take
TAIL_FROM, TAIL_POWER = 0.9, 1.5  # above this quantile the noise is Pareto's; infinite variance
BIAS = 0.01  # half of the excess of the limit: each rank is up to so much faster or slower
DRIFT = 0.01  # each rank becomes up to so much faster or slower from the first step to the last
COMMON = 0.3  # sd of what a step does to all ranks alike
BLOCK = 4  # recorded steps that are kept together
LEAST_RECORDED = 8  # steps of a recorded window
DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
RECORDED: tuple[tuple[str, str, Mapping[int, str]], ...] = (
    ("torch/sglang-cpu-tp2-nostack", "*TP-*.gz", {}),
    ("torch/sglang-cpu-tp2dp2", "*DP-1.trace.json.gz", {}),
    ("nsys", "sglang_cpu_tp2_win_b.sqlite", {31205: "TP0", 31206: "TP1"}),
)


# Noise of one step and rank, its standard deviation as a share.


def white(rng: Rng, shape: Shape, sd: float) -> Floats:
    """Independent normal noise."""
    return sd * rng.standard_normal(shape)


def autoregressive(phi: float, hidden: float = 0.0) -> Callable[[Rng, Shape, float], Floats]:
    """Of order 1, stationary. hidden: sd of white noise beside it."""

    def draw(rng: Rng, shape: Shape, sd: float) -> Floats:
        noise = white(rng, shape, sd)
        noise[:, 1:] *= np.sqrt(1 - phi**2)
        for step in range(1, shape[1]):
            noise[:, step] += phi * noise[:, step - 1]
        return noise + white(rng, shape, hidden)

    return draw


def spiky(rng: Rng, shape: Shape, sd: float) -> Floats:
    """White, but some steps of single ranks take much longer."""
    return white(rng, shape, sd) + np.where(rng.random(shape) < SPIKES, np.log(SPIKE), 0.0)


def heavy_tailed(rng: Rng, shape: Shape, sd: float) -> Floats:
    """White below its 90 % quantile, Pareto's law above."""
    noise = rng.standard_normal(shape)
    start = 1.2815515655446004  # that quantile
    tail = start * rng.random(shape) ** (-1 / TAIL_POWER)
    return sd * np.minimum(np.where(noise > start, tail, noise), 3 / sd)  # at most 20 x as long


def common_mode(rng: Rng, shape: Shape, sd: float) -> Floats:
    """White, and steps that take all ranks much longer or shorter."""
    return white(rng, shape, sd) + COMMON * rng.standard_normal((*shape[:2], 1))


def recorded(rng: Rng, shape: Shape, sd: float) -> Floats:
    """Blocks of consecutive residuals of recorded windows, of random sign."""
    windows, steps, ranks = shape
    blocks = _blocks()
    count = -(-steps // BLOCK)
    drawn = blocks[rng.integers(len(blocks), size=(windows, ranks, count))]
    drawn *= rng.choice((-1.0, 1.0), (windows, ranks, count, 1))
    flat = drawn.reshape(windows, ranks, -1)[:, :, :steps]
    return sd * np.ascontiguousarray(flat.transpose(0, 2, 1))


@lru_cache(maxsize=1)
def residuals() -> tuple[Floats, ...]:
    """Of each recorded window with enough steps: the log ratio of its two ranks, centred and
    divided by its standard deviation, shape (steps,). Empty where there are no recordings.
    """
    pieces = []
    for folder, pattern, ranks in RECORDED:
        files = sorted((DATA / folder).glob(pattern))
        try:
            groups = sum_times(read_window(files, pid_ranks=ranks, force=True)) if files else ()
        except SglprofError:
            continue
        for group in groups:
            times = group.matrix(group.select("compute"))
            times = times[(times > 0).all(axis=1)]
            if group.has_steps and times.shape[1] == 2 and len(times) >= LEAST_RECORDED:
                ratios = np.log(times[:, 0] / times[:, 1])
                pieces.append((ratios - ratios.mean()) / ratios.std())
    return tuple(pieces)


@lru_cache(maxsize=1)
def _blocks() -> Floats:
    """All runs of BLOCK steps, shape (blocks, BLOCK)."""
    windows = [np.lib.stride_tricks.sliding_window_view(each, BLOCK) for each in residuals()]
    blocks: Floats = np.concatenate(windows)
    return blocks / blocks.std()


# What is planted beside the slow rank, as log ratios of shape (windows, steps or 1, ranks).


def biased(rng: Rng, shape: Shape) -> Floats:
    """Each rank a little faster or slower for good."""
    return rng.uniform(-BIAS, BIAS, (shape[0], 1, shape[2]))


def drifting(rng: Rng, shape: Shape) -> Floats:
    """Each rank becomes steadily faster or slower; nothing on average."""
    ramp = np.linspace(-0.5, 0.5, shape[1])[:, None]
    return ramp * rng.uniform(-DRIFT, DRIFT, (shape[0], 1, shape[2]))


class Noise(NamedTuple):
    """phi: the correlation of successive steps, which the oracle knows. beside: planted beside the
    slow rank. is_clean: whether the oracle takes all of it for noise. hidden: sd of white noise
    beneath which φ is hidden.
    """

    name: str
    draw: Callable[[Rng, Shape, float], Floats] = white
    phi: float = 0.0
    beside: Callable[[Rng, Shape], Floats] | None = None
    is_clean: bool = True
    hidden: float = 0.0


NOISES = (
    Noise("white"),
    Noise("AR 0.6", autoregressive(0.6), 0.6),
    Noise("AR 0.9", autoregressive(0.9), 0.9),
    Noise("AR 0.95", autoregressive(0.95), 0.95),
    Noise("spikes", spiky, is_clean=False),
    Noise("Pareto", heavy_tailed, is_clean=False),
    Noise("bias", beside=biased),
    Noise("drift", beside=drifting),
    Noise("common", common_mode),
    Noise("recorded", recorded, is_clean=False),
)
HIDDEN = tuple(
    Noise(f"AR {phi:g} hidden", autoregressive(phi, BESIDE), phi, hidden=BESIDE)
    for phi in (0.6, 0.9, 0.95)
)
NOISE = {noise.name: noise for noise in (*NOISES, *HIDDEN)}


class Cell(NamedTuple):
    """What is judged many times. sd: of one rank and step; effect: %, on `slow` ranks; moving: sd
    of each rank's speed between the windows of one life; bias: each rank is up to so much faster
    or slower for good; is_repeated: whether windows of one life are judged until they are certain.
    """

    ranks: int
    steps: int
    noise: str
    sd: float
    effect: float
    limit: float = LIMIT
    slow: int = 1
    is_repeated: bool = False
    bias: float = 0.0
    moving: float = 0.0

    @property
    def row(self) -> str:
        """All but the effect: `8 × 100 AR 0.6 sd 2 %`."""
        more = f" limit {self.limit:g}" if self.limit != LIMIT else ""
        more += f" {self.slow} slow" if self.slow > 1 else ""
        more += " certain" if self.is_repeated else ""
        more += f" bias {100 * self.bias:g} %" if self.bias else ""
        more += f" moving {100 * self.moving:g} %" if self.moving else ""
        return f"{self.ranks} × {self.steps} {self.noise} sd {100 * self.sd:g} %{more}"

    @property
    def key(self) -> str:
        """`8 × 100 AR 0.6 sd 2 % +5 %`."""
        return f"{self.row} +{self.effect:g} %"

    @property
    def effective(self) -> float:
        """How many independent steps a window is worth."""
        phi = NOISE[self.noise].phi
        return self.steps * (1 - phi) / (1 + phi)


def grid() -> list[Cell]:
    """Single windows: every number of ranks and steps, noise, deviation and effect."""
    return [
        Cell(ranks, steps, noise.name, sd, effect)
        for ranks in RANKS
        for steps in STEPS
        for noise in NOISES
        for sd in DEVIATIONS
        for effect in EFFECTS
    ] + [
        Cell(ranks, steps, noise.name, sd, effect)
        for ranks in (2, 8)
        for steps in STEPS
        for noise in HIDDEN
        for sd in (0.01, 0.02)
        for effect in (0, 2, 5)
    ]


def at_the_edge() -> list[Cell]:
    """Where rules fail that hold for one rank alone.

    At the limit 1.00 all ranks of a balanced window are at the limit; at a limit of two thirds
    of their slowdown, nearly half of the ranks just must not pass.
    """
    all_at_limit = [
        Cell(ranks, steps, noise, 0.02, 0, limit=1.0)
        for ranks in RANKS
        for steps in STEPS
        for noise in ("white", "AR 0.6", "AR 0.9", "Pareto")
    ]
    just_too_slow = [
        Cell(ranks, steps, noise, sd, 3, slow=slow)
        for ranks, slow in ((2, 1), (8, 1), (8, 3), (64, 1), (64, 31))
        for steps in (100, 300)
        for noise in ("white", "AR 0.6")
        for sd in DEVIATIONS
    ]
    return [*all_at_limit, *just_too_slow]


def repeated() -> list[Cell]:
    """Lives of up to eight windows, judged until they are certain."""
    return [
        Cell(ranks, 100, noise, sd, effect, is_repeated=True, bias=bias, moving=moving)
        for ranks in RANKS
        for noise in ("white", "AR 0.6")
        for sd in DEVIATIONS
        for bias in (0.0, 0.005)
        for moving in (0.0, 0.01)
        for effect in (0, 2, 5)
        if effect != 2 or not bias  # else half of them would be above the limit
    ]


@dataclass(frozen=True)
class Batch:
    """Windows of a cell. logs: log of the times, shape (windows, steps, ranks). truth: log ratio of
    each rank to the median of the others, without the noise, shape (windows, ranks). known: mean of
    the noise of each rank's steps as far as an oracle sees it, likewise.
    """

    logs: Floats
    truth: Floats
    known: Floats

    def matrices(self) -> Iterator[Floats]:
        """The times of each window, ms, shape (steps, ranks)."""
        for each in self.logs:
            yield 20 * np.exp(each)


def batch(cell: Cell, first: int, last: int, *, level: Floats | None = None) -> Batch:
    """Windows `first` to `last` of a cell; the same ones whenever these two are the same.

    level: log speeds of the ranks in each window, beside what the cell plants.
    """
    rng = np.random.default_rng([zlib.crc32(cell.key.encode()), first])
    shape = (last - first, cell.steps, cell.ranks)
    noise = NOISE[cell.noise]
    planted = np.zeros((last - first, 1, cell.ranks))
    planted[:, :, : cell.slow] = np.log1p(cell.effect / 100)
    if level is not None:
        planted = planted + level[:, None, :]
    if noise.beside is not None:
        planted = planted + noise.beside(rng, shape)
    random = noise.draw(rng, shape, cell.sd)
    if noise.is_clean:
        known = (random - random.mean(axis=2, keepdims=True)).mean(axis=1)
    else:  # the oracle knows which part of the noise is normal
        known = mean_deviation(cell) * rng.standard_normal((last - first, cell.ranks))
    return Batch(planted + random, to_the_others(planted.mean(axis=1)), known)


def to_the_others(levels: Floats) -> Floats:
    """Each rank's level minus the median of the others', shape (windows, ranks)."""
    columns = [
        levels[:, rank] - np.median(np.delete(levels, rank, axis=1), axis=1)
        for rank in range(levels.shape[1])
    ]
    return np.stack(columns, axis=1)


@cache
def mean_deviation(cell: Cell) -> float:
    """Standard deviation of the mean of one rank's steps, as an oracle knows it."""
    noise, steps = NOISE[cell.noise], cell.steps
    if cell.noise == "recorded":
        drawn = recorded(np.random.default_rng(1), (4000, steps, 1), cell.sd)
        return float(drawn.mean(axis=1).std())
    lags = np.arange(1, steps)
    correlated = 1 + 2 * float(((1 - lags / steps) * noise.phi**lags).sum())
    return float(np.sqrt((cell.sd**2 * correlated + noise.hidden**2) / steps))


def lives(
    cell: Cell, first: int, last: int, windows: int
) -> Iterator[tuple[Sequence[Floats], Floats]]:
    """Of each life: its windows, and the log ratios of its ranks apart from how they move."""
    rng = np.random.default_rng([zlib.crc32(cell.key.encode()), first, 1])
    for number in range(first, last):
        bias = rng.uniform(-cell.bias, cell.bias, (1, cell.ranks))
        moved = cell.moving * rng.standard_normal((windows, cell.ranks))
        start = number * windows
        drawn = batch(cell, start, start + windows, level=bias + moved)
        planted = bias.copy()
        planted[:, : cell.slow] += np.log1p(cell.effect / 100)
        yield list(drawn.matrices()), to_the_others(planted)[0]
