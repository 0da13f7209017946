"""Waits for a server to start and to be ready, and reports progress."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from pytest_sglprof.errors import ServerDied, ServerNotReady
from pytest_sglprof.server.client import SglangClient
from pytest_sglprof.server.keeper_link import KeeperLink, keeper_log_end
from pytest_sglprof.server.limits import SILENCE_LIMIT
from pytest_sglprof.server.log import ServerLog
from pytest_sglprof.server.plan import (
    Closed,
    Exited,
    Failed,
    Plan,
    Progress,
    Started,
    error_from,
)
from pytest_sglprof.values import ServerSpec

TELL_EVERY = 1.0  # s between two lines of progress
POLL = 0.25  # s between two looks at /ready
CAP = 4.0  # times the limit, at most, while the log moves
PATIENCE = 0.25  # of the limit: how long a moving log extends it each time

Show = Callable[[str], None]


def wait_started(keeper: KeeperLink, plan: Plan, progress: Show | None) -> Started:
    """The keeper's answer; raises the error of a start that failed."""
    deadline = time.monotonic() + SILENCE_LIMIT
    while time.monotonic() < deadline:
        event = keeper.next_event(TELL_EVERY)
        if event is None:
            continue
        deadline = time.monotonic() + SILENCE_LIMIT
        if isinstance(event, Started):
            return event
        if isinstance(event, Failed):
            raise error_from(event)
        if isinstance(event, Progress) and progress is not None:
            progress(event.text)
        if isinstance(event, Closed):
            raise lost_keeper(keeper, plan.folder, "before it had started the server")
    raise ServerNotReady(
        f"the keeper process (pid {keeper.pid}) said nothing for {SILENCE_LIMIT:.0f} s",
        expected="news of the server's start",
        hint=f"look at {plan.folder / 'keeper.log'}",
        log=keeper_log_end(plan.folder),
    )


def wait_until_ready(
    keeper: KeeperLink,
    client: SglangClient,
    log: ServerLog,
    spec: ServerSpec,
    progress: Show | None,
) -> None:
    """Returns when the server takes requests.

    Raises `ServerDied` when it ends, `ServerNotReady` after `spec.ready_timeout` s; a log
    that moves extends that, four times at most.
    """
    clock = ReadyClock(spec.ready_timeout, time.monotonic())
    shown = 0.0
    while not client.is_ready():
        now = time.monotonic()
        clock.saw(log.position(), now)
        if exited := keeper.last_event(Exited):
            raise starting_death(log, exited.status, clock.elapsed(now))
        if keeper.last_event(Closed):
            raise lost_keeper(keeper, log.path.parent, "before the server was ready")
        if clock.is_over(now):
            raise ServerNotReady(
                f"the server was not ready after {clock.elapsed(now):.0f} s",
                expected=f"an answer 200 at {client.url}/ready within {spec.ready_timeout:g} s",
                hint=f"raise ready_timeout; its whole log is {log.path}",
                log=log.reason() or [log.last_line()],
            )
        if progress is not None and now - shown >= TELL_EVERY:
            progress(f"server {spec.key}: {clock.elapsed(now):.0f} s, {log.last_line()}")
            shown = now
        time.sleep(POLL)


class ReadyClock:
    """When waiting is over. All times in s of one monotonic clock."""

    def __init__(self, limit: float, now: float) -> None:
        self._limit = limit
        self._began = now
        self._deadline = now + limit
        self._size = -1

    def saw(self, size: int, now: float) -> None:
        """The log had `size` bytes at `now`."""
        if size != self._size and self._size >= 0:
            longest = self._began + CAP * self._limit
            self._deadline = min(max(self._deadline, now + PATIENCE * self._limit), longest)
        self._size = size

    def is_over(self, now: float) -> bool:
        """True when the server has had all its time."""
        return now >= self._deadline

    def elapsed(self, now: float) -> float:
        """Time since the start."""
        return now - self._began


def lost_keeper(keeper: KeeperLink, folder: Path, when: str) -> ServerDied:
    """The error for a server that was ended, since its keeper is gone."""
    return ServerDied(
        f"{keeper.death()} {when}; the server was ended with it",
        expected="a keeper that lives as long as its server",
        hint=f"look for whoever ended it (the kernel's log tells of a lack of memory) and at "
        f"{folder / 'keeper.log'}",
        log=keeper_log_end(folder),
    )


def starting_death(log: ServerLog, status: int | None, seconds: float) -> ServerDied:
    """The error for a server that ended before it was ready."""
    how = "of unknown status" if status is None else f"with exit status {status}"
    return ServerDied(
        f"the server ended {how} after {seconds:.0f} s, before it was ready",
        expected="a server that becomes ready",
        hint=f"its whole log is {log.path}",
        log=log.reason(),
    )
