"""The interface of a recording, the result of a closed window, and the watch for its death."""

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
    """One recording of one window. `deadline` is always a value of `time.monotonic`."""

    def refuse(self) -> None:
        """Raises `WindowRefused` for what would break the server or the data."""

    def start(self, deadline: float) -> None:
        """Starts to record, or raises."""

    def is_done(self) -> bool:
        """True once the requested steps have ended by themselves."""

    def stop(
        self, capture: WindowCapture, deadline: float, *, unfinished: str | None
    ) -> WindowCapture:
        """Ends the recording and returns `capture` with its results; missing ones do not raise.

        unfinished: why the window closes before its steps are over; None if they are.
        """

    def abort(self) -> None:
        """Ends the recording and discards its data, quickly and without raising."""


class RecordingType(Protocol):
    """The constructor of a recording, which sends nothing to the server yet."""

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
    """One file of a window. kind: "torch", "nsys-rep", "sqlite" or "parquet"; rank: its label."""

    path: Path
    kind: str
    rank: str = ""


@dataclass(frozen=True)
class WindowCapture:
    """The result of a closed window: what was recorded, and what is missing.

    state: "complete", "incomplete" (closed, but something is missing) or "failed" (nothing to
    read). reason: why it is not complete, "" if it is. opened, closed: Unix time, s.
    expected_ranks, missing_ranks: labels. pid_ranks: pid of each scheduler while the window
    was open -> rank label; an nsys report knows ranks only by their pid. gpu_ranks: device
    number -> rank label. nodes: rank label -> the node it runs on.
    log: lines of the server's log that explain `reason`.
    is_still_open: True if the profiler could not be stopped, so a teardown has to try again.
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
    nodes: Mapping[str, str] = field(default_factory=dict)
    reason: str = ""
    log: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    facts: ServerFacts = field(default_factory=ServerFacts)
    gpus: tuple[GpuClocks, ...] = ()
    is_still_open: bool = False


@dataclass(frozen=True)
class WindowCost:
    """What a window cost.

    stall_s: for how long serving stood still for it, s: the longest gap between two batch lines of
    a rank in the server's log, less what as many forward passes took before. None where the log
    does not tell: there is none, or the load was over. written_bytes, kept_bytes: of its files,
    when it was read and after the test. analysis_s: how long reading, measuring and judging took,
    s.
    """

    stall_s: float | None
    written_bytes: int
    kept_bytes: int
    analysis_s: float


POLL = 0.1  # s between two looks at a server; it costs a stat and a short read
CRASH_LINE = "Scheduler hit an exception"

Answer = TypeVar("Answer")


class LifeWatch:
    """Notices the death of `server` since this object was made.

    After a scheduler has crashed, the server's main process and open requests can survive for
    a minute, but the log says so at once. began: when this object was made, Unix s. log_start:
    size of the log at that time, bytes.
    """

    def __init__(self, server: Server) -> None:
        self._server = server
        self.began = time.time()
        self.log_start = server.log.position() if server.log else 0
        self._read_to = self.log_start
        self._death: ServerDied | None = None

    def death(self) -> ServerDied | None:
        """Why the server died; None while it lives."""
        if self._death is None:
            self._death = self._look()
        return self._death

    def _look(self) -> ServerDied | None:
        log = self._server.log
        if not self._server.is_alive():
            death = self._server.exit_reason()
            if death is None:
                death = ServerDied(f"the server at {self._server.url} is gone")
            if death.log or log is None:
                return death
            return ServerDied(
                death.what,
                expected=death.expected,
                hint=death.hint,
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
        """Returns `function(seconds left)`, unless the server dies or `deadline` passes first.

        what: name of the call, for errors. The function runs in its own thread, since a request
        to a dying server can hang for as long as any of its processes remain. Raises what the
        function raises, `ServerDied`, or `ServerSilent`.
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
    """Runs `function` in a daemon thread; the future holds its result or error."""
    future: Future[Answer] = Future()

    def run() -> None:
        try:
            future.set_result(function())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, name=name, daemon=True).start()
    return future
