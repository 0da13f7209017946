"""When samples of the ranks' compute say that one of them has become slower than its peers.

Page's cumulative sum (Biometrika 1954), one for each rank: S = max(0, S + x − k), where x is the
log of the rank's compute over the median of its peers' in a sample, and k is half of the log of
the limit, halfway between alike and just too slow. It alarms above h = `ALARM` x log(limit).

`python -m benchmarks.kernel_imbalance` finds `ALARM` by simulation: at most one false alarm in
24 hours of samples a minute apart, with 2 to 8 ranks, for steps of sd 5 % that resemble each other
(φ 0.6) and 1 % more between samples. A rank that is 1.15 times slower is then seen within 4 samples
in at least 90 % of all cases. Quieter ranks alarm less often still.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from pytest_sglprof._load.disturbance import Samples
from pytest_sglprof._load.onset import Onset

ALARM = 2.25  # x log(limit)


@dataclass(frozen=True)
class Alarm:
    """A rank that has become slower. since: Unix time of the first sample that says so, s.

    ratio: its compute over its peers' from then on, the geometric mean of `samples` samples.
    """

    rank: str
    since: float
    ratio: float
    samples: int


@dataclass
class _Sum:
    value: float = 0.0
    since: float = 0.0
    total: float = 0.0
    count: int = 0


class Cusum:
    """The cumulative sums of all ranks. limit: how many times slower is just too slow."""

    def __init__(self, limit: float) -> None:
        self._reference = math.log(limit) / 2
        self._alarm = ALARM * math.log(limit)
        self._sums: dict[str, _Sum] = {}

    def add(self, log_ratios: Mapping[str, float], moment: float) -> Alarm | None:
        """Takes one sample (rank -> log of its ratio) at `moment`, Unix s.

        Returns the alarm of the rank that is farthest beyond, whose sum then starts again.
        """
        for rank, log_ratio in log_ratios.items():
            held = self._sums.setdefault(rank, _Sum())
            if held.value == 0.0:
                held.since, held.total, held.count = moment, 0.0, 0
            held.value = max(0.0, held.value + log_ratio - self._reference)
            held.total += log_ratio
            held.count += 1
        rank = max(self._sums, key=lambda name: self._sums[name].value, default="")
        if not rank or self._sums[rank].value <= self._alarm:
            return None
        worst = self._sums.pop(rank)
        return Alarm(rank, worst.since, math.exp(worst.total / worst.count), worst.count)


class KernelDetector:
    """Declares an onset of the samples of a run; see `Cusum`. It needs no load samples.

    largest_factor: the largest ratio of a sample. count: of samples so far.
    """

    judged_s = 0.0

    def __init__(self, limit: float) -> None:
        self.largest_factor = 1.0
        self.count = 0
        self._limit = limit
        self._sums = Cusum(limit)
        self._newest = 0.0

    def add(self, samples: Samples, now: float) -> list[Onset]:
        """Nothing: load says nothing about ranks with the same input."""
        return []

    def sample(self, log_ratios: Mapping[str, float], moment: float) -> Onset | None:
        """Takes one sample, as `Cusum.add`."""
        self.count += 1
        gap, self._newest = moment - (self._newest or moment), moment
        self.largest_factor = max([self.largest_factor, *map(math.exp, log_ratios.values())])
        alarm = self._sums.add(log_ratios, moment)
        if alarm is None:
            return None
        return Onset(
            time=alarm.since,
            declared=moment,
            kind="kernels",
            factor=alarm.ratio,
            resolution_s=gap,
            source="kernels",
            sentence=f"{alarm.rank} computes {alarm.ratio:.2f}x as long as its peers in "
            f"{alarm.samples} samples (limit {self._limit:g})",
        )
