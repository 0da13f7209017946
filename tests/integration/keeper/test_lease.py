"""Leases: exclusive across processes, freed by death, and no files that pile up."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from pytest_sglprof._errors import LeaseError
from pytest_sglprof._server import lease

HOLD = "import sys,time; from pytest_sglprof._server.lease import *; \
a = acquire(sys.argv[1], timeout=5); print('held', flush=True); time.sleep(600)"


@pytest.fixture
def holder_process():
    """Another process that holds the lease `gpu-0`."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, "gpu-0"],
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert process.stdout.readline() == b"held\n"
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


def kill_holder_of(name: str) -> None:
    """Leaves the lock file of a process that was killed while it held `name`."""
    command = [sys.executable, "-c", HOLD, name]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment) as process:
        assert process.stdout.readline() == b"held\n"
        process.kill()


def test_another_process_is_kept_out_and_named(holder_process):
    assert lease.try_acquire("gpu-0") is None
    assert lease.holder("gpu-0") == holder_process.pid
    told: list[str] = []
    with pytest.raises(
        LeaseError, match=f"GPU 0 is held by process {holder_process.pid}"
    ) as caught:
        lease.acquire("gpu-0", timeout=0.3, what="GPU 0", progress=told.append)
    assert "free within 0.3 s" in caught.value.expected
    assert told == [f"waiting: GPU 0 is held by process {holder_process.pid}"]


def test_the_kernel_frees_the_lease_of_the_killed(holder_process, lease_folder):
    os.kill(holder_process.pid, signal.SIGKILL)
    holder_process.wait()
    assert lease.holder("gpu-0") is None
    assert (lease_folder / "gpu-0.lock").exists()
    held = lease.acquire("gpu-0", timeout=0)
    held.release()
    held.release()
    assert not (lease_folder / "gpu-0.lock").exists()


def test_sweep_removes_only_what_nobody_holds(holder_process, lease_folder):
    kill_holder_of("port-1")
    assert (lease_folder / "port-1.lock").exists()
    lease.sweep()
    assert [path.name for path in lease_folder.iterdir()] == ["gpu-0.lock"]


def test_waiting_ends_when_the_lease_is_freed_or_nobody_wants_it_any_more():
    held = lease.acquire("gpu-0", timeout=0)
    threading.Timer(0.2, held.release).start()
    lease.acquire("gpu-0", timeout=5).release()
    held = lease.acquire("gpu-0", timeout=0)
    with pytest.raises(LeaseError):
        lease.acquire("gpu-0", timeout=60, cancelled=lambda: True)
    held.release()
    assert lease.holder("never-held") is None


def test_two_never_hold_one_lease_though_files_come_and_go():
    """Release removes the file while others wait on it: the lock must be that of the name."""
    inside, clashes = [], []

    def work() -> None:
        for _ in range(60):
            held = lease.acquire("contested", timeout=20)
            inside.append(1)
            if len(inside) > 1:
                clashes.append(1)
            inside.pop()
            held.release()

    threads = [threading.Thread(target=work) for _ in range(4)]
    lease_poll, lease.POLL = lease.POLL, 0.0005
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        lease.POLL = lease_poll
    assert clashes == []


def test_a_window_is_locked_by_its_servers_address(lease_folder):
    url = "http://127.0.0.1:30000"
    with lease.window_lock(url):
        with pytest.raises(LeaseError, match=f"profile window of {url} is held"):
            lease.window_lock(url).__enter__()
        with lease.window_lock("http://127.0.0.1:30001"):
            pass
    with lease.window_lock(url):
        pass
    assert list(lease_folder.iterdir()) == []


def test_a_server_gets_its_neighbours_as_well():
    port, leases = lease.free_server_ports()
    names = {held.name for held in leases}
    assert {f"port-{port}", f"port-{port + 233}", f"port-{port + 241}"} <= names
    assert lease.lease_server_ports(port) is None
    for held in leases:
        held.release()
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", port + 234))
        assert lease.lease_server_ports(port) is None
    assert port < 32768
    assert min(lease.derived_ports(65500)) < 65500


def test_a_free_port_is_free_and_a_listeners_pid_is_found():
    port, held = lease.free_port()
    assert lease.port_is_free(port)
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", port))
        listener.listen()
        assert not lease.port_is_free(port)
        assert lease.listener_of(port) == os.getpid()
    assert lease.listener_of(port) is None
    held.release()


def test_no_free_port_is_an_error_of_its_own(monkeypatch):
    monkeypatch.setattr(lease, "port_is_free", lambda *_: False)
    with pytest.raises(LeaseError, match="no free port between"):
        lease.free_port()
    with pytest.raises(LeaseError, match="no free port between"):
        lease.free_server_ports()


def test_a_holder_that_is_slow_to_write_its_pid_is_called_another_process(lease_folder):
    held = lease.acquire("x", timeout=0)
    Path(held.path).write_text("")
    began = time.monotonic()
    with pytest.raises(LeaseError, match="held by another process"):
        lease.acquire("x", timeout=0)
    assert time.monotonic() - began < 1
    held.release()
