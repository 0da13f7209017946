"""`steady_load`: waits for the moment at which a window shows what it is meant to show."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from pytest_sglprof.capture.backend import WindowServer
from pytest_sglprof.errors import ServerError
from pytest_sglprof.server.transient import is_transient

INTERVAL = 0.2  # s between two looks; the server refreshes its figures every few steps


def steady_load(
    server: WindowServer,
    target: int,
    *,
    share: float = 0.8,
    hold: float = 2.0,
    timeout: float,
    stop: threading.Event,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], object] | None = None,
    on_look: Callable[[str], object] = lambda problem: None,
) -> bool:
    """True once the server has run at least ``share * target`` requests for `hold` seconds.

    target: requests that the load keeps in flight, over all DP ranks together. False when
    `timeout` seconds passed without it, when `stop` was set, or when the server died. A
    server that does not answer for a moment only interrupts the `hold`; `ServerRefused` for
    what waiting does not mend. clock, sleep: for tests; by default time passes, and `stop` ends
    a pause at once. on_look: told after each look why there was no answer, "" where there was.
    """
    pause = sleep or stop.wait
    deadline = clock() + timeout
    since: float | None = None
    while not stop.is_set():
        running, problem = _look(server)
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


def running_requests(server: WindowServer) -> int:
    """Requests in the running batches of all DP ranks; -1 when it has no answer for a moment."""
    return _look(server)[0]


def _look(server: WindowServer) -> tuple[int, str]:
    """The running requests, and why they are not known."""
    try:
        return sum(load.running for load in server.client.loads()), ""
    except ServerError as error:
        if not is_transient(error):
            raise
        return -1, error.what
