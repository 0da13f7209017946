"""A stand-in over several nodes: the front of the first one talks to the others' ranks over TCP.

As in SGLang, every node gets the same command but for `--node-rank`; the first one listens at
`--dist-init-addr`, and the others answer health checks only.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from pytest_sglprof.standin.model import Place, places
from pytest_sglprof.standin.options import Options, log

CONNECT_LIMIT = 120.0  # s for the ranks of all nodes to meet


class FarProcess:
    """A rank of another node, with what is used of `subprocess.Popen`. Its pid is not known."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self.pid = 0
        self.stdin = connection.makefile("wb")
        self.stdout = connection.makefile("rb")

    def poll(self) -> int | None:
        """1 once the rank, or its node, is gone: its exit status stays there."""
        with contextlib.suppress(OSError, ValueError):
            readable = select.select([self._connection], [], [], 0)[0]
            if not readable or self._connection.recv(1, socket.MSG_PEEK):
                return None
        return 1

    def wait(self, timeout: float | None = None) -> int:
        """As of Popen."""
        deadline = time.monotonic() + (CONNECT_LIMIT if timeout is None else timeout)
        while (status := self.poll()) is None:
            if time.monotonic() > deadline:
                raise subprocess.TimeoutExpired("rank of another node", timeout or 0)
            time.sleep(0.02)
        return status

    def terminate(self) -> None:
        """Its node ends it when the connection ends."""
        with contextlib.suppress(OSError):
            self._connection.shutdown(socket.SHUT_RDWR)

    kill = terminate


def node_of(place: Place, options: Options) -> int:
    """Number of the node that runs a rank: the ranks are spread in order."""
    return place.index * options.nnodes // len(places(options.sizes))


def far_ranks(options: Options) -> dict[int, FarProcess]:
    """Index -> rank, of all ranks of other nodes, once they have come; OSError if they do not."""
    wanted = [place for place in places(options.sizes) if node_of(place, options) > 0]
    ranks: dict[int, FarProcess] = {}
    host, _, port = options.dist_init_addr.rpartition(":")
    with socket.create_server((host, int(port)), reuse_port=False) as listener:
        listener.settimeout(CONNECT_LIMIT)
        while len(ranks) < len(wanted):
            connection, _ = listener.accept()
            line = connection.makefile("rb", buffering=0).readline()
            ranks[json.loads(line)["index"]] = FarProcess(connection)
    return ranks


def run_node(options: Options, argv: Sequence[str]) -> int:
    """Runs the ranks of a node that is not the first one; the exit status of its process."""
    ended = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: ended.set())
    try:
        listener = ThreadingHTTPServer((options.host, options.port), _Health)
    except OSError as error:
        log(f"port {options.port}: {error}")
        return 1
    threading.Thread(target=listener.serve_forever, daemon=True).start()
    here = [
        place for place in places(options.sizes) if node_of(place, options) == options.node_rank
    ]
    ranks: list[subprocess.Popen[bytes]] = []
    try:
        for place in here:
            ranks.append(_start(place, options, argv, ended))
        while not ended.wait(0.1) and all(rank.poll() is None for rank in ranks):
            pass
    except OSError as error:
        log(f"no connection to {options.dist_init_addr}: {error}")
        return 1
    finally:
        for rank in ranks:
            rank.terminate()
        for rank in ranks:
            rank.wait()
    dead = [rank.returncode for rank in ranks if rank.returncode not in (0, -signal.SIGTERM)]
    if dead and not ended.is_set():
        log("SIGQUIT received. signum=None, frame=None. It usually means one child failed.")
        os.kill(os.getpid(), signal.SIGKILL)
    return 0


def _start(
    place: Place, options: Options, argv: Sequence[str], ended: threading.Event
) -> subprocess.Popen[bytes]:
    """A rank whose stdin and stdout are a connection to the first node."""
    connection = _connected(options.dist_init_addr, ended)
    connection.sendall(json.dumps({"index": place.index}).encode() + b"\n")
    command = [sys.executable, "-m", "pytest_sglprof.standin.rank", place.title]
    with connection:
        return subprocess.Popen(
            [*command, str(place.index), str(os.getpid()), *argv],
            stdin=connection.fileno(),
            stdout=connection.fileno(),
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        )


def _connected(address: str, ended: threading.Event) -> socket.socket:
    host, _, port = address.rpartition(":")
    deadline = time.monotonic() + CONNECT_LIMIT
    while True:
        try:
            connection = socket.create_connection((host, int(port)), timeout=5)
            connection.settimeout(None)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            return connection
        except OSError:
            if ended.is_set() or time.monotonic() > deadline:
                raise
            time.sleep(0.1)


class _Health(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        """200 for health checks, 404 for all else."""
        self.send_response(200 if self.path in ("/health", "/health_generate") else 404)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, format: str, *args: Any) -> None:
        """Says nothing."""
