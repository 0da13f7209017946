"""Runs the load driver in a process group of its own, which never outlives this process."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pytest_sglprof._bench_serving import guard
from pytest_sglprof._server.command import EXEC_STEP, split_secret_words

_TAIL_BYTES = 4096
_POLL_S = 0.25


@contextlib.contextmanager
def _in_memory(document: Mapping[str, Any]) -> Iterator[int]:
    """Writes JSON to a file that exists only in memory; yields its descriptor."""
    handle = os.memfd_create("sglprof")
    try:
        with open(handle, "w", encoding="utf-8", closefd=False) as stream:
            json.dump(document, stream)
        yield handle
    finally:
        os.close(handle)


class DriverProcess:
    """A running load driver; its output goes to `log`.

    command: `PYTHON -m MODULE ARG …`. private: variables that only the driver's Python sees.
    Neither they nor the values of secret options appear in lists of processes, such as those
    in nsys reports. before: source that the driver's Python runs before it. on_end: called
    once, from another thread, as soon as the driver has ended. started: Unix time in s.
    """

    def __init__(
        self,
        command: Sequence[str],
        *,
        env: Mapping[str, str],
        private: Mapping[str, str] | None = None,
        before: str = "",
        log: Path,
        on_end: Callable[[], None] | None = None,
    ) -> None:
        self.log = log
        self.started = time.time()
        self._started = time.monotonic()
        python, _, module, *words = command
        shown, hidden = split_secret_words(words)
        handover = {"private": dict(private or {}), "args": hidden, "before": before}
        with log.open("wb") as output, _in_memory(handover) as secrets:
            target = ["module", module, *shown]
            step = [python, "-u", str(EXEC_STEP), f"/dev/fd/{secrets}", *target]
            self._process = subprocess.Popen(
                [sys.executable, "-I", guard.__file__, *step],
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=dict(env),
                pass_fds=[secrets],
                start_new_session=True,
            )
        self._on_end = on_end
        self._ended = threading.Event()
        self._watcher = threading.Thread(target=self._watch, name="sglprof-load", daemon=True)
        self._watcher.start()

    def _watch(self) -> None:
        end = None
        with contextlib.suppress(ChildProcessError):  # another thread has waited for it
            end = os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOWAIT)
        # If the guard or the driver was killed, the rest of the group still runs. The group's
        # number is not reused before its leader is waited for.
        if end is not None and (end.si_code != os.CLD_EXITED or end.si_status > 128):
            self._kill_group()
        self._process.wait()
        self._ended.set()
        if self._on_end:
            self._on_end()

    @property
    def pid(self) -> int:
        """Leader of the driver's process group."""
        return self._process.pid

    @property
    def status(self) -> int | None:
        """Exit status (128 + signal when it was killed), None while it runs."""
        code: int | None = self._process.returncode  # only the watcher waits and sets it
        return 128 - code if code is not None and code < 0 else code

    @property
    def elapsed(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self._started

    def wait(self, check: Callable[[], None]) -> int:
        """Waits for the end and returns the exit status.

        `check` is called four times a second. The driver is ended if it raises, and on
        KeyboardInterrupt.
        """
        try:
            while (status := self.status) is None:
                if not self._ended.wait(_POLL_S):
                    check()
            self._watcher.join()
            self._close_pipe()
            return status
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """Ends the driver and everything that it started. Idempotent."""
        self._close_pipe()
        if not self._ended.wait(guard.GRACE_S + 2):
            self._kill_group()
            self._ended.wait()
        self._watcher.join(timeout=1)

    def _kill_group(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)

    def _close_pipe(self) -> None:
        if self._process.stdin:
            with contextlib.suppress(OSError):
                self._process.stdin.close()

    def output(self) -> str:
        """Everything that the driver has written so far; "" if its folder was removed."""
        with contextlib.suppress(OSError):
            return self.log.read_text("utf-8", "replace")
        return ""

    def newest_output(self) -> str:
        """The end of its output; "" if its folder was removed."""
        with contextlib.suppress(OSError), self.log.open("rb") as stream:
            size = stream.seek(0, os.SEEK_END)
            stream.seek(max(0, size - _TAIL_BYTES))
            return stream.read().decode("utf-8", "replace")
        return ""

    def last_line(self) -> str:
        """The last line of its output; of a progress bar its newest state."""
        lines = [line for line in re.split(r"[\r\n]+", self.newest_output()) if line.strip()]
        return lines[-1].strip() if lines else ""


class Over(threading.Event):
    """An event that asks whether it is set."""

    def __init__(self, ask: Callable[[], bool]) -> None:
        super().__init__()
        self._ask = ask

    def is_set(self) -> bool:
        """Whether the answer is yes now."""
        return super().is_set() or self._ask()

    def wait(self, timeout: float | None = None) -> bool:
        """Waits for `timeout` seconds at most, unless the answer is yes before or after that."""
        return self._ask() or super().wait(timeout) or self._ask()
