"""Runs one command and never lets it outlive the process that asked for it.

Started as a script of its own (`python -I guard.py COMMAND…`), so it imports nothing of
this package. Standard input is a pipe from the caller: when that closes, for whatever
reason (also SIGKILL of the caller), the whole process group is ended. A pipe is used
because the kernel's parent-death signal follows the *thread* that forked, and loads may
be started from short-lived threads. The command itself does get that signal, from here,
so that it does not outlive a killed guard either.
"""

from __future__ import annotations

import ctypes
import os
import select
import signal
import subprocess
import sys
import time

GRACE_S = 3.0  # the load driver has nothing to save; it only needs to close its connections
PR_SET_PDEATHSIG = 1


def main(command: list[str]) -> int:
    """Runs `command`; its exit status, or 128 + signal."""
    wake_reader, wake_writer = os.pipe()
    os.set_blocking(wake_writer, False)
    signal.set_wakeup_fd(wake_writer, warn_on_full_buffer=False)
    # Handlers, not SIG_IGN: an ignored signal would be ignored by the command as well.
    for number in (signal.SIGCHLD, signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, _only_wake)
    child = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        close_fds=False,  # one may hold what the command is to read
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
    """The wake-up pipe carries the signal's number; nothing else is to be done."""


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
