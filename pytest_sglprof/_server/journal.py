"""What a run has on this machine, written into its run.json as it comes into being and goes.

Pytest, the workers of xdist and every keeper write: each reads the file, changes its part and
replaces the whole, while it holds a lock on it. What a run had whose processes were all killed,
is read from there.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import msgspec

from pytest_sglprof._files import RUN_FILE, atomic_write
from pytest_sglprof._process import ProcessId

LOCK_WAIT = 5.0  # s for another process to write its part: longer only if it was stopped
SERVERS, TESTS = "servers", "tests"  # keys of run.json

_Life = Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{12}$")]
_Folder = Annotated[str, msgspec.Meta(pattern=r"^servers/[\w.=,+@-]*[\w=,+@-]$")]


class KeptServer(msgspec.Struct, frozen=True, kw_only=True):
    """One server life: everything that has to go when it ends.

    life: the value of `SGLPROF_LIFE` in its processes. folder: relative to the run's. since: Unix
    time in s at which its keeper started. owner: the pytest or worker that started the keeper.
    node: the one that it runs on, "" for the machine of pytest; then the processes are that node's.
    server: the main process. processes: all below the keeper, as last seen. session: of nsys.
    clocks: UUID of a GPU -> MHz at which it is locked. files: outside of the folder. ended: when
    all of it was torn down, None before. left: what could not be removed then.
    """

    life: _Life
    folder: _Folder
    since: float
    stop_timeout: float
    owner: ProcessId
    keeper: ProcessId
    node: str = ""
    server: ProcessId | None = None
    processes: tuple[ProcessId, ...] = ()
    session: str = ""
    ports: tuple[int, ...] = ()
    gpus: tuple[str, ...] = ()
    clocks: dict[str, int] = {}
    files: tuple[str, ...] = ()
    ended: str | None = None
    left: tuple[str, ...] = ()


class StartedTest(msgspec.Struct, frozen=True, kw_only=True):
    """An attempt of a test that has begun, until its record is in the journal."""

    nodeid: str
    number: int
    worker: str
    began: float


def note_server(server: KeptServer, run: Path) -> None:
    """Adds a server life to the run in the folder `run`; no effect where there is no run.json."""
    _edit(run, lambda content: content.setdefault(SERVERS, []).append(msgspec.to_builtins(server)))


def change_server(folder: Path, life: str, **changes: Any) -> None:
    """Replaces fields of a server life, by the folder of its server."""

    def change(content: dict[str, Any]) -> None:
        for entry in content.get(SERVERS, ()):
            if entry["life"] == life:
                entry.update(msgspec.to_builtins(changes))

    _edit(run_of(folder), change)


def end_server(folder: Path, life: str, left: tuple[str, ...]) -> None:
    """Notes that a server life is over, and what of it is left."""
    now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    rest: dict[str, Any] = {} if left else {"processes": (), "files": (), "clocks": {}}
    change_server(folder, life, ended=now, left=left, **rest)


def note_test(run: Path, test: StartedTest) -> None:
    """Notes that an attempt of a test has begun."""
    _edit(run, lambda content: content.setdefault(TESTS, []).append(msgspec.to_builtins(test)))


def forget_test(run: Path, nodeid: str, number: int) -> None:
    """Its record is in the journal."""

    def change(content: dict[str, Any]) -> None:
        if tests := content.get(TESTS):
            content[TESTS] = [e for e in tests if (e["nodeid"], e["number"]) != (nodeid, number)]

    _edit(run, change)


def run_of(folder: Path) -> Path:
    """The folder of the run to which the folder of a server belongs."""
    return folder.parent.parent


def kept_servers(content: dict[str, Any]) -> list[KeptServer]:
    """The server lives in the content of a run.json, without entries that cannot be read."""
    return list(_converted(content.get(SERVERS), KeptServer))


def started_tests(content: dict[str, Any]) -> list[StartedTest]:
    """The attempts of tests without a record."""
    return list(_converted(content.get(TESTS), StartedTest))


def _converted(entries: Any, kind: Any) -> Iterator[Any]:
    for entry in entries if isinstance(entries, list) else ():
        with contextlib.suppress(msgspec.ValidationError):
            yield msgspec.convert(entry, kind)


def _edit(run: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Changes run.json under its lock. Raises OSError; without the file nothing happens."""
    file = run / RUN_FILE
    deadline = time.monotonic() + LOCK_WAIT
    while True:
        try:
            stream = file.open("rb")
        except FileNotFoundError:
            return
        with stream:
            if _is_locked(stream.fileno(), file):
                before = stream.read()
                change(content := json.loads(before))
                after = f"{json.dumps(content, indent=1)}\n".encode()
                if after != before:
                    atomic_write(file, after)
                return
        if time.monotonic() > deadline:
            raise TimeoutError(f"another process has held its lock for {LOCK_WAIT:g} s")
        time.sleep(0.01)


def _is_locked(handle: int, file: Path) -> bool:
    """Locks the file; False if another process has the lock, or has replaced the file."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return os.path.samestat(os.fstat(handle), file.stat())
    except (FileNotFoundError, BlockingIOError):
        return False
    except OSError:
        return True  # a disk without locks: better a change that is lost now and then
