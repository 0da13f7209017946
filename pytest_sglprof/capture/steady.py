"""`steady_load`: waits for the moment at which a window shows what it is meant to show."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from pytest_sglprof.errors import ServerError
from pytest_sglprof.server.transient import is_transient

if TYPE_CHECKING:
    from pytest_sglprof.server.server import Server

INTERVAL = 0.2  # s between two looks; the server refreshes its figures every few steps


def steady_load(
    server: Server,
    target: int,
    *,
    share: float = 0.8,
    hold: float = 2.0,
    timeout: float,
    stop: threading.Event,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], object] | None = None,
    on_look: Callable[[str | None], object] = lambda problem: None,
) -> bool:
    """True once the server has run at least ``share * target`` requests for `hold` seconds.

    target: requests that the load keeps in flight, over all DP ranks together. False when
    `timeout` seconds passed without it, when `stop` was set, or when the server died. A
    server that does not answer for a moment only interrupts the `hold`; `ServerRefused` for
    what waiting does not mend. clock, sleep: for tests; by default time passes, and `stop` ends
    a pause at once. on_look: gets after each look why there was no answer, None where there was.
    """
    pause = sleep or stop.wait
    deadline = clock() + timeout
    since: float | None = None
    while not stop.is_set():
        running, problem = running_requests(server)
        on_look(problem)
        if running >= share * target:
            since = clock() if since is None else since
            if clock() - since >= hold:
                return True
        else:
            since = None
            if not server.is_alive():
                return False
        if clock() >= deadline:
            return False
        pause(INTERVAL)
    return False


def running_requests(server: Server) -> tuple[int, str | None]:
    """Requests in the running batches of all DP ranks, or -1 and why they are not known now."""
    try:
        return sum(load.running for load in server.client.loads()), None
    except ServerError as error:
        if not is_transient(error):
            raise
        return -1, error.what
