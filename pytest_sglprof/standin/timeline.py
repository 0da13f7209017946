"""When each kernel of one forward pass runs, on every rank of a replica.

A collective starts on a rank when the rank arrives there and ends on all of its group at
the same moment: the last arrival plus the transfer. So waits follow from compute, and the
rank that arrives last spends the least time in it. Every rank derives the same timeline
by itself, because all randomness is seeded by (seed, rank, step).
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from pytest_sglprof.standin.kernels import FILL, IDLE, Batch, Kernel, forward, nominal_ns
from pytest_sglprof.standin.topology import Place

JITTER = 0.01
"""Each kernel lasts its nominal time ± at most this share, evenly spread around 0."""

LEAD = 0.02
"""Share of a step's nominal wall time before the first kernel."""

GAP = 0.0002
"""Share of a step's nominal wall time between two kernels of a stream."""


@dataclass(frozen=True)
class Slow:
    """A planted fault: `category` of rank `rank` takes `factor` times as long.

    rank: a label such as `TP1`, or the rank's number. Steps are forward passes counted
    since the server's start; the fault holds in [from_step, until_step).
    """

    rank: str
    category: str = "compute"
    factor: float = 1.0
    from_step: int = 0
    until_step: int | None = None

    def hits(self, place: Place, kernel: Kernel, step: int) -> bool:
        """True when the kernel of this rank in this step is slowed."""
        if self.rank not in (place.label, str(place.index)):
            return False
        if step < self.from_step or (self.until_step is not None and step >= self.until_step):
            return False
        if self.category == "compute":
            return kernel.kind == "kernel"
        return kernel.category == self.category


@dataclass(frozen=True)
class Launch:
    """One kernel on the device. start_ns counts from the step's start."""

    kernel: Kernel
    start_ns: int
    dur_ns: int


@dataclass(frozen=True)
class Model:
    """Everything that decides a timeline besides the batches. step_ns: a decode step."""

    step_ns: int
    layers: int = 4
    seed: int = 0
    slow: tuple[Slow, ...] = ()

    def step(
        self,
        step: int,
        peers: Sequence[Place],
        batches: Sequence[Batch],
        *,
        jitter: bool = True,
    ) -> dict[int, list[Launch]]:
        """Launches of every rank of one replica and stage, by `Place.index`.

        batches: of each queue of the replica. A batch without tokens runs too where a
        peer of another queue works (DP attention), since all meet in the collectives.
        """
        sizes = peers[0].sizes
        prefill = any(batch.mode == "EXTEND" for batch in batches)
        kernels = forward(
            prefill=prefill,
            layers=self.layers,
            attention_ranks=sizes.attention_tp,
            ranks=sizes.tp,
        )
        weight = sum(kernel.weight for kernel in kernels)
        gap = int(self.step_ns * GAP)
        clock = {place.index: int(self.step_ns * LEAD) for place in peers}
        noise = {place.index: self._noise(place, step, jitter) for place in peers}
        found: dict[int, list[Launch]] = {place.index: [] for place in peers}
        groups = _attention_groups(peers)
        for kernel in kernels:
            if kernel.kind == "collective":
                for group in groups if kernel.scope == "attention" else [list(peers)]:
                    busiest = max((batches[p.queue] for p in group), key=lambda b: b.tokens)
                    transfer = max(1, int(nominal_ns(kernel, busiest, self.step_ns, weight)))
                    end = max(clock[p.index] for p in group) + transfer
                    for place in group:
                        start = clock[place.index]
                        found[place.index].append(Launch(kernel, start, end - start))
                        clock[place.index] = end + gap
                continue
            for place in peers:
                length = nominal_ns(kernel, batches[place.queue], self.step_ns, weight)
                for fault in self.slow:
                    if fault.hits(place, kernel, step):
                        length *= fault.factor
                if jitter:
                    length *= 1 + noise[place.index].uniform(-JITTER, JITTER)
                start, dur = clock[place.index], max(1, round(length))
                found[place.index].append(Launch(kernel, start, dur))
                clock[place.index] = start + dur + gap
        return found

    def wall_ns(self, step: int, peers: Sequence[Place], batches: Sequence[Batch]) -> int:
        """How long the step takes on the wall, ns: its longest rank leaves some idle time."""
        launches = self.step(step, peers, batches, jitter=False)
        last = max(rank[-1].start_ns + rank[-1].dur_ns for rank in launches.values())
        return int(last / (FILL + LEAD + GAP * len(next(iter(launches.values())))))

    def _noise(self, place: Place, step: int, jitter: bool) -> random.Random:
        return random.Random(f"{self.seed}/{place.index}/{step}" if jitter else 0)


def _attention_groups(peers: Sequence[Place]) -> list[list[Place]]:
    groups: dict[int, list[Place]] = {}
    for place in peers:
        groups.setdefault(place.queue, []).append(place)
    return list(groups.values())


def is_idle(batches: Sequence[Batch]) -> bool:
    """True when no queue of a replica has anything to run."""
    return all(batch == IDLE for batch in batches)
