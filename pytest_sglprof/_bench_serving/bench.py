"""`BenchServing`, the value of the `bench_serving` fixture: calls SGLang's load driver.

result = bench_serving(num_prompts=200, random_input_len=1024)
with bench_serving.running(num_prompts=1000) as load:
    ...                                    # open windows while the load runs
load.result.ttft["p99"]
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pytest_sglprof._bench_serving.command import (
    LoadResult,
    bench_command,
    num_prompts,
    parse_result,
    reason,
    redact_record,
    requested_of,
    target_concurrency,
    usage_error,
    warm_up_keywords,
)
from pytest_sglprof._bench_serving.driver import DriverProcess
from pytest_sglprof._errors import LoadError, ServerRefused, do_every
from pytest_sglprof._files import atomic_write
from pytest_sglprof._redact import HIDDEN, learn_command, redact_command, redact_text
from pytest_sglprof._server.client import is_transient
from pytest_sglprof._server.command import secret_variables

if TYPE_CHECKING:
    from pytest_sglprof._server.launch import Server

Progress = Callable[[float, str], None]
DEFAULT_TIMEOUT_S = 3600.0
FLUSH_ATTEMPTS = 20
FLUSH_PAUSE_S = 0.25
_CHECK_EVERY_S = 1.0  # s; to check the server may take a request to it


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

    def stop(self) -> None:
        """Ends the load now; its `result` stays None."""
        self.was_stopped = self.is_running
        self._driver.stop()


class BenchServing:
    """Runs loads against one server.

    folder: for the driver's output and records (`load-1.log`, `load-1.jsonl`, …).
    progress: called about once a second with the seconds since the driver's start and
    its newest line. on_start: called with the target concurrency when the measured load
    (not the warm-up) starts; on_end: called when it ends. Both may be called from another
    thread. results: the finished loads, in order.
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
    ) -> None:
        self.results: list[LoadResult] = []
        self._server = server
        self._folder = folder
        self._progress = progress
        self._on_start = on_start
        self._on_end = on_end
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
        unmeasured, with just enough prompts to fill the batch. keep_cache: do not empty the
        server's prefix cache before the measured run; since the driver's seed is fixed, the
        run would find the prompts of an earlier one there. allow_failed: True, or how many
        requests may fail. timeout: s for each run.
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
        if warm_up:
            self._warm_up(name, options, timeout)
        flushed = not keep_cache and self._flush_cache()
        with self._driver_run(name, options, measured=True) as (driver, record, command):
            load = RunningLoad(driver, target_concurrency(options))
            yield load
            if load.was_stopped:
                return
            line = self._finish(driver, record, options, timeout)
            load.result = parse_result(
                line,
                requested=requested_of(driver.output(), num_prompts(options)),
                command=tuple(redact_command(command)),
                warmed_up=warm_up,
                cache_flushed=flushed,
                started=driver.started,
            )
        self.results.append(load.result)
        self._refuse_failed(load.result, allow_failed, driver.log)

    def _warm_up(self, name: str, options: Mapping[str, Any], timeout: float) -> None:
        fewer = warm_up_keywords(options)
        with self._driver_run(f"{name}-warm-up", fewer, measured=False) as (driver, record, _):
            self._finish(driver, record, fewer, timeout)

    def _flush_cache(self) -> bool:
        # The server refuses while a request runs, such as the last ones of the warm-up.
        problem: ServerRefused | None = None
        for attempt in range(FLUSH_ATTEMPTS):
            if attempt:
                time.sleep(FLUSH_PAUSE_S)
            try:
                if self._server.client.flush_cache():
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
        self, name: str, options: Mapping[str, Any], *, measured: bool
    ) -> Iterator[tuple[DriverProcess, Path, list[str]]]:
        """Runs the driver during the block; at the end no secret stays on disk."""
        server = self._server
        self._folder.mkdir(parents=True, exist_ok=True)
        # A hidden file until it is redacted, since the driver copies the server's keys into it.
        record = self._folder / f".{name}.raw"
        record.unlink(missing_ok=True)
        model = str(server.info.get("model_path") or "")
        if HIDDEN in model:  # a URL with a password; without it the driver asks the server
            model = ""
        command = bench_command(server.python, server.kind, server.url, model, options, record)
        learn_command(command)
        driver = DriverProcess(
            command,
            **self._environment(),
            log=self._folder / f"{name}.log",
            on_end=self._on_end if measured else None,
        )
        try:
            if measured and self._on_start:
                self._on_start(target_concurrency(options))
            yield driver, record, command
        finally:
            do_every(
                (
                    driver.stop,
                    partial(self._store_redacted, record, self._folder / f"{name}.jsonl"),
                    partial(self._redact_log, driver),
                )
            )

    def _environment(self) -> dict[str, dict[str, str]]:
        """The driver's variables: this process's, then the server's, and the server's key.

        `env` may be shown, `private` may not.
        """
        env = {**os.environ, **dict(self._server.spec.env), "PYTHONUNBUFFERED": "1"}
        # The key of another service must not be sent to this server.
        env.pop("OPENAI_API_KEY", None)
        if key := self._server.client.api_key:
            env["OPENAI_API_KEY"] = key
        private = secret_variables(self._server.spec, env)
        return {"env": {k: v for k, v in env.items() if k not in private}, "private": private}

    def _store_redacted(self, raw: Path, target: Path) -> None:
        if not raw.exists():
            return
        text = raw.read_text("utf-8", "replace")
        raw.unlink()
        atomic_write(target, redact_record(text))

    def _redact_log(self, driver: DriverProcess) -> None:
        output = driver.output()
        if (clean := redact_text(output)) != output:
            atomic_write(driver.log, clean)

    def _finish(
        self, driver: DriverProcess, record: Path, options: Mapping[str, Any], timeout: float
    ) -> str:
        """Waits for the driver's end; returns the last line of its record."""
        status = driver.wait(self._checker(driver, timeout))
        if status == 0 and record.exists():
            return record.read_text("utf-8", "replace").strip().rpartition("\n")[2]
        self._raise_when_server_died()
        output = redact_text(driver.output())
        if refused := usage_error(output, options):
            raise refused
        what = f"exit status {status}" if status else "exit status 0, but no result"
        raise LoadError(
            f"the load driver failed ({what})",
            expected="a result of all requests",
            hint=f"read the whole output: {driver.log}",
            log=reason(output),
        )

    def _checker(self, driver: DriverProcess, timeout: float) -> Callable[[], None]:
        checked = 0.0

        def check() -> None:
            nonlocal checked
            if driver.elapsed - checked < _CHECK_EVERY_S:
                return
            checked = driver.elapsed
            self._raise_when_server_died()
            last_line = redact_text(driver.last_line())
            if checked > timeout:
                raise LoadError(
                    f"the load driver did not end within {timeout:g} s",
                    hint=f"raise bench_serving(timeout=…), or read its output: {driver.log}",
                    log=[last_line],
                )
            if self._progress:
                self._progress(checked, last_line)

        return check

    def _raise_when_server_died(self) -> None:
        if not self._server.is_alive() and (died := self._server.exit_reason()):
            raise died

    def _refuse_failed(self, result: LoadResult, allow_failed: bool | int, log: Path) -> None:
        failed = result.requested - result.completed
        if not failed or allow_failed is True or failed <= int(allow_failed):
            return
        raise LoadError(
            f"{failed} of {result.requested} requests failed",
            expected="every request to complete",
            hint=f"read {log} and the server's log; allow_failed=True (or a number) allows it",
        )
