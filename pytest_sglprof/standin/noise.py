"""How much times differ from step to step of a rank, and from life to life of a server."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from functools import cache


@dataclass(frozen=True)
class StepNoise:
    """How much longer or shorter a rank's compute is in a step than in a typical one.

    Its logarithm is an autoregressive process of order 1, each rank's own: sd is its standard
    deviation, phi how much of it carries over to the next step, 0 to 1. The mean factor is 1.
    """

    sd: float
    phi: float = 0.0

    def factor(self, seed: int, rank: int, step: int) -> float:
        """What the rank's compute in this step is multiplied by; the same in every process."""
        return math.exp(self.sd * _carried(seed, rank, self.phi, step) - self.sd**2 / 2)


def _carried(seed: int, rank: int, phi: float, step: int) -> float:
    """The process of a rank at a step (from 0), with standard deviation 1."""
    known = _known_steps(seed, rank, phi)
    while len(known) <= step:
        new = random.Random(f"{seed}/{rank}/{len(known)}/noise").gauss(0.0, 1.0)
        known.append(phi * known[-1] + math.sqrt(1 - phi**2) * new if known else new)
    return known[step]


@cache
def _known_steps(seed: int, rank: int, phi: float) -> list[float]:
    """The steps of a process so far, which `_carried` makes longer."""
    return []


@dataclass(frozen=True)
class LifeNoise:
    """How much longer or shorter kernels last in one life of the server than in another.

    Everything that a life launches is multiplied by one factor, and each kernel by one more, on
    all ranks and in all steps alike. The logarithms of both have the standard deviation sd.
    seed: of the life.
    """

    sd: float
    seed: int

    def factor(self, kernel: str) -> float:
        """What every time of a kernel of this name is multiplied by; the same in every process."""
        return math.exp(self.sd * (_of_life(self.seed, "") + _of_life(self.seed, kernel)))


@cache
def _of_life(seed: int, name: str) -> float:
    """A deviate of standard deviation 1."""
    return random.Random(f"{seed}/{name}/life").gauss(0.0, 1.0)
