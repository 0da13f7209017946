"""Runs one command and ends it when the process that asked for it ends.

It runs as a script (`python -I guard.py COMMAND…`), so it imports nothing of this package.
Its standard input is a pipe from the caller. When that closes, even by SIGKILL of the caller,
the whole process group is ended. The kernel's parent-death signal would not do, since it
follows the *thread* that forked, and loads may be started from short-lived threads. The
command gets that signal from the guard, so that it does not outlive a killed guard either.
"""

from __future__ import annotations

import ctypes
import os
import select
import signal
import subprocess
import sys
import time

GRACE_S = 3.0  # enough to close connections; a load driver has nothing to save
PR_SET_PDEATHSIG = 1


def main(command: list[str]) -> int:
    """Runs `command` and returns its exit status, or 128 + the signal that ended it."""
    wake_reader, wake_writer = os.pipe()
    os.set_blocking(wake_writer, False)
    signal.set_wakeup_fd(wake_writer, warn_on_full_buffer=False)
    # Handlers, not SIG_IGN: an ignored signal would be ignored by the command as well.
    for number in (signal.SIGCHLD, signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, _only_wake)
    child = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        close_fds=False,  # the command may read its secrets from one
        preexec_fn=_die_with_parent,
    )
    while child.poll() is None:
        readable, _, _ = select.select([0, wake_reader], [], [])
        received = os.read(wake_reader, 64) if wake_reader in readable else b""
        closed = 0 in readable and not os.read(0, 64)
        if closed or any(number != signal.SIGCHLD for number in received):
            _end_group(child)
    return child.returncode if child.returncode >= 0 else 128 - child.returncode


def _only_wake(_number: int, _frame: object) -> None:
    """Does nothing: Python has written the signal's number to the wake-up pipe."""


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def _end_group(child: subprocess.Popen[bytes]) -> None:
    signal.signal(signal.SIGTERM, _only_wake)
    os.killpg(0, signal.SIGTERM)
    deadline = time.monotonic() + GRACE_S
    while child.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    os.killpg(0, signal.SIGKILL)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
