"""`KeeperLink`: pytest's end of the pipe to the process that owns the server."""

from __future__ import annotations

import contextlib
import os
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Container
from pathlib import Path
from typing import Any, TypeVar

from pytest_sglprof import process
from pytest_sglprof.server.aftermath import end_orphans
from pytest_sglprof.server.command import PACKAGE_ROOT
from pytest_sglprof.server.limits import FROZEN_LIMIT, ORPHAN_GRACE
from pytest_sglprof.server.plan import (
    LIFE,
    Clocks,
    Closed,
    Event,
    Launch,
    Order,
    Plan,
    Started,
    Stop,
    Stopped,
    decode_event,
    encode,
)

LOOK_EVERY = 0.5  # s between two looks at the keeper
READ_LIMIT = 5.0  # s to read the last messages of a keeper that has ended

_Event = TypeVar("_Event")


class KeeperLink:
    """Starts a keeper, talks to it, and ends what it leaves when it is killed.

    Events are kept until somebody asks for them.
    """

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._log = plan.folder / "keeper.log"
        self._closed = threading.Event()
        self._ending = threading.Event()
        self._fault: str | None = None
        self.left: tuple[str, ...] = ()
        self._events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self._last: dict[type[Any], Any] = {}
        plan.folder.mkdir(parents=True, exist_ok=True)
        with self._log.open("ab") as errors:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "pytest_sglprof.keeper"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                env={**_environment(plan.private), LIFE: plan.life},
                start_new_session=True,
            )
        self._began = process.create_time(self.pid) or time.time()
        threading.Thread(target=self._read, name="sglprof keeper", daemon=True).start()
        self._watch = threading.Thread(
            target=self._watch_over, name="sglprof keeper watch", daemon=True
        )
        self._watch.start()
        self.send(Launch(plan))

    @property
    def pid(self) -> int:
        """The keeper's pid."""
        return self._process.pid

    def is_running(self) -> bool:
        """True while the keeper's process runs."""
        return self._process.poll() is None

    def send(self, order: Order) -> None:
        """Sends one message; silently ignored if the keeper has exited."""
        stream = self._process.stdin
        if stream is None or stream.closed:
            return
        with contextlib.suppress(OSError):
            stream.write(encode(order))
            stream.flush()

    def next_event(self, timeout: float) -> Event | None:
        """The next event that was not yet taken; None when there is none in `timeout` s."""
        try:
            return self._events.get(timeout=max(timeout, 0.0))
        except queue.Empty:
            return None

    def last_event(self, kind: type[_Event]) -> _Event | None:
        """The last event of this kind, taken or not."""
        return self._last.get(kind)

    def wait_for(self, kind: type[_Event], timeout: float) -> _Event | None:
        """The same, waited for; ends early when the keeper does."""
        deadline = time.monotonic() + timeout
        while (event := self.last_event(kind)) is None and time.monotonic() < deadline:
            if self.last_event(Closed) is not None:
                return self.last_event(kind)
            time.sleep(0.02)
        return event

    def death(self) -> str | None:
        """How the keeper ended; None while it runs, or when that was asked for."""
        status = self._process.poll()
        if status is None and self.last_event(Closed) is not None:
            with contextlib.suppress(subprocess.TimeoutExpired):  # it is about to end
                status = self._process.wait(READ_LIMIT)
        if status is None or (self._ending.is_set() and self.last_event(Stopped) is not None):
            return None
        who = f"the keeper process (pid {self.pid})"
        if self._fault:
            return f"{who} {self._fault}, so it was killed"
        if self.last_event(Stopped) is not None:
            return f"{who} was told to end by somebody else (SIGTERM)"
        how = f"was killed by signal {-status}" if status < 0 else f"ended with status {status}"
        return f"{who} {how}"

    def close(self, timeout: float) -> bool:
        """Asks for the teardown and waits for it; `left` then holds what it could not remove.

        False for a keeper that was dead, stayed stopped or took more than `timeout` s: it
        is killed, and what it leaves is ended from here.
        """
        self._ending.set()
        self.send(Stop())
        self._watch.join(timeout)
        if self._watch.is_alive() and self.is_running():
            self._kill(f"did not tear down within {timeout:.0f} s")
        self._watch.join()
        if self._process.stdin is not None:
            with contextlib.suppress(OSError):
                self._process.stdin.close()
        return self.last_event(Stopped) is not None

    def _watch_over(self) -> None:
        """Until the keeper is gone, and all that it had with it."""
        stopped = 0
        while self.is_running():
            # Looks are counted, not seconds: pytest itself may have been stopped as well.
            stopped = stopped + 1 if process.is_stopped(self.pid) else 0
            if stopped * LOOK_EVERY > FROZEN_LIMIT:
                self._kill(f"was stopped and did not go on for {FROZEN_LIMIT:g} s")
            if self._closed.wait(LOOK_EVERY):
                time.sleep(0.02)  # it is about to end
        self._closed.wait(READ_LIMIT)
        if (teardown := self.last_event(Stopped)) is not None:
            self.left = teardown.left
            return
        self._ending.wait(ORPHAN_GRACE)
        started, locked = self.last_event(Started), self.last_event(Clocks)
        self.left = end_orphans(
            self._plan,
            server=started.pid if started else 0,
            since=self._began,
            clocks=locked.clocks if locked else {},
        )

    def _kill(self, fault: str) -> None:
        self._fault = fault
        self._process.kill()
        self._process.wait()

    def _read(self) -> None:
        stream = self._process.stdout
        assert stream is not None
        with stream:
            for line in stream:
                with contextlib.suppress(ValueError):
                    self._take(decode_event(line))
        self._take(Closed())
        self._closed.set()

    def _take(self, event: Event) -> None:
        self._last[type(event)] = event
        self._events.put(event)


def _environment(private: Container[str]) -> dict[str, str]:
    """Ours without secrets, this very package's folder first, wherever that may lie.

    Nor with the name of the test that is running now: the server outlives it.
    """
    paths = [str(PACKAGE_ROOT), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    ours = {k: v for k, v in os.environ.items() if k not in private}
    ours.pop("PYTEST_CURRENT_TEST", None)
    return {**ours, "PYTHONPATH": os.pathsep.join(path for path in paths if path)}


def keeper_log_end(folder: Path, limit: int = 8) -> list[str]:
    """The last lines of a keeper's log."""
    with contextlib.suppress(OSError):
        return (folder / "keeper.log").read_text(errors="replace").splitlines()[-limit:]
    return []
