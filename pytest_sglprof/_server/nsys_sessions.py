"""The nsys sessions of this machine, and the one that a running server is in.

A session is known to nsys by its name under one TMPDIR. Which processes it holds is read from the
command line of the ``nsys profile`` or ``nsys launch`` above them.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from pytest_sglprof import _process as process
from pytest_sglprof._errors import NsysSessionError
from pytest_sglprof._nsys import GONE, ListedSession, NsysSession, NsysTool, list_sessions
from pytest_sglprof._server.arguments import option
from pytest_sglprof._server.client import is_local_url, port_of
from pytest_sglprof._server.lease import listener_of

_TMP = "/tmp"  # where a process without TMPDIR has its temporary files
_STARTS = ("profile", "launch")  # commands of nsys under which a program runs
_HINT = (
    "start the server under `nsys profile --start-later=true --session-new=NAME …` "
    "(docs/running-server.md), or name its session: --nsys-session NAME"
)


@dataclass(frozen=True)
class NsysCommand:
    """A running ``nsys profile``. session: the name that it was given, "" without one."""

    pid: int
    session: str
    tmpdir: Path


def nsys_commands() -> list[NsysCommand]:
    """Those of this user that are running; of a chain of wrappers the outermost."""
    import psutil

    commands = {}
    for candidate in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            words = candidate.cmdline()
            if (session := _session_in(words)) is not None:
                tmpdir = Path(process.variable(candidate.pid, "TMPDIR") or _TMP)
                command = NsysCommand(candidate.pid, session, tmpdir)
                commands[candidate.pid] = command, candidate.ppid()
    return [command for command, parent in commands.values() if parent not in commands]


def _session_in(words: Sequence[str]) -> str | None:
    """The name of the session that a command line starts; None if it starts none."""
    for at, word in enumerate(words[:2]):  # a script follows its interpreter
        if Path(word).name == "nsys" and words[at + 1 : at + 2] and words[at + 1] in _STARTS:
            arguments = words[at + 2 :]
            return option(arguments, "--session-new") or option(arguments, "--session") or ""
    return None


@dataclass(frozen=True)
class KnownSession:
    """A session that nsys lists, and the ``nsys profile`` that made it; None if that is unknown."""

    listed: ListedSession
    tmpdir: Path
    command: NsysCommand | None


def known_sessions(tool: NsysTool) -> list[KnownSession]:
    """The sessions under this process's TMPDIR and under those of running nsys commands."""
    commands = nsys_commands()
    sessions: dict[tuple[str, str], KnownSession] = {}
    here = Path(os.environ.get("TMPDIR") or _TMP)
    for tmpdir in dict.fromkeys([here, *(command.tmpdir for command in commands)]):
        listed = [each for each in list_sessions(tool, tmpdir) if each.state not in GONE]
        owners = _owners(listed, [each for each in commands if each.tmpdir == tmpdir])
        for each in listed:
            known = KnownSession(each, tmpdir, owners.get(each.name))
            sessions.setdefault((each.id, each.name), known)
    return list(sessions.values())


def _owners(
    listed: Sequence[ListedSession], commands: Sequence[NsysCommand]
) -> Mapping[str, NsysCommand]:
    """Name of a session -> the command that made it. nsys itself names one that got no name."""
    owners = {command.session: command for command in commands if command.session}
    unnamed = [command for command in commands if not command.session]
    others = [each.name for each in listed if each.name not in owners]
    if len(unnamed) == len(others) == 1:
        owners[others[0]] = unnamed[0]
    return owners


def session_for(url: str, tool: NsysTool, wanted: str = "") -> NsysSession:
    """The session called `wanted`, by name or ID; "": the one that holds the server at `url`.

    Raises `NsysSessionError`, which lists the sessions that there are.
    """
    sessions = known_sessions(tool)
    if wanted:
        chosen = [each for each in sessions if wanted in (each.listed.name, each.listed.id)]
        if not chosen:  # it lists the others, by name
            NsysSession(tool, wanted).require()
    else:
        chosen = _holding(url, sessions)
    if len(chosen) != 1:
        names = ", ".join(describe(each) for each in sessions) or "none"
        by = f"called {wanted!r}" if wanted else f"that hold the server at {url}"
        raise NsysSessionError(
            f"there are {len(chosen)} nsys sessions {by}",
            expected=f"one; nsys lists: {names}",
            hint=_HINT,
        )
    return NsysSession(tool, chosen[0].listed.name, tmpdir=chosen[0].tmpdir)


def _holding(url: str, sessions: Sequence[KnownSession]) -> list[KnownSession]:
    if not is_local_url(url):
        raise NsysSessionError(
            f"the server at {url} is on another machine, whose nsys sessions cannot be reached",
            expected="a server on this machine: nsys sessions are controlled where they run",
            hint="run sglprof on the server's machine",
        )
    listener = listener_of(port_of(urlsplit(url)))
    above = set(process.ancestors(listener)) if listener else set()
    return [each for each in sessions if each.command and each.command.pid in above]


def describe(session: KnownSession) -> str:
    """`serve (ID 107281, state Launched)`."""
    listed = session.listed
    return f"{listed.name} (ID {listed.id}, state {listed.state})"
