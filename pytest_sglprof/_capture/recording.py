"""What a recording is, what a closed window left, and whether the server lives meanwhile."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol, TypeVar

from pytest_sglprof._config.model import WindowSpec
from pytest_sglprof._errors import ServerDied, ServerSilent
from pytest_sglprof._server.log_lines import ServerFacts
from pytest_sglprof._server.nvml import GpuClocks

if TYPE_CHECKING:
    from pytest_sglprof._server.launch import Server


Progress = Callable[[str], None]


class Recording(Protocol):
    """One recording of one window. Every `deadline` is a time of `time.monotonic`."""

    def refuse(self) -> None:
        """Raises `WindowRefused` for what would break the server or the data."""

    def start(self, deadline: float) -> None:
        """Starts to record, or raises."""

    def is_done(self) -> bool:
        """True when the asked-for steps have ended by themselves."""

    def stop(
        self, capture: WindowCapture, deadline: float, *, unfinished: str | None
    ) -> WindowCapture:
        """Ends the recording; `capture` with what it left, never an error for what is missing.

        unfinished: why the window closes before its steps are over (None when it does not).
        """

    def abort(self) -> None:
        """Ends a recording whose data nobody wants, quickly and without raising."""


class RecordingType(Protocol):
    """How a recording is made; nothing is asked of the server yet."""

    def __call__(
        self,
        server: Server,
        spec: WindowSpec,
        *,
        window_id: str,
        folder: Path,
        life: LifeWatch,
        progress: Progress | None = None,
    ) -> Recording: ...


@dataclass(frozen=True)
class Artifact:
    """One file that a window left. kind: "torch", "nsys-rep", "sqlite", "parquet"."""

    path: Path
    kind: str
    rank: str = ""


@dataclass(frozen=True)
class WindowCapture:
    """A window after it was closed: what is there, and what is not.

    state: "complete", or "incomplete" (closed, but something is missing), or "failed"
    (nothing to read). reason: why it is not complete. opened, closed: Unix time, s.
    expected_ranks / missing_ranks: labels. pid_ranks: pid of each scheduler at window
    time -> rank label, which is the only trace of the rank in an nsys report.
    is_still_open: the profiler could not be stopped, so a teardown has to try again.
    """

    window_id: str
    spec: WindowSpec
    state: Literal["complete", "incomplete", "failed"]
    opened: float
    closed: float
    artifacts: tuple[Artifact, ...] = ()
    expected_ranks: tuple[str, ...] = ()
    missing_ranks: tuple[str, ...] = ()
    pid_ranks: Mapping[int, str] = field(default_factory=dict)
    gpu_ranks: Mapping[int, str] = field(default_factory=dict)
    reason: str = ""
    log: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    facts: ServerFacts = field(default_factory=ServerFacts)
    gpus: tuple[GpuClocks, ...] = ()
    is_still_open: bool = False


POLL = 0.1  # s between two looks at a server; it costs a stat and a short read
CRASH_LINE = "Scheduler hit an exception"

Answer = TypeVar("Answer")


class LifeWatch:
    """Notices the death of `server` since this object was made.

    A server whose scheduler crashed can keep its main process, and its open requests,
    for a minute; the line in its log comes at once. began: Unix time, s. log_start: where
    the log ended then.
    """

    def __init__(self, server: Server) -> None:
        self._server = server
        self.began = time.time()
        self.log_start = server.log.position() if server.log else 0
        self._read_to = self.log_start
        self._death: ServerDied | None = None

    def death(self) -> ServerDied | None:
        """What it died of; None while it lives."""
        if self._death is None:
            self._death = self._look()
        return self._death

    def _look(self) -> ServerDied | None:
        log = self._server.log
        if not self._server.is_alive():
            found = self._server.exit_reason()
            if found is None:
                found = ServerDied(f"the server at {self._server.url} is gone")
            if found.log or log is None:
                return found
            return ServerDied(
                found.what,
                expected=found.expected,
                hint=found.hint,
                log=log.reason(self.log_start),
            )
        if log is None:
            return None
        lines, self._read_to = log.read(self._read_to)
        if not any(CRASH_LINE in line for line in lines):
            return None
        return ServerDied(
            "a scheduler of the server crashed during the profile window",
            expected="a server that survives its window",
            hint="the server has to be started anew; its log says why it crashed",
            log=log.reason(self.log_start),
        )

    def call(self, function: Callable[[float], Answer], deadline: float, what: str) -> Answer:
        """`function(seconds left)`, given up when the server dies or time is over.

        It runs in a thread of its own, since a request to a dying server can hang as
        long as the server's remains do. Raises what the function raises, `ServerDied`,
        or `ServerSilent`.
        """
        left = max(deadline - time.monotonic(), 1.0)
        answer = in_thread(f"sglprof {what}", lambda: function(left))
        over = time.monotonic() + left + 1.0
        while not answer.done() and time.monotonic() < over:
            wait([answer], POLL)
            if not answer.done() and (death := self.death()):
                raise death
        if not answer.done():
            raise ServerSilent(f"{what} did not answer within {left:.0f} s")
        error = answer.exception()
        if error is not None and (death := self.death()):
            raise death from error
        return answer.result()


def in_thread(name: str, function: Callable[[], Answer]) -> Future[Answer]:
    """What `function` will return or raise; its thread keeps no process alive."""
    future: Future[Answer] = Future()

    def run() -> None:
        try:
            future.set_result(function())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, name=name, daemon=True).start()
    return future
