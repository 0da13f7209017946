"""`SglangClient`: the few HTTP endpoints of an SGLang server that this plugin uses.

A failed request raises one of three errors: `ServerUnreachable` if there is no connection,
`ServerSilent` if there is no answer in time, and `ServerRefused` for an HTTP error status.
"""

from __future__ import annotations

import contextlib
import ipaddress
import math
import socket
import ssl
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path
from typing import Any, Literal, TypeVar
from urllib.parse import SplitResult, urlsplit

import httpx

from pytest_sglprof._errors import (
    ServerError,
    ServerRefused,
    ServerSilent,
    ServerUnreachable,
    SettingsError,
)
from pytest_sglprof._limits import refuse_deep, why_undecodable
from pytest_sglprof._redact import learn, redact, redact_text
from pytest_sglprof._server.sizes import MOST_RANKS, flat_info, invalid_size

PROBE_TIMEOUT = 5.0  # s; a readiness probe that takes longer counts as "not yet"
# The load of each DP rank, newest endpoint first; 0.4.4 has neither. Without `include` the first
# costs the server more.
LOADS_PATHS = ("/v1/loads?include=core,disagg", "/get_load")
ABSENT = (HTTPStatus.NOT_FOUND, HTTPStatus.METHOD_NOT_ALLOWED, HTTPStatus.NOT_IMPLEMENTED)
_DENIED = (HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN)
SHOWN_BODY = 300  # characters of an error's body; the real reason is in the server's log
# Bytes of an answer. `/server_info` has about 10 kB for each DP rank, the other answers less.
MOST_BYTES = 8 << 20


@dataclass(frozen=True)
class DpLoad:
    """Load of one DP rank. running, waiting: requests; tokens, token_usage: of its KV cache.

    waiting: in all of its queues; those of a prefill or decode server hold requests that are
    handed over, too. token_usage: 0 to 1. throughput: generated tokens / s. A figure that is
    absent is 0.
    """

    dp_rank: int
    running: int
    waiting: int = 0
    tokens: int = 0
    token_usage: float = 0.0
    throughput: float = 0.0


def read_loads(answer: Any) -> list[DpLoad]:
    """The load of each DP rank from an answer of `LOADS_PATHS`; ValueError for any other answer.

    `/get_load` answers with a list or one object, and has the waiting requests in `num_reqs`.
    """
    try:
        loads = answer["loads"] if isinstance(answer, dict) and "loads" in answer else answer
        if isinstance(loads, dict):
            loads = [loads]
        if not isinstance(loads, list):
            raise TypeError(f"a {type(loads).__name__} where loads are expected")
        if len(loads) > MOST_RANKS:
            raise ValueError(f"the loads of {len(loads)} DP ranks")
        return [_read_load(load) for load in loads]
    except (LookupError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"it does not give each DP rank's requests ({error!r})") from error


# Queues that a server has beside its waiting one, by their names in `/v1/loads`, old and new.
# `num_waiting_reqs` counts all of them but the last one: prefilled, and being handed over.
_QUEUES = (
    *("prefill_bootstrap_queue_reqs", "prefill_prealloc_queue_reqs"),
    *("decode_prealloc_queue_reqs", "decode_transfer_queue_reqs", "decode_retracted_queue_reqs"),
)
_HANDED_OVER = "prefill_inflight_queue_reqs"


def _read_load(load: Mapping[str, Any]) -> DpLoad:
    queues = load.get("disaggregation") or {}
    waiting = max(_count(load, "num_waiting_reqs"), sum(_count(queues, name) for name in _QUEUES))
    if "num_running_reqs" in load:
        running = _count(load, "num_running_reqs")
    elif "num_reqs" in load:
        running = max(_count(load, "num_reqs") - waiting, 0)
    else:
        running = _count({"load": load["load"]}, "load")
    return DpLoad(
        dp_rank=_count(load, "dp_rank"),  # null on a server with one
        running=running,
        waiting=waiting + _count(queues, _HANDED_OVER),
        tokens=_count(load, "num_used_tokens") or _count(load, "num_tokens"),
        token_usage=_gauge(load, "token_usage"),
        throughput=_gauge(load, "gen_throughput"),
    )


def _count(figures: Mapping[str, Any], name: str) -> int:
    """A number of requests, ranks or tokens, 0 if it is absent; ValueError for anything else."""
    value = figures.get(name)
    if value is None:
        return 0
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
        raise ValueError(f"{name} is {value!r}")
    return int(value)


def _gauge(figures: Mapping[str, Any], name: str) -> float:
    """A ratio or a rate, of which a server that has not computed yet may say NaN."""
    value = float(figures.get(name) or 0.0)
    return value if 0.0 <= value < math.inf else 0.0


class SglangClient:
    """Talks to one server. Threads may share it as long as none of them closes it.

    url: ``http://HOST:PORT``. api_key: the server's ``--api-key``. admin_key: its
    ``--admin-api-key``, which the profile endpoints require if it is set.
    timeout: s, for the quick endpoints. verify: whom to trust with https, as httpx takes it.
    """

    def __init__(
        self,
        url: str,
        *,
        api_key: str = "",
        admin_key: str = "",
        timeout: float = 30.0,
        verify: ssl.SSLContext | bool = True,
    ) -> None:
        learn((api_key, admin_key))
        self.verify = verify
        self.url = url.rstrip("/")
        self._api_key = api_key
        self._admin_key = admin_key
        self._stop_path = "/stop_profile"
        self._loads_path = LOADS_PATHS[0]
        self._http = httpx.Client(
            base_url=self.url,
            timeout=timeout,
            verify=verify,
            # Requests to this machine must not go through a proxy from the environment.
            trust_env=not is_local_url(url),
            # The server closes idle connections after 5 s. A request at that very moment is
            # reset, and cannot be repeated: /start_profile must not be sent twice.
            limits=httpx.Limits(max_keepalive_connections=0),
        )

    @property
    def api_key(self) -> str:
        """The key for ordinary requests, "" without one. For a load driver, never to be stored."""
        return self._api_key or self._admin_key

    @property
    def admin_key(self) -> str:
        """The key for requests that change the server, "" without one. Never to be stored."""
        return self._admin_key or self._api_key

    def is_ready(self) -> bool:
        """True when the server takes requests, False while it is starting.

        Asks ``/ready``, which costs nothing. A server without it answers 404, or 401 to a key
        that is not its own, and is asked ``/health``, which runs a one-token batch, so do not
        poll it inside a window. Raises `ServerRefused` if waiting cannot help: the key is wrong,
        or it has neither of the two; `ServerUnreachable` if its certificate is not trusted.
        """
        try:
            for path in ("/ready", "/health"):
                response = self._probe(path)
                if is_transient_status(response.status_code):
                    return response.status_code == HTTPStatus.OK
                # Until 0.5.20 any unknown path is 401 without the key, and so is this known one.
                if response.status_code in _DENIED and self._probe("/v1/models").status_code in (
                    _DENIED
                ):
                    break
        except httpx.RequestError as error:
            if _is_untrusted(error):
                raise _unreachable(f"{self.url}{path}", error) from error
            return False
        raise self._refusal(path, response, admin=False)

    def _probe(self, path: str) -> httpx.Response:
        headers = self._headers(admin=False)
        request = self._http.build_request("GET", path, headers=headers, timeout=PROBE_TIMEOUT)
        return self._answer(request, PROBE_TIMEOUT)

    def server_info(self) -> dict[str, Any]:
        """All resolved arguments of the server in one dict, with keys and tokens hidden."""
        path = "/server_info"
        response = self._request("GET", path, allow=ABSENT)
        if response.status_code in ABSENT:
            path = "/get_server_info"
            response = self._request("GET", path)
        info = flat_info(redact(self._json_object(response, path)))
        if problem := invalid_size(info):
            raise self._not_understood(response, path, f"its sizes: {problem}")
        return info

    def loads(self) -> list[DpLoad]:
        """Load of each DP rank now; `ServerRefused` with a status of `ABSENT` if none says it."""
        response = self._request("GET", self._loads_path, allow=ABSENT)
        if response.status_code in ABSENT:
            first, self._loads_path = self._loads_path, LOADS_PATHS[-1]
            if first == LOADS_PATHS[-1]:
                self._loads_path = LOADS_PATHS[0]
                raise self._refusal(" and ".join(map(_path, LOADS_PATHS)), response, admin=False)
            return self.loads()
        try:
            return read_loads(json_of(response))
        except ValueError as error:
            path = _path(self._loads_path)
            raise self._not_understood(response, path, f"its load: {error}") from error

    def metrics(self) -> str:
        """The answer of ``/metrics``; a server that does not answer quickly is not waited for."""
        return self._request("GET", "/metrics", timeout=PROBE_TIMEOUT).text

    def start_profile(self, params: Mapping[str, Any], timeout: float) -> None:
        """Opens a torch profile; `params` is the body of ``/start_profile``.

        Raises `ServerRefused` if the server refuses; only its log gives the reason.
        """
        self._request("POST", "/start_profile", admin=True, timeout=timeout, json=dict(params))

    def stop_profile(self, timeout: float) -> bool:
        """Ends the profile; False if none was running.

        Returns once the files of all ranks are written. A server without ``/stop_profile`` is
        asked ``/end_profile``, from then on at once.
        """
        status = self._stop(timeout)
        if status == HTTPStatus.NOT_FOUND and self._stop_path == "/stop_profile":
            self._stop_path = "/end_profile"
            status = self._stop(timeout)
            if status == HTTPStatus.NOT_FOUND:
                self._stop_path = "/stop_profile"
                raise ServerRefused(
                    f"{self.url} has neither /stop_profile nor /end_profile",
                    status=status,
                    expected="an SGLang server, which has one of the two",
                    hint="check that the URL is that of the server itself, not of a gateway",
                )
        return status == HTTPStatus.OK

    def _stop(self, timeout: float) -> int:
        allowed = (HTTPStatus.NOT_FOUND, HTTPStatus.INTERNAL_SERVER_ERROR)
        response = self._request(
            "POST", self._stop_path, admin=True, timeout=timeout, allow=allowed
        )
        return response.status_code

    def record_experts(self, action: Literal["start", "stop", "dump"], timeout: float) -> None:
        """Tells the recorder of experts what to do; only for a server that has one.

        Without ``--expert-distribution-recorder-mode`` this kills the server.
        """
        path = f"/{action}_expert_distribution_record"
        self._request("POST", path, admin=True, timeout=timeout)

    def flush_cache(self) -> bool:
        """Empties the prefix cache; False if it cannot because requests are running."""
        allowed = (HTTPStatus.BAD_REQUEST,)
        response = self._request("POST", "/flush_cache", admin=True, allow=allowed)
        return response.status_code == HTTPStatus.OK

    def close(self) -> None:
        """Closes the client, which cannot be used afterwards."""
        self._http.close()

    def _headers(self, admin: bool) -> dict[str, str]:
        key = (self._admin_key or self._api_key) if admin else (self._api_key or self._admin_key)
        return {"Authorization": f"Bearer {key}"} if key else {}

    def _request(
        self,
        method: str,
        path: str,
        *,
        admin: bool = False,
        timeout: float | None = None,
        json: Mapping[str, Any] | None = None,
        allow: tuple[int, ...] = (),
    ) -> httpx.Response:
        limit = self._http.timeout if timeout is None else httpx.Timeout(timeout)
        target, path = path, _path(path)
        seconds = limit.read or 0.0
        try:
            request = self._http.build_request(
                method, target, headers=self._headers(admin), timeout=limit, json=json
            )
            response = self._answer(request, seconds)
        except httpx.TimeoutException as error:
            raise ServerSilent(
                f"{self.url}{path} did not answer within {seconds:g} s",
                hint="a server does not answer while it exports a profile: take a smaller window "
                "or raise the timeout",
            ) from error
        except httpx.RequestError as error:
            raise _unreachable(f"{self.url}{path}", error) from error
        if response.is_success or response.status_code in allow:
            return response
        raise self._refusal(path, response, admin)

    def _answer(self, request: httpx.Request, seconds: float) -> httpx.Response:
        """The whole answer. httpx limits the time of each read, this that of all reads."""
        deadline = time.monotonic() + seconds
        response = self._http.send(request, stream=True)
        with contextlib.closing(response):
            content = bytearray()
            for part in response.iter_bytes():
                content += part
                if len(content) > MOST_BYTES:
                    raise ServerRefused(
                        f"{request.url} answers with more than {MOST_BYTES >> 20} MiB",
                        status=response.status_code,
                        expected="an SGLang server, whose answers are shorter",
                        hint="check the URL: another program may be listening there",
                    )
                if time.monotonic() > deadline:
                    raise httpx.ReadTimeout("the answer has no end", request=request)
        return httpx.Response(response.status_code, content=bytes(content), request=request)

    def _refusal(self, path: str, response: httpx.Response, admin: bool) -> ServerRefused:
        status = response.status_code
        if status in _DENIED:
            option = "admin_api_key_env (or api_key_env)" if admin else "api_key_env"
            return ServerRefused(
                f"{self.url}{path} answered {status}: the server requires a key",
                status=status,
                expected="the key that the server was started with",
                hint=f"name the environment variable that holds it in {option}",
            )
        body = redact_text(response.text).strip()
        return ServerRefused(
            f"{self.url}{path} answered {status}: {body[:SHOWN_BODY]}",
            status=status,
            hint="read the reason in the server's log" if status >= 500 else "",
        )

    def _json_object(self, response: httpx.Response, path: str) -> dict[str, Any]:
        try:
            document = json_of(response)
        except ValueError:
            document = None
        if isinstance(document, dict):
            return document
        raise self._not_understood(response, path, "a JSON object")

    def _not_understood(self, response: httpx.Response, path: str, wanted: str) -> ServerRefused:
        return ServerRefused(
            f"{self.url}{path} did not answer with {wanted}",
            status=response.status_code,
            expected="an SGLang server",
            hint="check the URL: another program may be listening there",
        )


def json_of(response: httpx.Response) -> Any:
    """The document of an answer; ValueError if it is none."""
    try:
        document = response.json()
        refuse_deep(document)
    except RecursionError as error:
        raise ValueError(why_undecodable(error)) from None
    return document


def _is_untrusted(error: httpx.RequestError) -> bool:
    """True if the server's certificate is not trusted, or is for another name."""
    return "CERTIFICATE_VERIFY_FAILED" in str(error)


def _unreachable(what: str, error: httpx.RequestError) -> ServerUnreachable:
    text = str(error) or type(error).__name__
    expected, hint = (
        "an SGLang server at this address",
        "check the URL, and that the server is running",
    )
    if _is_untrusted(error):
        text = f"its certificate is not trusted: {text}"
        expected = "a certificate of a known authority, for the name in the address"
        hint = (
            "name the server as its certificate does, or give the certificate (or that of its "
            "authority) in PEM format: --sglprof-server-ca FILE, --server-ca FILE of a command"
        )
    elif "[SSL" in text:
        hint = "if the server speaks plain http, write http://"
    elif isinstance(error, httpx.RemoteProtocolError):
        hint += "; if it speaks https, write https://"
    return ServerUnreachable(f"{what}: {text}", expected=expected, hint=hint)


def _path(target: str) -> str:
    return target.partition("?")[0]


# Addresses of servers: each server gets one spelling, and is on this machine or not.

_PORTS = {"http": 80, "https": 443}
_LOCALHOST = frozenset({"localhost", "localhost.localdomain"})
_LOCAL_NAMES = _LOCALHOST | {"ip6-localhost", "ip6-loopback"}


def checked_url(url: str) -> str:
    """``http://HOST:PORT`` in its one spelling; raises `SettingsError` for another kind of URL.

    The spelling is in lower case, without a final dot and without a default port.
    ``localhost`` and addresses such as 0.0.0.0 become the loopback address.
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
            hint="leave out paths, and set keys in SGLPROF_API_KEY and SGLPROF_ADMIN_API_KEY",
        )
    return url_to(parts.scheme, host, port)


def url_to(scheme: str, host: str, port: int) -> str:
    """The address at which this machine reaches a server that listens on `host`."""
    name = plain_host(host)
    shown = f"[{name}]" if ":" in name else name
    return f"{scheme}://{shown}" + ("" if _PORTS.get(scheme) == port else f":{port}")


def server_name(url: str) -> str:
    """``HOST:PORT``, the same for every address of one server; its locks are named after it."""
    parts = urlsplit(url)
    host = "127.0.0.1" if is_local_url(url) else plain_host(parts.hostname or "")
    return f"{host}:{port_of(parts)}"


def is_local_url(url: str) -> bool:
    """True if `url` is an address of this machine."""
    host = plain_host(urlsplit(url).hostname or "")
    address = _address(host)
    return host in _LOCAL_NAMES or (address is not None and address.is_loopback)


def plain_host(host: str) -> str:
    """A host in its one spelling, without brackets; "" for none."""
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
    """The port of an address; without one, that of its scheme."""
    return _PORTS.get(parts.scheme, 0) if parts.port is None else parts.port


def _address(name: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        address = ipaddress.ip_address(name)
    except ValueError:
        return None
    return getattr(address, "ipv4_mapped", None) or address


# Failures that may be gone at the next try. A server that starts, exports a profile or is
# restarted behind a gateway answers 503, resets connections or sends half an answer. A wrong
# key or a missing endpoint stays wrong.

PATIENCE = 10.0  # s of tries for an answer that is needed
PAUSE = 0.25  # s between two tries
WAITED_FOR = (HTTPStatus.REQUEST_TIMEOUT, HTTPStatus.TOO_EARLY, HTTPStatus.TOO_MANY_REQUESTS)

Answer = TypeVar("Answer")


def is_transient(error: ServerError) -> bool:
    """True for a failure that the next try may not have."""
    if isinstance(error, ServerRefused):
        return is_transient_status(error.status)
    return isinstance(error, ServerUnreachable)


def is_transient_status(status: int) -> bool:
    """True for a status that the next try may not have, or whose content may be valid then."""
    is_client_error = HTTPStatus.BAD_REQUEST <= status < HTTPStatus.INTERNAL_SERVER_ERROR
    return not is_client_error or status in WAITED_FOR


def patiently(ask: Callable[[], Answer], limit: float = PATIENCE) -> Answer:
    """Calls `ask` and returns its answer; for `limit` s it is called again after a failure.

    Raises the last error then. Raises at once if the failure is not transient, or if no
    process listens there.
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


# Whether an attached server still runs. A window asks ten times a second, and each connection
# would be work for the process that is being measured.

LOOK_EVERY = 5.0  # s between two connections to a server whose port cannot be looked up
CONNECT_LIMIT = 5.0  # s
_TABLES = (Path("/proc/net/tcp"), Path("/proc/net/tcp6"))
_LISTEN = "0A"


class Presence:
    """Whether the server at `url`, which has just answered, is still there.

    On this machine the kernel's list of listening ports is read. A server on another machine,
    or in a container with a forwarded port, gets a connection every `LOOK_EVERY` s.
    """

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        self._host, self._port = parts.hostname or "", port_of(parts)
        self._is_listed = is_local_url(url) and is_listening(self._port)
        self._looked = time.monotonic()
        self._answered = True

    def is_there(self) -> bool:
        """False once the server no longer listens."""
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
        # Listening sockets come first, so the long rest is seldom read.
        with contextlib.suppress(OSError), table.open() as lines:
            for line in lines:
                fields = line.split()
                if fields[3] == _LISTEN and fields[1].endswith(ending):
                    return True
    return False
