"""Addresses of servers: one spelling for one server, and which are on this machine."""

from __future__ import annotations

import ipaddress
from urllib.parse import SplitResult, urlsplit

from pytest_sglprof.errors import SettingsError

_PORTS = {"http": 80, "https": 443}
_LOCALHOST = frozenset({"localhost", "localhost.localdomain"})
_LOCAL_NAMES = _LOCALHOST | {"ip6-localhost", "ip6-loopback"}


def checked_url(url: str) -> str:
    """``http://HOST:PORT`` in its one spelling; raises `SettingsError` for anything else.

    Lower case, no final dot, no default port; ``localhost`` and addresses that mean "all of
    this machine" become the loopback address.
    """
    full = url.strip() if "://" in url else f"http://{url.strip()}"
    try:
        parts = urlsplit(full)
        host, port = plain_host(parts.hostname or ""), port_of(parts)
        valid = parts.scheme in _PORTS and bool(host) and port > 0 and "@" not in parts.netloc
    except ValueError:
        valid = False
    if not valid or parts.path.strip("/") or parts.query or parts.fragment:
        raise SettingsError(
            f"--sglprof-server {url!r} is not the address of a server",
            expected="http://HOST:PORT",
            hint="give no path; keys come from SGLPROF_API_KEY and SGLPROF_ADMIN_API_KEY",
        )
    return url_to(parts.scheme, host, port)


def url_to(scheme: str, host: str, port: int) -> str:
    """The address at which this machine reaches a server that listens on `host`."""
    name = plain_host(host)
    shown = f"[{name}]" if ":" in name else name
    return f"{scheme}://{shown}" + ("" if _PORTS.get(scheme) == port else f":{port}")


def server_name(url: str) -> str:
    """``HOST:PORT``, the same for every address of one server: what its locks go by."""
    parts = urlsplit(url)
    host = "127.0.0.1" if is_local_url(url) else plain_host(parts.hostname or "")
    return f"{host}:{port_of(parts)}"


def is_local_url(url: str) -> bool:
    """True when `url` names this very machine."""
    host = plain_host(urlsplit(url).hostname or "")
    address = _address(host)
    return host in _LOCAL_NAMES or (address is not None and address.is_loopback)


def plain_host(host: str) -> str:
    """One spelling of a host, without brackets; "" for none."""
    name = host.strip("[]").lower().rstrip(".")
    if name in _LOCALHOST:
        return "127.0.0.1"
    address = _address(name)
    if address is None:
        return name
    if address.is_unspecified:
        # A server that listens on :: need not listen on 127.0.0.1 (asyncio's do not).
        return "127.0.0.1" if address.version == 4 else "::1"
    return str(address)


def port_of(parts: SplitResult) -> int:
    """The port of an address, that of its scheme where it names none."""
    return _PORTS.get(parts.scheme, 0) if parts.port is None else parts.port


def _address(name: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        address = ipaddress.ip_address(name)
    except ValueError:
        return None
    return getattr(address, "ipv4_mapped", None) or address
