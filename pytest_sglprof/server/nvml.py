"""`Nvml`: the GPUs of this machine, seen and set through NVML (nvidia-ml-py)."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any


class NvmlError(OSError):
    """NVML refused or failed; `words` is its own message."""

    @property
    def words(self) -> str:
        """NVML's message."""
        return str(self.args[0])

    def __str__(self) -> str:
        return f"NVML: {self.words}"


@dataclass(frozen=True)
class GpuReading:
    """One look at one GPU. sm_mhz: its SM clock. reasons: NVML's bits. limit: W, None unknown."""

    uuid: str
    sm_mhz: int
    power_limit_w: float | None
    reasons: int


class Nvml:
    """NVML while it is open: without any client a driver may unload. Devices go by their UUIDs.

    Making one raises ImportError where nvidia-ml-py is missing; that and every method raise
    `NvmlError` where the driver, or a GPU, does not do it.
    """

    def __init__(self) -> None:
        import pynvml

        self._nvml: Any = pynvml
        self._devices: dict[str, Any] = {}
        with self._errors():
            pynvml.nvmlInit()

    def uuids(self) -> list[str]:
        """Every GPU, in the order of the bus (CUDA counts by speed by default)."""
        with self._errors():
            count = self._nvml.nvmlDeviceGetCount()
            devices = [self._nvml.nvmlDeviceGetHandleByIndex(index) for index in range(count)]
            self._devices = {_text(self._nvml.nvmlDeviceGetUUID(one)): one for one in devices}
        return list(self._devices)

    def pids(self, uuid: str) -> list[int]:
        """The processes that have a context on a GPU; inside a container it may list none."""
        with self._errors():
            processes = self._nvml.nvmlDeviceGetComputeRunningProcesses(self._device(uuid))
            return [int(process.pid) for process in processes]

    def reading(self, uuid: str) -> GpuReading:
        """Its clock now, and what holds it down."""
        nvml = self._nvml
        with self._errors():
            device = self._device(uuid)
            try:
                limit = nvml.nvmlDeviceGetEnforcedPowerLimit(device) / 1000.0
            except nvml.NVMLError:  # virtual GPUs have none
                limit = None
            return GpuReading(
                uuid=uuid,
                sm_mhz=int(nvml.nvmlDeviceGetClockInfo(device, nvml.NVML_CLOCK_SM)),
                power_limit_w=limit,
                reasons=int(nvml.nvmlDeviceGetCurrentClocksThrottleReasons(device)),
            )

    def lock_clock(self, uuid: str, mhz: int) -> None:
        """Holds the clock of its multiprocessors, until it is reset or the driver unloaded."""
        with self._errors():
            self._nvml.nvmlDeviceSetGpuLockedClocks(self._device(uuid), mhz, mhz)

    def reset_clock(self, uuid: str) -> None:
        """Lets it run as the driver chooses."""
        with self._errors():
            self._nvml.nvmlDeviceResetGpuLockedClocks(self._device(uuid))

    def close(self) -> None:
        """Ends the use of NVML; locks stay. Safe to call twice."""
        with contextlib.suppress(self._nvml.NVMLError):
            self._nvml.nvmlShutdown()

    def _device(self, uuid: str) -> Any:
        if uuid not in self._devices:
            self._devices[uuid] = self._nvml.nvmlDeviceGetHandleByUUID(uuid)
        return self._devices[uuid]

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except self._nvml.NVMLError as error:
            raise NvmlError(str(error)) from error


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)
