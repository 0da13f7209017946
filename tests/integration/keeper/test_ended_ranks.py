"""Shared memory of ranks that ended before anybody tore the server down."""

from __future__ import annotations

import os
import secrets
import signal
import time
from collections.abc import Callable
from pathlib import Path

import psutil

from pytest_sglprof._server.launch import Server

PATIENCE = 60.0


def test_segments_of_killed_ranks_are_removed(start: Callable[..., Server]) -> None:
    mark = secrets.token_hex(4)
    server = start("--tp", "2", env={"FAKE_SHARED": mark})
    deadline = time.monotonic() + PATIENCE
    log = server.folder / "keeper.log"
    while log.read_text().count(mark) < 2:
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.05)
    assert len(list(Path("/dev/shm").glob(f"*{mark}"))) == 2
    members = [server.pid, *(p.pid for p in psutil.Process(server.pid).children(recursive=True))]
    for pid in reversed(members):  # nobody is left whose maps could be read
        os.kill(pid, signal.SIGKILL)
    assert server.stop() == ()
    assert list(Path("/dev/shm").glob(f"*{mark}")) == []
