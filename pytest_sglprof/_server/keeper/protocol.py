"""The messages between pytest and the keeper, pytest's end of the pipe, and shared limits.

A message is one line of JSON. Its kind is in `op` (to the keeper's stdin) or `event` (from
its stdout). It is written by `json` because a secret may hold bytes that are not UTF-8:
Python stands these in as surrogates, which msgspec refuses to write.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import secrets
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Container, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import msgspec

from pytest_sglprof import _errors as errors
from pytest_sglprof import _process as process
from pytest_sglprof._config.backends import Backend
from pytest_sglprof._config.model import ServerSpec
from pytest_sglprof._errors import LeaseError, ServerError, SglprofError
from pytest_sglprof._files import RUN_FILE, unwritten
from pytest_sglprof._nsys import QUICK as NSYS_QUICK
from pytest_sglprof._process import KILL_WAIT, TERM_WAIT, ProcessId
from pytest_sglprof._server import lease
from pytest_sglprof._server.command import PACKAGE_ROOT, Entry
from pytest_sglprof._server.journal import KeptServer, end_server, note_server, run_of
from pytest_sglprof._server.nvml import unlock_clocks

if TYPE_CHECKING:
    import psutil


LIFE = "SGLPROF_LIFE"  # set for every process that a keeper starts; holds the plan's `life`
TMPDIR_LINK = "sglprof-"  # begins the name of a link, which ends in the plan's `life`


@dataclass(frozen=True)
class Plan:
    """Everything that a keeper needs in order to start a server.

    nsys: path of the command, "" to start without it. parent: pid of pytest. pythonpath:
    pytest's PYTHONPATH; the keeper runs with a longer one, which the server's interpreter
    must not inherit. private: pytest's secret variables; the keeper is started without
    them because nsys stores the environment of every process. life: a name that no other
    run of a server has, see `LIFE`.
    """

    spec: ServerSpec
    entry: Entry
    folder: Path
    nsys: str = ""
    nsys_version: str = ""
    api_key: str = ""
    admin_key: str = ""
    parent: int = 0
    pythonpath: str = ""
    private: Mapping[str, str] = field(default_factory=dict)
    life: str = field(default_factory=partial(secrets.token_hex, 6))

    @property
    def session_name(self) -> str:
        """The name of the server's nsys session."""
        return f"sglprof-{self.parent}-{self.life}"

    @property
    def short_tmpdir(self) -> Path:
        """A link to the server's temporary folder, used if the path of that is too long."""
        return Path(tempfile.gettempdir()) / f"{TMPDIR_LINK}{self.life}"


class Launch(msgspec.Struct, frozen=True, tag_field="op", tag="launch"):
    """The first message, sent once. It holds keys, so it is sent through a pipe, never stored."""

    plan: Plan


class Window(msgspec.Struct, frozen=True, tag_field="op", tag="window"):
    """A window is open since Unix time `opened` (s); with backend None no window is open."""

    backend: Backend | None
    opened: float


class Stop(msgspec.Struct, frozen=True, tag_field="op", tag="stop"):
    """Tear the server down. The end of the pipe means the same."""


class ProgressEvent(msgspec.Struct, frozen=True, tag_field="event", tag="progress"):
    """Progress of the start, as a line for people."""

    text: str


class Clocks(msgspec.Struct, frozen=True, tag_field="event", tag="clocks"):
    """GPUs whose clocks are locked: UUID -> MHz."""

    clocks: dict[str, int]


class Started(msgspec.Struct, frozen=True, tag_field="event", tag="started"):
    """The server's process runs.

    created: Unix time in s at which it started. session: its nsys session, "" without nsys.
    """

    pid: int
    created: float
    host: str
    port: int
    command: tuple[str, ...]
    session: str
    tmpdir: Path


class Failed(msgspec.Struct, frozen=True, tag_field="event", tag="failed"):
    """The server could not be started. error: name of the error's class; fields: its attributes."""

    error: str
    fields: dict[str, Any]


class Exited(msgspec.Struct, frozen=True, tag_field="event", tag="exited"):
    """The server ended by itself. status: its exit status, None if unknown."""

    status: int | None


class Stopped(msgspec.Struct, frozen=True, tag_field="event", tag="stopped"):
    """The last message. left: what the teardown could not remove.

    problems: a line for each file that could not be written.
    """

    left: tuple[str, ...]
    problems: tuple[str, ...] = ()


class Closed(msgspec.Struct, frozen=True, tag_field="event", tag="closed"):
    """The pipe from the keeper has ended. Not sent: `KeeperLink` adds it."""


Order = Launch | Window | Stop
Event = ProgressEvent | Clocks | Started | Failed | Exited | Stopped | Closed


def encode(message: Order | Event) -> bytes:
    """One message as a line."""
    fields = msgspec.to_builtins(message, enc_hook=str)  # only paths need the hook
    return json.dumps(fields).encode() + b"\n"


def decode_order(line: bytes | str) -> Order:
    """The inverse of `encode`; ValueError for what is none of these messages."""
    order: Order = msgspec.convert(json.loads(line), Order, dec_hook=_path)
    return order


def decode_event(line: bytes | str) -> Event:
    """The inverse of `encode`; ValueError for what is none of these messages."""
    event: Event = msgspec.convert(json.loads(line), Event, dec_hook=_path)
    return event


def error_message(error: SglprofError) -> Failed:
    """An error as a message, with all its attributes."""
    return Failed(type(error).__name__, dict(vars(error)))


def error_from(message: Failed) -> SglprofError:
    """The error in a message; a `ServerError` if its class is unknown."""
    kind = getattr(errors, message.error, None)
    if not (isinstance(kind, type) and issubclass(kind, SglprofError)):
        kind = ServerError
    blank = vars(ServerError("the keeper failed and did not say why"))
    log = tuple(message.fields.get("log", ()))
    return kind.restored({**blank, **message.fields, "log": log})


def _path(kind: type[Path], text: str) -> Path:
    return kind(text)


# Pytest's end of the pipe to the keeper.

LOOK_EVERY = 0.5  # s between two checks whether the keeper runs
READ_LIMIT = 5.0  # s to read the last messages of a keeper that has ended

_Event = TypeVar("_Event")


class KeeperLink:
    """Starts a keeper, talks to it, and cleans up after it if it is killed.

    Events are kept until they are asked for. left: what could not be removed. problems: a line
    for each file that could not be written.
    """

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._log = plan.folder / "keeper.log"
        self._closed = threading.Event()
        self._ending = threading.Event()
        self._fault: str | None = None
        self.left: tuple[str, ...] = ()
        self.problems: tuple[str, ...] = ()
        self._events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self._last: dict[type[Any], Any] = {}
        plan.folder.mkdir(parents=True, exist_ok=True)
        with self._log.open("ab") as errors:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "pytest_sglprof._server.keeper"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                env={**_environment(plan.private), LIFE: plan.life},
                start_new_session=True,
            )
        self._began = process.create_time(self.pid) or time.time()
        self._server = self._kept_server()
        with self._writing():
            note_server(self._server, run_of(plan.folder))
        threading.Thread(target=self._read, name="sglprof keeper", daemon=True).start()
        self._watch = threading.Thread(
            target=self._watch_over, name="sglprof keeper watch", daemon=True
        )
        self._watch.start()
        self.send(Launch(plan))

    @property
    def pid(self) -> int:
        """The keeper's pid."""
        return self._process.pid

    def is_running(self) -> bool:
        """True while the keeper's process runs."""
        return self._process.poll() is None

    def send(self, order: Order) -> None:
        """Sends one message; silently ignored if the keeper has exited."""
        stream = self._process.stdin
        if stream is None or stream.closed:
            return
        with contextlib.suppress(OSError):
            stream.write(encode(order))
            stream.flush()

    def next_event(self, timeout: float) -> Event | None:
        """The next event in order; None if none arrives within `timeout` s."""
        try:
            return self._events.get(timeout=max(timeout, 0.0))
        except queue.Empty:
            return None

    def last_event(self, kind: type[_Event]) -> _Event | None:
        """The newest event of this kind, whether `next_event` has returned it or not."""
        return self._last.get(kind)

    def wait_for(self, kind: type[_Event], timeout: float) -> _Event | None:
        """Waits for an event of this kind; None after `timeout` s or once the keeper has ended."""
        deadline = time.monotonic() + timeout
        while (event := self.last_event(kind)) is None and time.monotonic() < deadline:
            if self.last_event(Closed) is not None:
                return self.last_event(kind)
            time.sleep(0.02)
        return event

    def death(self) -> str | None:
        """How the keeper ended; None while it runs, or if it ended because `close` asked it to."""
        status = self._process.poll()
        if status is None and self.last_event(Closed) is not None:
            with contextlib.suppress(subprocess.TimeoutExpired):  # about to end
                status = self._process.wait(READ_LIMIT)
        if status is None or (self._ending.is_set() and self.last_event(Stopped) is not None):
            return None
        who = f"the keeper process (pid {self.pid})"
        if self._fault:
            return f"{who} {self._fault}, so it was killed"
        if self.last_event(Stopped) is not None:
            return f"{who} was sent SIGTERM by another process"
        how = f"was killed by signal {-status}" if status < 0 else f"ended with status {status}"
        return f"{who} {how}"

    def close(self, timeout: float) -> bool:
        """Asks for the teardown and waits for it; afterwards `left` holds what it left.

        False if the keeper was dead, stayed stopped or took more than `timeout` s. Then it
        is killed, and this process ends whatever it left behind.
        """
        self._ending.set()
        self.send(Stop())
        try:
            self._watch.join(timeout)
            if self._watch.is_alive() and self.is_running():
                self._kill(f"did not tear down within {timeout:.0f} s")
            self._watch.join()
        finally:  # also after a Ctrl-C: then the keeper goes on alone
            if self._process.stdin is not None:
                with contextlib.suppress(OSError):
                    self._process.stdin.close()
        return self.last_event(Stopped) is not None

    def _watch_over(self) -> None:
        """Runs until the keeper is gone, and everything that it had started."""
        stopped = 0
        while self.is_running():
            # Checks are counted, not seconds, since pytest itself may have been stopped too.
            stopped = stopped + 1 if process.is_stopped(self.pid) else 0
            if stopped * LOOK_EVERY > FROZEN_LIMIT:
                self._kill(f"was stopped (SIGSTOP) and did not continue within {FROZEN_LIMIT:g} s")
            if self._closed.wait(LOOK_EVERY):
                time.sleep(0.02)  # it is about to end
        self._closed.wait(READ_LIMIT)
        if (teardown := self.last_event(Stopped)) is not None:
            self.left = teardown.left
            self.problems += teardown.problems
            return
        self._ending.wait(ORPHAN_GRACE)
        started, locked = self.last_event(Started), self.last_event(Clocks)
        orphaned = msgspec.structs.replace(
            self._server,
            server=ProcessId(started.pid, 0) if started else None,
            clocks=locked.clocks if locked else {},
        )
        folder = self._plan.folder
        self.left = end_orphans(orphaned, folder, leader=started.pid if started else 0)
        with self._writing():
            end_server(folder, self._plan.life, self.left)

    def _kept_server(self) -> KeptServer:
        plan = self._plan
        return KeptServer(
            life=plan.life,
            folder=f"{plan.folder.parent.name}/{plan.folder.name}",
            since=self._began,
            stop_timeout=plan.spec.stop_timeout,
            owner=process.identity(os.getpid()) or ProcessId(os.getpid(), 0),
            keeper=process.identity(self.pid) or ProcessId(self.pid, 0),
            session=plan.session_name if plan.nsys else "",
            files=(str(plan.short_tmpdir),),
        )

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """A journal that cannot be written is a problem, and ends nothing."""
        try:
            yield
        except (OSError, ValueError) as error:
            self.problems = (unwritten(RUN_FILE, error),)

    def _kill(self, fault: str) -> None:
        self._fault = fault
        self._process.kill()
        self._process.wait()

    def _read(self) -> None:
        stream = self._process.stdout
        assert stream is not None
        with stream:
            for line in stream:
                with contextlib.suppress(ValueError):
                    self._take(decode_event(line))
        self._take(Closed())
        self._closed.set()

    def _take(self, event: Event) -> None:
        self._last[type(event)] = event
        self._events.put(event)


def _environment(private: Container[str]) -> dict[str, str]:
    """The keeper's variables: this process's without secrets, and a path to this package."""
    paths = [str(PACKAGE_ROOT), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    variables = {k: v for k, v in os.environ.items() if k not in private}
    variables.pop("PYTEST_CURRENT_TEST", None)  # the server outlives the test that runs now
    return {**variables, "PYTHONPATH": os.pathsep.join(path for path in paths if path)}


def keeper_log_end(folder: Path, limit: int = 8) -> list[str]:
    """The last lines of a keeper's log."""
    with contextlib.suppress(OSError):
        return (folder / "keeper.log").read_text(errors="replace").splitlines()[-limit:]
    return []


# Time limits that pytest and the keeper share, all in s. When one of them waits for the other,
# its limit is the sum of the limits of the steps that it waits for. A wait ends early if the
# other process ends.

# The keeper starts a server.
START_LIMIT = 120.0  # for the new process to read its secrets, then again to write its pid
PORT_WAIT = 10.0  # for a port to become free after its last server
SLACK = 15.0  # for files, NVML and a busy machine
# While it waits for a lease the keeper reports every second; everything else together takes
# less than this.
SILENCE_LIMIT = 2 * START_LIMIT + PORT_WAIT + NSYS_QUICK + SLACK

# The server ended by itself, and the keeper looks for its exit status.
RANK_GRACE = 1.0  # for the ranks of a dead server to end by themselves
STATUS_WAIT = 60.0  # for nsys to write the report of a dead server and pass on its status
HURRIED_WAIT = 10.0  # the same once a teardown has been asked for
EXIT_LIMIT = RANK_GRACE + KILL_WAIT + STATUS_WAIT + SLACK

# The keeper tears down.
GRACE = 12.0  # after SIGTERM; SGLang needs about 5
FINALISE = 10.0  # for nsys to end after the server
LAUNCHER_GRACE = 2.0  # after SIGTERM to an nsys that did not end by itself
SHUTDOWN = 8.0  # for `nsys shutdown`, and again for the session to disappear
AGENT_WAIT = 2.0  # for the agent of nsys, which ends a moment after its session
GPU_WAIT = 10.0  # for the driver to drop the contexts of killed processes
PUMP_WAIT = 5.0  # for the last lines of the log

# Pytest watches the keeper.
FROZEN_LIMIT = 5.0  # for a keeper that was stopped (SIGSTOP) to continue
ORPHAN_GRACE = 3.0  # for pytest to call `close` after the keeper was killed
ORPHAN_TERM = 5.0  # after SIGTERM to a server without a keeper, which is to be gone within 30 s


def teardown_limit(stop_timeout: float, *, nsys: bool) -> float:
    """The longest time in s that a keeper may take for a teardown.

    stop_timeout: s for closing an open window, from the spec. nsys: the server runs under it.
    """
    total = RANK_GRACE + KILL_WAIT + HURRIED_WAIT  # the server may have died just before
    total += stop_timeout
    total += min(GRACE, stop_timeout) + TERM_WAIT + KILL_WAIT
    total += FINALISE + LAUNCHER_GRACE + TERM_WAIT + KILL_WAIT
    total += AGENT_WAIT + KILL_WAIT
    total += GPU_WAIT + PUMP_WAIT + SLACK
    if nsys:
        total += 2 * NSYS_QUICK + stop_timeout  # two looks at the session; a repeated import
        total += 3 * NSYS_QUICK + 2 * SHUTDOWN
        total += NSYS_QUICK
    return total


# Cleaning up after a keeper that was killed. It may not have sent a single message, so its
# processes are known by the variable `LIFE`, which they inherit, and its files by the plan.

INJECTION = "QUADD_INJECTION_CONFIG"  # names a file in /tmp, which stays if nsys is killed


def end_orphans(server: KeptServer, folder: Path, *, leader: int) -> tuple[str, ...]:
    """Ends the processes, removes the files and unlocks the clocks; returns what is left.

    folder: of the server. leader: pid of the server if its process session is surely its, else 0.
    The keeper's leases ended with it.
    """
    family = family_of(server, leader)
    injections = {process.variable(member.pid, INJECTION) for member in family}
    shared = process.shared_memory(family, server.since)
    shared |= process.named_shared_memory(server.files, server.since)
    left = _end(server, family, leader)
    process.remove_shared_memory(shared)
    for name in {*injections, *server.files}:
        remove_injection(name)
    for link in map(Path, server.files):
        if link.name == f"{TMPDIR_LINK}{server.life}" and link.is_symlink():
            with contextlib.suppress(OSError):
                link.unlink()
    shutil.rmtree(folder / "tmp", ignore_errors=True)
    with contextlib.suppress(LeaseError):  # no folder, so no leases
        lease.sweep()
    return (*(f"process {pid}" for pid in left), *unlock_clocks(server.clocks))


def family_of(server: KeptServer, leader: int) -> list[psutil.Process]:
    """The processes of a server life that run."""
    known = [*server.processes, *([server.server] if server.server else [])]
    return process.marked(LIFE, server.life, leader=leader, since=server.since, known=known)


def remove_injection(name: str) -> None:
    """Removes the file that a killed nsys leaves behind; does nothing for any other name."""
    path = Path(name)
    if is_injection(path):
        with contextlib.suppress(OSError):
            if path.lstat().st_uid == os.getuid():
                path.unlink()


def is_injection(path: Path) -> bool:
    """Whether nsys names its file so."""
    return path.name.startswith("injection_config_")


def _end(server: KeptServer, family: list[psutil.Process], leader: int) -> list[int]:
    """Ends the server first, so that nsys can finish; returns the pids that are still alive."""
    pids = {member.pid for member in family}
    main = server.server.pid if server.server else 0
    first = [main] if main in pids else process.topmost(family)
    process.terminate_tree(first, min(ORPHAN_TERM, server.stop_timeout))
    patience = FINALISE if server.session else AGENT_WAIT
    process.wait_gone(family_of(server, leader), patience)
    deadline = time.monotonic() + process.KILL_WAIT
    # Repeated, since a process may be starting another one just now.
    while (rest := family_of(server, leader)) and time.monotonic() < deadline:
        process.kill_all(rest, wait=deadline - time.monotonic())
    return [member.pid for member in rest]
