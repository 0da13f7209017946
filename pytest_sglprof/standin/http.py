"""The HTTP side: a small threaded server that routes requests and logs them as uvicorn does."""

from __future__ import annotations

import hmac
import json
import threading
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

from pytest_sglprof.standin.front import Front
from pytest_sglprof.standin.options import raw, web

MAX_BODY = 64 << 20


@dataclass(frozen=True)
class Call:
    """One HTTP request. body: raw bytes; query: first value of each key."""

    front: Front
    method: str
    path: str
    query: dict[str, str]
    body: bytes


@dataclass(frozen=True)
class Reply:
    """One HTTP response; `stream` replaces `body` for server-sent events."""

    status: int = 200
    body: bytes = b""
    content_type: str = "text/plain; charset=utf-8"
    stream: Iterable[bytes] | None = None


@dataclass(frozen=True)
class Route:
    """What answers a path. admin: an admin key, where there is one, is asked for."""

    methods: tuple[str, ...]
    handle: Callable[[Call], Reply]
    admin: bool = False


class BadRequest(Exception):
    """A body or parameter that the server refuses with 400."""


class ServerFault(Exception):
    """Something the real server answers with 500 and a traceback in its log."""


def as_json(value: Any, status: int = 200) -> Reply:
    """A JSON reply."""
    return Reply(status, json.dumps(value).encode(), "application/json")


def body_of(call: Call) -> dict[str, Any]:
    """The JSON object that was sent; BadRequest for anything else."""
    try:
        value = json.loads(call.body)
    except ValueError as error:
        raise BadRequest(f"JSON decode error: {error}") from error
    if not isinstance(value, dict):
        raise BadRequest("Input should be a valid dictionary or instance")
    return value


def allowed(front: Front, path: str, authorization: str, *, admin: bool) -> bool:
    """Whether a request with this header may pass, by the rules of the real server."""
    keys, speech = front.options, front.options.speech
    if path.startswith(("/health", "/metrics", *(("/ready",) if speech.has("/ready") else ()))):
        return True
    admin_key = keys.admin_api_key if admin and speech.admin_key else ""
    wanted = admin_key or keys.api_key
    if not wanted:
        return True
    scheme, _, token = authorization.partition(" ")
    return scheme.lower() == "bearer" and hmac.compare_digest(token.encode(), wanted.encode())


class Listener(ThreadingHTTPServer):
    """The listening socket; OSError when the address is taken. find: path → route."""

    daemon_threads = True
    block_on_close = False
    request_queue_size = 512

    def __init__(self, front: Front, find: Callable[[str], Route | None]) -> None:
        self.front = front
        self.find = find
        super().__init__((front.options.host, front.options.port), Handler)

    @property
    def port(self) -> int:
        """The port, also where 0 was asked for."""
        return int(self.server_address[1])

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that went away is no news."""


class Handler(BaseHTTPRequestHandler):
    """One connection."""

    protocol_version = "HTTP/1.1"
    server: Listener
    server_version = "uvicorn"
    sys_version = ""
    disable_nagle_algorithm = True

    def do_GET(self) -> None:
        """Any GET."""
        self._serve()

    def do_POST(self) -> None:
        """Any POST."""
        self._serve()

    def do_PUT(self) -> None:
        """Any PUT."""
        self._serve()

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: requests are logged once they are answered."""

    def _serve(self) -> None:
        front = self.server.front
        if front.crashed.is_set():  # as the real one, it hangs until it is gone
            threading.Event().wait()
        parts = urlsplit(self.path)
        length = min(int(self.headers.get("Content-Length") or 0), MAX_BODY)
        body = self.rfile.read(length) if length else b""
        query = {key: values[0] for key, values in parse_qs(parts.query).items()}
        call = Call(front, self.command, parts.path, query, body)
        failure = ""
        try:
            reply = self._answer(call)
        except BadRequest as error:
            reply = _refusal(str(error))
        except ServerFault:
            failure = traceback.format_exc()
            reply = Reply(500, b"Internal Server Error")
        self._send(reply)
        if failure:
            self.close_connection = True  # as uvicorn does, without having said so
            web("Exception in ASGI application", "ERROR")
            raw(failure.replace(f"{__name__}.ServerFault", "RuntimeError").rstrip())

    def _answer(self, call: Call) -> Reply:
        known = call.front.options.speech.has(call.path)
        route = self.server.find(call.path) if known else None
        header = self.headers.get("Authorization", "")
        if not allowed(call.front, call.path, header, admin=bool(route and route.admin)):
            return as_json({"error": "Unauthorized"}, 401)
        if route is None:
            return as_json({"detail": "Not Found"}, 404)
        if call.method not in route.methods:
            return as_json({"detail": "Method Not Allowed"}, 405)
        return route.handle(call)

    def _send(self, reply: Reply) -> None:
        phrase = HTTPStatus(reply.status).phrase
        client = f"{self.client_address[0]}:{self.client_address[1]}"
        try:
            self.send_response(reply.status)
            self.send_header("Content-Type", reply.content_type)
            if reply.stream is None:
                self.send_header("Content-Length", str(len(reply.body)))
                self.end_headers()
                self.wfile.write(reply.body)
                web(f'{client} - "{self.command} {self.path} HTTP/1.1" {reply.status} {phrase}')
                return
            web(f'{client} - "{self.command} {self.path} HTTP/1.1" {reply.status} {phrase}')
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            for part in reply.stream:
                self.wfile.write(b"%x\r\n%s\r\n" % (len(part), part))
            self.wfile.write(b"0\r\n\r\n")
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True
            close = getattr(reply.stream, "close", None)
            if close is not None:
                close()


def _refusal(message: str) -> Reply:
    return as_json(
        {
            "object": "error",
            "message": message,
            "type": "Bad Request",
            "param": None,
            "code": 400,
        },
        400,
    )
