"""Ends what runs that were killed have left on this machine: processes, files, locked clocks.

A run's journal says what it had (`_server.journal`). Nothing is ended that is not surely its: a
process has the life's mark in its environment, or the pid and start time that the journal names,
or is in a process session of one of these.
"""

from __future__ import annotations

import contextlib
import os
import platform
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from pytest_sglprof import _process as process
from pytest_sglprof._errors import LeaseError
from pytest_sglprof._redact import redact_command
from pytest_sglprof._run.folder import has_process, is_run_folder, locked, run_content
from pytest_sglprof._server import lease
from pytest_sglprof._server.journal import KeptServer, end_server, kept_servers
from pytest_sglprof._server.keeper.protocol import (
    TMPDIR_LINK,
    end_orphans,
    family_of,
    is_injection,
)

if TYPE_CHECKING:
    import psutil

# Records of load drivers as these write them, which hold the server's keys.
RAW_RECORDS = "loads/*/.*.raw"
_MAX_WORDS = 60  # characters of a command line


@dataclass(frozen=True)
class Cleaned:
    """What became of one server life, a line each. name: of its run and its folder.

    ended: what is gone now, or would be. left: what belongs to it and is still there. alone: what
    was not touched, and why.
    """

    name: str
    ended: tuple[str, ...] = ()
    left: tuple[str, ...] = ()
    alone: tuple[str, ...] = ()


def swept(output: Path) -> list[str]:
    """Cleans up after dead runs in the output folder; returns lines for people.

    Does not wait for a keeper that is still at work.
    """
    return [
        f"{each.name}, whose run was killed: {text}"
        for each in clean(output, patience=0.0)
        for text in (*each.ended, *(f"left behind: {what}" for what in each.left))
    ]


def clean(place: Path, *, patience: float, is_dry: bool = False) -> list[Cleaned]:
    """Cleans up after a dead run, or after those of an output folder or a comparison, in order.

    patience: s to wait for a keeper that is tearing its server down. is_dry: only says what would
    be ended.
    """
    place = Path(os.path.realpath(place))
    folders = [place] if is_run_folder(place) else [*filter(is_run_folder, _folders_in(place))]
    return [each for folder in folders for each in _clean_run(folder, patience, is_dry)]


def _folders_in(place: Path) -> list[Path]:
    with contextlib.suppress(OSError):
        return sorted(path for path in place.iterdir() if path.is_dir())
    return []


def open_servers(folder: Path) -> list[KeptServer]:
    """The server lives of a run that were not torn down, or not wholly."""
    servers = kept_servers(run_content(folder) or {})
    return [each for each in servers if each.ended is None or each.left]


def _clean_run(folder: Path, patience: float, is_dry: bool) -> Iterator[Cleaned]:
    servers, raw = open_servers(folder), sorted(folder.glob(RAW_RECORDS))
    if not servers and not raw:
        return
    with locked(folder) as is_over:
        content = run_content(folder) or {}
        why = _why_alone(content) if is_over else "its run goes on"
        for server in servers:
            name = f"{folder.name}/{server.folder}"
            home = folder / server.folder
            where = f"it ran on node {server.node}: its keeper ends it there" if server.node else ""
            if why or where or folder not in home.resolve().parents:
                yield Cleaned(
                    name, alone=(why or where or "its folder is a link to another place",)
                )
            else:
                yield _Cleaning(name, home, _of_now(server, content), is_dry).clean(patience)
        if raw and not why:
            yield _without(folder, raw, is_dry)


def _without(folder: Path, raw: Sequence[Path], is_dry: bool) -> Cleaned:
    for record in () if is_dry else raw:
        with contextlib.suppress(OSError):
            record.unlink()
    gone = [record for record in raw if is_dry or not record.exists()]
    verb = "would remove" if is_dry else "removed"
    return Cleaned(
        folder.name,
        ended=tuple(f"{verb} {path.relative_to(folder)}" for path in gone),
        left=tuple(str(path.relative_to(folder)) for path in raw if path not in gone),
    )


def _why_alone(content: Mapping[str, Any]) -> str:
    """Why nothing of a run is touched; "" where it is dead, and was on this machine."""
    if content.get("host") != platform.node():
        return f"it ran on {content.get('host')}"
    if content.get("pid_space") != process.machine()["pid_space"]:
        return "it ran in another container"
    return "its run goes on" if has_process(content) else ""


def _of_now(server: KeptServer, content: Mapping[str, Any]) -> KeptServer:
    """Without its processes where the machine was restarted: their numbers mean others now."""
    if content.get("boot") == process.machine()["boot"]:
        return server
    gone = process.ProcessId(0, 0)
    return msgspec.structs.replace(server, processes=(), server=None, keeper=gone, owner=gone)


class _Cleaning:
    """One server life. home: its server's folder."""

    def __init__(self, name: str, home: Path, server: KeptServer, is_dry: bool) -> None:
        self._name, self._home, self._server, self._is_dry = name, home, server, is_dry
        self._ended: list[str] = []
        self._alone = tuple(
            f"process {each.pid} is another one now"
            for each in dict.fromkeys((server.keeper, *_processes(server)))
            if process.identity(each.pid) not in (None, each)
        )

    def clean(self, patience: float) -> Cleaned:
        """Ends its keeper first if that is stuck, else lets it finish what it does."""
        family = [*_running(self._server.keeper), *family_of(self._server, _leader(self._server))]
        words = {member.pid: _words(member) for member in family}
        files = [path for path in self._files() if os.path.lexists(path)]
        left = [] if self._is_dry else self._end(patience)
        alive = [] if self._is_dry else [each.pid for each in process.wait_gone(family, 0.0)]
        ended = [f"process {pid} ({words[pid]})" for pid in words if pid not in alive]
        self._say("end", ended)
        gone = [file for file in files if self._is_dry or not os.path.lexists(file)]
        self._say("remove", map(str, gone))
        return Cleaned(self._name, tuple(self._ended), tuple(left), self._alone)

    def _end(self, patience: float) -> list[str]:
        server = self._server
        if keeper := _running(server.keeper):
            for stuck in (*_running(server.owner), *keeper):
                if process.is_stopped(stuck.pid):
                    process.kill_all([stuck])
            if process.wait_gone(keeper, patience):
                at_work = f"process {server.keeper.pid} (its keeper, which tears the server down)"
                self._alone += () if patience else (at_work,)
                return [at_work] if patience else []
        with self._unlocking() as clocks:
            left = end_orphans(
                msgspec.structs.replace(server, clocks=clocks), self._home, leader=_leader(server)
            )
        with contextlib.suppress(OSError, ValueError):  # the next one finds nothing to do
            end_server(self._home, server.life, left)
        self._say("unlock", (f"the clocks of {uuid}" for uuid in clocks if not left))
        return list(left)

    @contextlib.contextmanager
    def _unlocking(self) -> Iterator[dict[str, int]]:
        """The clocks that are this life's: nobody else holds the GPUs, during the block either."""
        with contextlib.ExitStack() as held:
            for gpu in self._server.gpus if self._server.clocks else ():
                try:
                    lock = lease.try_acquire(f"gpu-{gpu}")
                except LeaseError:
                    lock = None
                if lock is None:
                    self._alone += (f"clocks of GPU {gpu}, which another process holds",)
                    yield {}
                    return
                held.callback(lock.release)
            yield self._server.clocks

    def _files(self) -> Iterator[Path]:
        server = self._server
        yield self._home / "tmp"
        yield from process.named_shared_memory(server.files, server.since)
        for path in map(Path, server.files):
            if is_injection(path) or path.name == f"{TMPDIR_LINK}{server.life}":
                yield path

    def _say(self, verb: str, things: Any) -> None:
        form = f"would {verb}" if self._is_dry else _PAST[verb]
        self._ended.extend(f"{form} {thing}" for thing in things)


_PAST = {"end": "ended", "remove": "removed", "unlock": "unlocked"}


def _processes(server: KeptServer) -> list[process.ProcessId]:
    return [*server.processes, *([server.server] if server.server else [])]


def _running(known: process.ProcessId) -> list[psutil.Process]:
    """The process, if this very one runs."""
    import psutil

    with contextlib.suppress(psutil.Error):
        if process.is_same(known):
            return [psutil.Process(known.pid)]
    return []


def _leader(server: KeptServer) -> int:
    """Pid of the main process if its process session is surely this server's, else 0."""
    if server.server is None:
        return 0
    leader = server.server.pid
    for each in filter(process.is_same, _processes(server)):
        with contextlib.suppress(OSError):
            if os.getsid(each.pid) == leader:
                return leader
    return 0


def _words(member: psutil.Process) -> str:
    import psutil

    with contextlib.suppress(psutil.Error):
        text = " ".join(" ".join(redact_command(member.cmdline())).split())
        return text if len(text) <= _MAX_WORDS else f"{text[: _MAX_WORDS - 1]}…"
    return "ended"
