"""An attached server's life is watched without a connection to it."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import psutil
import pytest

from pytest_sglprof._capture.recording import LifeWatch
from pytest_sglprof._server import client as presence
from pytest_sglprof._server.client import Presence, is_listening
from pytest_sglprof._server.launch import attach

WINDOW = 2.0  # s; ten looks a second
LISTENER = """
import socket, sys, time
family = socket.AF_INET6 if ":" in sys.argv[1] else socket.AF_INET
listener = socket.create_server((sys.argv[1], 0), family=family)
print(listener.getsockname()[1], flush=True)
time.sleep(600)
"""


class CountingServer(ThreadingHTTPServer):
    """Answers /server_info; counts what it accepts."""

    daemon_threads = True

    def __init__(self, host: str) -> None:
        self.accepted = 0
        super().__init__((host, 0), _Info)
        self.url = f"http://{host}:{self.server_address[1]}"

    def get_request(self):
        self.accepted += 1
        return super().get_request()


class _Info(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        data = json.dumps({"tp_size": 1, "version": "0.0-counting"}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def counting():
    running = []

    def start(host: str = "127.0.0.1") -> CountingServer:
        server = CountingServer(host)
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        running.append((server, thread))
        return server

    yield start
    for server, thread in running:
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.fixture
def listener():
    """Starts a process that only listens; gives it and its port."""
    running = []

    def start(host: str) -> tuple[subprocess.Popen[str], int]:
        command = [sys.executable, "-c", LISTENER, host]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        running.append(process)
        return process, int(process.stdout.readline())

    yield start
    for process in running:
        process.kill()
        process.wait()
        process.stdout.close()


def look_for(life: LifeWatch, seconds: float) -> int:
    """Looks as a window does, also after errors of calls and from the load's side."""
    looks = 0
    over = time.monotonic() + seconds
    while time.monotonic() < over:
        assert life.death() is None
        looks += 1
        time.sleep(0.1)
    return looks


@pytest.mark.parametrize("name", ["127.0.0.1", "localhost", "LOCALHOST", "0.0.0.0"])
def test_fault_11_a_window_opens_no_connection_to_an_attached_server(counting, tmp_path, name):
    server = counting()
    attached = attach(server.url.replace("127.0.0.1", name), folder=tmp_path)
    life = LifeWatch(attached)
    before = server.accepted
    assert before >= 1
    assert look_for(life, WINDOW) > 12
    assert attached.exit_reason() is None
    assert server.accepted == before
    attached.stop()


def other_address() -> str:
    """An address of this machine that is not the loopback one."""
    for addresses in psutil.net_if_addrs().values():
        for address in addresses:
            if address.family == socket.AF_INET and not address.address.startswith("127."):
                return address.address
    pytest.skip("this machine has no address but the loopback one")


def test_fault_11_a_server_elsewhere_is_asked_every_few_seconds_at_most(
    counting, tmp_path, monkeypatch
):
    server = counting(other_address())
    attached = attach(server.url, folder=tmp_path)
    before = server.accepted
    look_for(LifeWatch(attached), WINDOW)
    assert presence.LOOK_EVERY > WINDOW
    assert server.accepted == before
    monkeypatch.setattr(presence, "LOOK_EVERY", 0.7)
    look_for(LifeWatch(attached), WINDOW)
    assert 1 <= server.accepted - before <= 4
    attached.stop()


@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0", "::1", "::"])
def test_fault_11_a_death_is_noticed_at_once(listener, host):
    process, port = listener(host)
    there = Presence(f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}")
    assert there.is_there()
    process.kill()
    process.wait()
    assert not there.is_there()


def test_fault_11_a_death_elsewhere_is_noticed_at_the_next_look(listener, monkeypatch):
    monkeypatch.setattr(presence, "LOOK_EVERY", 0.2)
    host = other_address()
    process, port = listener(host)
    there = Presence(f"http://{host}:{port}")
    process.kill()
    process.wait()
    assert there.is_there()
    time.sleep(0.2)
    assert not there.is_there()


def test_fault_11_a_port_that_is_only_forwarded_is_not_taken_for_dead(monkeypatch):
    """As with a container whose port the kernel forwards: nobody listens here."""
    with socket.create_server(("127.0.0.1", 0)) as forwarded:
        port = forwarded.getsockname()[1]
        monkeypatch.setattr(presence, "_TABLES", ())
        monkeypatch.setattr(presence, "LOOK_EVERY", 0.0)
        there = Presence(f"http://127.0.0.1:{port}")
        assert there.is_there()
    assert not there.is_there()


def test_fault_11_an_outgoing_connection_is_nobody_who_listens():
    with (
        socket.create_server(("127.0.0.1", 0)) as server,
        socket.create_connection(server.getsockname()[:2]) as client,
    ):
        assert is_listening(server.getsockname()[1])
        assert not is_listening(client.getsockname()[1])
