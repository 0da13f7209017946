"""`HttpSource`: one endpoint of a server, asked again and again without ever hurrying it."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from http import HTTPStatus

import httpx

from pytest_sglprof.errors import ServerRefused
from pytest_sglprof.server.address import is_local_url
from pytest_sglprof.server.transient import is_transient_status

MAX_BACKOFF = 5.0  # s between two tries of a server that does not answer
MAX_DOUBLINGS = 64  # of the interval; far beyond MAX_BACKOFF, and a float still holds it
REQUEST_TIMEOUT = 5.0  # s; an export of a profile stalls the server for longer: ask again then


class HttpSource:
    """Asks `path` every `interval` s; failures double that, up to 5 s, until it answers.

    api_key: the server's. clock: Unix time in s, of the samples. transport: for tests that
    control time. A server that is starting (503), stalled or gone only makes answers miss;
    one that wants another key or lacks the endpoint is an error, `ServerRefused`.
    """

    path = "/"

    def __init__(
        self,
        url: str,
        *,
        api_key: str = "",
        interval: float,
        clock: Callable[[], float] = time.time,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        self.url = url.rstrip("/")
        self.delay = interval
        self.failures = 0
        self.problem = ""
        self._interval = interval
        self._clock = clock
        self._transport = transport
        self._headers: Mapping[str, str] = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self._http: httpx.AsyncClient | None = None

    async def ask(self) -> httpx.Response | None:
        """One answer, or None; sets `delay`, the seconds until the next try."""
        if self._http is None:  # made in the loop that uses it
            self._http = httpx.AsyncClient(
                base_url=self.url,
                headers=self._headers,
                timeout=REQUEST_TIMEOUT,
                trust_env=not is_local_url(self.url),
                transport=self._transport,
                # Reading the certificates takes 30 ms, which plain HTTP does not need.
                verify=self.url.startswith("https:"),
            )
        try:
            response = await self._http.get(self.path)
        except httpx.RequestError as error:
            self.failed(str(error) or type(error).__name__)
            return None
        if not response.is_success:
            if is_transient_status(response.status_code):
                self.failed(f"answered {response.status_code}")
                return None
            if response.status_code in (HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN):
                raise self._refused(response, "the server's key", "set SGLPROF_API_KEY")
            raise self._refused(response, "an SGLang server that has it", self.without())
        self.failures, self.problem, self.delay = 0, "", self._interval
        return response

    def without(self) -> str:
        """What to do about a server that lacks the endpoint."""
        return "check the URL"

    def failed(self, problem: str) -> None:
        """Counts an answer that was no use, and backs off."""
        self.failures += 1
        self.problem = f"{self.url}{self.path}: {problem}"
        doubled = self._interval * 2.0 ** min(self.failures, MAX_DOUBLINGS)
        self.delay = min(max(MAX_BACKOFF, self._interval), doubled)

    async def close(self) -> None:
        """Closes the connections."""
        http, self._http = self._http, None
        if http is not None:
            await http.aclose()

    def _refused(self, response: httpx.Response, expected: str, hint: str) -> ServerRefused:
        return ServerRefused(
            f"{self.url}{self.path} answered {response.status_code}",
            status=response.status_code,
            expected=expected,
            hint=hint,
        )
