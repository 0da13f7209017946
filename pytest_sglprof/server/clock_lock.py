"""GPU clocks that are held at one frequency while a server lives, and given back after it.

A GPU that boosts as far as heat and power let it measures another speed each night. Who
locks is the keeper, which outlives a pytest that dies. NVML holds a lock until it is reset
or the driver is unloaded, and tells nobody what a clock was locked at before.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol

from pytest_sglprof.errors import ClockLockError

SETTING = "lock_clocks of [gpu]"


class ClockDriver(Protocol):
    """Sets the clocks of GPUs; every method raises `ClockLockError` when it cannot."""

    def find(self, names: Sequence[str], *, by_bus: bool) -> list[str]:
        """The UUIDs of devices by their names in CUDA_VISIBLE_DEVICES.

        by_bus: indices count by the bus, as NVML does. CUDA counts by speed unless told.
        """

    def lock(self, uuid: str, mhz: int) -> None:
        """Holds the clock of a GPU's multiprocessors."""

    def reset(self, uuid: str) -> None:
        """Lets it run as the driver chooses."""

    def close(self) -> None:
        """Frees what it holds; locks stay."""


class ClockLock:
    """The GPUs of one server, locked. held: UUID -> MHz."""

    def __init__(
        self, driver: ClockDriver, names: Sequence[str], mhz: int, *, by_bus: bool
    ) -> None:
        """Locks all of them or, with `ClockLockError`, none."""
        self._driver = driver
        self.held: dict[str, int] = {}
        try:
            for uuid in driver.find(names, by_bus=by_bus):
                self.held[uuid] = mhz  # before: a lock that fails may have been set all the same
                driver.lock(uuid, mhz)
        except ClockLockError:
            self.release()
            raise

    def release(self) -> list[str]:
        """Resets them; returns what could not be. Idempotent."""
        held, self.held = self.held, {}
        left = reset_all(self._driver, held)
        self._driver.close()
        return left


def reset_all(driver: ClockDriver, held: Mapping[str, int]) -> list[str]:
    """Resets every GPU, whatever becomes of the others; returns what could not be."""
    left = []
    for uuid, mhz in held.items():
        try:
            driver.reset(uuid)
        except ClockLockError as error:
            left.append(f"clock of {uuid}, locked at {mhz} MHz: {error.what}")
    return left


def give_back(held: Mapping[str, int]) -> list[str]:
    """Resets GPUs whose keeper died without doing so; returns what could not be."""
    if not held:
        return []
    try:
        driver = nvml_driver()
    except ClockLockError as error:
        return [f"clocks of {', '.join(held)}: {error.what}"]
    try:
        return reset_all(driver, held)
    finally:
        driver.close()


def nvml_driver() -> NvmlDriver:
    """NVML of this machine; raises `ClockLockError` where there is none."""
    try:
        import pynvml
    except ImportError:
        raise ClockLockError(
            f"{SETTING} needs nvidia-ml-py, which is not installed here",
            expected="the extra `gpu` beside pytest-sglprof",
            hint="pip install 'pytest-sglprof[gpu]', or remove lock_clocks",
        ) from None
    return NvmlDriver(pynvml)


class NvmlDriver:
    """NVML through nvidia-ml-py. It stays open: without any client a driver may unload."""

    def __init__(self, nvml: Any) -> None:
        self._nvml = nvml
        with self._told("NVML does not start", "check nvidia-smi; without an NVIDIA GPU there"):
            nvml.nvmlInit()

    def find(self, names: Sequence[str], *, by_bus: bool) -> list[str]:
        """See `ClockDriver`."""
        with self._told("NVML does not list the GPUs", "check nvidia-smi, or"):
            present = [_text(self._nvml.nvmlDeviceGetUUID(device)) for device in self._devices()]
        every = len(names) == len(present) and all(name.isdecimal() for name in names)
        found = present if every else [_uuid(name, present, by_bus=by_bus) for name in names]
        if not found:
            raise ClockLockError(
                f"{SETTING}: no GPU is visible whose clock could be locked",
                expected="an NVIDIA GPU in the server's lease",
                hint="check nvidia-smi and $CUDA_VISIBLE_DEVICES, or remove lock_clocks",
            )
        return found

    def lock(self, uuid: str, mhz: int) -> None:
        """See `ClockDriver`."""
        hint = "run as root, choose a clock of `nvidia-smi -q -d SUPPORTED_CLOCKS`, or"
        with self._told(f"the clock of {uuid} cannot be locked at {mhz} MHz", hint):
            device = self._nvml.nvmlDeviceGetHandleByUUID(uuid)
            self._nvml.nvmlDeviceSetGpuLockedClocks(device, mhz, mhz)

    def reset(self, uuid: str) -> None:
        """See `ClockDriver`."""
        hint = f"nvidia-smi -i {uuid} --reset-gpu-clocks; if clocks cannot be set here,"
        with self._told(f"the clock of {uuid} cannot be reset", hint):
            self._nvml.nvmlDeviceResetGpuLockedClocks(self._nvml.nvmlDeviceGetHandleByUUID(uuid))

    def close(self) -> None:
        """Ends the use of NVML; safe to call twice."""
        with contextlib.suppress(self._nvml.NVMLError):
            self._nvml.nvmlShutdown()

    def _devices(self) -> Iterable[Any]:
        count = self._nvml.nvmlDeviceGetCount()
        return [self._nvml.nvmlDeviceGetHandleByIndex(index) for index in range(count)]

    @contextlib.contextmanager
    def _told(self, what: str, hint: str) -> Iterator[None]:
        """NVML's errors as our own, with NVML's words."""
        try:
            yield
        except self._nvml.NVMLError as error:
            raise ClockLockError(
                f"{SETTING}: {what}: {error}",
                expected="a GPU whose clocks this process may set",
                hint=f"{hint} remove lock_clocks",
            ) from error


def _uuid(name: str, present: Sequence[str], *, by_bus: bool) -> str:
    """The UUID of a device by its name; CUDA takes any beginning of a UUID that is unique."""
    if name.startswith("MIG-"):
        raise ClockLockError(
            f"{SETTING}: {name} is a part of a GPU, and clocks belong to the whole",
            expected="whole GPUs",
            hint="remove lock_clocks, or give the server whole GPUs",
        )
    if name.isdecimal() and not by_bus:
        raise ClockLockError(
            f"{SETTING}: which GPU CUDA calls {name} is not known",
            expected="CUDA_DEVICE_ORDER=PCI_BUS_ID, UUIDs in CUDA_VISIBLE_DEVICES, or all GPUs",
            hint="export CUDA_DEVICE_ORDER=PCI_BUS_ID: CUDA counts by speed, NVML by the bus",
        )
    if name.isdecimal():
        matches = list(present[int(name) : int(name) + 1])
    else:
        matches = [uuid for uuid in present if uuid.startswith(name)]
    if len(matches) != 1:
        raise ClockLockError(
            f"{SETTING}: NVML knows {len(matches) or 'no'} GPU{'s' * (len(matches) > 1)} {name}",
            expected=f"one of {', '.join(present) or 'none'}",
            hint="check nvidia-smi and $CUDA_VISIBLE_DEVICES, or remove lock_clocks",
        )
    return matches[0]


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)
