"""Exclusive leases of ports, GPUs and profile windows, across processes.

A lease is an ``flock`` on a file of a per-user folder: the kernel frees it when its
holder dies, however it dies. A file is removed only while its lock is held, and a lock
counts only on the file that still bears the name, so no two holders ever meet and no
files pile up. The folder is opened once and every file is reached through it: no link is
followed, and nothing that is not a lock file of ours is written to or removed.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import socket
import stat
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from random import SystemRandom

from pytest_sglprof.errors import LeaseError
from pytest_sglprof.files import safe_name
from pytest_sglprof.server.address import server_name

ENV_DIR = "SGLPROF_LEASE_DIR"
# Not from TMPDIR or XDG_RUNTIME_DIR: a shell, cron and CI of one user have different ones.
ROOT = Path("/tmp")
POLL = 0.25  # s between two tries to get a lease
FIRST_PORT = 20000
EPHEMERAL = 32768  # ports from here on are handed out by the kernel to outgoing connections
ZMQ_DELTA = 233  # SGLang's distance from the HTTP port to those of DP attention
ZMQ_PORTS = 9  # init port, six derived ones, and room for the Rust server's
PORT_TRIES = 200
_OURS = re.compile(r"(port-\d+|gpu-(\d+|(GPU|MIG)-.+)|test-cpu|(window|test)-.+-[0-9a-f]{8})\.lock")
_SIGNATURE = re.compile(r"sglprof (\d+)\n")
_BARE_PID = re.compile(r"\d*\n?")
_TEXT_BYTES = 64


def lease_dir() -> Path:
    """The folder of the lock files: ``$SGLPROF_LEASE_DIR``, else ``/tmp/sglprof-UID``.

    Made with mode 0700; raises `LeaseError` when it is not a folder of ours alone.
    """
    with _folder() as (path, _):
        return path


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
            folder = os.open(self.path.parent, _FOLDER_FLAGS)
            try:  # while the lock is held: nobody else can hold it now
                if _bears_name(self._handle, self.path.name, folder):
                    os.unlink(self.path.name, dir_fd=folder)
            finally:
                os.close(folder)
        os.close(self._handle)
        self._handle = None


def try_acquire(name: str) -> Lease | None:
    """The lease called `name`, or None when somebody holds it.

    Raises `LeaseError` where its file cannot be made, or is not one of ours.
    """
    with _folder() as (folder, folder_fd):
        path = folder / f"{safe_name(name)}.lock"
        while True:
            handle = _open(path, folder_fd, os.O_RDWR | os.O_CREAT)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(handle)
                return None
            if _bears_name(handle, path.name, folder_fd):
                _sign(handle)
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
    with _folder() as (folder, folder_fd):
        path = folder / f"{safe_name(name)}.lock"
        try:
            handle = _open(path, folder_fd, os.O_RDONLY)
        except FileNotFoundError:
            return None
    try:
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        pid = _SIGNATURE.fullmatch(_text(handle))
        return int(pid[1]) if pid else None
    finally:
        os.close(handle)
    return None


def sweep() -> None:
    """Removes lock files of ours whose holders were killed, and no other file."""
    with _folder() as (folder, folder_fd):
        names = os.listdir(folder_fd)  # noqa: PTH208 - pathlib would go by the path once more
        for name in filter(_OURS.fullmatch, names):
            with contextlib.suppress(OSError, LeaseError):
                handle = _open(folder / name, folder_fd, os.O_RDWR)
                try:
                    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    if _is_signed(handle) and _bears_name(handle, name, folder_fd):
                        os.unlink(name, dir_fd=folder_fd)
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


_FOLDER_FLAGS = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


@contextlib.contextmanager
def _folder() -> Iterator[tuple[Path, int]]:
    """The folder of the lock files and an open handle on it."""
    chosen = os.environ.get(ENV_DIR)
    path = Path(chosen) if chosen else ROOT / f"sglprof-{os.getuid()}"
    try:
        path.mkdir(parents=True, exist_ok=True, mode=0o700)
        handle = os.open(path, _FOLDER_FLAGS)
    except OSError as error:
        link = path.is_symlink()
        raise _unusable(path, "it is a link" if link else error.strerror or str(error)) from error
    try:
        _check_folder(path, handle, chosen=bool(chosen))
        yield path, handle
    finally:
        os.close(handle)


def _check_folder(path: Path, handle: int, *, chosen: bool) -> None:
    status = os.fstat(handle)
    if status.st_uid != os.getuid():
        raise _unusable(path, "it belongs to somebody else")
    if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        if chosen:
            raise _unusable(path, "others may write to it", f"chmod go-w {path}, or ")
        os.fchmod(handle, 0o700)


def _unusable(path: Path, why: str, remedy: str = "") -> LeaseError:
    return LeaseError(
        f"the lease folder {path} cannot be used: {why}",
        expected="a folder (not a link) of your own, to which nobody else can write",
        hint=f"{remedy}name another one in ${ENV_DIR}",
    )


def _open(path: Path, folder: int, flags: int) -> int:
    """The lock file, never through a link; raises `LeaseError` when it is not one of ours."""
    try:
        # O_NONBLOCK: a fifo of that name must not be waited for.
        flags |= os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        handle = os.open(path.name, flags, 0o600, dir_fd=folder)
    except OSError as error:
        if error.errno == errno.ENOENT and not flags & os.O_CREAT:
            raise
        why = "it is a link" if error.errno == errno.ELOOP else error.strerror or str(error)
        raise _no_lock_file(path, why) from error
    status = os.fstat(handle)
    why = ""
    if not stat.S_ISREG(status.st_mode):
        why = "it is not a regular file"
    elif status.st_uid != os.getuid():
        why = "it belongs to somebody else"
    elif status.st_nlink > 1:
        why = "it has a second name"
    elif not (_is_signed(handle) or _BARE_PID.fullmatch(_text(handle))):
        why = "it holds something else than a process id"
    if why:
        os.close(handle)
        raise _no_lock_file(path, why)
    return handle


def _no_lock_file(path: Path, why: str) -> LeaseError:
    return LeaseError(
        f"the lock file {path} cannot be used: {why}",
        expected="a file that only pytest-sglprof makes and removes",
        hint=f"look what it is and move it away, or name another folder in ${ENV_DIR}",
    )


def _sign(handle: int) -> None:
    with contextlib.suppress(OSError):  # on a full disk a lock holds without its holder's name
        os.ftruncate(handle, 0)
        os.pwrite(handle, f"sglprof {os.getpid()}\n".encode(), 0)


def _is_signed(handle: int) -> bool:
    """Also true for a file whose maker was killed before it could sign."""
    text = _text(handle)
    made_now = not text and stat.S_IMODE(os.fstat(handle).st_mode) == 0o600
    return made_now or _SIGNATURE.fullmatch(text) is not None


def _text(handle: int) -> str:
    return os.pread(handle, _TEXT_BYTES, 0).decode("latin-1")


def _holder_text(name: str) -> str:
    pid = holder(name)
    return f"process {pid}" if pid else "another process"


def _bears_name(handle: int, name: str, folder: int) -> bool:
    try:
        there = os.stat(name, dir_fd=folder, follow_symlinks=False)
    except FileNotFoundError:
        return False
    here = os.fstat(handle)
    return (here.st_dev, here.st_ino) == (there.st_dev, there.st_ino)


def _no_port() -> LeaseError:
    return LeaseError(
        f"no free port between {FIRST_PORT} and {EPHEMERAL} after {PORT_TRIES} tries",
        hint="end servers that are left over",
    )
