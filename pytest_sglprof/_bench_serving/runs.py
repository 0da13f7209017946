"""`DriverRuns`: runs drivers against one server, and keeps secrets out of what they leave."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from pytest_sglprof._bench_serving.command import progress_of, reason, redact_record
from pytest_sglprof._bench_serving.driver import DriverProcess
from pytest_sglprof._errors import LoadError, do_every
from pytest_sglprof._files import atomic_write
from pytest_sglprof._redact import HIDDEN, learn_command, redact_text
from pytest_sglprof._server.command import secret_variables

if TYPE_CHECKING:
    from pytest_sglprof._server.launch import Server

Progress = Callable[[str], None]
_CHECK_EVERY_S = 1.0  # s; to check the server may take a request to it


class DriverRuns:
    """Runs drivers in `folder`, which keeps their output and records, redacted.

    progress: called about once a second with what runs, and for how long.
    """

    def __init__(self, server: Server, *, folder: Path, progress: Progress | None = None) -> None:
        self._server = server
        self._folder = folder
        self._progress = progress

    @property
    def model(self) -> str:
        """The server's model; "" for a URL with a password: the driver then asks the server."""
        model = str(self._server.info.get("model_path") or "")
        return "" if HIDDEN in model else model

    @contextlib.contextmanager
    def run(
        self,
        name: str,
        make_command: Callable[[Path], list[str]],
        *,
        env: Mapping[str, str] | None = None,
        before: str = "",
        drop: Sequence[str] = (),
        on_end: Callable[[], None] | None = None,
    ) -> Iterator[tuple[DriverProcess, Path, list[str]]]:
        """Runs a driver during the block; at the end no secret stays on disk.

        Yields the process, the file of its record, and its command. make_command: its command,
        given that file. env: further variables. before: source that the driver's interpreter
        runs before it. drop: keys of the record that are not kept. on_end: see `DriverProcess`.
        """
        self._folder.mkdir(parents=True, exist_ok=True)
        # A hidden file until it is redacted, since the driver copies the server's keys into it.
        record = self._folder / f".{name}.raw"
        record.unlink(missing_ok=True)
        command = make_command(record)
        learn_command(command)
        driver = DriverProcess(
            command,
            **self._environment(env or {}),
            before=before,
            log=self._folder / f"{name}.log",
            on_end=on_end,
        )
        try:
            yield driver, record, command
        finally:
            do_every(
                (
                    driver.stop,
                    partial(_store_redacted, record, self._folder / f"{name}.jsonl", drop),
                    partial(_redact_log, driver),
                )
            )

    def _environment(self, more: Mapping[str, str]) -> dict[str, dict[str, str]]:
        """The driver's variables: this process's, then the server's, and the server's key.

        `env` may be shown, `private` may not.
        """
        env = {**os.environ, **dict(self._server.spec.env), "PYTHONUNBUFFERED": "1", **more}
        env |= self._server.driver_variables
        # The key of another service must not be sent to this server.
        env.pop("OPENAI_API_KEY", None)
        if key := self._server.client.api_key:
            env["OPENAI_API_KEY"] = key
        private = secret_variables(self._server.spec, env)
        return {"env": {k: v for k, v in env.items() if k not in private}, "private": private}

    def check(
        self, driver: DriverProcess, timeout: float, call: str, what: str, requests: int = 0
    ) -> Callable[[], None]:
        """A function that raises once the driver is too late or the server has died.

        It looks once a second, however often it is called. call: whose `timeout` that is. what:
        runs, of how many requests, for the progress.
        """
        checked = 0.0

        def check() -> None:
            nonlocal checked
            if driver.elapsed - checked < _CHECK_EVERY_S:
                return
            checked = driver.elapsed
            self.raise_when_server_died()
            if checked > timeout:
                raise LoadError(
                    f"the load driver did not end within {timeout:g} s",
                    hint=f"raise {call}(timeout=…), or read its output: {driver.log}",
                    log=[redact_text(driver.last_line())],
                )
            if self._progress:
                done = progress_of(driver.newest_output(), requests)
                self._progress(
                    f"{what}{done}, {checked:.0f} s" if done else f"{what} {checked:.0f} s"
                )

        return check

    def raise_when_server_died(self) -> None:
        """Raises the reason for which the server ended, if it did."""
        if not self._server.is_alive() and (died := self._server.exit_reason()):
            raise died


def driver_failed(driver: DriverProcess, expected: str) -> LoadError:
    """The error of a driver that has ended without the result that was expected."""
    status = driver.status
    what = f"exit status {status}" if status else "exit status 0, but no result"
    if not driver.log.parent.is_dir():
        what += f"; its folder {driver.log.parent} is gone"
    return LoadError(
        f"the load driver failed ({what})",
        expected=expected,
        hint=f"read the whole output: {driver.log}",
        log=reason(redact_text(driver.output())),
    )


def _store_redacted(raw: Path, target: Path, drop: Sequence[str]) -> None:
    if not raw.exists():
        return
    text = raw.read_text("utf-8", "replace")
    raw.unlink()
    atomic_write(target, redact_record(text, drop))


def _redact_log(driver: DriverProcess) -> None:
    output = driver.output()
    if (clean := redact_text(output)) != output:
        atomic_write(driver.log, clean)
