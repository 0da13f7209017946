"""Answers that no SGLang server gives: without end, huge, nested, or with impossible figures."""

from __future__ import annotations

import asyncio
import gzip
import json
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from pytest_sglprof._errors import ServerRefused, ServerSilent, ServerUnreachable, SglprofError
from pytest_sglprof._load import sources
from pytest_sglprof._load.sources import LoadsSource
from pytest_sglprof._server.client import MOST_BYTES, SglangClient

Answer = Callable[[BaseHTTPRequestHandler], None]
LIMIT_S = 1.0


class Server(ThreadingHTTPServer):
    """Gives one answer to every request."""

    daemon_threads = True
    answer: Answer

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Nothing: a client that has enough resets the connection."""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        server = self.server
        assert isinstance(server, Server)
        try:
            server.answer(self)
        except OSError:  # the client has gone
            self.close_connection = True

    do_POST = do_GET

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing."""


def document(value: object) -> Answer:
    return body(json.dumps(value).encode())


def body(content: bytes, **headers: str) -> Answer:
    def give(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(200)
        for name, value in headers.items():
            handler.send_header(name.replace("_", "-"), value)
        handler.send_header("Content-Length", str(len(content)))
        handler.end_headers()
        handler.wfile.write(content)

    return give


def forever(part: bytes, pause: float = 0.0) -> Answer:
    """Parts without end, each after a pause of so many seconds."""

    def give(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(200)
        handler.send_header("Transfer-Encoding", "chunked")
        handler.end_headers()
        while True:
            handler.wfile.write(b"%x\r\n%s\r\n" % (len(part), part))
            handler.wfile.flush()
            time.sleep(pause)

    return give


def cut(content: bytes) -> Answer:
    """Half of what was announced."""

    def give(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(200)
        handler.send_header("Content-Length", str(2 * len(content)))
        handler.end_headers()
        handler.wfile.write(content)
        handler.close_connection = True

    return give


@pytest.fixture
def answering() -> Iterator[Callable[[Answer], str]]:
    """A function that starts a server with an answer and returns its URL."""
    servers: list[Server] = []

    def start(answer: Answer) -> str:
        server = Server(("127.0.0.1", 0), Handler)
        server.answer = answer  # type: ignore[method-assign]
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}).start()
        servers.append(server)
        return f"http://127.0.0.1:{server.server_address[1]}"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def status(code: int, **headers: str) -> Answer:
    """An error with a long page that nobody asked for."""

    def give(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(code)
        for name, value in headers.items():
            handler.send_header(name, value)
        handler.send_header("Content-Length", str(100_000))
        handler.end_headers()
        handler.wfile.write(b"<script>" * 12_500)

    return give


def reset(handler: BaseHTTPRequestHandler) -> None:
    linger = struct.pack("ii", 1, 0)  # which makes closing a reset
    handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
    handler.connection.close()
    handler.close_connection = True


DEEP = b'{"loads":' + b"[" * 200_000 + b"]" * 200_000 + b"}"
WHATEVER_IS_ASKED = {
    "without end": (forever(b"[1,2,3," * 10_000), "answers with more than 8 MiB"),
    "slow without end": (forever(b" ", pause=0.05), "did not answer within 1 s"),
    "long": (body(b" " * (MOST_BYTES + 1)), "answers with more than 8 MiB"),
    "inflated": (
        body(gzip.compress(b" " * (16 * MOST_BYTES)), Content_Encoding="gzip"),
        "answers with more than 8 MiB",
    ),
    "not gzip": (body(b"{}", Content_Encoding="gzip"), "decompressing|incorrect header"),
    "nested": (body(DEEP), "did not answer with"),
    "half": (cut(b'{"tp_size": 2'), "without|incomplete|closed"),
    "empty": (body(b""), "did not answer with"),
    "text": (body(b"<html>"), "did not answer with"),
    "not UTF-8": (body(b'{"tp_size": "\xff\xfe"}'), "did not answer with"),
    "a number": (body(b"7"), "did not answer with"),
    "a number of 5,000 digits": (body(b'{"tp_size": ' + b"7" * 5_000 + b"}"), "did not answer"),
}
SIZES: tuple[dict[str, object], ...] = (
    {"tp_size": 1_000_000},
    {"tp_size": 10**300},
    {"tp_size": -3},
    {"tp_size": 0, "dp_size": 0},
    {"tp_size": "2"},
    {"tp_size": True},
    {"tp_size": 2.5},
    {"tp_size": [2]},
    {"tp_size": 4096, "dp_size": 4096},
    {"nnodes": 10**9},
    {"ep_size": 5000},
    {"server_args": [1]},
)
LOADS: tuple[object, ...] = (
    {"loads": [{"num_running_reqs": "abc"}]},
    {"loads": [{"num_running_reqs": -1}]},
    {"loads": [{"num_running_reqs": float("inf")}]},
    {"loads": [{"num_running_reqs": float("nan")}]},
    {"loads": [{"num_running_reqs": True}]},
    {"loads": [{"num_running_reqs": 1, "disaggregation": 7}]},
    {"loads": [{"num_running_reqs": 1, "dp_rank": -5}]},
    {"loads": [None, 5]},
    {"loads": "many"},
    {"loads": [{"num_running_reqs": 1}] * 70_000},
    [[]],
    [{}],
    5,
)


def client_of(url: str) -> SglangClient:
    return SglangClient(url, timeout=LIMIT_S)


@pytest.mark.parametrize("name", WHATEVER_IS_ASKED)
@pytest.mark.parametrize("asked", ["server_info", "loads"])
def test_an_answer_that_is_none_is_an_error_of_ours(answering, asked, name):
    answer, reason = WHATEVER_IS_ASKED[name]
    client = client_of(answering(answer))
    with pytest.raises((ServerRefused, ServerSilent, ServerUnreachable), match=reason):
        getattr(client, asked)()
    client.close()


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_sizes_that_no_server_has_are_refused(answering, sizes):
    client = client_of(answering(document({"version": "0.5.23", **sizes})))
    with pytest.raises(ServerRefused, match="did not answer with its sizes"):
        client.server_info()
    client.close()


@pytest.mark.parametrize("loads", LOADS, ids=lambda loads: str(loads)[:60])
def test_loads_that_no_server_has_are_refused(answering, loads):
    client = client_of(answering(document(loads)))
    with pytest.raises(ServerRefused, match="did not answer with its load"):
        client.loads()
    client.close()


@pytest.mark.parametrize(
    "name", [n for n in WHATEVER_IS_ASKED if n not in ("not UTF-8", "a number of 5,000 digits")]
)
def test_a_watch_goes_on_without_the_answer(answering, monkeypatch, name):
    monkeypatch.setattr(sources, "REQUEST_TIMEOUT", LIMIT_S)
    source = LoadsSource(answering(WHATEVER_IS_ASKED[name][0]), interval=0.5)

    async def ask() -> list[object]:
        samples = list(await source.poll())
        await source.close()
        return samples

    assert asyncio.run(ask()) == []
    assert source.failures == 1
    assert source.problem


TO_A_PROFILE = {
    **{f"status {code}": status(code) for code in (400, 401, 404, 500, 503)},
    "redirect": status(302, Location="/elsewhere"),
    "without end": forever(b"[1,2,3," * 10_000),
    "slow without end": forever(b" ", pause=0.05),
    "half": cut(b"Start profiling."),
    "reset": reset,
}


@pytest.mark.parametrize("name", TO_A_PROFILE)
@pytest.mark.parametrize("asked", ["start_profile", "stop_profile"])
def test_a_profile_that_is_answered_wrongly_is_an_error_of_ours(answering, asked, name):
    client = client_of(answering(TO_A_PROFILE[name]))
    words = ({}, LIMIT_S) if asked == "start_profile" else (LIMIT_S,)
    begin = time.monotonic()
    if asked == "stop_profile" and name == "status 500":  # the answer where none is running
        assert client.stop_profile(LIMIT_S) is False
    else:
        with pytest.raises((ServerRefused, ServerSilent, ServerUnreachable)) as caught:
            getattr(client, asked)(*words)
        assert client.url in caught.value.what
        assert len(str(caught.value)) < 2_000
    assert time.monotonic() - begin < 4 * LIMIT_S
    client.close()


def test_readiness_is_decided_in_bounded_time(answering):
    client = client_of(answering(forever(b"[1,2,3," * 10_000)))
    with pytest.raises(SglprofError, match="answers with more than 8 MiB"):
        client.is_ready()
    client.close()
