"""Exclusive leases of ports, GPUs and profile windows, across processes.

A lease is an ``flock`` on a file of a per-user folder: the kernel frees it when its
holder dies, however it dies. A file is removed only while its lock is held, and a lock
counts only on the file that still bears the name, so no two holders ever meet and no
files pile up.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from random import SystemRandom

from pytest_sglprof.errors import LeaseError
from pytest_sglprof.files import safe_name
from pytest_sglprof.server.address import server_name

ENV_DIR = "SGLPROF_LEASE_DIR"
POLL = 0.25  # s between two tries to get a lease
FIRST_PORT = 20000
EPHEMERAL = 32768  # ports from here on are handed out by the kernel to outgoing connections
ZMQ_DELTA = 233  # SGLang's distance from the HTTP port to those of DP attention
ZMQ_PORTS = 9  # init port, six derived ones, and room for the Rust server's
PORT_TRIES = 200


def lease_dir() -> Path:
    """The folder of the lock files, made with mode 0700.

    ``$SGLPROF_LEASE_DIR``, else below ``$XDG_RUNTIME_DIR``, else below the temporary folder.
    """
    chosen = os.environ.get(ENV_DIR)
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    if chosen:
        folder = Path(chosen)
    elif runtime and Path(runtime).is_dir() and os.access(runtime, os.W_OK):
        folder = Path(runtime) / "sglprof"
    else:
        # The temporary folder of the system, not TMPDIR: all processes must agree on it.
        folder = Path(tempfile.gettempdir()) / f"sglprof-{os.getuid()}"
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    if folder.stat().st_uid != os.getuid():
        raise LeaseError(
            f"the lease folder {folder} belongs to somebody else",
            hint=f"name another one in ${ENV_DIR}",
        )
    return folder


class Lease:
    """A held lease; `release` (or the end of the process) frees it."""

    def __init__(self, name: str, path: Path, handle: int) -> None:
        self.name = name
        self.path = path
        self._handle: int | None = handle

    def release(self) -> None:
        """Frees the lease and removes its file; idempotent."""
        if self._handle is None:
            return
        with contextlib.suppress(OSError):
            self.path.unlink()  # while the lock is held: nobody else can hold it now
        os.close(self._handle)
        self._handle = None


def try_acquire(name: str) -> Lease | None:
    """The lease called `name`, or None when somebody holds it."""
    path = lease_dir() / f"{safe_name(name)}.lock"
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(handle)
            return None
        if _bears_name(handle, path):
            os.ftruncate(handle, 0)
            os.pwrite(handle, f"{os.getpid()}\n".encode(), 0)
            return Lease(name, path, handle)
        os.close(handle)  # its holder removed it meanwhile: try the new file


def acquire(
    name: str,
    *,
    timeout: float,
    what: str = "",
    progress: Callable[[str], None] | None = None,
    cancelled: Callable[[], bool] | None = None,
) -> Lease:
    """Waits up to `timeout` s for the lease; raises `LeaseError` that names its holder.

    what: how messages call it ("GPU 0"). cancelled: asked often; True gives up.
    """
    deadline = time.monotonic() + timeout
    told = 0.0
    while (lease := try_acquire(name)) is None:
        now = time.monotonic()
        held = f"{what or name} is held by {_holder_text(name)}"
        if now >= deadline or (cancelled is not None and cancelled()):
            raise LeaseError(
                held,
                expected=f"it to be free within {timeout:g} s" if timeout else "it to be free",
                hint="wait for the other run to end, or choose another one",
            )
        if progress is not None and now - told >= 1.0:
            progress(f"waiting: {held}")
            told = now
        time.sleep(min(POLL, max(deadline - now, 0.01)))
    return lease


def holder(name: str) -> int | None:
    """The pid that holds the lease, None when nobody does (or nobody says)."""
    path = lease_dir() / f"{safe_name(name)}.lock"
    try:
        with path.open() as stream:
            try:
                fcntl.flock(stream.fileno(), fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                text = stream.read().strip()
                return int(text) if text.isdigit() else None
    except FileNotFoundError:
        pass
    return None


def sweep() -> None:
    """Removes lock files whose holders were killed."""
    for path in lease_dir().glob("*.lock"):
        with contextlib.suppress(OSError):
            handle = os.open(path, os.O_RDWR | os.O_CLOEXEC)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if _bears_name(handle, path):
                    path.unlink()
            finally:
                os.close(handle)


@contextlib.contextmanager
def window_lock(url: str) -> Iterator[None]:
    """Held while a window of the server at `url` is open; `LeaseError` when one is."""
    lease = acquire(f"window-{server_name(url)}", timeout=0, what=f"the profile window of {url}")
    try:
        yield
    finally:
        lease.release()


def lease_server_ports(port: int) -> list[Lease] | None:
    """Leases an HTTP port and those that SGLang derives from it; None when one is taken."""
    leases: list[Lease] = []
    for number in (port, *derived_ports(port)):
        lease = try_acquire(port_name(number)) if port_is_free(number) else None
        if lease is None:
            for held in leases:
                held.release()
            return None
        leases.append(lease)
    return leases


def derived_ports(port: int) -> range:
    """The ports that DP attention takes beside the HTTP port."""
    first = port + ZMQ_DELTA
    if first + ZMQ_PORTS > 65535:
        first = port - ZMQ_DELTA - ZMQ_PORTS
    return range(first, first + ZMQ_PORTS)


def free_server_ports() -> tuple[int, list[Lease]]:
    """A free HTTP port below the ephemeral range, with all that belongs to it leased."""
    for _ in range(PORT_TRIES):
        port = SystemRandom().randrange(FIRST_PORT, EPHEMERAL - ZMQ_DELTA - ZMQ_PORTS)
        leases = lease_server_ports(port)
        if leases is not None:
            return port, leases
    raise _no_port()


def free_port() -> tuple[int, Lease]:
    """One free, leased port (for the ranks' rendezvous)."""
    for _ in range(PORT_TRIES):
        port = SystemRandom().randrange(FIRST_PORT, EPHEMERAL)
        lease = try_acquire(port_name(port)) if port_is_free(port) else None
        if lease is not None:
            return port, lease
    raise _no_port()


def port_name(port: int) -> str:
    """Name of a port's lease."""
    return f"port-{port}"


def port_is_free(port: int, host: str = "127.0.0.1") -> bool:
    """True when a server could listen there now, on this address and on all of them."""
    for address in {host, ""}:
        with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((address, port))
            except OSError:
                return False
    return True


def listener_of(port: int) -> int | None:
    """The pid that listens on a TCP port; None when it cannot be told."""
    import psutil

    try:
        connections = psutil.net_connections("tcp")
    except psutil.Error:
        return None
    for connection in connections:
        if connection.status == psutil.CONN_LISTEN and tuple(connection.laddr)[1:2] == (port,):
            return int(connection.pid) if connection.pid else None
    return None


def _holder_text(name: str) -> str:
    pid = holder(name)
    return f"process {pid}" if pid else "another process"


def _bears_name(handle: int, path: Path) -> bool:
    try:
        there = path.stat()
    except FileNotFoundError:
        return False
    here = os.fstat(handle)
    return (here.st_dev, here.st_ino) == (there.st_dev, there.st_ino)


def _no_port() -> LeaseError:
    return LeaseError(
        f"no free port between {FIRST_PORT} and {EPHEMERAL} after {PORT_TRIES} tries",
        hint="end servers that are left over",
    )
