"""What lives on this machine and what is left of runs: servers, leases, sessions. Changes nothing.

Everything is read from the processes and files themselves, so that it holds also of runs of other
terminals and of those that were killed.
"""

from __future__ import annotations

import contextlib
import importlib.util
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from pytest_sglprof import _process as process
from pytest_sglprof._errors import NsysError, ServerError, ServerMissing
from pytest_sglprof._files import RESULTS, safe_name
from pytest_sglprof._nsys import COLLECTING, NsysTool, find_nsys
from pytest_sglprof._run.clean import open_servers
from pytest_sglprof._run.folder import has_process, run_content, run_folders
from pytest_sglprof._server import lease
from pytest_sglprof._server.arguments import has_option, option
from pytest_sglprof._server.client import SglangClient, checked_url, port_of, server_name
from pytest_sglprof._server.command import installation, local_url
from pytest_sglprof._server.nsys_sessions import KnownSession, known_sessions
from pytest_sglprof._server.sizes import ServerSizes

if TYPE_CHECKING:
    import psutil

    from pytest_sglprof._config.load import Settings

KEEPER = "pytest_sglprof._server.keeper"
DEFAULT_PORT = 30000  # of SGLang
SERVERS = ("sglang", "pytest_sglprof.standin")  # one of the first words of a server begins so
_LAUNCHER_WORDS = 8  # in which it stands, behind the interpreter and what hands over its secrets
EXTRAS = {
    "parquet": "pyarrow",
    "gpu": "pynvml",
    "png": "PIL",
    "xdist": "xdist",
    "nvtx": "nvtx",
    "cluster": "distributed",
}


@dataclass(frozen=True)
class AliveServer:
    """A server that a run of pytest keeps alive.

    name: of its table in sglprof.toml. url: "" while it is starting. pid: of its main process.
    since: Unix time in s. folder: of its log.
    """

    name: str
    url: str
    pid: int
    since: float
    folder: str


@dataclass(frozen=True)
class Holder:
    """A process that holds leases. what: its command line; leases: their names."""

    pid: int
    what: str
    leases: tuple[str, ...]


@dataclass(frozen=True)
class DeadRun:
    """A run that ended without results.json, or left something. host: where it ran."""

    folder: str
    started: str
    host: str


@dataclass(frozen=True)
class SessionState:
    """An nsys session. server: the address of the server in it, "" if it is not known."""

    name: str
    id: str
    state: str
    server: str


@dataclass(frozen=True)
class Tool:
    """Something that is used where it is installed. problem: why it cannot be, "" if it can."""

    name: str
    version: str
    path: str = ""
    problem: str = ""


@dataclass(frozen=True)
class RankNow:
    """The load of one DP rank. running, waiting: requests; usage: of its KV cache, 0 to 1."""

    rank: str
    running: int
    waiting: int
    usage: float


@dataclass(frozen=True)
class ServerState:
    """What a server says of itself. profile: whether it is being profiled, as far as known."""

    url: str
    version: str
    model: str
    ranks: tuple[str, ...]
    profile: str
    load: tuple[RankNow, ...]
    problem: str = ""


@dataclass(frozen=True)
class Status:
    """Everything that `sglprof status` shows."""

    servers: tuple[AliveServer, ...]
    leases: tuple[Holder, ...]
    dead_runs: tuple[DeadRun, ...]
    nsys_sessions: tuple[SessionState, ...]
    tools: tuple[Tool, ...]
    server: ServerState | None = None


def read_status(settings: Settings, client: SglangClient | None = None) -> Status:
    """The state of this machine, and of the server of `client`.

    Raises `ServerError` if that server does not answer.
    """
    nsys, tool = _nsys(settings)
    sessions = known_sessions(tool) if tool is not None else []
    holders = held_leases()
    return Status(
        servers=tuple(servers_alive()),
        leases=tuple(holders),
        dead_runs=tuple(dead_runs(settings.output)),
        nsys_sessions=tuple(_session_state(each) for each in sessions),
        tools=(nsys, _interpreter(settings.python or sys.executable), *_extras()),
        server=server_state(client, holders, sessions) if client is not None else None,
    )


def servers_alive() -> list[AliveServer]:
    """The servers that runs of this user keep alive on this machine, in order of their start."""
    import psutil

    servers = []
    for keeper in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            if KEEPER in keeper.cmdline()[1:]:
                # Its standard error is the file keeper.log of the server's folder.
                folder = Path(f"/proc/{keeper.pid}/fd/2").readlink().parent
                servers.append(_alive(keeper, folder))
    return sorted(servers, key=lambda each: (each.since, each.pid))


def _alive(keeper: psutil.Process, folder: Path) -> AliveServer:
    server = _server_below(keeper)
    return AliveServer(
        name=folder.name.rpartition(".")[0],
        url=_url_of(server) if server is not None else "",
        pid=server.pid if server is not None else 0,
        since=(server or keeper).create_time(),
        folder=str(folder),
    )


def _server_below(parent: psutil.Process) -> psutil.Process | None:
    """The main process of the server that runs below `parent`, None if there is none."""
    import psutil

    for child in process.descendants(parent.pid):
        with contextlib.suppress(psutil.Error):
            words = child.cmdline()
            names = [Path(word).name for word in words[:_LAUNCHER_WORDS]]
            is_nsys = any(name.startswith("nsys") for name in names[:2])
            if not is_nsys and any(name.startswith(SERVERS) for name in names[1:]):
                return child
    return None


def _url_of(server: psutil.Process) -> str:
    words = server.cmdline()
    port = option(words, "--port") or str(DEFAULT_PORT)
    if not port.isdigit():
        return ""
    host = option(words, "--host") or ""
    return local_url(host, int(port), tls=has_option(words, "--ssl-certfile"))


def held_leases() -> list[Holder]:
    """The processes that hold GPUs, ports, windows and the machine, with what they hold."""
    by_pid: dict[int, list[str]] = {}
    for name, pid in lease.held():
        by_pid.setdefault(pid, []).append(name)
    return [Holder(pid, _command(pid), tuple(sorted(by_pid[pid]))) for pid in sorted(by_pid)]


def _command(pid: int) -> str:
    """Its command line, without secrets."""
    import psutil

    from pytest_sglprof._redact import redact_command

    with contextlib.suppress(psutil.Error):
        return " ".join(redact_command(psutil.Process(pid).cmdline()))
    return ""


def dead_runs(output: Path) -> list[DeadRun]:
    """The runs below `output` that were killed, the oldest first."""
    runs = []
    for folder in run_folders(output):
        content = run_content(folder) or {}
        is_unfinished = not (folder / RESULTS).exists() or open_servers(folder)
        if is_unfinished and not has_process(content):
            runs.append(DeadRun(str(folder), str(content["started"]), str(content["host"])))
    return runs


def _session_state(session: KnownSession) -> SessionState:
    listed, server = session.listed, ""
    if session.command is not None:
        import psutil

        with contextlib.suppress(psutil.Error):
            main = _server_below(psutil.Process(session.command.pid))
            server = _url_of(main) if main is not None else ""
    return SessionState(listed.name, listed.id, listed.state, server)


def _nsys(settings: Settings) -> tuple[Tool, NsysTool | None]:
    try:
        tool = find_nsys(settings.nsys or None)
    except NsysError as error:
        return Tool("nsys", "", problem=error.what), None
    return Tool("nsys", tool.version, tool.path), tool


def _interpreter(python: str) -> Tool:
    """SGLang in the interpreter that runs of pytest would use."""
    try:
        installed = installation(python)
    except ServerMissing as error:
        return Tool("sglang", "", python, error.what)
    if installed.server or installed.serve:
        return Tool("sglang", installed.version, python)
    return Tool("sglang", "", python, "not installed in this interpreter (--sglprof-python)")


def _extras() -> list[Tool]:
    missing = "not installed"
    return [
        Tool(f"extra {name}", "", problem="" if importlib.util.find_spec(module) else missing)
        for name, module in EXTRAS.items()
    ]


def server_state(
    client: SglangClient, holders: Sequence[Holder], sessions: Sequence[KnownSession]
) -> ServerState:
    """What the server answers; raises `ServerError` if it does not."""
    info = client.server_info()
    sizes = ServerSizes.from_info(info)
    load: list[RankNow] = []
    problem = ""
    try:
        for each in client.loads():
            now = RankNow(f"DP{each.dp_rank}", each.running, each.waiting, each.token_usage)
            load.append(now)
    except ServerError as error:
        problem = error.what
    return ServerState(
        url=client.url,
        version=sizes.version,
        model=str(info.get("model_path") or ""),
        ranks=tuple(rank.label for rank in sizes.ranks()),
        profile=_profile(client.url, holders, sessions),
        load=tuple(load),
        problem=problem,
    )


def _profile(url: str, holders: Sequence[Holder], sessions: Sequence[KnownSession]) -> str:
    """Whether a profile of the server is running, as far as this machine knows."""
    name = safe_name(lease.window_name(checked_url(url)))
    holder = next((each for each in holders if name in each.leases), None)
    if holder is not None:
        return f"a window of process {holder.pid} is open"
    port = port_of(urlsplit(url))
    for session in sessions:
        state = _session_state(session)
        is_here = state.server and server_name(state.server) == server_name(url) and port
        if is_here and session.listed.state in COLLECTING:
            return f"nsys session {session.listed.name} collects"
    return "none of this machine (SGLang does not say whether others have one)"
