"""`steady_load`: waits for the moment at which a window shows what it is meant to show."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from pytest_sglprof.capture.backend import WindowServer
from pytest_sglprof.errors import ServerUnreachable

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
) -> bool:
    """True once the server has run at least ``share * target`` requests for `hold` seconds.

    target: requests that the load keeps in flight, over all DP ranks together. False when
    `timeout` seconds passed without it, when `stop` was set, or when the server died. A
    server that does not answer for a moment only interrupts the `hold`. clock, sleep: for
    tests; by default time passes, and `stop` ends a pause at once.
    """
    pause = sleep or stop.wait
    deadline = clock() + timeout
    since: float | None = None
    while not stop.is_set():
        if running_requests(server) >= share * target:
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
    """Requests in the running batches of all DP ranks; -1 when the server does not answer."""
    try:
        loads = server.client.loads()
    except ServerUnreachable:
        return -1
    return sum(int(load.get("num_running_reqs") or 0) for load in loads)
