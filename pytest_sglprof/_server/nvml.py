"""`Nvml`: reads and locks the clocks of this machine's GPUs through NVML (nvidia-ml-py)."""

from __future__ import annotations

import contextlib
import statistics
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pytest_sglprof._errors import ClockLockError
from pytest_sglprof._ranks import Rank

if TYPE_CHECKING:
    from pytest_sglprof._server.launch import Server


@dataclass(frozen=True)
class GpuClocks:
    """The GPU of one rank during a window.

    median_sm_mhz: of its SM clock, MHz. power_limit_w: W, None if it has none. throttled:
    slowed by heat or an external power brake; a power cap is normal and does not count.
    reason: "thermal", "power brake", both, or "". throttled_share: share of the readings in
    which it was slowed, 0 to 1.
    """

    rank: str
    uuid: str
    median_sm_mhz: float
    power_limit_w: float | None
    throttled: bool
    reason: str = ""
    throttled_share: float = 0.0


class NvmlError(OSError):
    """NVML refused or failed; `words` is its message."""

    @property
    def words(self) -> str:
        """NVML's message."""
        return str(self.args[0])

    def __str__(self) -> str:
        return f"NVML: {self.words}"


@dataclass(frozen=True)
class GpuReading:
    """One reading of one GPU.

    sm_mhz: its SM clock, MHz. power_limit_w: W, None if it has none. reasons: bits of
    nvmlClocksEventReasons.
    """

    uuid: str
    sm_mhz: int
    power_limit_w: float | None
    reasons: int


class Nvml:
    """An open connection to NVML. Without one the driver may unload. GPUs are named by UUID.

    The constructor raises ImportError without nvidia-ml-py. It and every method raise
    `NvmlError` if the driver or the GPU refuses.
    """

    def __init__(self) -> None:
        import pynvml

        self._nvml: Any = pynvml
        self._devices: dict[str, Any] = {}
        with self._errors():
            pynvml.nvmlInit()

    def uuids(self) -> list[str]:
        """The UUID of every GPU, in the order of the bus (CUDA's default is the order of speed)."""
        with self._errors():
            count = self._nvml.nvmlDeviceGetCount()
            devices = [self._nvml.nvmlDeviceGetHandleByIndex(index) for index in range(count)]
            self._devices = {_text(self._nvml.nvmlDeviceGetUUID(one)): one for one in devices}
        return list(self._devices)

    def pids(self, uuid: str) -> list[int]:
        """The processes that have a context on a GPU; [] in some containers."""
        with self._errors():
            processes = self._nvml.nvmlDeviceGetComputeRunningProcesses(self._device(uuid))
            return [int(process.pid) for process in processes]

    def reading(self, uuid: str) -> GpuReading:
        """A GPU's clock now, and the reasons for which it is limited."""
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
        """Locks the SM clock of a GPU until it is reset or the driver is unloaded."""
        with self._errors():
            self._nvml.nvmlDeviceSetGpuLockedClocks(self._device(uuid), mhz, mhz)

    def reset_clock(self, uuid: str) -> None:
        """Unlocks the SM clock of a GPU."""
        with self._errors():
            self._nvml.nvmlDeviceResetGpuLockedClocks(self._device(uuid))

    def close(self) -> None:
        """Closes NVML; locked clocks stay locked. Safe to call twice."""
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


# The clocks of a server's GPUs during a window. A GPU at its power limit lowers its clock all the
# time, which is normal and does not count. Heat and an external power brake are faults of the
# machine.

PERIOD = 0.1  # s between two readings; NVML updates its figures every 20 to 100 ms
# A slowdown in a smaller share of the readings is too short to change a window's figures.
THROTTLED_SHARE = 0.05
# Bits of nvmlClocksEventReasons, without the software power cap (0x4) and the general hardware
# slowdown (0x8), which a high power draw sets as well.
REASONS = ((0x20, "thermal"), (0x40, "thermal"), (0x80, "power brake"))


class GpuSampler:
    """Reads the GPUs of a server's ranks. uuids: label of a rank -> UUID of its GPU."""

    def __init__(self, nvml: Nvml, ranks: Mapping[int, Rank]) -> None:
        """Finds each rank's GPU from the processes that NVML lists on it. ranks: pid -> rank.

        An index would not do, since CUDA orders devices by speed and NVML by bus.
        """
        self._nvml = nvml
        self.uuids = {
            ranks[pid].label: uuid
            for uuid in nvml.uuids()
            for pid in nvml.pids(uuid)
            if pid in ranks
        }

    def read(self) -> Mapping[str, GpuReading]:
        """Label of a rank -> a reading of its GPU now."""
        return {label: self._nvml.reading(uuid) for label, uuid in self.uuids.items()}

    def close(self) -> None:
        """Closes NVML."""
        self._nvml.close()


class ClockWatch:
    """Reads the GPUs in a thread until `stop`. period: s between two readings."""

    def __init__(self, sampler: GpuSampler, period: float = PERIOD) -> None:
        self._sampler = sampler
        self._period = period
        self._readings: list[Mapping[str, GpuReading]] = []
        self._failure = ""
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="sglprof-clocks", daemon=True)
        self._thread.start()

    def stop(self) -> tuple[tuple[GpuClocks, ...], tuple[str, ...]]:
        """Ends the thread within one reading; returns (the clocks of each rank, notes)."""
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
    """The clocks of each rank from the readings of a window, in the order of the ranks there."""
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

    None for a CPU server, the stand-in, or an attached server (its GPUs are not known), and
    if there is no NVML or no GPU can be matched with a rank.
    """
    # Here, since reports import this module and need no HTTP client.
    from pytest_sglprof._server.command import LAUNCHERS

    if server.attached or server.sizes.is_cpu or not LAUNCHERS[server.kind].uses_hardware:
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


# Locking GPU clocks while a server runs. A GPU that boosts as far as heat and power allow gives
# different timings every night. The keeper holds the lock, since it outlives a pytest that dies.
# NVML keeps a lock until it is reset or the driver is unloaded, and does not say at which
# frequency a clock was locked before.

SETTING = "lock_clocks of [gpu]"


class ClockLock:
    """The locked clocks of one server's GPUs. held: UUID -> MHz."""

    def __init__(self, names: Sequence[str], mhz: int, *, by_bus: bool) -> None:
        """Locks the clocks of all these GPUs; if one fails, none and raises `ClockLockError`.

        names: as in CUDA_VISIBLE_DEVICES. by_bus: indices follow the bus, as those of NVML.
        """
        self._nvml = open_nvml()
        self.held: dict[str, int] = {}
        try:
            for uuid in _find(self._nvml, names, by_bus=by_bus):
                self.held[uuid] = (
                    mhz  # before, since a lock may be set although NVML reports a failure
                )
                hint = "run as root, choose a clock of `nvidia-smi -q -d SUPPORTED_CLOCKS`, or"
                with _explained(f"the clock of {uuid} cannot be locked at {mhz} MHz", hint):
                    self._nvml.lock_clock(uuid, mhz)
        except ClockLockError:
            self.release()
            raise

    def release(self) -> list[str]:
        """Unlocks the clocks; returns what could not be unlocked. Idempotent."""
        held, self.held = self.held, {}
        left = _unlock(self._nvml, held)
        self._nvml.close()
        return left


def unlock_clocks(held: Mapping[str, int]) -> list[str]:
    """Unlocks clocks that a dead keeper has left locked; returns what could not be unlocked."""
    if not held:
        return []
    try:
        nvml = open_nvml()
    except ClockLockError as error:
        return [f"clocks of {', '.join(held)}: {error.what}"]
    try:
        return _unlock(nvml, held)
    finally:
        nvml.close()


def open_nvml() -> Nvml:
    """NVML of this machine; raises `ClockLockError` if there is none."""
    try:
        with _explained("NVML does not start", "check nvidia-smi; without an NVIDIA GPU there"):
            return Nvml()
    except ImportError:
        raise ClockLockError(
            f"{SETTING} needs nvidia-ml-py, which is not installed here",
            expected="the extra `gpu` beside pytest-sglprof",
            hint="pip install 'pytest-sglprof[gpu]', or remove lock_clocks",
        ) from None


def _unlock(nvml: Nvml, held: Mapping[str, int]) -> list[str]:
    """Unlocks each clock even if another one fails; returns what could not be unlocked."""
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
    """The UUIDs of the GPUs with these names; all GPUs for as many indices."""
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
    """Turns an `NvmlError` into a `ClockLockError`."""
    try:
        yield
    except NvmlError as error:
        raise ClockLockError(
            f"{SETTING}: {what}: {error.words}",
            expected="a GPU whose clocks this process may set",
            hint=f"{hint} remove lock_clocks",
        ) from error


def _uuid(name: str, present: Sequence[str], *, by_bus: bool) -> str:
    """The UUID of a GPU from its name. CUDA accepts any unique beginning of a UUID."""
    if name.startswith("MIG-"):
        raise ClockLockError(
            f"{SETTING}: {name} is part of a GPU, whose clock can only be locked as a whole",
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
            f"{SETTING}: NVML lists {len(matches) or 'no'} GPU{'s' * (len(matches) > 1)} {name}",
            expected=f"one of {', '.join(present) or 'none'}",
            hint="check nvidia-smi and $CUDA_VISIBLE_DEVICES, or remove lock_clocks",
        )
    return matches[0]
