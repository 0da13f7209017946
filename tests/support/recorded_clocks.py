"""The GPU readings that belong to a planted window, replayed through the sampler's interface."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence

from pytest_sglprof._server.nvml import ClockWatch, GpuClocks, GpuReading
from tests.support.planted import FULL_MHZ, LOW_MHZ, Plan

READINGS = 40


def readings(plan: Plan) -> list[Mapping[str, GpuReading]]:
    """One GPU a rank; in the second half those that the plan throttles are slow, and say why."""
    return [
        {
            label: _reading(rank, plan.throttled.get(rank) if at >= READINGS // 2 else None)
            for rank, label in enumerate(plan.labels)
        }
        for at in range(READINGS)
    ]


def _reading(rank: int, reasons: int | None) -> GpuReading:
    slow = reasons is not None
    return GpuReading(f"GPU-{rank}", LOW_MHZ if slow else FULL_MHZ, 700.0, reasons or 0)


class Recording:
    """Stands for a `GpuSampler`: gives a sequence once, then its last reading."""

    def __init__(self, sequence: Sequence[Mapping[str, GpuReading]]) -> None:
        self._left = list(sequence)
        self.over = threading.Event()

    def read(self) -> Mapping[str, GpuReading]:
        if len(self._left) > 1:
            return self._left.pop(0)
        self.over.set()
        return self._left[0]

    def close(self) -> None:
        self._left = self._left[-1:]


def recorded_clocks(plan: Plan) -> tuple[GpuClocks, ...]:
    """What a watch makes of the window's readings."""
    recording = Recording(readings(plan))
    watch = ClockWatch(recording, period=0.0005)
    assert recording.over.wait(30)
    clocks, notes = watch.stop()
    assert notes == ()
    return clocks
