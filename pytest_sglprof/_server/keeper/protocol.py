"""The messages between pytest and the keeper, shared limits, and what a killed keeper left.

A message is one line of JSON. Its kind is in `op` (to the keeper's stdin) or `event` (from
its stdout). It is written by `json` because a secret may hold bytes that are not UTF-8:
Python stands these in as surrogates, which msgspec refuses to write.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from pytest_sglprof import _errors as errors
from pytest_sglprof import _process as process
from pytest_sglprof._config.backends import Backend
from pytest_sglprof._config.model import ServerSpec
from pytest_sglprof._errors import LeaseError, ServerError, SglprofError
from pytest_sglprof._nsys import QUICK as NSYS_QUICK
from pytest_sglprof._process import KILL_WAIT, TERM_WAIT
from pytest_sglprof._server import lease
from pytest_sglprof._server.command import Entry
from pytest_sglprof._server.journal import KeptServer
from pytest_sglprof._server.nvml import unlock_clocks

if TYPE_CHECKING:
    import psutil


LIFE = "SGLPROF_LIFE"  # set for every process that a keeper starts; holds the plan's `life`
SHOWN = "shown-to-node"  # a file by which a keeper on a node sees whether it has pytest's folder
SEEN = "seen-by-node"  # the one that it writes then, by which pytest sees the same
END_ORPHANS = "--end-orphans"  # arguments of the keeper's module, for other commands on a node
SEND_FILES = "--send-files"
TMPDIR_LINK = "sglprof-"  # begins the name of a link, which ends in the plan's `life`


@dataclass(frozen=True)
class Plan:
    """Everything that a keeper needs in order to start a server, or its part on one node.

    nsys: path of the command, "" to start without it. parent: pid of pytest. pythonpath:
    pytest's PYTHONPATH; the keeper runs with a longer one, which the server's interpreter
    must not inherit. private: pytest's secret variables; the keeper is started without
    them because nsys stores the environment of every process. life: a name that no other
    run of a server has, see `LIFE`. node: the name of the node that the keeper runs on, "" for
    a server of one machine; node_rank: its number, of `nodes`. is_remote: it is started through a
    launcher, so it may be another machine. head: address of the first node for the server's ranks,
    ``HOST:PORT``, "" where that is chosen.
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
    node: str = ""
    node_rank: int = 0
    nodes: int = 1
    is_remote: bool = False
    head: str = ""
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


class Ask(msgspec.Struct, frozen=True, tag_field="op", tag="ask"):
    """Something to be done or looked up where the keeper runs, see `questions.QUESTIONS`."""

    number: int
    what: str
    values: dict[str, Any] = {}


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
    head: address at which ranks of other nodes reach the first one, "" without other nodes.
    is_shared: the keeper has the folder that pytest has.
    """

    pid: int
    created: float
    host: str
    port: int
    command: tuple[str, ...]
    session: str
    tmpdir: Path
    head: str = ""
    is_shared: bool = True


class Answer(msgspec.Struct, frozen=True, tag_field="event", tag="answer"):
    """What became of an `Ask`. error: the class of the error that it raised, "" for none."""

    number: int
    value: Any = None
    error: str = ""
    fields: dict[str, Any] = {}


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


Order = Launch | Window | Ask | Stop
Event = ProgressEvent | Clocks | Started | Answer | Failed | Exited | Stopped | Closed


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


def show(plan: Plan) -> None:
    """Writes what a keeper on a node looks for with `is_shown`."""
    if plan.is_remote:
        (plan.folder / SHOWN).write_text(plan.life, encoding="utf-8")


def is_shown(plan: Plan) -> bool:
    """On a node: whether its folder is the one in which pytest has called `show`."""
    with contextlib.suppress(OSError):
        return (plan.folder / SHOWN).read_text(encoding="utf-8") == plan.life
    return not plan.is_remote


def error_message(error: SglprofError) -> Failed:
    """An error as a message, with all its attributes."""
    return Failed(type(error).__name__, dict(vars(error)))


def error_from(message: Failed | Answer) -> SglprofError:
    """The error in a message; a `ServerError` if its class is unknown."""
    kind = getattr(errors, message.error, None)
    if not (isinstance(kind, type) and issubclass(kind, SglprofError)):
        kind = ServerError
    blank = vars(ServerError("the keeper failed and did not say why"))
    log = tuple(message.fields.get("log", ()))
    return kind.restored({**blank, **message.fields, "log": log})


def _path(kind: type[Path], text: str) -> Path:
    return kind(text)


# Time limits that pytest and the keeper share, all in s. When one of them waits for the other,
# its limit is the sum of the limits of the steps that it waits for. A wait ends early if the
# other process ends.

# The keeper starts a server.
START_LIMIT = 120.0  # for the new process to read its secrets, then again to write its pid
PORT_WAIT = 10.0  # for a port to become free after its last server
NODE_START = 120.0  # for a launcher to start a keeper on a node
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
NODE_CLEAN_LIMIT = 60.0  # for another command on a node whose keeper was killed
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
        if link.name == f"{TMPDIR_LINK}{server.life}":
            remove_tmpdir(link)
    remove_tmpdir(folder / "tmp")
    with contextlib.suppress(LeaseError):  # no folder, so no leases
        lease.sweep()
    return (*(f"process {pid}" for pid in left), *unlock_clocks(server.clocks))


class Orphans(msgspec.Struct, frozen=True):
    """What a keeper that was killed may have left on its node."""

    server: KeptServer
    folder: str
    leader: int


def family_of(server: KeptServer, leader: int) -> list[psutil.Process]:
    """The processes of a server life that run."""
    known = [*server.processes, *([server.server] if server.server else [])]
    return process.marked(LIFE, server.life, leader=leader, since=server.since, known=known)


def remove_tmpdir(place: Path) -> None:
    """Removes a folder for temporary files, or the link to one."""
    if place.is_symlink():
        with contextlib.suppress(OSError):
            place.unlink()
    else:
        shutil.rmtree(place, ignore_errors=True)


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
