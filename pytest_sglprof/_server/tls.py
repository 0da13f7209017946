"""TLS of a server: which certificates are trusted there, and by which name it is reached.

SGLang speaks https with `--ssl-certfile` and `--ssl-keyfile`. Its certificate is often its own, or
that of a company's authority, and names no loopback address. So what was started with a certificate
is trusted by just that file (or `--ssl-ca-certs`), whatever name it was reached by.
"""

from __future__ import annotations

import contextlib
import os
import socket
import ssl
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from pytest_sglprof._errors import SettingsError
from pytest_sglprof._files import atomic_write
from pytest_sglprof._server.arguments import option
from pytest_sglprof._server.client import port_of

Verify = ssl.SSLContext | bool  # as httpx takes it
CONNECT_LIMIT = 5.0  # s
# For the standard library, httpx and aiohttp, and for requests, which SGLang's drivers use.
BUNDLE_VARIABLES = ("SSL_CERT_FILE", "REQUESTS_CA_BUNDLE")


def certificates(args: Sequence[str]) -> tuple[Path, ...]:
    """The files by which a server that is started with `args` is trusted; () for plain http.

    Raises `SettingsError` where one of the files of TLS does not exist.
    """
    names = ("--ssl-certfile", "--ssl-ca-certs", "--ssl-keyfile")
    values = {name: option(args, name) for name in names}
    files = {name: Path(value) for name, value in values.items() if value is not None}
    for name, file in files.items():
        if not file.is_file():
            raise SettingsError(
                f"{name} {file} does not exist",
                expected="a file in PEM format",
                hint=f"correct the path; a relative one begins in {Path.cwd()}",
            )
    return tuple(files[name] for name in names[:2] if name in files) if names[0] in files else ()


def given_certificates(file: str, url: str) -> tuple[Path, ...]:
    """The file that somebody gives for a running server; raises `SettingsError` for plain http."""
    if file and not url.startswith("https:"):
        raise SettingsError(
            f"a certificate is given for {url}",
            expected="an address that begins with https://",
            hint="correct the address, or leave --sglprof-server-ca (--server-ca) out",
        )
    return (Path(file),) if file else ()


def trust(files: Sequence[Path], *, any_name: bool) -> Verify:
    """Trusts what these files certify and nothing else; without files the usual authorities.

    any_name: whether the certificate may be for another name than that in the address.
    """
    if not files:
        return True
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = not any_name
    context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN  # the server's own is no authority
    for file in files:
        try:
            context.load_verify_locations(cafile=file)
        except OSError as error:  # also ssl.SSLError
            raise SettingsError(
                f"{file} holds no certificate that can be read: {error.strerror or error}",
                expected="one or more certificates in PEM format",
                hint="give the server's certificate, or that of the authority that signed it",
            ) from error
    return context


def named(url: str, verify: Verify) -> str:
    """`url` with a name that the server's certificate has, if one of them leads to the same place.

    Load drivers check the name, and https://127.0.0.1 is seldom one. The server must be up.
    """
    parts = urlsplit(url)
    host, port = parts.hostname or "", port_of(parts)
    if parts.scheme != "https" or not isinstance(verify, ssl.SSLContext):
        return url
    with contextlib.suppress(OSError):
        here = _addresses(host, port)
        names = list(_names(_certificate(host, port, verify)))
        if host in names:
            return url
        for name in names:
            with contextlib.suppress(OSError, UnicodeError):
                if _addresses(name, port) & here:
                    return f"https://{name}:{port}"
    return url


def bundle_variables(files: Sequence[Path], folder: Path) -> dict[str, str]:
    """What makes a load driver trust `files` beside what it trusts anyway; {} without files.

    It still may download a tokenizer, so a bundle of everything is written to `folder`.
    """
    if not files:
        return {}
    given = [os.environ[name] for name in BUNDLE_VARIABLES if os.environ.get(name)]
    if not given:
        import certifi

        given = [certifi.where()]
    texts = [Path(file).read_text("utf-8", "replace") for file in (*given, *map(str, files))]
    bundle = folder / "trusted.pem"
    atomic_write(bundle, "\n".join(texts))
    return dict.fromkeys(BUNDLE_VARIABLES, str(bundle))


def _certificate(host: str, port: int, context: ssl.SSLContext) -> Mapping[str, Any]:
    with (
        socket.create_connection((host, port), timeout=CONNECT_LIMIT) as raw,
        context.wrap_socket(raw, server_hostname=host) as secure,
    ):
        return secure.getpeercert() or {}


def _names(certificate: Mapping[str, Any]) -> Iterator[str]:
    """Its names and addresses; without any the common name of its owner, as was once usual."""
    others = [name for kind, name in certificate.get("subjectAltName", ()) if "*" not in name]
    owner = [value for part in certificate.get("subject", ()) for key, value in part
             if key == "commonName"]  # fmt: skip
    yield from others or owner


def _addresses(host: str, port: int) -> set[str]:
    listed = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return {str(address[0]) for *_, address in listed}
