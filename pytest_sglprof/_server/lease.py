"""Exclusive leases of ports, GPUs and profile windows, across processes.

A lease is a `filelock.UnixFileLock` (an ``flock``) on a file in a folder of the user's. The
kernel frees it however its holder dies. filelock never removes its files; here a file is
removed while its lock is held, so that no two processes hold one lease and no files pile up.

The folder belongs to the user alone, and each file is checked before it is locked: no link is
followed, and only lock files that pytest-sglprof made are written to or removed.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import re
import socket
import stat
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from random import SystemRandom

from filelock import Timeout, UnixFileLock

from pytest_sglprof._errors import LeaseError
from pytest_sglprof._files import safe_name
from pytest_sglprof._server.client import server_name

ENV_DIR = "SGLPROF_LEASE_DIR"
# Not TMPDIR or XDG_RUNTIME_DIR, which differ between a shell, cron and CI of one user.
ROOT = Path("/tmp")
POLL = 0.25  # s between two tries to get a lease
FIRST_PORT = 20000
EPHEMERAL = 32768  # the kernel gives ports from here on to outgoing connections
ZMQ_DELTA = 233  # SGLang's ports for DP attention are this far from the HTTP port
ZMQ_PORTS = 9  # init port, six derived ones, and room for those of the Rust server
PORT_TRIES = 200
_LOCK_FILE = re.compile(
    r"(port-\d+|gpu-(\d+|(GPU|MIG)-.+)|test-cpu|((window|test)-.+|baselines)-[0-9a-f]{8})\.lock"
)
_SIGNATURE = re.compile(r"sglprof (\d+)\n")
_BARE_PID = re.compile(r"\d*\n?")
_TEXT_BYTES = 64


def lease_dir() -> Path:
    """The folder of the lock files: ``$SGLPROF_LEASE_DIR``, else ``/tmp/sglprof-UID``.

    Made with mode 0700. Raises `LeaseError` if it is not a folder that only this user owns and
    can write to.
    """
    chosen = os.environ.get(ENV_DIR)
    path = Path(chosen) if chosen else ROOT / f"sglprof-{os.getuid()}"
    try:
        path.mkdir(parents=True, exist_ok=True, mode=0o700)
        status = path.lstat()
    except OSError as error:
        link = path.is_symlink()
        raise _unusable(path, "it is a link" if link else error.strerror or str(error)) from error
    if not stat.S_ISDIR(status.st_mode):
        raise _unusable(path, "it is a link")
    if status.st_uid != os.getuid():
        raise _unusable(path, "it belongs to another user")
    if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        if chosen:
            raise _unusable(path, "other users may write to it", f"chmod go-w {path}, or ")
        path.chmod(0o700)
    return path


class Lease:
    """A held lease; `release` (or the end of the process) frees it."""

    def __init__(self, name: str, path: Path, lock: UnixFileLock, file: os.stat_result) -> None:
        self.name = name
        self.path = path
        self._lock = lock
        self._file = file
        self._owner = os.getpid()
        atexit.register(self._at_exit)  # a third Ctrl-C may interrupt what releases it

    def release(self) -> None:
        """Frees the lease and removes its file; idempotent."""
        if not self._lock.is_locked:
            return
        # While the lock is held, so that no other process can hold it. But if a cleaner of /tmp
        # has removed the file, another process may hold the lock of a new one.
        with contextlib.suppress(OSError):
            if os.path.samestat(self.path.lstat(), self._file):
                self.path.unlink()
        self._lock.release()
        atexit.unregister(self._at_exit)

    def _at_exit(self) -> None:
        if os.getpid() == self._owner:  # not in a process that was forked meanwhile
            self.release()


def try_acquire(name: str) -> Lease | None:
    """The lease called `name`, or None if another process holds it.

    Raises `LeaseError` if its file cannot be made, or is not a lock file of pytest-sglprof.
    """
    path = _path(name)
    files: list[os.stat_result] = []

    def sign(handle: int) -> None:
        files.append(os.fstat(handle))
        with contextlib.suppress(OSError):  # on a full disk the lock works without a pid in it
            os.ftruncate(handle, 0)
            os.pwrite(handle, f"sglprof {os.getpid()}\n".encode(), 0)

    while True:
        _read(path)
        if lock := _try_lock(path, sign):
            return Lease(name, path, lock, files[-1])
        if path.exists():
            return None  # else its holder has just removed it, so try again


def acquire(
    name: str,
    *,
    timeout: float,
    what: str = "",
    progress: Callable[[str], None] | None = None,
    cancelled: Callable[[], bool] | None = None,
) -> Lease:
    """Waits up to `timeout` s for the lease; raises a `LeaseError` that names its holder.

    what: its name in messages ("GPU 0"). cancelled: called often; True ends the wait.
    """
    deadline = time.monotonic() + timeout
    shown = 0.0
    while (lease := try_acquire(name)) is None:
        now = time.monotonic()
        held = f"{what or name} is held by {_holder_text(name)}"
        if now >= deadline or (cancelled is not None and cancelled()):
            raise LeaseError(
                held,
                expected=f"it to be free within {timeout:g} s" if timeout else "it to be free",
                hint="wait for the other run to end, or choose another one",
            )
        if progress is not None and now - shown >= 1.0:
            progress(f"waiting: {held}")
            shown = now
        time.sleep(min(POLL, max(deadline - now, 0.01)))
    return lease


def holder(name: str) -> int | None:
    """The pid that holds the lease; None if none does, or if it is not known which."""
    path = _path(name)
    text = _read(path)
    if text is None:
        return None
    if lock := _try_lock(path):
        lock.release()
        return None
    pid = _SIGNATURE.fullmatch(text)
    return int(pid[1]) if pid else None


def sweep() -> None:
    """Removes lock files whose holders were killed, and no other file."""
    folder = lease_dir()
    for path in folder.iterdir():
        if _LOCK_FILE.fullmatch(path.name):
            with contextlib.suppress(OSError, LeaseError):
                if _is_signed(path) and (lock := _try_lock(path)):
                    path.unlink(missing_ok=True)
                    lock.release()


@contextlib.contextmanager
def window_lock(url: str) -> Iterator[None]:
    """A lock to hold while a window of the server at `url` is open; `LeaseError` if one is."""
    lease = acquire(window_name(url), timeout=0, what=f"the profile window of {url}")
    try:
        yield
    finally:
        lease.release()


def window_name(url: str) -> str:
    """Name of the lease of a server's window."""
    return f"window-{server_name(url)}"


def held() -> list[tuple[str, int]]:
    """The leases that processes of this user hold, and their pids. Touches no file."""
    folder = Path(os.environ.get(ENV_DIR) or ROOT / f"sglprof-{os.getuid()}")
    leases = []
    with contextlib.suppress(OSError):
        # A line: `1: FLOCK  ADVISORY  WRITE 4711 fe:01:131090 0 EOF`.
        locks = Path("/proc/locks").read_text().splitlines()
        locked = {line.split()[5].rpartition(":")[2] for line in locks if " FLOCK " in line}
        for path in sorted(folder.iterdir()):
            with contextlib.suppress(OSError, LeaseError):
                signed = _SIGNATURE.fullmatch(_read(path) or "")
                if signed and str(path.lstat().st_ino) in locked:
                    leases.append((path.stem, int(signed[1])))
    return leases


def lease_server_ports(port: int) -> list[Lease] | None:
    """Leases an HTTP port and those that SGLang derives from it; None if one of them is taken."""
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
    """The ports that DP attention uses in addition to the HTTP port."""
    first = port + ZMQ_DELTA
    if first + ZMQ_PORTS > 65535:
        first = port - ZMQ_DELTA - ZMQ_PORTS
    return range(first, first + ZMQ_PORTS)


def free_server_ports() -> tuple[int, list[Lease]]:
    """A free HTTP port below the ephemeral range, and the leases of it and its derived ports."""
    for _ in range(PORT_TRIES):
        port = SystemRandom().randrange(FIRST_PORT, EPHEMERAL - ZMQ_DELTA - ZMQ_PORTS)
        leases = lease_server_ports(port)
        if leases is not None:
            return port, leases
    raise _no_port()


def free_port() -> tuple[int, Lease]:
    """A free port (for the ranks' rendezvous) and its lease."""
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
    """True if a server could listen on the port now, at `host` and at all addresses."""
    for address in {host, ""}:
        with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((address, port))
            except OSError:
                return False
    return True


def listener_of(port: int) -> int | None:
    """The pid that listens on a TCP port; None if unknown."""
    import psutil

    try:
        connections = psutil.net_connections("tcp")
    except psutil.Error:
        return None
    for connection in connections:
        if connection.status == psutil.CONN_LISTEN and tuple(connection.laddr)[1:2] == (port,):
            return int(connection.pid) if connection.pid else None
    return None


def _path(name: str) -> Path:
    return lease_dir() / f"{safe_name(name)}.lock"


def _try_lock(path: Path, sign: Callable[[int], None] | None = None) -> UnixFileLock | None:
    lock = UnixFileLock(
        path, mode=0o600, thread_local=False, fallback_to_soft=False, on_acquired=sign
    )
    try:
        lock.acquire(blocking=False)
    except Timeout:
        return None
    except OSError as error:
        raise _bad_lock_file(path, error.strerror or str(error)) from error
    return lock


def _unusable(path: Path, why: str, remedy: str = "") -> LeaseError:
    return LeaseError(
        f"the lease folder {path} cannot be used: {why}",
        expected="a folder (not a link) of your own, to which no other user can write",
        hint=f"{remedy}set ${ENV_DIR} to another folder",
    )


def _read(path: Path) -> str | None:
    """The text of a lock file, None without one; `LeaseError` if another program made it."""
    try:
        status = path.lstat()
        if stat.S_ISLNK(status.st_mode):
            why = "it is a link"
        elif not stat.S_ISREG(status.st_mode):
            why = "it is not a regular file"
        elif status.st_uid != os.getuid():
            why = "it belongs to another user"
        elif status.st_nlink > 1:
            why = "it has a second hard link"
        else:
            with path.open("rb") as stream:
                text = stream.read(_TEXT_BYTES).decode("latin-1")
            if _SIGNATURE.fullmatch(text) or _BARE_PID.fullmatch(text):
                return text
            why = "it does not hold a process id"
    except FileNotFoundError:
        return None
    except OSError as error:
        why = error.strerror or str(error)
    raise _bad_lock_file(path, why)


def _bad_lock_file(path: Path, why: str) -> LeaseError:
    return LeaseError(
        f"the lock file {path} cannot be used: {why}",
        expected="a file that only pytest-sglprof writes and removes",
        hint=f"check what it is and move it away, or set ${ENV_DIR} to another folder",
    )


def _is_signed(path: Path) -> bool:
    """True for a file with a signature, or whose maker was killed before it could sign."""
    text = _read(path)
    made_now = text == "" and stat.S_IMODE(path.lstat().st_mode) == 0o600
    return made_now or _SIGNATURE.fullmatch(text or "") is not None


def _holder_text(name: str) -> str:
    pid = holder(name)
    return f"process {pid}" if pid else "another process"


def _no_port() -> LeaseError:
    return LeaseError(
        f"no free port between {FIRST_PORT} and {EPHEMERAL} after {PORT_TRIES} tries",
        hint="end servers that are no longer needed",
    )
