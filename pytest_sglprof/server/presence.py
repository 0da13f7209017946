"""Whether a server that somebody else runs is still there, at no cost to it.

It is asked ten times a second inside a window, and each connection is work for the process
that is being measured.
"""

from __future__ import annotations

import contextlib
import socket
import time
from pathlib import Path
from urllib.parse import urlsplit

from pytest_sglprof.server.address import is_local_url, port_of

LOOK_EVERY = 5.0  # s between two connections to a server whose port cannot be looked up
CONNECT_LIMIT = 5.0  # s
_TABLES = (Path("/proc/net/tcp"), Path("/proc/net/tcp6"))
_LISTEN = "0A"


class Presence:
    """Of the server at `url`, which answered just now.

    On this machine the kernel's own list of listening ports is read. A server elsewhere, or
    one in a container whose port is only forwarded, gets a connection every `LOOK_EVERY` s.
    """

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        self._host, self._port = parts.hostname or "", port_of(parts)
        self._is_listed = is_local_url(url) and is_listening(self._port)
        self._looked = time.monotonic()
        self._answered = True

    def is_there(self) -> bool:
        """False once nothing listens there any more."""
        if self._is_listed:
            return is_listening(self._port)
        if time.monotonic() - self._looked >= LOOK_EVERY:
            self._answered = self._answers()
            self._looked = time.monotonic()
        return self._answered

    def _answers(self) -> bool:
        address = (self._host, self._port)
        with (
            contextlib.suppress(OSError),
            socket.create_connection(address, timeout=CONNECT_LIMIT),
        ):
            return True
        return False


def is_listening(port: int) -> bool:
    """True while some process of this machine listens on the TCP port."""
    ending = f":{port:04X}"
    for table in _TABLES:
        # Listening sockets stand first: the rest, which may be long, is seldom read.
        with contextlib.suppress(OSError), table.open() as lines:
            for line in lines:
                fields = line.split()
                if fields[3] == _LISTEN and fields[1].endswith(ending):
                    return True
    return False
