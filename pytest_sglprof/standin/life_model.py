"""Server lives whose truth is known: how long each kernel lasts in each step of each life.

What differs between lives of one version differs for a whole life: memory layout, clocks, the
order of autotuning. All of it is drawn in logarithms, and a time is e to the sum of

- the kernel's own time, spread evenly over `SPREAD_US`;
- its host: each host is faster or slower in everything;
- its life: in everything (`run_sd`), in each kernel (`kernel_sd`), and, of bistable kernels, one
  of two states that the life drew when it began (autotuning);
- what is planted, in the lives that are changed;
- its step: an autoregressive process that all kernels share, and noise of the kernel alone.

The last is the only part of which many steps make a mean. Nothing here knows how lives are
compared.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

SPREAD_US = (2.0, 200.0)
"""Of the time of a kernel in a step: the shortest and the longest."""

CATEGORIES = {
    "gemm": 0.30,
    "moe": 0.20,
    "attention": 0.15,
    "norm": 0.12,
    "elementwise": 0.12,
    "quantization": 0.08,
    "sampling": 0.03,
}
"""How likely a kernel is of each."""

IDLE = 0.08
"""Idle time of a step, as a share of its compute in a typical life."""


@dataclass(frozen=True)
class LifePlan:
    """What lives of one version are like. Each sd is of a logarithm.

    steps: of a window, one in a life. host_sd: between hosts; run_sd: between lives, of all
    kernels alike; kernel_sd: between lives, of each kernel by itself. bistable: share of the
    kernels that are, by a life's luck, `jump` above or below. step_sd, phi: of what all kernels of
    a step share, and how much of it carries over to the next step; call_sd: of one kernel in one
    step. freedom: of Student's t, by which lives then differ, scaled to the same sd; 0: normally.
    """

    kernels: int = 200
    steps: int = 100
    run_sd: float = 0.010
    kernel_sd: float = 0.015
    host_sd: float = 0.0
    bistable: float = 0.0
    jump: float = 0.08
    step_sd: float = 0.010
    phi: float = 0.6
    call_sd: float = 0.02
    freedom: int = 0


@dataclass(frozen=True)
class Change:
    """What is planted: a kernel (by its number), a category or all kernels take `factor` times
    as long."""

    factor: float
    category: str = ""
    kernel: int | None = None


@dataclass(frozen=True)
class Life:
    """Where a life ran, and whether it is of the changed version."""

    host: int = 0
    is_changed: bool = False


@dataclass(frozen=True)
class Lives:
    """Drawn lives. names, categories: of each kernel. truth: log ns of each kernel in a typical
    step, shape (lives, kernels). times: ns, shape (lives, steps, kernels). idle: ns of each step in
    which no kernel runs, shape (lives, steps). planted: log factor of each kernel in changed lives.
    bistable: numbers of those kernels.
    """

    lives: tuple[Life, ...]
    names: tuple[str, ...]
    categories: tuple[str, ...]
    truth: Floats
    times: Floats
    idle: Floats
    planted: Floats
    bistable: tuple[int, ...]

    def planted_ratio(self) -> float:
        """Compute of a step after the change / before it, apart from what lives differ by."""
        before = np.exp(self.truth - self.planted * self._changed()).mean(axis=0)
        return float((before * np.exp(self.planted)).sum() / before.sum())

    def _changed(self) -> npt.NDArray[np.bool_]:
        return np.array([[life.is_changed] for life in self.lives])


def night(accepted: int, fresh: int, *, is_changed: bool = False) -> tuple[Life, ...]:
    """Lives of one host: the accepted ones, then those of this night, which may be changed."""
    return (*[Life()] * accepted, *[Life(is_changed=is_changed)] * fresh)


def draw(
    plan: LifePlan, lives: Sequence[Life], seed: int | Sequence[int], change: Change | None = None
) -> Lives:
    """The lives of a plan; the same ones for the same arguments.

    Kernels, hosts and bistable states depend on the seed alone, not on the change.
    """
    version, between, within = (
        np.random.default_rng(each) for each in np.random.SeedSequence(seed).spawn(3)
    )
    low, high = np.log(1000 * np.array(SPREAD_US))
    base = version.uniform(low, high, plan.kernels)
    drawn = version.choice(len(CATEGORIES), plan.kernels, p=list(CATEGORIES.values()))
    categories = tuple(list(CATEGORIES)[at] for at in drawn)
    names = tuple(f"{category}_kernel_{at}" for at, category in enumerate(categories))
    two_states = version.choice(plan.kernels, round(plan.bistable * plan.kernels), replace=False)
    planted = _planted(change, categories)
    hosts = plan.host_sd * version.standard_normal(1 + max(life.host for life in lives))
    count = len(lives)
    truth = base + hosts[[life.host for life in lives], None]
    truth = truth + plan.run_sd * _deviates(between, (count, 1), plan.freedom)
    truth = truth + plan.kernel_sd * _deviates(between, (count, plan.kernels), plan.freedom)
    truth[:, two_states] += plan.jump * between.choice((-1.0, 1.0), (count, len(two_states)))
    changed = np.array([life.is_changed for life in lives])
    truth = truth + changed[:, None] * planted
    idle = np.log(IDLE * np.exp(base).sum()) + plan.run_sd * between.standard_normal(count)
    common = _steps(within, plan, count)
    of_call = plan.call_sd * within.standard_normal((count, plan.steps, plan.kernels))
    return Lives(
        lives=tuple(lives),
        names=names,
        categories=categories,
        truth=truth,
        times=np.exp(truth[:, None, :] + common[:, :, None] + of_call),
        idle=np.exp(idle[:, None] + _steps(within, plan, count)),
        planted=planted,
        bistable=tuple(sorted(int(at) for at in two_states)),
    )


def _planted(change: Change | None, categories: Sequence[str]) -> Floats:
    planted = np.zeros(len(categories))
    if change is None:
        return planted
    if change.kernel is not None:
        planted[change.kernel] = np.log(change.factor)
    else:
        planted[[change.category in ("", each) for each in categories]] = np.log(change.factor)
    return planted


def _deviates(rng: np.random.Generator, shape: tuple[int, int], freedom: int) -> Floats:
    """Of standard deviation 1."""
    if not freedom:
        return rng.standard_normal(shape)
    scale = float(np.sqrt((freedom - 2) / freedom))
    return scale * rng.standard_t(freedom, shape)


def _steps(rng: np.random.Generator, plan: LifePlan, count: int) -> Floats:
    """What the kernels of a step share: stationary, of order 1, shape (lives, steps)."""
    noise: Floats = plan.step_sd * rng.standard_normal((count, plan.steps))
    noise[:, 1:] *= np.sqrt(1 - plan.phi**2)
    for step in range(1, plan.steps):
        noise[:, step] += plan.phi * noise[:, step - 1]
    return noise
