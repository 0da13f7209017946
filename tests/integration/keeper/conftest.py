"""A fake SGLang in this interpreter, leases of the test's own, and proof of cleanliness."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from pytest_sglprof._config.model import ServerSpec
from pytest_sglprof._server import command
from pytest_sglprof._server.launch import Server, launch

FAKE = Path(__file__).parents[2] / "support" / "fake_sglang"


@pytest.fixture(autouse=True)
def lease_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "leases"
    monkeypatch.setenv("SGLPROF_LEASE_DIR", str(folder))
    return folder


@pytest.fixture
def fake_sglang(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Makes `sglang` the fake one for every Python that is started from here."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(FAKE), *sys.path]))
    command._probe.cache_clear()
    yield
    command._probe.cache_clear()


def family(marker: Path) -> list[psutil.Process]:
    """All other processes that carry the test's lease folder in their environment."""
    found = []
    for process in psutil.process_iter():
        try:
            alive = process.status() != psutil.STATUS_ZOMBIE and process.pid != os.getpid()
            if alive and process.environ().get("SGLPROF_LEASE_DIR") == str(marker):
                found.append(process)
        except psutil.Error:
            continue
    return found


def words(process: psutil.Process) -> list[str]:
    """Its command; [] once it has ended."""
    try:
        return process.cmdline()
    except psutil.Error:
        return []


def wait_clean(marker: Path, timeout: float) -> list[psutil.Process]:
    deadline = time.monotonic() + timeout
    while (left := family(marker)) and time.monotonic() < deadline:
        time.sleep(0.1)
    return left


@pytest.fixture
def nothing_left(lease_folder: Path) -> Iterator[None]:
    """Fails the test when a process or a lease outlives it; ends what is left."""
    yield
    left = wait_clean(lease_folder, 20.0)
    names = [" ".join(words(process)) for process in left]
    for process in left:
        process.kill()
    assert names == []
    assert sorted(path.name for path in lease_folder.glob("*.lock")) == []


Launch = Callable[..., Server]


@pytest.fixture
def start(fake_sglang: None, tmp_path: Path, nothing_left: None) -> Iterator[Launch]:
    """Launches the fake server; stops it in the end."""
    servers = []

    def start(*args: str, env: dict[str, str] | None = None, **fields: object) -> Server:
        spec = ServerSpec(args=("--device", "cpu", *args), env=tuple((env or {}).items()), **fields)
        server = launch(spec, folder=tmp_path / f"server-{len(servers)}")
        servers.append(server)
        return server

    yield start
    for server in servers:
        server.stop()
