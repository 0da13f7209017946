"""GPU clocks are locked before the server starts and given back however it ends.

The keeper is a real process and its end a real one; only NVML is a recorder that writes
down its calls. None of it ran on a GPU.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from pytest_sglprof._config.model import ServerSpec
from pytest_sglprof._errors import ClockLockError, ServerDied
from pytest_sglprof._report.model import LockedClock
from pytest_sglprof._run.servers import describe_server
from pytest_sglprof._server import command
from pytest_sglprof._server.launch import Server, launch
from pytest_sglprof._server.nvml import ClockLock, open_nvml
from tests.integration.keeper.conftest import FAKE, family, wait_clean, words
from tests.support.running import wait_for

LAUNCHER = """
import sys, time
from pathlib import Path
from pytest_sglprof._server.launch import launch
from pytest_sglprof._config.model import ServerSpec
spec = ServerSpec(gpus=(1, 2), lock_clocks=1410, env=(("FAKE_MODE", sys.argv[2]),))
server = launch(spec, folder=Path(sys.argv[1]), progress=lambda text: print(text, flush=True))
try:
    print("READY", flush=True)
    time.sleep(600)
finally:
    server.stop()
"""
LOCKED = ["lock GPU-b 1410", "lock GPU-c 1410"]
RESET = ["reset GPU-b", "reset GPU-c"]


class Calls:
    """What NVML was asked for, by any process."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def lines(self) -> list[list[str]]:
        if not self._path.exists():
            return []
        return [line.split(maxsplit=1) for line in self._path.read_text().splitlines()]

    @property
    def asked(self) -> list[str]:
        return [call for _, call in self.lines()]

    @property
    def pids(self) -> set[int]:
        return {int(pid) for pid, _ in self.lines()}


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Calls]:
    """Four GPUs, a recording NVML and the fake server, here and in every child."""
    nvml = Path(__file__).parents[2] / "support" / "fake_nvml"
    path = tmp_path / "nvml-calls"
    monkeypatch.setenv("FAKE_NVML_CALLS", str(path))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2,3")
    monkeypatch.setenv("CUDA_DEVICE_ORDER", "PCI_BUS_ID")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(nvml), str(FAKE), *sys.path]))
    monkeypatch.delitem(sys.modules, "pynvml", raising=False)
    monkeypatch.syspath_prepend(str(nvml))
    command._probe.cache_clear()
    yield Calls(path)
    command._probe.cache_clear()
    sys.modules.pop("pynvml", None)


Start = Callable[..., Server]


@pytest.fixture
def start(calls: Calls, nothing_left: None, tmp_path: Path) -> Iterator[Start]:
    servers = []

    def start(**fields: object) -> Server:
        values: dict[str, Any] = {"gpus": (1, 2), "lock_clocks": 1410, **fields}
        servers.append(launch(ServerSpec(**values), folder=tmp_path / "server"))
        return servers[-1]

    yield start
    for server in servers:
        server.stop()


def test_locked_while_the_server_lives_and_recorded(
    start: Start, calls: Calls, tmp_path: Path
) -> None:
    server = start()
    assert calls.asked == LOCKED
    assert calls.pids.isdisjoint({os.getpid(), server.pid})
    assert server.locked_clocks == {"GPU-b": 1410, "GPU-c": 1410}
    assert describe_server(server, tmp_path).locked_clocks == (
        LockedClock(uuid="GPU-b", mhz=1410),
        LockedClock(uuid="GPU-c", mhz=1410),
    )
    assert server.stop() == ()
    assert calls.asked == LOCKED + RESET
    assert server.stop() == ()
    assert calls.asked == LOCKED + RESET


def test_without_the_setting_and_on_cpu_no_clock_is_touched(start: Start, calls: Calls) -> None:
    assert start(lock_clocks=0).stop() == ()
    assert start(args=("--device", "cpu")).locked_clocks == {}
    assert calls.asked == []


def test_a_server_that_dies_gives_them_back(start: Start, calls: Calls) -> None:
    server = start()
    os.kill(server.pid, signal.SIGKILL)
    while server.is_alive():
        time.sleep(0.01)
    assert server.exit_reason() is not None
    assert server.stop() == ()
    assert calls.asked == LOCKED + RESET


def test_a_server_that_does_not_start_gives_them_back(start: Start, calls: Calls) -> None:
    with pytest.raises(ServerDied):
        start(env=(("FAKE_MODE", "die"),))
    assert calls.asked == LOCKED + RESET


def test_a_keeper_that_is_killed_leaves_it_to_pytest(
    start: Start, calls: Calls, lease_folder: Path
) -> None:
    server = start()
    (keeper,) = [p for p in family(lease_folder) if "pytest_sglprof._server.keeper" in words(p)]
    assert calls.pids == {keeper.pid}
    keeper.kill()
    keeper.wait(10)
    assert server.stop() == ()
    assert calls.asked == LOCKED + RESET
    assert calls.pids == {keeper.pid, os.getpid()}


@pytest.mark.parametrize("mode", ["", "never"])
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_killed_or_interrupted_pytest(
    calls: Calls,
    nothing_left: None,
    lease_folder: Path,
    tmp_path: Path,
    mode: str,
    number: signal.Signals,
) -> None:
    log = tmp_path / "server" / "server.log"
    process = subprocess.Popen(
        [sys.executable, "-c", LAUNCHER, str(tmp_path / "server"), mode],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert process.stdout is not None
    with process.stdout:
        if mode == "never":
            wait_for(lambda: log.is_file() and "fired up" in log.read_text())
        else:
            assert any("READY" in line for line in process.stdout)
        assert calls.asked == LOCKED
        process.send_signal(number)
    process.wait(60)
    assert wait_clean(lease_folder, 30) == []
    assert calls.asked == LOCKED + RESET
    assert process.pid not in calls.pids


def test_no_permission_is_an_error_and_leaves_nothing_locked(
    start: Start, calls: Calls, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("FAKE_NVML_WRONG", "lock GPU-c")
    with pytest.raises(ClockLockError) as caught:
        start()
    assert "GPU-c cannot be locked at 1410 MHz: Insufficient Permissions" in caught.value.what
    assert "run as root" in caught.value.hint
    # A lock that failed may have been set all the same.
    assert calls.asked == ["lock GPU-b 1410", *RESET]
    assert not (tmp_path / "server" / "server.log").exists()


def test_without_a_driver_or_the_library(
    start: Start, calls: Calls, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_NVML_WRONG", "init")
    with pytest.raises(ClockLockError, match="NVML does not start: Driver Not Loaded"):
        start()
    monkeypatch.setitem(sys.modules, "pynvml", None)
    with pytest.raises(ClockLockError, match="nvidia-ml-py, which is not installed") as caught:
        open_nvml()
    assert "pytest-sglprof[gpu]" in caught.value.hint
    assert calls.asked == []


def test_what_cannot_be_given_back_is_told_and_the_others_are(
    start: Start, calls: Calls, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_NVML_WRONG", "reset GPU-b")
    (left,) = start().stop()
    assert left.startswith("clock of GPU-b, locked at 1410 MHz: ")
    assert "GPU is lost" in left
    assert calls.asked == LOCKED + RESET


@pytest.mark.parametrize(
    ("names", "by_bus", "held"),
    [
        (["1", "3"], True, ["GPU-b", "GPU-d"]),
        (["GPU-c", "GPU-a"], False, ["GPU-c", "GPU-a"]),
        (["3", "2", "1", "0"], False, ["GPU-a", "GPU-b", "GPU-c", "GPU-d"]),  # all, in any order
        (["4", "5", "6", "7"], False, ["GPU-a", "GPU-b", "GPU-c", "GPU-d"]),  # in a container
    ],
)
def test_devices_by_their_names(
    calls: Calls, names: list[str], by_bus: bool, held: list[str]
) -> None:
    lock = ClockLock(names, 1200, by_bus=by_bus)
    assert list(lock.held) == held
    assert lock.release() == []
    assert lock.release() == []
    assert calls.asked == [f"lock {u} 1200" for u in held] + [f"reset {u}" for u in held]


@pytest.mark.parametrize(
    ("names", "by_bus", "what"),
    [
        (["0", "1"], False, "which GPU CUDA calls 0 is not known"),
        (["7"], True, "NVML lists no GPU 7"),
        (["GPU-"], True, "NVML lists 4 GPUs GPU-"),
        (["MIG-1"], True, "MIG-1 is part of a GPU"),
        ([], True, "no GPU is visible"),
    ],
)
def test_devices_that_cannot_be_told(
    calls: Calls, names: list[str], by_bus: bool, what: str
) -> None:
    with pytest.raises(ClockLockError, match=what):
        ClockLock(names, 1200, by_bus=by_bus)
    assert calls.asked == []
