"""`launch` starts a server, `attach` connects to a running one; both return a `Server`."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from functools import cached_property
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from pytest_sglprof import _process as process
from pytest_sglprof._config.backends import Backend
from pytest_sglprof._config.model import LauncherName, ServerSpec
from pytest_sglprof._errors import (
    ServerDied,
    ServerNotReady,
    SettingsError,
    SglprofError,
)
from pytest_sglprof._nsys import NsysSession, NsysTool, find_nsys
from pytest_sglprof._ranks import Rank
from pytest_sglprof._server import command, lease, tls
from pytest_sglprof._server.arguments import option
from pytest_sglprof._server.client import (
    Presence,
    SglangClient,
    checked_url,
    is_local_url,
    patiently,
    port_of,
)
from pytest_sglprof._server.death import describe_status, explain_status
from pytest_sglprof._server.keeper.protocol import (
    EXIT_LIMIT,
    SILENCE_LIMIT,
    Clocks,
    Closed,
    Exited,
    Failed,
    KeeperLink,
    Plan,
    ProgressEvent,
    Started,
    Window,
    error_from,
    keeper_log_end,
    teardown_limit,
)
from pytest_sglprof._server.log import ServerLog, StartGrowth
from pytest_sglprof._server.nsys_sessions import session_for
from pytest_sglprof._server.sizes import ServerSizes

Progress = Callable[[str], None]


class Server:
    """A server that was ready when this object was made.

    spec: what it was started from, with what `--config FILE` holds among its `args` (only the
    name for an attached server). kind: the row of
    `LAUNCHERS`, "sglang" or "standin". folder: holds server.log, traces/, nsys/ and, while
    the server lives, tmp/. info: ``/server_info`` without its secrets. server_dir: for an
    attached server, (a folder on its machine, the same folder here). locked_clocks: UUID of
    a GPU -> MHz at which its clock is held. keeper_fault: after `stop`, how the keeper
    ended or failed although nobody had asked it to; None if it did not. problems: after `stop`,
    a line for each file that could not be written. started: Unix time in s. ready_s: s from
    then until the server was ready. Both are None for an attached server. driver_variables:
    what a load driver needs in its environment to reach it.
    """

    __module__ = "pytest_sglprof"

    def __init__(
        self,
        *,
        spec: ServerSpec,
        kind: LauncherName,
        url: str,
        folder: Path,
        python: str,
        client: SglangClient,
        info: Mapping[str, Any],
        log: ServerLog | None = None,
        nsys: NsysSession | None = None,
        server_dir: tuple[str, str] | None = None,
        shown_command: tuple[str, ...] = (),
        keeper: KeeperLink | None = None,
        pid: int = 0,
        created: float = 0.0,
        locked_clocks: Mapping[str, int] | None = None,
        started: float | None = None,
        ready_s: float | None = None,
        driver_variables: Mapping[str, str] | None = None,
        is_any_driver: bool = False,
    ) -> None:
        self.spec = spec
        self.kind = kind
        self.url = url
        parts = urlsplit(url)
        self.host = parts.hostname or ""
        self.port = port_of(parts)
        self.folder = folder
        self.python = python
        self.client = client
        self.info = dict(info)
        self.sizes = ServerSizes.from_info(info)
        self.log = log
        self.nsys = nsys
        self.server_dir = server_dir
        self.trace_root = Path(server_dir[1]) if server_dir else folder / "traces"
        self.command = shown_command
        self.keeper_fault: str | None = None
        self.problems: tuple[str, ...] = ()
        self.pid = pid
        self.attached = keeper is None
        self.locked_clocks = dict(locked_clocks or {})
        self._presence = Presence(url)
        self.started = started
        self.ready_s = ready_s
        self.driver_variables = dict(driver_variables or {})
        self.loads: list[Any] = []  # those that ended before its first window
        self.had_window = False
        self.past_windows: dict[Any, dict[float, Any]] = {}  # by kind and length, for `_run.cost`
        self.warm_for: dict[str, int] = {}  # shape of a load it has run -> requests at once
        self._is_any_driver = is_any_driver
        self._keeper = keeper
        self._created = created
        self._left: tuple[str, ...] | None = None

    def is_alive(self) -> bool:
        """True while the server's process runs; for an attached server, while its port is open.

        This costs the server nothing; one on another machine gets a connection every few
        seconds.
        """
        if self._keeper is None:
            return self._presence.is_there()
        return process.is_alive(self.pid, self._created)

    def exit_reason(self) -> ServerDied | None:
        """Why the server died, with its exit status and lines of its log; None while it lives."""
        if self.is_alive():
            return None
        if self._keeper is None:
            return ServerDied(
                f"nothing listens at {self.url} any more",
                hint="pytest-sglprof did not start this server: look at its log",
            )
        exited = self._keeper.wait_for(Exited, EXIT_LIMIT)
        if exited is None and self._keeper.death():
            return lost_keeper(self._keeper, self.folder, "while the server ran")
        return died(self.log, exited.status if exited else None)

    @cached_property
    def driver_kind(self) -> LauncherName:
        """The launcher whose load drivers are used: its own, or that of the embedded ones."""
        if self._is_any_driver and not command.has_load_driver(self.python):
            return "standin"
        return self.kind

    def scheduler_ranks(self) -> dict[int, Rank]:
        """pid -> rank, from the titles of processes; {} for a server on another machine."""
        if self._keeper is not None:
            return process.scheduler_ranks(self.pid)
        if not is_local_url(self.url):
            return {}
        pid = lease.listener_of(self.port)
        return process.scheduler_ranks(pid) if pid else {}

    def window_lock(self) -> AbstractContextManager[None]:
        """A lock to hold while a window is open; `LeaseError` if another process has one open."""
        return lease.window_lock(self.url)

    def note_load(self, result: object) -> None:
        """Keeps a load that is over if no window was open before: a window slows what follows."""
        if not self.had_window:
            self.loads.append(result)

    def announce_window(self, backend: Backend | None) -> None:
        """Tells the keeper which window to close before a teardown; None if none is open."""
        self.had_window = True
        if self._keeper is not None:
            self._keeper.send(Window(backend, time.time()))

    @property
    def left_behind(self) -> tuple[str, ...]:
        """What `stop` could not remove; empty before `stop`."""
        return self._left or ()

    def stop(self) -> tuple[str, ...]:
        """Stops the server and returns what could not be removed. Idempotent.

        An attached server keeps running.
        """
        if self._left is None:
            self.client.close()
            self._left = ()
            if self._keeper is not None:
                # One whose server has ended by itself ends, too.
                death = None if self._keeper.last_event(Exited) else self._keeper.death()
                self._keeper.close(_teardown(self.spec))
                self._left = self._keeper.left
                self.problems = self._keeper.problems
                self.keeper_fault = death or self._keeper.death()
        return self._left


def launch(
    spec: ServerSpec,
    *,
    folder: Path,
    nsys_path: str | None = None,
    progress: Progress | None = None,
) -> Server:
    """Starts the server of `spec` and returns when it is ready.

    folder: for this server alone, made if missing. progress: called about once a second with
    a line of text. Raises `ServerMissing`, `NsysError`, `LeaseError`, `ServerDied` or
    `ServerNotReady`, after everything that was started has been ended.
    """
    plan = _plan(spec, folder, nsys_path)
    keeper = KeeperLink(plan)
    try:
        started = wait_started(keeper, plan, progress)
        return _when_ready(keeper, plan, started, progress)
    except BaseException as error:
        keeper.close(_teardown(spec))
        if keeper.left and isinstance(error, SglprofError):
            left = f"left behind: {', '.join(keeper.left)}"
            error.hint = f"{error.hint}; {left}" if error.hint else left
        raise


def _plan(spec: ServerSpec, folder: Path, nsys_path: str | None) -> Plan:
    """Everything that the keeper needs; also hides the spec's secrets in this process.

    Raises `ServerMissing`, `NsysError` or `SettingsError`.
    """
    entry = command.find_entry(spec)
    tool = find_nsys(nsys_path) if spec.nsys else None
    merged = command.merged_spec(spec, entry)
    tls.trust(tls.certificates(merged.args), any_name=True)  # before a model is loaded for minutes
    api_key, admin_key = server_keys(merged)
    return Plan(
        spec=spec,
        entry=entry,
        folder=folder.absolute(),
        nsys=tool.path if tool else "",
        nsys_version=tool.version if tool else "",
        api_key=api_key,
        admin_key=admin_key,
        parent=os.getpid(),
        pythonpath=os.environ.get("PYTHONPATH", ""),
        private=command.keep_secrets([merged]),
    )


def _when_ready(
    keeper: KeeperLink, plan: Plan, started: Started, progress: Progress | None
) -> Server:
    """Waits until the server takes requests; raises as `wait_until_ready` does."""
    began, began_at = time.time(), time.monotonic()
    log = ServerLog(plan.folder / "server.log")
    spec = command.merged_spec(plan.spec, plan.entry)
    files = tls.certificates(spec.args)
    url = command.local_url(started.host, started.port, tls=bool(files))
    verify = tls.trust(files, any_name=True)
    client = SglangClient(url, api_key=plan.api_key, admin_key=plan.admin_key, verify=verify)
    try:
        wait_until_ready(keeper, client, log, plan.spec, progress)
        ready_s = time.monotonic() - began_at
        info = patiently(client.server_info)
    except BaseException:
        client.close()
        raise
    locked = keeper.last_event(Clocks)
    tool = NsysTool(plan.nsys, plan.nsys_version) if plan.nsys else None
    return Server(
        spec=spec,
        kind=plan.entry.kind,
        url=tls.named(url, verify),
        folder=plan.folder,
        python=plan.entry.python,
        client=client,
        info=info,
        log=log,
        nsys=NsysSession(tool, started.session, tmpdir=started.tmpdir) if tool else None,
        shown_command=started.command,
        keeper=keeper,
        pid=started.pid,
        created=started.created,
        locked_clocks=locked.clocks if locked else {},
        started=began,
        ready_s=ready_s,
        driver_variables=tls.bundle_variables(files, plan.folder),
    )


def attach(
    url: str,
    *,
    name: str = "attached",
    api_key: str = "",
    admin_key: str = "",
    server_dir: tuple[str, str] | None = None,
    nsys_session: str | None = None,
    finds_session: bool = False,
    nsys_path: str | None = None,
    python: str = "",
    ca: str = "",
    folder: Path,
) -> Server:
    """Connects to a server that somebody else runs, and never stops it.

    python: an interpreter on this machine that has SGLang's load driver ("": this one, and where
    it has none, the embedded driver).
    server_dir: (a folder on the server's machine, the same folder here).
    nsys_session: the name or ID of the nsys session that the server runs under. finds_session:
    find it otherwise; it is an error if there is none. ca: file of the certificates that its
    https is trusted by ("": the usual authorities).
    Raises `SettingsError`, `ServerUnreachable`, `ServerRefused` (401 without the key) or
    `NsysError`.
    """
    url = checked_url(url)
    files = tls.given_certificates(ca, url)
    verify = tls.trust(files, any_name=is_local_url(url))
    session = None
    if nsys_session or finds_session:
        session = session_for(url, find_nsys(nsys_path), nsys_session or "")
    client = SglangClient(url, api_key=api_key, admin_key=admin_key, verify=verify)
    try:
        info = patiently(client.server_info)
    except BaseException:
        client.close()
        raise
    folder.mkdir(parents=True, exist_ok=True)
    return Server(
        spec=ServerSpec(name=name, nsys=session is not None),
        kind=command.kind_from_info(info),
        url=tls.named(url, verify),
        folder=folder.absolute(),
        python=(process.which(python) or python) if python else sys.executable,
        is_any_driver=not python,
        client=client,
        info=info,
        nsys=session,
        server_dir=server_dir,
        driver_variables=tls.bundle_variables(files, folder),
    )


def server_keys(spec: ServerSpec) -> tuple[str, str]:
    """The API key and the admin key of a server, from its arguments or the environment."""
    keys = []
    for name, flag in (
        (spec.api_key_env, "--api-key"),
        (spec.admin_api_key_env, "--admin-api-key"),
    ):
        if name and not os.environ.get(name):
            raise SettingsError(
                f"server {spec.name!r}: the environment variable {name} is not set",
                expected=f"the server's {flag[2:]} as its value",
                hint=f"export {name}, or remove the setting that names it",
            )
        keys.append(option(spec.args, flag) or (os.environ[name] if name else ""))
    return keys[0], keys[1]


def died(log: ServerLog | None, status: int | None) -> ServerDied:
    """The error for a server that ended by itself."""
    reason = log.reason() if log else ()
    return ServerDied(
        f"the server died ({describe_status(status)})",
        expected="a running server",
        hint=_next(explain_status(status, reason), log),
        log=reason,
    )


def _next(meaning: str, log: ServerLog | None) -> str:
    read = f"read the whole log: {log.path}" if log else ""
    return "; ".join(filter(None, (meaning, read)))


def _teardown(spec: ServerSpec) -> float:
    return teardown_limit(spec.stop_timeout, nsys=spec.nsys)


# Waiting until a server has started and is ready.

PROGRESS_EVERY = 1.0  # s between two lines of progress
POLL = 0.25  # s between two requests to /ready
CAP = 4.0  # however much the log grows, the wait ends after this many times the limit
PATIENCE = 0.25  # share of the limit that is still waited after the log last grew

Show = Callable[[str], None]


def wait_started(keeper: KeeperLink, plan: Plan, progress: Show | None) -> Started:
    """Waits for the keeper to start the server's process; raises the error of a failed start."""
    deadline = time.monotonic() + SILENCE_LIMIT
    while time.monotonic() < deadline:
        event = keeper.next_event(PROGRESS_EVERY)
        if event is None:
            continue
        deadline = time.monotonic() + SILENCE_LIMIT
        if isinstance(event, Started):
            return event
        if isinstance(event, Failed):
            raise error_from(event)
        if isinstance(event, ProgressEvent) and progress is not None:
            progress(event.text)
        if isinstance(event, Closed):
            raise lost_keeper(keeper, plan.folder, "before it had started the server")
    raise ServerNotReady(
        f"the keeper process (pid {keeper.pid}) sent nothing for {SILENCE_LIMIT:.0f} s",
        expected="messages about the server's start",
        hint=f"read {plan.folder / 'keeper.log'}",
        log=keeper_log_end(plan.folder),
    )


def wait_until_ready(
    keeper: KeeperLink,
    client: SglangClient,
    log: ServerLog,
    spec: ServerSpec,
    progress: Show | None,
) -> None:
    """Returns when the server takes requests.

    Raises `ServerDied` when it ends, `ServerNotReady` after `spec.ready_timeout` s. While
    its log grows, not only by answers to these probes, it gets more time, up to four times as much.
    """
    clock = ReadyClock(spec.ready_timeout, time.monotonic())
    growth = StartGrowth(log)
    shown = 0.0
    while not client.is_ready():
        now = time.monotonic()
        clock.saw(growth.size(), now)
        if exited := keeper.last_event(Exited):
            raise starting_death(log, exited.status, clock.elapsed(now))
        if keeper.last_event(Closed):
            raise lost_keeper(keeper, log.path.parent, "before the server was ready")
        if clock.is_over(now):
            raise ServerNotReady(
                f"the server was not ready after {clock.elapsed(now):.0f} s",
                expected=f"an answer 200 at {client.url}/ready within {spec.ready_timeout:g} s",
                hint=f"raise ready_timeout, or read the whole log: {log.path}",
                log=log.reason() or [log.last_line()],
            )
        if progress is not None and now - shown >= PROGRESS_EVERY:
            phase = log.phase() or "starting"
            progress(f"server {spec.key}: {phase}, {clock.elapsed(now):.0f} s")
            shown = now
        time.sleep(POLL)


class ReadyClock:
    """Says when to stop waiting for a server. All times in s of one monotonic clock."""

    def __init__(self, limit: float, now: float) -> None:
        self._limit = limit
        self._began = now
        self._deadline = now + limit
        self._size = -1

    def saw(self, size: int, now: float) -> None:
        """Takes the log's size at `now`, in bytes; a log that has grown gives more time."""
        if size > self._size >= 0:
            longest = self._began + CAP * self._limit
            self._deadline = min(max(self._deadline, now + PATIENCE * self._limit), longest)
        self._size = max(size, self._size)

    def is_over(self, now: float) -> bool:
        """True once the server has used up its time."""
        return now >= self._deadline

    def elapsed(self, now: float) -> float:
        """Time since the start."""
        return now - self._began


def lost_keeper(keeper: KeeperLink, folder: Path, when: str) -> ServerDied:
    """The error for a server that was ended because its keeper had died."""
    return ServerDied(
        f"{keeper.death()} {when}; the server was ended with it",
        expected="a keeper that lives as long as its server",
        hint="find out what ended it (if memory ran out, the kernel's log says so), and read "
        f"{folder / 'keeper.log'}",
        log=keeper_log_end(folder),
    )


def starting_death(log: ServerLog, status: int | None, seconds: float) -> ServerDied:
    """The error for a server that ended before it was ready."""
    reason = log.reason()
    return ServerDied(
        f"the server ended with {describe_status(status)} after {seconds:.0f} s, before it was "
        "ready",
        expected="a server that becomes ready",
        hint=_next(explain_status(status, reason), log),
        log=reason,
    )
