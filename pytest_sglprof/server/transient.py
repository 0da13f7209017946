"""Which failures of a server are for a moment only, so that it is asked once more.

A server that starts, exports a profile or is restarted behind a gateway answers 503, resets
connections or sends half an answer; a wrong key or a missing endpoint stays wrong.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from http import HTTPStatus
from typing import TypeVar

import httpx

from pytest_sglprof.errors import ServerError, ServerRefused, ServerUnreachable

PATIENCE = 10.0  # s for one answer that is needed to go on
PAUSE = 0.25  # s between two tries
WAITED_FOR = (HTTPStatus.REQUEST_TIMEOUT, HTTPStatus.TOO_EARLY, HTTPStatus.TOO_MANY_REQUESTS)

Answer = TypeVar("Answer")


def is_transient(error: ServerError) -> bool:
    """True for a failure that the next request may not meet."""
    if isinstance(error, ServerRefused):
        return is_transient_status(error.status)
    return isinstance(error, ServerUnreachable)


def is_transient_status(status: int) -> bool:
    """The same of an HTTP status; a success is one whose content makes no sense yet."""
    is_ours = HTTPStatus.BAD_REQUEST <= status < HTTPStatus.INTERNAL_SERVER_ERROR
    return not is_ours or status in WAITED_FOR


def patiently(ask: Callable[[], Answer], limit: float = PATIENCE) -> Answer:
    """What `ask` answers; asked again for `limit` s while failures are transient.

    Raises the last error then, and at once what is not transient, or that nothing listens.
    """
    deadline = time.monotonic() + limit
    while True:
        try:
            return ask()
        except ServerError as error:
            is_gone = isinstance(error.__cause__, httpx.ConnectError)
            if is_gone or not is_transient(error) or time.monotonic() >= deadline:
                raise
        time.sleep(PAUSE)
