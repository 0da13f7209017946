"""Waiting until a server has started and is ready, and the errors of one that ended."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from pytest_sglprof._errors import ServerDied, ServerNotReady, SettingsError
from pytest_sglprof._server.client import SglangClient
from pytest_sglprof._server.death import describe_status, explain_status
from pytest_sglprof._server.keeper.link import KeeperLink, keeper_log_end
from pytest_sglprof._server.keeper.protocol import (
    NODE_START,
    SEEN,
    SHOWN,
    SILENCE_LIMIT,
    Closed,
    Exited,
    Failed,
    Plan,
    ProgressEvent,
    Started,
    error_from,
)
from pytest_sglprof._server.log import ServerLog, StartGrowth

PROGRESS_EVERY = 1.0  # s between two lines of progress
POLL = 0.25  # s between two requests to /ready
CAP = 4.0  # however much the log grows, the wait ends after this many times the limit
FOLDER_LIMIT = 15.0  # s for a file that a node has written to be seen here
PATIENCE = 0.25  # share of the limit that is still waited after the log last grew

Show = Callable[[str], None]


def wait_started(keeper: KeeperLink, plan: Plan, progress: Show | None) -> Started:
    """Waits for the keeper to start the server's process; raises the error of a failed start.

    A keeper on a node says something as soon as it runs there, see `NODE_START`.
    """
    limit = min(NODE_START, plan.spec.ready_timeout) if plan.node else SILENCE_LIMIT
    deadline = time.monotonic() + limit
    while time.monotonic() < deadline:
        event = keeper.next_event(PROGRESS_EVERY)
        if event is None:
            continue
        limit = SILENCE_LIMIT
        deadline = time.monotonic() + limit
        if isinstance(event, Started):
            (plan.folder / SHOWN).unlink(missing_ok=True)
            if event.is_shared:
                _check_folder(plan)
            else:
                keeper.gather()
            return event
        if isinstance(event, Failed):
            raise error_from(event)
        if isinstance(event, ProgressEvent) and progress is not None:
            progress(event.text)
        if isinstance(event, Closed):
            raise lost_keeper(keeper, plan.folder, "before it had started the server")
    who = f"node {plan.node}" if plan.node else f"the keeper process (pid {keeper.pid})"
    raise ServerNotReady(
        f"{who} sent nothing for {limit:.0f} s",
        expected="messages about the server's start",
        hint=f"read {plan.folder / 'keeper.log'}",
        log=keeper_log_end(plan.folder),
    )


def _check_folder(plan: Plan) -> None:
    """Raises `SettingsError` if a node does not write into the folder that is read here."""
    if not plan.node:
        return
    seen = plan.folder / SEEN
    deadline = time.monotonic() + FOLDER_LIMIT
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError):
            if seen.read_text(encoding="utf-8") == plan.life:
                seen.unlink()
                return
        list(plan.folder.iterdir())  # makes a network disk look again
        time.sleep(0.1)
    raise SettingsError(
        f"node {plan.node} does not write into {plan.folder}: its folder of that name is another",
        expected="a folder that this machine and all nodes share",
        hint="put the results on a shared disk: --sglprof-output DIR",
    )


def wait_until_ready(
    keepers: Sequence[tuple[Plan, KeeperLink]],
    client: SglangClient,
    progress: Show | None,
) -> None:
    """Returns when the server takes requests.

    keepers: of its nodes, the first one first; usually there is one.

    Raises `ServerDied` when it ends, `ServerNotReady` after `spec.ready_timeout` s. While
    its log grows, not only by answers to these probes, it gets more time, up to four times as much.
    """
    spec = keepers[0][0].spec
    log = ServerLog(keepers[0][0].folder / "server.log")
    clock = ReadyClock(spec.ready_timeout, time.monotonic())
    growth = StartGrowth(log)
    shown = 0.0
    while not client.is_ready():
        now = time.monotonic()
        clock.saw(growth.size(), now)
        for plan, keeper in keepers:
            if exited := keeper.last_event(Exited):
                keeper.catch_up()
                its_log = ServerLog(plan.folder / "server.log")
                raise starting_death(its_log, exited.status, clock.elapsed(now), plan.node)
            if keeper.last_event(Closed):
                raise lost_keeper(keeper, plan.folder, "before the server was ready")
        if clock.is_over(now):
            raise ServerNotReady(
                f"the server was not ready after {clock.elapsed(now):.0f} s",
                expected=f"an answer 200 at {client.url}/ready within {spec.ready_timeout:g} s",
                hint=f"raise ready_timeout, or read the whole log: {log.path}",
                log=log.reason() or [log.last_line()],
            )
        if progress is not None and now - shown >= PROGRESS_EVERY:
            phase = log.phase() or "starting"
            progress(f"server {spec.key}: {phase}, {clock.elapsed(now):.0f} s")
            shown = now
        time.sleep(POLL)


class ReadyClock:
    """Says when to stop waiting for a server. All times in s of one monotonic clock."""

    def __init__(self, limit: float, now: float) -> None:
        self._limit = limit
        self._began = now
        self._deadline = now + limit
        self._size = -1

    def saw(self, size: int, now: float) -> None:
        """Takes the log's size at `now`, in bytes; a log that has grown gives more time."""
        if size > self._size >= 0:
            longest = self._began + CAP * self._limit
            self._deadline = min(max(self._deadline, now + PATIENCE * self._limit), longest)
        self._size = max(size, self._size)

    def is_over(self, now: float) -> bool:
        """True once the server has used up its time."""
        return now >= self._deadline

    def elapsed(self, now: float) -> float:
        """Time since the start."""
        return now - self._began


def lost_keeper(keeper: KeeperLink, folder: Path, when: str) -> ServerDied:
    """The error for a server that was ended because its keeper had died."""
    return ServerDied(
        f"{keeper.death()} {when}; the server was ended with it",
        expected="a keeper that lives as long as its server",
        hint="find out what ended it (if memory ran out, the kernel's log says so), and read "
        f"{folder / 'keeper.log'}",
        log=keeper_log_end(folder),
    )


def starting_death(
    log: ServerLog, status: int | None, seconds: float, node: str = ""
) -> ServerDied:
    """The error for a server that ended before it was ready."""
    reason = log.reason()
    return ServerDied(
        f"the server{f' on node {node}' if node else ''} ended with {describe_status(status)} "
        f"after {seconds:.0f} s, before it was ready",
        expected="a server that becomes ready",
        hint=_next(explain_status(status, reason), log),
        log=reason,
    )


def died(log: ServerLog | None, status: int | None, node: str = "") -> ServerDied:
    """The error for a server that ended by itself."""
    reason = log.reason() if log else ()
    return ServerDied(
        f"the server{f' on node {node}' if node else ''} died ({describe_status(status)})",
        expected="a running server",
        hint=_next(explain_status(status, reason), log),
        log=reason,
    )


def _next(meaning: str, log: ServerLog | None) -> str:
    if log is not None and not log.path.parent.is_dir():  # which is what it may have died of
        return f"the server's folder {log.path.parent} is gone: let nothing remove it in a run"
    read = f"read the whole log: {log.path}" if log else ""
    return "; ".join(filter(None, (meaning, read)))
