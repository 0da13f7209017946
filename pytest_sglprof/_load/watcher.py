"""`LoadWatch`: follows the load of one running server in a background thread."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import ssl
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from pytest_sglprof._load.disturbance import Disturbances
from pytest_sglprof._load.samples import BalanceSample, LoadSample, WaitSample
from pytest_sglprof._load.sources import LineReader, LogFollower, Sample

if TYPE_CHECKING:
    import pandas as pd

LOG_INTERVAL = 0.25  # s between two looks at a log; one costs a stat and a short read
MAX_SAMPLES = 500_000  # kept (35 h of two ranks at 2 Hz); the oldest beyond are dropped

Listener = Callable[[Sequence[Sample], float], None]


class Source(Protocol):
    """Where samples come from. delay: s until the next `poll`."""

    @property
    def delay(self) -> float: ...
    async def poll(self) -> Sequence[Sample]: ...
    async def close(self) -> None: ...


class LogSource:
    """The samples appended to a log from now on; with `from_end=False`, all of them.

    delay: s until the next `poll`; 0 while there is more to read. lines: what the reader knows.
    """

    delay = LOG_INTERVAL

    def __init__(self, path: Path, *, from_end: bool = True) -> None:
        self._path = path
        self._from_end = from_end
        self.lines = LineReader()
        self._log: LogFollower | None = None
        self._blocks: Iterator[list[Sample]] | None = None

    async def poll(self) -> list[Sample]:
        """The samples written since the last call, from at most two blocks of the log.

        More would keep the event loop from its other sources.
        """
        if self._log is None:
            self._log = LogFollower(self._path, from_end=self._from_end)
            self._log.lines = self.lines
        if self._blocks is None:
            self._blocks = self._log.blocks()
        samples = next(self._blocks, None)
        more = next(self._blocks, None) if samples is not None else None
        if more is None:
            self._blocks = None
        self.delay = LOG_INTERVAL if more is None else 0.0
        return [*(samples or ()), *(more or ())]

    async def close(self) -> None:
        """Closes the file."""
        log, self._log, self._blocks = self._log, None, None
        if log is not None:
            log.close()


class LoadWatch:
    """Collects samples from all sources, in order of arrival, for use during and after the watch.

    clock: gives the time, Unix s. keep: number of samples kept, the oldest are dropped; 0 if
    only listeners need them. An error in the thread, from a source or a listener, ends the
    watch; `check` and `stop` raise it. Use `start` and `stop`, or a `with` block. disturbances:
    the windows that are opened meanwhile, whose effect on the load does not count.
    """

    __module__ = "pytest_sglprof"

    def __init__(
        self,
        sources: Sequence[Source],
        *,
        clock: Callable[[], float] = time.time,
        keep: int = MAX_SAMPLES,
    ) -> None:
        self.disturbances = Disturbances(clock)
        self._sources = tuple(sources)
        self._clock = clock
        self._lock = threading.Lock()
        self._samples: deque[Sample] = deque(maxlen=keep)
        self._listeners: list[Listener] = []
        self._error: BaseException | None = None
        self._stopping = False
        self._loop: asyncio.AbstractEventLoop | None = None
        self._halt: asyncio.Event | None = None
        self._thread: threading.Thread | None = None

    @property
    def samples(self) -> tuple[LoadSample, ...]:
        """All load samples so far."""
        with self._lock:
            return tuple(s for s in self._samples if isinstance(s, LoadSample))

    @property
    def balances(self) -> tuple[BalanceSample, ...]:
        """All balances so far, as the server itself measured them."""
        with self._lock:
            return tuple(s for s in self._samples if isinstance(s, BalanceSample))

    @property
    def metrics(self) -> tuple[BalanceSample | WaitSample, ...]:
        """All that the server measured of itself so far."""
        with self._lock:
            return tuple(s for s in self._samples if not isinstance(s, LoadSample))

    @property
    def frame(self) -> pd.DataFrame:
        """The load samples so far, one row each; columns are the fields of `LoadSample`."""
        import pandas as pd

        names = [field.name for field in dataclasses.fields(LoadSample)]
        rows = [[getattr(sample, name) for name in names] for sample in self.samples]
        return pd.DataFrame(rows, columns=names)

    @property
    def problem(self) -> str:
        """Why a source has no samples now; "" if all of them work."""
        problems = (getattr(source, "problem", "") for source in self._sources)
        return next((problem for problem in problems if problem), "")

    def listen(self, listener: Listener) -> None:
        """Calls `listener(samples, now)` in the watching thread, after every poll of a source.

        `samples` may be empty; `now` is in Unix s.
        """
        with self._lock:
            self._listeners.append(listener)

    def unlisten(self, listener: Listener) -> None:
        """Stops calling `listener`; does nothing if it was never added."""
        with self._lock:
            if listener in self._listeners:
                self._listeners.remove(listener)

    def start(self) -> None:
        """Starts to watch, or resumes after `stop`."""
        if self._thread is None:
            with self._lock:
                self._stopping = False
            self._thread = threading.Thread(target=self._run, name="sglprof-watch", daemon=True)
            self._thread.start()

    def check(self) -> None:
        """Raises the error that ended the watching thread, if any."""
        with self._lock:
            error = self._error
        if error is not None:
            raise error

    def stop(self) -> None:
        """Ends the thread, closes the sources, and raises the thread's error, if any."""
        self._end()
        with self._lock:
            error, self._error = self._error, None
        if error is not None:
            raise error

    def __enter__(self) -> LoadWatch:
        self.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        if kind is None:
            self.stop()
        else:  # the block's own error matters more
            self._end()

    def _end(self) -> None:
        with self._lock:
            self._stopping = True
            if self._loop is not None and self._halt is not None:
                self._loop.call_soon_threadsafe(self._halt.set)
        thread, self._thread = self._thread, None
        if thread is not None:
            thread.join()

    def _run(self) -> None:
        try:
            asyncio.run(self._watch())
        except BaseException as error:  # handed over by stop or check
            with self._lock:
                self._error = error

    async def _watch(self) -> None:
        halt = asyncio.Event()
        with self._lock:
            self._loop, self._halt = asyncio.get_running_loop(), halt
            if self._stopping:
                halt.set()
        tasks = [asyncio.create_task(self._follow(source, halt)) for source in self._sources]
        ending = asyncio.create_task(halt.wait())
        try:
            await asyncio.wait([*tasks, ending], return_when=asyncio.FIRST_COMPLETED)
            for task in tasks:
                if task.done():
                    task.result()
        finally:
            with self._lock:
                self._loop = None
            halt.set()
            ending.cancel()
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, ending, return_exceptions=True)
            async with contextlib.AsyncExitStack() as closing:
                for source in self._sources:
                    closing.push_async_callback(source.close)

    async def _follow(self, source: Source, halt: asyncio.Event) -> None:
        loop = asyncio.get_running_loop()
        # Up to Python 3.11, `asyncio.wait_for` loses a cancellation that comes with its result.
        while not halt.is_set():
            began = loop.time()
            self._publish(await source.poll())
            await asyncio.sleep(max(0.0, source.delay - (loop.time() - began)))

    def _publish(self, samples: Sequence[Sample]) -> None:
        with self._lock:
            self._samples.extend(samples)
            listeners = list(self._listeners)
        self.disturbances.hear(samples)
        now = self._clock()
        for listener in listeners:
            listener(samples, now)


def server_watch(
    url: str,
    *,
    api_key: str = "",
    log: Path | None = None,
    metrics: bool = False,
    waits: bool = False,
    keep: int = MAX_SAMPLES,
    verify: ssl.SSLContext | bool = True,
) -> LoadWatch:
    """A `LoadWatch` of a running server, not started yet.

    log: the server's log, if it is on this machine. metrics: whether the server has
    `/metrics`. keep: as for `LoadWatch`. verify: as for `SglangClient`.
    """
    from pytest_sglprof._load.sources import (
        LOADS_INTERVAL,
        METRICS_INTERVAL,
        LoadsSource,
        MetricsSource,
    )

    sources: list[Source] = [
        LoadsSource(url, api_key=api_key, interval=LOADS_INTERVAL, verify=verify)
    ]
    if log is not None:
        sources.append(LogSource(log))
    if metrics:
        of_metrics = MetricsSource(url, api_key=api_key, interval=METRICS_INTERVAL, verify=verify)
        of_metrics.reads_waits = waits
        sources.append(of_metrics)
    return LoadWatch(sources, keep=keep)
