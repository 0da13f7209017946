"""The clocks of a server's GPUs during a window, and whether heat or a power brake slowed them.

A GPU that runs at its power limit lowers its clock all the time: that is normal and counts as
nothing. Thermal slowdown and an external power brake are faults of the machine.
"""

from __future__ import annotations

import statistics
import threading
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from pytest_sglprof.ranks import Rank
from pytest_sglprof.server.nvml import GpuReading, Nvml
from pytest_sglprof.values import GpuClocks

if TYPE_CHECKING:
    from pytest_sglprof.server.server import Server

PERIOD = 0.1  # s between two readings; NVML's own figures change every 20 to 100 ms
# Below this share of the readings a slowdown is a flicker that no figure of a window shows.
THROTTLED_SHARE = 0.05
# Bits of nvmlClocksEventReasons. Not among them: the software power cap (0x4), and the general
# hardware slowdown (0x8), which also stands for a power draw that is merely high.
REASONS = ((0x20, "thermal"), (0x40, "thermal"), (0x80, "power brake"))


class GpuSampler:
    """Reads the GPUs of a server's ranks. uuids: rank's label -> UUID of its GPU."""

    def __init__(self, nvml: Nvml, ranks: Mapping[int, Rank]) -> None:
        """Finds each rank's GPU by the processes (pid -> rank) that NVML lists on it.

        Not by index: CUDA orders devices by speed and NVML by bus.
        """
        self._nvml = nvml
        self.uuids = {
            ranks[pid].label: uuid
            for uuid in nvml.uuids()
            for pid in nvml.pids(uuid)
            if pid in ranks
        }

    def read(self) -> Mapping[str, GpuReading]:
        """The GPU of each rank now, by the rank's label."""
        return {label: self._nvml.reading(uuid) for label, uuid in self.uuids.items()}

    def close(self) -> None:
        """Ends the use of NVML."""
        self._nvml.close()


class ClockWatch:
    """A thread that samples from its start to its `stop`."""

    def __init__(self, sampler: GpuSampler, period: float = PERIOD) -> None:
        self._sampler = sampler
        self._period = period
        self._readings: list[Mapping[str, GpuReading]] = []
        self._failure = ""
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="sglprof-clocks", daemon=True)
        self._thread.start()

    def stop(self) -> tuple[tuple[GpuClocks, ...], tuple[str, ...]]:
        """Ends sampling; the clocks of each rank, and notes. Takes at most one reading."""
        self._over.set()
        self._thread.join()
        notes = (f"reading GPU clocks ended early: {self._failure}",) if self._failure else ()
        return clocks_of(self._readings), notes

    def _run(self) -> None:
        try:
            while True:
                self._readings.append(self._sampler.read())
                if self._over.wait(self._period):
                    return
        except OSError as error:
            self._failure = str(error)
        finally:
            self._sampler.close()


def clocks_of(readings: Sequence[Mapping[str, GpuReading]]) -> tuple[GpuClocks, ...]:
    """What the readings of a window say of each rank, in order of appearance."""
    by_rank: dict[str, list[GpuReading]] = {}
    for look in readings:
        for rank, reading in look.items():
            by_rank.setdefault(rank, []).append(reading)
    return tuple(_clocks(rank, of_rank) for rank, of_rank in by_rank.items())


def _clocks(rank: str, readings: Sequence[GpuReading]) -> GpuClocks:
    slowed = [[word for bit, word in REASONS if one.reasons & bit] for one in readings]
    share = sum(bool(words) for words in slowed) / len(readings)
    throttled = share >= THROTTLED_SHARE
    words = dict.fromkeys(word for each in slowed for word in each) if throttled else ()
    return GpuClocks(
        rank=rank,
        uuid=readings[-1].uuid,
        median_sm_mhz=float(statistics.median(one.sm_mhz for one in readings)),
        power_limit_w=readings[-1].power_limit_w,
        throttled=throttled,
        reason=", ".join(words),
        throttled_share=share,
    )


def watch_clocks(server: Server) -> ClockWatch | None:
    """Begins to watch the GPUs of a server that was started here.

    None where there is nothing to see: a CPU server, the stand-in, an attached server (its
    devices are not known), no NVML, or GPUs that cannot be matched with ranks.
    """
    if server.attached or server.kind != "sglang" or server.sizes.is_cpu:
        return None
    try:
        nvml = Nvml()
    except (ImportError, OSError):
        return None
    try:
        sampler = GpuSampler(nvml, server.scheduler_ranks())
    except OSError:
        nvml.close()
        return None
    if not sampler.uuids:
        sampler.close()
        return None
    return ClockWatch(sampler)
