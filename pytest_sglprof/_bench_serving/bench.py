"""`BenchServing`, the value of the `bench_serving` fixture: calls SGLang's load driver.

result = bench_serving(num_prompts=200, random_input_len=1024)
with bench_serving.running(num_prompts=1000) as load:
    ...                                    # open windows while the load runs
load.result.ttft["p99"]
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pytest_sglprof._bench_serving.command import (
    DETAILS,
    LoadResult,
    bench_command,
    load_shape,
    measured_keywords,
    num_prompts,
    parse_result,
    record_line,
    requested_of,
    target_concurrency,
    usage_error,
    warm_up_keywords,
    warm_up_prompts,
)
from pytest_sglprof._bench_serving.driver import DriverProcess, Over
from pytest_sglprof._bench_serving.runs import DriverRuns, Progress, driver_failed
from pytest_sglprof._errors import LoadError, ServerRefused
from pytest_sglprof._redact import redact_command, redact_text
from pytest_sglprof._server.client import is_transient
from pytest_sglprof._server.deployment import servers_of

if TYPE_CHECKING:
    from pytest_sglprof._server.launch import Server

DEFAULT_TIMEOUT_S = 3600.0
FLUSH_ATTEMPTS = 20
FLUSH_PAUSE_S = 0.25


class RunningLoad:
    """A load that runs in the background; `result` is set at the end of its `with` block."""

    def __init__(self, driver: DriverProcess, target_concurrency: int) -> None:
        self.result: LoadResult | None = None
        self.target_concurrency = target_concurrency
        self.was_stopped = False
        self._driver = driver

    @property
    def is_running(self) -> bool:
        """True until the driver has ended."""
        return self._driver.status is None

    @property
    def over(self) -> threading.Event:
        """Set once the driver has ended."""
        return Over(lambda: not self.is_running)

    def stop(self) -> None:
        """Ends the load now; its `result` stays None."""
        self.was_stopped = self.is_running
        self._driver.stop()


class BenchServing:
    """Runs loads against one server.

    folder: for the driver's output and records (`load-1.log`, `load-1.jsonl`, …).
    progress: called about once a second with `warm-up 12 s` or `load 18/24, 5 s`. on_start: called
    with the target concurrency when the measured load (not the warm-up) starts; on_end: called
    when it ends. Both may be called from another thread. on_result: called with each finished
    load. results: the finished loads, in order. commands: of all measured loads, redacted, in the
    order in which they started; numbers: from 1, of those of them that finished.
    """

    __module__ = "pytest_sglprof"

    def __init__(
        self,
        server: Server,
        *,
        folder: Path,
        progress: Progress | None = None,
        on_start: Callable[[int], None] | None = None,
        on_end: Callable[[], None] | None = None,
        on_result: Callable[[LoadResult], None] | None = None,
    ) -> None:
        self.results: list[LoadResult] = []
        self.commands: list[tuple[str, ...]] = []
        self.numbers: list[int] = []
        self.server = server
        self.progress = progress
        self._runs = DriverRuns(server, folder=folder, progress=progress)
        self._on_start = on_start
        self._on_end = on_end
        self._on_result = on_result
        self._count = 0

    def __call__(
        self,
        *,
        warm_up: bool = True,
        keep_cache: bool = False,
        allow_failed: bool | int = False,
        timeout: float = DEFAULT_TIMEOUT_S,
        **options: Any,
    ) -> LoadResult:
        """Runs one load to its end.

        options: options of SGLang's load driver with `_` for `-` (`num_prompts=200`,
        `random_input_len=1024`, `max_concurrency=16`, …). Prompts are random token ids
        unless `dataset_name` chooses others. warm_up: first run a load of the same shape,
        unmeasured, with just enough prompts to fill the batch, unless one of that shape has
        run on this server. keep_cache: do not empty the
        server's prefix cache before the measured run; since the driver's seed is fixed, the
        run would find the prompts of an earlier one there. allow_failed: True, or how many
        requests may fail. timeout: s for each run. With steady_state_concurrency_ratio=0.8
        (SGLang 0.5.19 or newer) `raw["steady_state"]` has the figures of the longest span with
        at least that share of the peak concurrency.
        Raises LoadError if the driver or a request fails, ServerDied if the server ends,
        SettingsError for keywords that the driver does not have.
        """
        with self.running(
            warm_up=warm_up,
            keep_cache=keep_cache,
            allow_failed=allow_failed,
            timeout=timeout,
            **options,
        ) as load:
            pass
        assert load.result is not None  # only stop() leaves it empty
        return load.result

    @contextlib.contextmanager
    def running(
        self,
        *,
        warm_up: bool = True,
        keep_cache: bool = False,
        allow_failed: bool | int = False,
        timeout: float = DEFAULT_TIMEOUT_S,
        **options: Any,
    ) -> Iterator[RunningLoad]:
        """Runs the load during a `with` block, whose end waits for the end of the load.

        A block that raises ends the load at once. Arguments and errors are those of a call.
        """
        self._count += 1
        name = f"load-{self._count}"
        if warm_up and not self._is_warm(options):
            self._warm_up(name, options, timeout)
        flushed = not keep_cache and self._flush_cache()
        measured = measured_keywords(options)
        drop = () if "output_details" in options else DETAILS
        target = target_concurrency(options)
        with self._driver_run(name, measured, target=target, drop=drop) as run:
            driver, record, command = run
            load = RunningLoad(driver, target)
            self.commands.append(tuple(redact_command(command)))
            number = len(self.commands)
            yield load
            if load.was_stopped:
                return
            line = self._finish(driver, record, options, timeout)
            load.result = parse_result(
                line,
                requested=requested_of(driver.output(), num_prompts(options)),
                command=self.commands[number - 1],
                warmed_up=warm_up,
                cache_flushed=flushed,
                started=driver.started,
                drop=drop,
            )
        self._note_warm(options)
        self.results.append(load.result)
        self.numbers.append(number)
        if self._on_result is not None:
            self._on_result(load.result)
        self._refuse_failed(load.result, allow_failed, driver.log)

    def _warm_up(self, name: str, options: Mapping[str, Any], timeout: float) -> None:
        fewer = warm_up_keywords(options)
        with self._driver_run(f"{name}-warm-up", fewer) as (driver, record, _):
            self._finish(driver, record, fewer, timeout, what="warm-up")
        self._note_warm(options)

    def _is_warm(self, options: Mapping[str, Any]) -> bool:
        """Whether this server has run a load of this shape, with as many requests at once."""
        return self.server.warm_for.get(load_shape(options), 0) >= warm_up_prompts(options)

    def _note_warm(self, options: Mapping[str, Any]) -> None:
        shape, warm_for = load_shape(options), self.server.warm_for
        warm_for[shape] = max(warm_for.get(shape, 0), warm_up_prompts(options))

    def _flush_cache(self) -> bool:
        # The server refuses while a request runs, such as the last ones of the warm-up.
        problem: ServerRefused | None = None
        for attempt in range(FLUSH_ATTEMPTS):
            if attempt:
                time.sleep(FLUSH_PAUSE_S)
            try:
                if all(each.client.flush_cache() for each in servers_of(self.server).values()):
                    return True
                problem = None
            except ServerRefused as error:
                if not is_transient(error):
                    raise
                problem = error
        if problem is not None:
            raise problem
        return False

    @contextlib.contextmanager
    def _driver_run(
        self, name: str, options: Mapping[str, Any], *, target: int = 0, drop: Sequence[str] = ()
    ) -> Iterator[tuple[DriverProcess, Path, list[str]]]:
        """Runs the driver during the block. target: of the measured load; 0 for a warm-up."""
        server = self.server

        def command(record: Path) -> list[str]:
            return bench_command(
                server.python, server.driver_kind, server.url, self._runs.model, options, record
            )

        on_end = self._on_end if target else None
        with self._runs.run(name, command, drop=drop, on_end=on_end) as running:
            if target and self._on_start:
                self._on_start(target)
            yield running

    def _finish(
        self,
        driver: DriverProcess,
        record: Path,
        options: Mapping[str, Any],
        timeout: float,
        what: str = "load",
    ) -> str:
        """Waits for the driver's end; returns the last line of its record."""
        check = self._runs.check(driver, timeout, "bench_serving", what, num_prompts(options))
        status = driver.wait(check)
        if status == 0 and record.exists():
            return record_line(record.read_text("utf-8", "replace"))
        self._runs.raise_when_server_died()
        if refused := usage_error(redact_text(driver.output()), options):
            raise refused
        raise driver_failed(driver, "a result of all requests")

    def _refuse_failed(self, result: LoadResult, allow_failed: bool | int, log: Path) -> None:
        failed = result.requested - result.completed
        if not failed or allow_failed is True or failed <= int(allow_failed):
            return
        raise LoadError(
            f"{failed} of {result.requested} requests failed",
            expected="every request to complete",
            hint=f"read {log} and the server's log; allow_failed=True (or a number) allows it",
        )
