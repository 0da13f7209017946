"""Where load samples come from: endpoints of a server, and its log.

`LoadsSource` and `MetricsSource` poll an endpoint, `LogFollower` follows a log that grows,
`FinishedLog` reads one that does not.
"""

from __future__ import annotations

import asyncio
import functools
import os
import ssl
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from http import HTTPStatus
from pathlib import Path
from types import MappingProxyType
from typing import IO

import httpx

from pytest_sglprof._errors import ServerRefused, SglprofError
from pytest_sglprof._load.onset import seem_unequal
from pytest_sglprof._load.samples import BalanceSample, KnownRanks, LoadSample, WaitSample
from pytest_sglprof._ranks import Rank
from pytest_sglprof._server.client import (
    ABSENT,
    LOADS_PATHS,
    MOST_BYTES,
    DpLoad,
    is_local_url,
    is_transient_status,
    json_of,
    read_loads,
)
from pytest_sglprof._server.log_lines import (
    Entry,
    EntryReader,
    read_balance,
    read_batch,
    read_sizes,
)
from pytest_sglprof._server.series import BALANCEDNESS, SYNC_WAIT, Totals, between, read_totals

MAX_BACKOFF = 5.0  # s between two requests to a server that does not answer
MAX_DOUBLINGS = 64  # of the interval: far beyond MAX_BACKOFF, but no float overflow
REQUEST_TIMEOUT = 5.0  # s; an export of a profile stalls the server for longer


class HttpSource:
    """Polls `path` every `interval` s; each failure doubles that, up to 5 s, until it answers.

    api_key: of the server. clock: gives the time of the samples, Unix s. transport: for tests
    that control time. verify: whom to trust with https, as httpx takes it. While a server is
    starting (503), stalled or gone, answers are missing; if it refuses the key or lacks the
    endpoint, that is an error, `ServerRefused`.
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
        verify: ssl.SSLContext | bool = True,
    ) -> None:
        self.url = url.rstrip("/")
        self.delay = interval
        self.failures = 0
        self.problem = ""
        self._interval = interval
        self._clock = clock
        self._transport = transport
        # Reading the certificates takes 30 ms, which plain HTTP does not need.
        self._verify = verify if self.url.startswith("https:") else False
        self._headers: Mapping[str, str] = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self._http: httpx.AsyncClient | None = None

    async def ask(self) -> httpx.Response | None:
        """One answer, or None; sets `delay`, the seconds until the next request."""
        if self._http is None:  # must be made in the event loop that uses it
            self._http = httpx.AsyncClient(
                base_url=self.url,
                headers=self._headers,
                timeout=REQUEST_TIMEOUT,
                trust_env=not is_local_url(self.url),
                transport=self._transport,
                verify=self._verify,
            )
        try:
            response = await asyncio.wait_for(self._answer(self._http), REQUEST_TIMEOUT)
        except (httpx.RequestError, asyncio.TimeoutError) as error:
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

    async def _answer(self, http: httpx.AsyncClient) -> httpx.Response:
        """The whole answer, unless it is longer than any of an SGLang server."""
        content = bytearray()
        async with http.stream("GET", self.path) as response:
            async for part in response.aiter_bytes():
                content += part
                if len(content) > MOST_BYTES:
                    raise httpx.ReadError(f"an answer of more than {MOST_BYTES >> 20} MiB")
        return httpx.Response(response.status_code, content=bytes(content))

    def without(self) -> str:
        """Hint for a server that lacks the endpoint."""
        return "check the URL"

    def failed(self, problem: str) -> None:
        """Counts a failure, and backs off."""
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


# `/v1/loads`: the load of every DP rank, without any flag of the server.

LOADS_INTERVAL = 0.5  # s; a rank refreshes its figures every 15 decode steps
CLOSER = 0.1  # s between two requests while the ranks seem unequal
CLOSER_LOOKS = 50  # requests so close in a row: what has lasted for 5 s is not chance


class LoadsSource(HttpSource):
    """Samples of all ranks, dated at the moment of the answer; older servers have `/get_load`.

    Short requests that begin together make load come in waves, and four samples in 2 s can all
    fall between two waves. So it polls more often as soon as the ranks seem unequal.
    """

    path = LOADS_PATHS[0]
    _unequal_looks = 0

    async def poll(self) -> Sequence[LoadSample]:
        """The newest load of each rank; empty if the server does not answer."""
        try:
            response = await self.ask()
        except ServerRefused as error:
            if error.status not in ABSENT or self.path == LOADS_PATHS[-1]:
                raise
            self.path = LOADS_PATHS[-1]
            return await self.poll()
        if response is None:
            return []
        try:
            loads = read_loads(json_of(response))
        except ValueError as error:
            self.failed(f"not the load of an SGLang server: {error}")
            return []
        samples = load_samples(loads, self._clock())
        self._unequal_looks = self._unequal_looks + 1 if seem_unequal(samples) else 0
        if 1 <= self._unequal_looks <= CLOSER_LOOKS:
            self.delay = min(CLOSER, self.delay)
        return samples

    def without(self) -> str:
        """Hint for older servers, which lack it."""
        return "follow the server's log instead: sglprof watch LOG --follow"


def load_samples(loads: Sequence[DpLoad], now: float) -> list[LoadSample]:
    """The loads at one moment; the label is "" if there is only one DP rank."""
    return [
        LoadSample(
            time=now,
            rank="" if len(loads) == 1 else f"DP{load.dp_rank}",
            running=load.running,
            waiting=load.waiting,
            tokens=load.tokens,
            token_usage=load.token_usage,
            throughput=load.throughput,
            source="loads",
        )
        for load in loads
    ]


# `/metrics`: the balances that the server itself measures.

METRICS_INTERVAL = 2.0  # s; each answer makes the server gather the series of all its processes


class MetricsSource(HttpSource):
    """Balances, as means over the steps between two answers; with `reads_waits` also waits.

    Needs `--enable-metrics`, and SGLANG_ENABLE_METRICS_DP_ATTENTION=1 for `dp_tokens` or
    an expert recorder with `--expert-balancedness-report-mode` for `experts`; without
    these series there are no samples.
    """

    path = "/metrics"
    _before: dict[str, tuple[float, float]] | None = None
    _totals: Totals = MappingProxyType({})
    reads_waits = False  # those of the ranks' schedulers for each other

    async def poll(self) -> list[Sample]:
        """At most one sample of each kind: the mean over the steps since the last call."""
        response = await self.ask()
        if response is None:
            return []
        now, before = read_metrics(response.text), self._before
        totals, totals_before = read_totals(response.text), self._totals
        self._before, self._totals = now, totals
        if before is None:
            return []
        moment = self._clock()
        samples: list[Sample] = [
            WaitSample(moment, f"DP{wait.dp}", wait.seconds)
            for wait in between(totals_before, totals).sync_waits
            if self.reads_waits
        ]
        for name, (total, count) in now.items():
            old_total, old_count = before.get(name, (0.0, 0.0))
            steps = count - old_count
            if steps <= 0 or total <= old_total:
                continue
            mean = (total - old_total) / steps
            if name == BALANCEDNESS:
                samples.append(BalanceSample(moment, "", "experts", 1 / mean, source="metrics"))
            else:
                samples.append(BalanceSample(moment, "", "dp_tokens", mean, source="metrics"))
        return samples

    def without(self) -> str:
        """Hint for a server started without the endpoint."""
        return "start the server with --enable-metrics"


def read_metrics(text: str) -> dict[str, tuple[float, float]]:
    """Maps the balance series to (sum, count), added up over all labels."""
    sums: dict[str, tuple[float, float]] = {}
    for (name, _), more in read_totals(text).items():
        if name != SYNC_WAIT:
            total, count = sums.get(name, (0.0, 0.0))
            sums[name] = (total + more.sum, count + more.count)
    return sums


# The log, while it grows and across rotations, or when it is finished.

BLOCK = 2**18  # bytes read at once (2,000 lines, 20 ms), so that memory stays flat
MAX_PARTIAL = 2**20  # bytes of an unfinished line that are kept; the longest known has 20,000


class LogFollower:
    """Reads what was appended since the last call; a file that does not exist is empty.

    path: the log. from_end: skip its present contents. A file that was replaced (rotated by
    renaming) is read to its end before the new one; one that was truncated (rotated by
    copying) is read from its start. Close it, or use a `with` block.
    """

    def __init__(self, path: Path, *, from_end: bool = False) -> None:
        self.path = path
        self.lines = LineReader()
        self._stream: IO[bytes] | None = None
        self._partial = b""
        self._from_end = from_end
        if from_end:
            self._open()

    def poll(self) -> list[Sample]:
        """The samples of all lines that were completed since the last call."""
        return [sample for block in self.blocks() for sample in block]

    def blocks(self) -> Iterator[list[Sample]]:
        """The samples of `poll`, block by block, for a log of any size."""
        if self._stream is None and not self._open():
            return
        yield from self._read()
        if self._was_replaced():
            yield from self._read()  # written after the read and before the rotation
            yield self.rest()
            self.close()
            if self._open():
                yield from self._read()

    def rest(self) -> list[Sample]:
        """The sample of a last line without a newline, in a log that is finished."""
        return self._take(b"\n")

    def close(self) -> None:
        """Closes the file; the next `poll` would start again from the beginning."""
        if self._stream is not None:
            self._stream.close()
            self._stream = None

    def __enter__(self) -> LogFollower:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _open(self) -> bool:
        try:
            self._stream = self.path.open("rb")
        except FileNotFoundError:
            self._from_end = False  # a log that begins later is read from its start
            return False
        except OSError as error:
            raise SglprofError(
                f"the log {self.path} cannot be read: {error.strerror or error}",
                expected="the server's log",
            ) from error
        if self._from_end:
            self._stream.seek(0, os.SEEK_END)
            self._from_end = False
        return True

    def _read(self) -> Iterator[list[Sample]]:
        assert self._stream is not None
        if os.fstat(self._stream.fileno()).st_size < self._stream.tell():
            self._stream.seek(0)
            self._partial = b""
        while data := self._stream.read(BLOCK):
            yield self._take(data)

    def _take(self, data: bytes) -> list[Sample]:
        whole, _, rest = (self._partial + data).rpartition(b"\n")
        self._partial = rest if len(rest) <= MAX_PARTIAL else b""
        return self.lines.read(whole.decode("utf-8", "replace").split("\n"))

    def _was_replaced(self) -> bool:
        assert self._stream is not None
        try:
            now = self.path.stat()
        except OSError:
            return False  # renamed, and the new file does not exist yet
        then = os.fstat(self._stream.fileno())
        return (now.st_dev, now.st_ino) != (then.st_dev, then.st_ino)


class FinishedLog:
    """The samples of a log that does not grow, block by block, so that memory stays flat.

    Each iteration reads the file again. A last line without a newline counts too. lines: what
    the reader of the newest iteration knows.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.lines = LineReader()

    @property
    def has_milliseconds(self) -> bool:
        """Whether the stamps have them."""
        return self.lines.has_milliseconds

    def __iter__(self) -> Iterator[list[Sample]]:
        with LogFollower(self.path) as log:
            self.lines = log.lines
            yield from log.blocks()
            yield log.rest()


def read_log(path: Path) -> list[Sample]:
    """All samples of a finished log."""
    return [sample for block in FinishedLog(path) for sample in block]


# From the lines of a log to samples.

Sample = LoadSample | BalanceSample | WaitSample
MOST_RANKS = 4096  # larger numbers are not DP ranks; every rank below one that is seen is tracked


class LineReader:
    """Reads load samples from log lines; ignores all other lines, and never raises.

    has_milliseconds: True if the stamps have them, as the server runs with SGLANG_LOG_MS=1.
    known: the DP ranks of which lines with a prefix tell, see `Servers`.
    """

    def __init__(self) -> None:
        self._entries = EntryReader()
        self.has_milliseconds = False
        self.known: dict[str, KnownRanks] = {}

    @property
    def unreadable(self) -> int:
        """How many batch lines have a stamp that cannot be read."""
        return self._entries.unreadable

    @property
    def is_own_format(self) -> bool:
        """Whether an entry was in a format of the user's."""
        return self._entries.is_own_format

    def read(self, lines: Iterable[str]) -> list[Sample]:
        """The samples of these lines, in their order."""
        return [*self._samples(lines)]

    def _samples(self, lines: Iterable[str]) -> Iterator[Sample]:
        for entry in self._entries.read(lines):
            sample: Sample | None = None
            if entry.is_batch:
                sample = _load(entry)
            elif entry.kind == "experts":
                sample = _experts(entry)
            elif entry.kind == "arguments":
                self._know(entry)
            if sample is not None:
                self.has_milliseconds = self.has_milliseconds or not entry.resolution
                yield sample

    def _know(self, entry: Entry) -> None:
        sizes = read_sizes(entry)
        if sizes is not None and sizes.total <= MOST_RANKS:
            before = self.known.get(entry.server, KnownRanks())
            self.known[entry.server] = before | KnownRanks(sizes.here, sizes.total)


@functools.lru_cache(maxsize=4096)  # each rank has one such string, in many lines
def load_rank(tags: str) -> str:
    """The parts of a log line's tags that identify the load: `DP1` of ` DP1 PP0 TP4 EP4`.

    The TP, CP and EP ranks of one DP rank share its requests, while each pipeline stage logs
    its own. "" without a DP tag.
    """
    rank = Rank.from_tags(tags)
    if rank is None or rank.dp is None or rank.dp >= MOST_RANKS:
        return ""
    return Rank(dp=rank.dp, pp=rank.pp).label


def _load(entry: Entry) -> LoadSample | None:
    batch = read_batch(entry)
    running = batch.running
    if running is None and "#unbootstrapped-req" in entry.text:
        running = batch.held
    if running is None:
        return None
    return LoadSample(
        time=entry.time,
        rank=load_rank(entry.tags),
        running=running,
        waiting=batch.waiting,
        tokens=batch.tokens,
        token_usage=batch.token_usage,
        throughput=batch.throughput,
        iteration=batch.iteration,
        server=entry.server,
    )


def _experts(entry: Entry) -> BalanceSample | None:
    balance = read_balance(entry)
    if balance is None:
        return None
    return BalanceSample(
        time=entry.time,
        rank=load_rank(entry.tags),
        kind="experts",
        factor=1.0 / balance.balancedness,
        iteration=balance.iteration,
        server=entry.server,
    )
