"""Whether the server still lives, and calls to it that end when it dies."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from typing import TypeVar

from pytest_sglprof.capture.backend import WindowServer
from pytest_sglprof.errors import ServerDied, ServerSilent
from pytest_sglprof.values import Backend

POLL = 0.1  # s between two looks at a server; it costs a stat and a short read
# s for a window that is given up; nsys has a report to write before it can be dropped
ABORT_SECONDS: Mapping[Backend, float] = {"torch": 15.0, "nsys": 30.0}
CRASH_LINE = "Scheduler hit an exception"

Answer = TypeVar("Answer")


class LifeWatch:
    """Notices the death of `server` since this object was made.

    A server whose scheduler crashed can keep its main process, and its open requests,
    for a minute; the line in its log comes at once. began: Unix time, s. log_start: where
    the log ended then.
    """

    def __init__(self, server: WindowServer) -> None:
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
        answers: list[Answer] = []
        errors: list[BaseException] = []
        left = max(deadline - time.monotonic(), 1.0)

        def run() -> None:
            try:
                answers.append(function(left))
            except BaseException as error:
                errors.append(error)

        thread = threading.Thread(target=run, name=f"sglprof {what}", daemon=True)
        thread.start()
        over = time.monotonic() + left + 1.0
        while thread.is_alive() and time.monotonic() < over:
            thread.join(POLL)
            if thread.is_alive() and (death := self.death()):
                raise death
        if answers:
            return answers[0]
        if errors:
            if death := self.death():
                raise death from errors[0]
            raise errors[0]
        raise ServerSilent(f"{what} did not answer within {left:.0f} s")
