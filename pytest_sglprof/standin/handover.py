"""How a prefill stand-in tells a decode stand-in that a prompt is done: a room for each request.

A router sends a request to both, with the bootstrap address of the prefill server and a room. The
real servers agree there about memory; here the one that decodes asks for a room and has its answer
once the prompt that is in it has run.
"""

from __future__ import annotations

import socket
import socketserver
import threading
from collections import defaultdict
from typing import Any

LIMIT = 120.0  # s for a prompt to run
_DONE = b"done\n"


class Rooms:
    """The rooms of a prefill server, each an event that is set once its prompt has run."""

    def __init__(self) -> None:
        self._events: dict[int, threading.Event] = defaultdict(threading.Event)
        self._lock = threading.Lock()

    def of(self, room: int) -> threading.Event:
        """The event of a room; whoever asks first makes it."""
        with self._lock:
            return self._events[room]

    def leave(self, room: int) -> None:
        """Forgets a room."""
        with self._lock:
            self._events.pop(room, None)

    def listen(self, host: str, port: int) -> None:
        """Answers decode servers from now on; raises OSError if the port is taken."""
        rooms = self

        class Handler(socketserver.StreamRequestHandler):
            def handle(self) -> None:
                room = int(self.rfile.readline() or b"0")
                if rooms.of(room).wait(LIMIT):
                    self.wfile.write(_DONE)
                rooms.leave(room)

        server = socketserver.ThreadingTCPServer((host, port), Handler)
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, daemon=True).start()


def await_prompt(host: str, port: int, room: int) -> None:
    """Waits until the prompt in a room has run; raises OSError where nobody says so."""
    with socket.create_connection((host, port), timeout=LIMIT) as connection:
        connection.sendall(b"%d\n" % room)
        if connection.makefile("rb").readline() != _DONE:
            raise OSError(f"room {room} stayed empty")


def rooms_of(body: dict[str, Any], index: int) -> tuple[str, int, int] | None:
    """Bootstrap host, port and room of a request, or of one of its batch; None without them."""
    names = ("bootstrap_host", "bootstrap_port", "bootstrap_room")
    values = [body.get(name) for name in names]
    host, port, room = (each[index] if isinstance(each, list) else each for each in values)
    return None if host is None or port is None or room is None else (host, port, room)
