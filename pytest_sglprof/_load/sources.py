"""`HttpSource`: one endpoint of a server, asked again and again without ever hurrying it."""

from __future__ import annotations

import functools
import os
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from http import HTTPStatus
from pathlib import Path
from typing import IO

import httpx

from pytest_sglprof._errors import ServerRefused, SglprofError
from pytest_sglprof._load.onset import seem_unequal
from pytest_sglprof._load.samples import BalanceSample, LoadSample
from pytest_sglprof._ranks import Rank
from pytest_sglprof._server.client import (
    LOADS,
    DpLoad,
    is_local_url,
    is_transient_status,
    read_loads,
)
from pytest_sglprof._server.log_lines import Entry, EntryReader, read_balance, read_batch

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


# `LoadsSource`: load of every DP rank from `/v1/loads`, which needs no flag of the server.


LOADS_INTERVAL = 0.5  # s; a rank refreshes its figures every 15 decode steps
CLOSER = 0.1  # s; between two looks while the ranks seem unequal
CLOSER_LOOKS = 50  # in a row: what has lasted for 5 s is not chance


class LoadsSource(HttpSource):
    """Samples of all ranks at one moment, the moment of the answer.

    Short requests that begin together make waves, and four looks in 2 s can all fall into
    the moments between two of them. So it looks closer as soon as the ranks seem unequal.
    """

    path = LOADS
    _unequal_looks = 0

    async def poll(self) -> Sequence[LoadSample]:
        """The newest load of each rank; nothing where the server does not answer."""
        response = await self.ask()
        if response is None:
            return []
        try:
            loads = read_loads(response.json())
        except ValueError as error:
            self.failed(f"not the load of an SGLang server: {error}")
            return []
        samples = load_samples(loads, self._clock())
        self._unequal_looks = self._unequal_looks + 1 if seem_unequal(samples) else 0
        if 1 <= self._unequal_looks <= CLOSER_LOOKS:
            self.delay = min(CLOSER, self.delay)
        return samples

    def without(self) -> str:
        """Older servers have none."""
        return "follow the server's log instead: sglprof watch LOG --follow"


def load_samples(loads: Sequence[DpLoad], now: float) -> list[LoadSample]:
    """The loads at one moment; labels have no DP part where there is one DP rank."""
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


# `MetricsSource`: the balances that a server measures itself, from `/metrics`.


METRICS_INTERVAL = 2.0  # s; the server gathers all series of all its processes for each answer

_LINE = re.compile(
    r"^sglang:(dp_attention_token_imbalance_ratio|eplb_balancedness)_(sum|count)"
    r"(?:\{[^}]*\})? (\S+)",
    re.M,
)


class MetricsSource(HttpSource):
    """Means between two answers of what happened once a step.

    Needs `--enable-metrics`, and SGLANG_ENABLE_METRICS_DP_ATTENTION=1 for `dp_tokens` or
    an expert recorder with `--expert-balancedness-report-mode` for `experts`; without
    these series it gives nothing.
    """

    path = "/metrics"
    _before: dict[str, tuple[float, float]] | None = None

    async def poll(self) -> list[Sample]:
        """At most one sample of each kind: the mean over the steps since the last call."""
        response = await self.ask()
        if response is None:
            return []
        now, before = read_metrics(response.text), self._before
        self._before = now
        if before is None:
            return []
        moment = self._clock()
        samples: list[Sample] = []
        for name, (total, count) in now.items():
            old_total, old_count = before.get(name, (0.0, 0.0))
            steps = count - old_count
            if steps <= 0 or total <= old_total:
                continue
            mean = (total - old_total) / steps
            if name == "eplb_balancedness":
                samples.append(BalanceSample(moment, "", "experts", 1 / mean, source="metrics"))
            else:
                samples.append(BalanceSample(moment, "", "dp_tokens", mean, source="metrics"))
        return samples

    def without(self) -> str:
        """The endpoint is a switch of the server."""
        return "start the server with --enable-metrics"


def read_metrics(text: str) -> dict[str, tuple[float, float]]:
    """Name -> (sum, count) of the series that tell a balance, over all their labels."""
    found: dict[str, list[float]] = {}
    for name, part, value in _LINE.findall(text):
        try:
            number = float(value)
        except ValueError:
            continue
        found.setdefault(name, [0.0, 0.0])[part == "count"] += number
    return {name: (total, count) for name, (total, count) in found.items()}


# `LogFollower`: the samples of a log file while it grows, also across its rotation.


# Bytes read at once, so that a log of gigabytes costs no memory: 2,000 lines, some 20 ms.
BLOCK = 2**18
# A line longer than this is no batch line: server_args is the longest, with 20,000.
MAX_PARTIAL = 2**20


class LogFollower:
    """Reads what was appended since the last look; a file that is not there is empty.

    path: the log. from_end: skip what stands in it now. A file that was replaced
    (rotated by renaming) is read to its end before the new one; one that was cut short
    (copy and truncate) is read from its start. Close it, or use a `with` block.
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
        """The same as `poll` in pieces, for a log of any size."""
        if self._stream is None and not self._open():
            return
        yield from self._read()
        if self._was_replaced():
            yield from self._read()  # written between the two looks
            yield self.rest()
            self.close()
            if self._open():
                yield from self._read()

    def rest(self) -> list[Sample]:
        """The samples of a last line that has no end: of a log that is finished."""
        return self._take(b"\n")

    def close(self) -> None:
        """Closes the file; the next `poll` would begin anew."""
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
            return False  # renamed, and the new one is not there yet
        then = os.fstat(self._stream.fileno())
        return (now.st_dev, now.st_ino) != (then.st_dev, then.st_ino)


class FinishedLog:
    """The samples of a log that does not grow, block by block; each iteration reads it anew.

    So its size costs no memory. A last line without an end counts, too.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.has_milliseconds = False

    def __iter__(self) -> Iterator[list[Sample]]:
        with LogFollower(self.path) as log:
            yield from log.blocks()
            yield log.rest()
            self.has_milliseconds = log.lines.has_milliseconds


def read_log(path: Path) -> list[Sample]:
    """All samples of a finished log."""
    return [sample for block in FinishedLog(path) for sample in block]


# `LineReader`: load samples from the lines of a server's log, whatever else they hold.


Sample = LoadSample | BalanceSample
MOST_RANKS = 4096  # a number beyond is no rank's, and all ranks below it are kept an account of


class LineReader:
    """Reads line after line; never raises, and ignores what is no load.

    has_milliseconds: the server runs with SGLANG_LOG_MS=1, so stamps are that fine.
    """

    def __init__(self) -> None:
        self._entries = EntryReader()
        self.has_milliseconds = False

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
            if sample is not None:
                self.has_milliseconds = self.has_milliseconds or not entry.resolution
                yield sample


@functools.lru_cache(maxsize=4096)  # one text a rank, however many samples it has
def load_rank(tags: str) -> str:
    """`DP1` of ` DP1 PP0 TP4 EP4`: the parts that say whose requests they are.

    The TP, CP and EP ranks of one DP rank share its requests; the stages of a pipeline log
    each on their own. "" where no DP tag stands, and for tags that are none of SGLang's.
    """
    rank = Rank.parse(tags)
    if rank is None or rank.dp is None or rank.dp >= MOST_RANKS:
        return ""
    return Rank(dp=rank.dp, pp=rank.pp).label


def _load(entry: Entry) -> LoadSample | None:
    batch = read_batch(entry)
    if batch.running is None:
        return None
    return LoadSample(
        time=entry.time,
        rank=load_rank(entry.tags),
        running=batch.running,
        waiting=batch.waiting,
        tokens=batch.tokens,
        token_usage=batch.token_usage,
        throughput=batch.throughput,
        iteration=batch.iteration,
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
    )
