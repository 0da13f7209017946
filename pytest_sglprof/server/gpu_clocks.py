"""The clocks of a server's GPUs during a window, and whether heat or a power brake slowed them.

A GPU that runs at its power limit lowers its clock all the time: that is normal and counts as
nothing. Thermal slowdown and an external power brake are faults of the machine.
"""

from __future__ import annotations

import contextlib
import statistics
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from pytest_sglprof.values import GpuClocks

if TYPE_CHECKING:
    from pytest_sglprof.server.server import Server

PERIOD = 0.1  # s between two readings; NVML's own figures change every 20 to 100 ms
# Below this share of the readings a slowdown is a flicker that no figure of a window shows.
THROTTLED_SHARE = 0.05
# Bits of nvmlClocksEventReasons. Not among them: the software power cap (0x4), and the general
# hardware slowdown (0x8), which also stands for a power draw that is merely high.
REASONS = ((0x20, "thermal"), (0x40, "thermal"), (0x80, "power brake"))


@dataclass(frozen=True)
class GpuReading:
    """One look at one GPU. sm_mhz: its SM clock. reasons: NVML's bits. limit: W, None unknown."""

    uuid: str
    sm_mhz: int
    power_limit_w: float | None
    reasons: int


class GpuSampler(Protocol):
    """Reads some GPUs again and again."""

    def read(self) -> Mapping[str, GpuReading]:
        """The GPU of each rank now, by the rank's label; raises OSError when it cannot."""

    def close(self) -> None:
        """Frees what it holds."""


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
    for reading in readings:
        for rank, found in reading.items():
            by_rank.setdefault(rank, []).append(found)
    return tuple(_clocks(rank, found) for rank, found in by_rank.items())


def _clocks(rank: str, found: Sequence[GpuReading]) -> GpuClocks:
    slowed = [[word for bit, word in REASONS if one.reasons & bit] for one in found]
    share = sum(bool(words) for words in slowed) / len(found)
    throttled = share >= THROTTLED_SHARE
    words = dict.fromkeys(word for each in slowed for word in each) if throttled else ()
    return GpuClocks(
        rank=rank,
        uuid=found[-1].uuid,
        median_sm_mhz=float(statistics.median(one.sm_mhz for one in found)),
        power_limit_w=found[-1].power_limit_w,
        throttled=throttled,
        reason=", ".join(words),
        throttled_share=share,
    )


def watch_clocks(server: Server) -> ClockWatch | None:
    """Begins to watch the GPUs of a server that was started here.

    None where there is nothing to see: a CPU server, the stand-in, an attached server (its
    devices are not known), no NVML, or GPUs that cannot be told to be those of ranks.
    """
    if server.attached or server.kind != "sglang" or server.sizes.is_cpu:
        return None
    try:
        import pynvml
    except ImportError:
        return None
    try:
        pynvml.nvmlInit()
    except (pynvml.NVMLError, OSError):
        return None
    sampler = NvmlSampler(pynvml)
    try:
        pids = {pid: rank.label for pid, rank in server.scheduler_ranks().items()}
        sampler.find_ranks(pids)
    except OSError:
        sampler.close()
        return None
    if not sampler.handles:
        sampler.close()
        return None
    return ClockWatch(sampler)


class NvmlSampler:
    """NVML through nvidia-ml-py. handles: rank's label -> device handle."""

    def __init__(self, nvml: Any) -> None:
        self._nvml = nvml
        self.handles: dict[str, Any] = {}

    def find_ranks(self, pid_ranks: Mapping[int, str]) -> None:
        """Finds each rank's device by the processes that NVML lists on it.

        Not by index: CUDA orders devices by speed and NVML by bus. Inside a container
        NVML may list none of our processes; then no rank is found.
        """
        with self._readable():
            for index in range(self._nvml.nvmlDeviceGetCount()):
                device = self._nvml.nvmlDeviceGetHandleByIndex(index)
                for process in self._nvml.nvmlDeviceGetComputeRunningProcesses(device):
                    label = pid_ranks.get(int(process.pid))
                    if label is not None:
                        self.handles[label] = device

    def read(self) -> Mapping[str, GpuReading]:
        """One reading of every rank's device."""
        with self._readable():
            return {rank: self._reading(device) for rank, device in self.handles.items()}

    def close(self) -> None:
        """Ends the use of NVML; safe to call twice."""
        nvml, self.handles = self._nvml, {}
        with contextlib.suppress(nvml.NVMLError):
            nvml.nvmlShutdown()

    def _reading(self, device: Any) -> GpuReading:
        nvml = self._nvml
        try:
            limit = nvml.nvmlDeviceGetEnforcedPowerLimit(device) / 1000.0
        except nvml.NVMLError:  # virtual GPUs have none
            limit = None
        uuid = nvml.nvmlDeviceGetUUID(device)
        return GpuReading(
            uuid=uuid.decode() if isinstance(uuid, bytes) else str(uuid),
            sm_mhz=int(nvml.nvmlDeviceGetClockInfo(device, nvml.NVML_CLOCK_SM)),
            power_limit_w=limit,
            reasons=int(nvml.nvmlDeviceGetCurrentClocksThrottleReasons(device)),
        )

    @contextlib.contextmanager
    def _readable(self) -> Iterator[None]:
        """NVML's errors as OSError, so that callers need not know the library."""
        try:
            yield
        except self._nvml.NVMLError as error:
            raise OSError(f"NVML: {error}") from error
