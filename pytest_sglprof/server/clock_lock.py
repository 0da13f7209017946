"""GPU clocks that are held at one frequency while a server lives, and given back after it.

A GPU that boosts as far as heat and power let it gives different timings every night. The
keeper holds the lock, since it outlives a pytest that dies. NVML holds a lock until it is reset
or the driver is unloaded, and does not say what a clock was locked at before.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence

from pytest_sglprof.errors import ClockLockError
from pytest_sglprof.server.nvml import Nvml, NvmlError

SETTING = "lock_clocks of [gpu]"


class ClockLock:
    """The GPUs of one server, locked. held: UUID -> MHz."""

    def __init__(self, names: Sequence[str], mhz: int, *, by_bus: bool) -> None:
        """Locks all of them or, with `ClockLockError`, none.

        names: as in CUDA_VISIBLE_DEVICES. by_bus: indices count by the bus, as NVML does.
        """
        self._nvml = open_nvml()
        self.held: dict[str, int] = {}
        try:
            for uuid in _find(self._nvml, names, by_bus=by_bus):
                self.held[uuid] = mhz  # before: a lock that fails may have been set all the same
                hint = "run as root, choose a clock of `nvidia-smi -q -d SUPPORTED_CLOCKS`, or"
                with _explained(f"the clock of {uuid} cannot be locked at {mhz} MHz", hint):
                    self._nvml.lock_clock(uuid, mhz)
        except ClockLockError:
            self.release()
            raise

    def release(self) -> list[str]:
        """Resets them; returns what could not be. Idempotent."""
        held, self.held = self.held, {}
        left = _reset(self._nvml, held)
        self._nvml.close()
        return left


def give_back(held: Mapping[str, int]) -> list[str]:
    """Resets GPUs whose keeper died without doing so; returns what could not be."""
    if not held:
        return []
    try:
        nvml = open_nvml()
    except ClockLockError as error:
        return [f"clocks of {', '.join(held)}: {error.what}"]
    try:
        return _reset(nvml, held)
    finally:
        nvml.close()


def open_nvml() -> Nvml:
    """NVML of this machine; raises `ClockLockError` where there is none."""
    try:
        with _explained("NVML does not start", "check nvidia-smi; without an NVIDIA GPU there"):
            return Nvml()
    except ImportError:
        raise ClockLockError(
            f"{SETTING} needs nvidia-ml-py, which is not installed here",
            expected="the extra `gpu` beside pytest-sglprof",
            hint="pip install 'pytest-sglprof[gpu]', or remove lock_clocks",
        ) from None


def _reset(nvml: Nvml, held: Mapping[str, int]) -> list[str]:
    """Resets every GPU, whatever becomes of the others; returns what could not be."""
    left = []
    for uuid, mhz in held.items():
        try:
            nvml.reset_clock(uuid)
        except NvmlError as error:
            left.append(
                f"clock of {uuid}, locked at {mhz} MHz: it cannot be reset: {error.words} "
                f"(nvidia-smi -i {uuid} --reset-gpu-clocks)"
            )
    return left


def _find(nvml: Nvml, names: Sequence[str], *, by_bus: bool) -> list[str]:
    """The UUIDs of the GPUs by their names."""
    with _explained("NVML does not list the GPUs", "check nvidia-smi, or"):
        present = nvml.uuids()
    every = len(names) == len(present) and all(name.isdecimal() for name in names)
    chosen = present if every else [_uuid(name, present, by_bus=by_bus) for name in names]
    if not chosen:
        raise ClockLockError(
            f"{SETTING}: no GPU is visible whose clock could be locked",
            expected="an NVIDIA GPU in the server's lease",
            hint="check nvidia-smi and $CUDA_VISIBLE_DEVICES, or remove lock_clocks",
        )
    return chosen


@contextlib.contextmanager
def _explained(what: str, hint: str) -> Iterator[None]:
    """NVML's errors as `ClockLockError`, with NVML's words."""
    try:
        yield
    except NvmlError as error:
        raise ClockLockError(
            f"{SETTING}: {what}: {error.words}",
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
