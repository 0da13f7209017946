"""A keeper that is killed, or frozen, at any moment: all is gone soon, and the reason is told."""

from __future__ import annotations

import os
import re
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from pytest_sglprof import _process as process
from pytest_sglprof._config.model import ServerSpec
from pytest_sglprof._errors import ServerError
from pytest_sglprof._server import lease
from pytest_sglprof._server.launch import Server, launch
from tests.integration.keeper.conftest import family, wait_clean, words
from tests.support.real_env import real_nsys

GONE_WITHIN = 30.0  # s; what is promised of a killed keeper
CPU = ServerSpec(args=("--device", "cpu", "--tp", "2"), ready_timeout=60, stop_timeout=8.0)
# The interpreter of a server that never takes its secrets, and never tells its pid.
SLOW_PYTHON = """#!/bin/sh
case "$*" in *exec_step.py*) sleep 600 & wait;; esac
exec {python} "$@"
"""


class Starting:
    """`launch` in a thread of its own."""

    def __init__(self, spec: ServerSpec, folder: Path, nsys: str | None) -> None:
        self.folder = folder
        self.server: Server | None = None
        self.error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, args=(spec, nsys))
        self._thread.start()

    def _run(self, spec: ServerSpec, nsys: str | None) -> None:
        try:
            self.server = launch(spec, folder=self.folder, nsys_path=nsys)
        except BaseException as error:
            self.error = error

    def log(self, name: str) -> str:
        path = self.folder / name
        return path.read_text() if path.exists() else ""

    def join(self, timeout: float = GONE_WITHIN) -> None:
        self._thread.join(timeout)
        assert not self._thread.is_alive()


@pytest.fixture
def begin(fake_sglang, nothing_left, tmp_path) -> Iterator[Callable[..., Starting]]:
    started = []

    def begin(spec: ServerSpec = CPU, nsys: str | None = None) -> Starting:
        starting = Starting(replace(spec, nsys=nsys is not None), tmp_path / "server", nsys)
        started.append(starting)
        return starting

    before = shared_files(tmp_path)
    yield begin
    for starting in started:
        starting.join()
        if starting.server is not None:
            starting.server.stop()
    assert shared_files(tmp_path) <= before


def shared_files(folder: Path) -> set[str]:
    """What may stay behind outside of the server's `folder`."""
    places = (Path(tempfile.gettempdir()), Path("/dev/shm"))
    paths = [path for place in places for path in place.iterdir()]
    links = {str(p) for p in paths if p.is_symlink() and folder in p.readlink().parents}
    return links | {str(p) for p in paths if re.match(r"injection_config_|.*nsys", p.name)}


def keeper_of(lease_folder: Path) -> psutil.Process:
    def keepers() -> list[psutil.Process]:
        return [p for p in family(lease_folder) if "pytest_sglprof._server.keeper" in words(p)]

    return wait_for(keepers)[0]


def wait_for(what, limit: float = 60.0):
    deadline = time.monotonic() + limit
    while not (found := what()):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return found


def all_gone(starting: Starting, lease_folder: Path, began: float) -> None:
    """Processes, leases, the temporary folder, fifos: nothing is left in time."""
    assert wait_clean(lease_folder, GONE_WITHIN - (time.monotonic() - began)) == []
    wait_for(lambda: not (starting.folder / "tmp").exists(), 5.0)
    assert not [p for p in starting.folder.rglob("*") if p.is_fifo()]
    assert time.monotonic() - began < GONE_WITHIN


PHASES = ["leasing", "handover", "never ready", "running"]


def reach(phase: str, begin, lease_folder: Path, tmp_path: Path, nsys: str | None) -> Starting:
    """Starts a server and returns at that moment of its life."""
    if phase == "leasing":
        held = lease.acquire("port-29999", timeout=0)
        starting = begin(replace(CPU, port=29999), nsys)
        wait_for(lambda: "keeper" in starting.log("keeper.log"))
        time.sleep(0.5)
        held.release()  # so that only the keeper's own leases are to be cleaned
        return starting
    if phase == "handover":
        python = tmp_path / "slow-python"
        python.write_text(SLOW_PYTHON.format(python=sys.executable))
        python.chmod(0o755)
        starting = begin(replace(CPU, python=str(python)), nsys)
        wait_for(lambda: any("sleep" in words(p) for p in family(lease_folder)))
        return starting
    mode = "never" if phase == "never ready" else ""
    starting = begin(replace(CPU, env=(("FAKE_MODE", mode),)), nsys)
    wait_for(lambda: "fired up" in starting.log("server.log"))
    if phase == "running":
        wait_for(lambda: starting.server)
    return starting


def kill_in(phase: str, number: int, begin, lease_folder, tmp_path, nsys: str | None = None):
    starting = reach(phase, begin, lease_folder, tmp_path, nsys)
    keeper = keeper_of(lease_folder)
    began = time.monotonic()
    keeper.send_signal(number)
    if phase != "running":
        starting.join()
    all_gone(starting, lease_folder, began)
    return starting, keeper


def told(starting: Starting) -> str:
    """The reason as the user gets it."""
    error = starting.error
    if starting.server is not None:
        assert not starting.server.is_alive()
        error = starting.server.exit_reason()
    assert isinstance(error, ServerError)
    assert error.expected
    assert error.hint
    return error.what


@pytest.mark.parametrize("phase", PHASES)
def test_fault_d_a_keeper_that_is_killed_leaves_nothing(phase, begin, lease_folder, tmp_path):
    starting, keeper = kill_in(phase, signal.SIGKILL, begin, lease_folder, tmp_path)
    assert f"the keeper process (pid {keeper.pid}) was killed by signal 9" in told(starting)


@pytest.mark.parametrize("phase", PHASES)
def test_fault_3_a_keeper_that_is_frozen_leaves_nothing(phase, begin, lease_folder, tmp_path):
    starting, keeper = kill_in(phase, signal.SIGSTOP, begin, lease_folder, tmp_path)
    text = told(starting)
    stopped = "was stopped (SIGSTOP) and did not continue"
    assert f"the keeper process (pid {keeper.pid}) {stopped}" in text


@pytest.mark.parametrize("phase", PHASES)
def test_fault_d_a_keeper_that_is_told_to_end_says_so(phase, begin, lease_folder, tmp_path):
    starting, keeper = kill_in(phase, signal.SIGTERM, begin, lease_folder, tmp_path)
    if phase != "leasing":
        assert f"the keeper process (pid {keeper.pid}) was sent SIGTERM" in told(starting)


@pytest.mark.real_nsys
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
@pytest.mark.parametrize("phase", ["handover", "never ready", "running"])
def test_fault_d_below_nsys_too(phase, number, begin, lease_folder, tmp_path):
    starting, keeper = kill_in(phase, number, begin, lease_folder, tmp_path, real_nsys())
    assert f"the keeper process (pid {keeper.pid}) was" in told(starting)


@pytest.mark.real_nsys
def test_fault_d_inside_an_nsys_window(begin, lease_folder, tmp_path):
    starting = reach("running", begin, lease_folder, tmp_path, real_nsys())
    starting.server.nsys.start(tmp_path / "one.nsys-rep")
    starting.server.announce_window("nsys")
    began = time.monotonic()
    keeper_of(lease_folder).kill()
    all_gone(starting, lease_folder, began)
    assert "was killed by signal 9" in told(starting)


def test_fault_d_ranks_that_overwrote_their_variables_are_found(begin, lease_folder, tmp_path):
    """As setproctitle does; a rank is then known by its session, also when the server is dead."""
    starting = reach("running", begin, lease_folder, tmp_path, None)
    server = starting.server
    ranks = [psutil.Process(pid) for pid in server.scheduler_ranks()]
    assert all(os.getsid(rank.pid) == server.pid for rank in ranks)
    since = process.create_time(keeper_of(lease_folder).pid)
    by_session = process.marked("NO_SUCH_MARK", "x", leader=server.pid, since=since)
    assert {rank.pid for rank in ranks} <= {found.pid for found in by_session}


def test_fault_3_a_keeper_that_is_stopped_for_two_seconds_goes_on(begin, lease_folder, tmp_path):
    starting = reach("running", begin, lease_folder, tmp_path, None)
    keeper = keeper_of(lease_folder)
    for _ in range(3):
        keeper.suspend()
        time.sleep(2.0)
        keeper.resume()
        time.sleep(1.0)
    assert starting.server.is_alive()
    assert keeper.is_running()
    assert starting.server.stop() == ()
    assert "teardown is over" in starting.log("keeper.log")


def test_fault_3_a_frozen_keeper_is_not_waited_for(begin, lease_folder, tmp_path):
    starting = reach("running", begin, lease_folder, tmp_path, None)
    began = time.monotonic()
    keeper_of(lease_folder).suspend()
    assert starting.server.stop() == ()
    all_gone(starting, lease_folder, began)


def test_fault_d_the_server_is_ended_in_order_by_whoever_holds_it(begin, lease_folder, tmp_path):
    starting = reach("running", begin, lease_folder, tmp_path, None)
    keeper_of(lease_folder).kill()
    time.sleep(0.5)
    assert starting.server.is_alive()  # not cut off at once: its owner may end it now
    assert starting.server.stop() == ()
    assert not starting.server.is_alive()
