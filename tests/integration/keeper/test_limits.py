"""The time limits that pytest and the keeper share: who waits, waits as long as it may take."""

from __future__ import annotations

import ast
import os
import signal
import threading
import time
from pathlib import Path

import pytest

from pytest_sglprof import _nsys as nsys
from pytest_sglprof import _process as process
from pytest_sglprof._server import launch
from pytest_sglprof._server.keeper import exec_step, life, protocol, teardown

# Writes its report for so long after its target's end, and tells the target's status then.
REPORT_SECONDS = 16.5
SLOW_NSYS = f"""#!/bin/sh
case "$1 $2" in
    "--version "*) echo "NVIDIA Nsight Systems version 2023.4.4.1";;
    "profile --help") echo "--start-later";;
    "profile "*)
        shift
        while [ "${{1#-}}" != "$1" ]; do shift; done
        setsid "$@"
        status=$?
        sleep {REPORT_SECONDS}
        exit $status;;
esac
"""


@pytest.fixture
def below_slow_nsys(start, tmp_path, monkeypatch):
    """A server below an nsys that takes long to write its report."""
    tool = tmp_path / "nsys"
    tool.write_text(SLOW_NSYS)
    tool.chmod(0o755)
    monkeypatch.setenv("SGLPROF_NSYS", str(tool))
    server = start("--tp", "2", nsys=True, stop_timeout=5.0)
    os.kill(server.pid, signal.SIGKILL)
    while server.is_alive():
        time.sleep(0.01)
    return server


def test_fault_13_an_exit_status_that_comes_late_is_waited_for(below_slow_nsys):
    began = time.monotonic()
    reason = below_slow_nsys.exit_reason()
    assert time.monotonic() - began > 15
    assert "exit status 137" in reason.what


def test_fault_13_waiting_for_it_ends_with_the_keeper(below_slow_nsys):
    keeper = below_slow_nsys._keepers[0]
    threading.Timer(1.0, os.kill, (keeper.pid, signal.SIGKILL)).start()
    began = time.monotonic()
    reason = below_slow_nsys.exit_reason()
    assert time.monotonic() - began < 5
    assert f"the keeper process (pid {keeper.pid}) was killed by signal 9" in reason.what


def test_fault_13_pytest_waits_as_long_as_the_keeper_may_take():
    """The limits of the caller are made of those of the keeper, step by step."""
    longest_start = 2 * protocol.START_LIMIT + protocol.PORT_WAIT
    assert longest_start < protocol.SILENCE_LIMIT
    # The exec step reads no settings, and gives up when nobody hands it its secrets.
    assert exec_step.READ_LIMIT >= protocol.START_LIMIT
    told_after = protocol.RANK_GRACE + process.KILL_WAIT + protocol.STATUS_WAIT
    assert told_after < protocol.EXIT_LIMIT
    for stop_timeout in (0.0, 8.0, 60.0, 600.0):
        steps = (
            protocol.HURRIED_WAIT,
            stop_timeout,
            min(protocol.GRACE, stop_timeout),
            protocol.FINALISE,
            protocol.LAUNCHER_GRACE,
            protocol.AGENT_WAIT,
            protocol.GPU_WAIT,
            4 * process.KILL_WAIT,
        )
        plain = protocol.teardown_limit(stop_timeout, nsys=False)
        assert sum(steps) < plain
        # `nsys sessions list`, before and after each command, may take all its time.
        looks = 6 * nsys.QUICK
        longest_below_nsys = sum(steps) + looks + stop_timeout + 2 * protocol.SHUTDOWN
        assert longest_below_nsys < protocol.teardown_limit(stop_timeout, nsys=True)


def test_fault_13_limits_of_both_sides_stand_in_one_place():
    shared = {name for name, value in vars(protocol).items() if isinstance(value, float)}
    for module in (life, launch, teardown):
        code = ast.parse(Path(module.__file__).read_text())
        assigned = {
            target.id
            for node in code.body
            if isinstance(node, ast.Assign)
            for target in node.targets
            if isinstance(target, ast.Name)
        }
        assert not assigned & shared, module.__name__
