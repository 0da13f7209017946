"""Recorded sequences of GPU readings, and NVML's way of answering. None of it ran on a GPU."""

from __future__ import annotations

import sys
import types
from collections.abc import Callable, Mapping

import pytest

from pytest_sglprof._ranks import Rank
from pytest_sglprof._server.nvml import PERIOD, ClockWatch, GpuReading, GpuSampler, Nvml, clocks_of

POWER_CAP, HW_SLOWDOWN, SW_THERMAL, HW_THERMAL, POWER_BRAKE, IDLE = 0x4, 0x8, 0x20, 0x40, 0x80, 0x1


def sequence(*steps: tuple[int, int]) -> list[Mapping[str, GpuReading]]:
    """(SM clock, reasons) of rank TP1, one after another; TP0 is calm."""
    calm = GpuReading("GPU-0", 1980, 700.0, 0)
    return [
        {"TP0": calm, "TP1": GpuReading("GPU-1", mhz, 700.0, reasons)} for mhz, reasons in steps
    ]


@pytest.mark.parametrize(
    ("steps", "throttled", "reason", "share"),
    [
        ([(1755, POWER_CAP)] * 20, False, "", 0.0),
        ([(1755, POWER_CAP | HW_SLOWDOWN)] * 20, False, "", 0.0),
        ([(210, IDLE)] * 20, False, "", 0.0),
        ([(1980, 0)] * 10 + [(1200, SW_THERMAL)] * 10, True, "thermal", 0.5),
        ([(1200, HW_THERMAL | HW_SLOWDOWN | POWER_CAP)] * 20, True, "thermal", 1.0),
        ([(700, POWER_BRAKE | HW_SLOWDOWN)] * 20, True, "power brake", 1.0),
        ([(1200, SW_THERMAL), (700, POWER_BRAKE)] * 10, True, "thermal, power brake", 1.0),
        ([(1980, 0)] * 99 + [(1200, HW_THERMAL)], False, "", 0.01),
    ],
)
def test_only_heat_and_the_power_brake_count(
    steps: list[tuple[int, int]], throttled: bool, reason: str, share: float
) -> None:
    calm, found = clocks_of(sequence(*steps))
    assert (found.throttled, found.reason) == (throttled, reason)
    assert found.throttled_share == pytest.approx(share)
    assert (calm.rank, calm.throttled, calm.median_sm_mhz) == ("TP0", False, 1980.0)


def test_median_limit_and_uuid() -> None:
    found = clocks_of(sequence((1000, 0), (1500, 0), (1900, 0)))[1]
    assert (found.median_sm_mhz, found.power_limit_w, found.uuid) == (1500.0, 700.0, "GPU-1")
    assert clocks_of([]) == ()


class Replay:
    """Gives a recorded sequence, then its last reading for ever; or fails in the end."""

    def __init__(self, readings: list[Mapping[str, GpuReading]], *, fails: bool = False) -> None:
        self.readings = list(readings)
        self.fails = fails
        self.closed = 0

    def read(self) -> Mapping[str, GpuReading]:
        if len(self.readings) > 1:
            return self.readings.pop(0)
        if self.fails:
            raise OSError("NVML: GPU is lost")
        return self.readings[0]

    def close(self) -> None:
        self.closed += 1


def test_a_watch_samples_until_it_is_stopped() -> None:
    replay = Replay(sequence(*[(1200, HW_THERMAL)] * 5))
    watch = ClockWatch(replay, period=0.001)
    while len(replay.readings) > 1:
        pass
    (_, hot), notes = watch.stop()
    assert (hot.throttled, hot.reason, notes) == (True, "thermal", ())
    assert replay.closed == 1


def test_a_gpu_that_is_lost_ends_the_watch_with_a_note() -> None:
    replay = Replay(sequence((1200, 0), (1300, 0)), fails=True)
    watch = ClockWatch(replay, period=0.0)
    while not replay.closed:
        pass
    clocks, notes = watch.stop()
    assert [found.rank for found in clocks] == ["TP0", "TP1"]
    assert notes == ("reading GPU clocks ended early: NVML: GPU is lost",)


def test_a_short_window_has_one_reading() -> None:
    (_, found), _ = ClockWatch(Replay(sequence((1500, 0))), period=PERIOD).stop()
    assert found.median_sm_mhz == 1500.0


class NvmlError(Exception):
    """As pynvml.NVMLError."""


def recorded_nvml(pids: dict[int, list[int]], **wrong: object) -> types.SimpleNamespace:
    """pynvml's functions as far as they are used; devices are their indices."""

    def fail(*_: object) -> None:
        raise NvmlError("Unknown Error")

    functions = {
        "NVMLError": NvmlError,
        "NVML_CLOCK_SM": 1,
        "nvmlDeviceGetCount": lambda: len(pids),
        "nvmlDeviceGetHandleByIndex": lambda index: index,
        "nvmlDeviceGetComputeRunningProcesses": lambda device: [
            types.SimpleNamespace(pid=pid) for pid in pids[device]
        ],
        "nvmlDeviceGetUUID": lambda device: f"GPU-{device}".encode(),
        "nvmlDeviceGetClockInfo": lambda device, kind: 1000 * kind + device,
        "nvmlDeviceGetEnforcedPowerLimit": lambda device: 700_000,
        "nvmlDeviceGetCurrentClocksThrottleReasons": lambda device: HW_THERMAL,
        "nvmlInit": lambda: None,
        "nvmlShutdown": lambda: None,
    }
    return types.SimpleNamespace(**{**functions, **dict.fromkeys(wrong, fail)})


@pytest.fixture
def nvml_of(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Nvml]:
    """NVML over `recorded_nvml`."""

    def open_it(pids: dict[int, list[int]], **wrong: object) -> Nvml:
        monkeypatch.setitem(sys.modules, "pynvml", recorded_nvml(pids, **wrong))
        return Nvml()

    return open_it


def ranks(*pids: int) -> dict[int, Rank]:
    return {pid: Rank(tp=number) for number, pid in enumerate(pids)}


def test_nvml_finds_ranks_by_their_processes_not_by_index(nvml_of: Callable[..., Nvml]) -> None:
    sampler = GpuSampler(nvml_of({0: [11, 99], 1: [], 2: [10]}), ranks(10, 11, 12))
    assert sampler.read() == {
        "TP1": GpuReading("GPU-0", 1000, 700.0, HW_THERMAL),
        "TP0": GpuReading("GPU-2", 1002, 700.0, HW_THERMAL),
    }
    sampler.close()
    sampler.close()


def test_nvml_errors_are_plain_ones_and_a_missing_limit_is_none(
    nvml_of: Callable[..., Nvml],
) -> None:
    nvml = nvml_of({0: [10]}, nvmlDeviceGetEnforcedPowerLimit=True)
    assert GpuSampler(nvml, ranks(10)).read()["TP0"].power_limit_w is None
    broken = GpuSampler(nvml_of({0: [10]}, nvmlDeviceGetClockInfo=True), ranks(10))
    with pytest.raises(OSError, match="NVML: Unknown Error"):
        broken.read()
    with pytest.raises(OSError, match="NVML: Unknown Error"):
        nvml_of({}, nvmlInit=True)
