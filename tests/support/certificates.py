"""Certificates for tests, made with openssl, and a server that shows one."""

from __future__ import annotations

import contextlib
import http.server
import shutil
import ssl
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest


class Certificate(NamedTuple):
    """Its file, and that of its key."""

    file: Path
    key: Path


def certificate(
    folder: Path,
    stem: str,
    *,
    names: str = "DNS:localhost",
    owner: str = "localhost",
    signed_by: Certificate | None = None,
    password: str = "",
) -> Certificate:
    """names: its subjectAltName, "" for none. signed_by: an authority; None: signed by itself."""
    if shutil.which("openssl") is None:
        pytest.skip("no openssl to make certificates with")
    made = Certificate(folder / f"{stem}.pem", folder / f"{stem}.key")
    words = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256"]
    words += ["-days", "2", "-subj", f"/CN={owner}", "-out", made.file, "-keyout", made.key]
    words += ["-passout", f"pass:{password}"] if password else ["-nodes"]
    words += ["-addext", f"subjectAltName={names}"] if names else []
    if signed_by is not None:
        words += ["-CA", signed_by.file, "-CAkey", signed_by.key]
        words += ["-addext", "basicConstraints=critical,CA:FALSE"]
    subprocess.run(words, check=True, capture_output=True)
    return made


class _Answer(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b"{}")

    def log_message(self, format: str, *args: object) -> None:
        pass


class _Server(http.server.ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: object, client_address: object) -> None:
        pass  # handshakes that are to fail


@contextlib.contextmanager
def answering(shown: Certificate | None) -> Iterator[int]:
    """The port of a server of this machine that answers 200; with plain http without `shown`."""
    server = _Server(("127.0.0.1", 0), _Answer)
    if shown is not None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(shown.file, shown.key)
        server.socket = context.wrap_socket(
            server.socket, server_side=True, do_handshake_on_connect=False
        )
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield server.server_address[1]
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
