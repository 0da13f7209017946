"""`launch` starts a server, `attach` connects to a running one; both return a `Server`."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import cached_property
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from pytest_sglprof import _process as process
from pytest_sglprof._config.backends import BACKENDS, Backend
from pytest_sglprof._config.model import LauncherName, ServerSpec
from pytest_sglprof._errors import (
    ServerDied,
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
from pytest_sglprof._server.keeper.link import KeeperLink
from pytest_sglprof._server.keeper.protocol import (
    EXIT_LIMIT,
    Clocks,
    Exited,
    Plan,
    Started,
    Window,
    teardown_limit,
)
from pytest_sglprof._server.log import ServerLog
from pytest_sglprof._server.nodes import Node, NodesStart, is_on_nodes
from pytest_sglprof._server.nsys_sessions import session_for
from pytest_sglprof._server.sizes import ServerSizes
from pytest_sglprof._server.starting import died, lost_keeper, wait_started, wait_until_ready

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
    what a load driver needs in its environment to reach it. nodes: those that it was started on
    through a launcher, the first one first; () for a server of this machine.
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
        keepers: Sequence[KeeperLink] = (),
        nodes: Sequence[Node] = (),
        release: Callable[[], tuple[str, ...]] = tuple,
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
        self.info: dict[str, Any] = dict(info)
        self.sizes: ServerSizes = ServerSizes.from_info(info)
        self.log = log
        self.nsys = nsys
        self.server_dir = server_dir
        self.trace_root = Path(server_dir[1]) if server_dir else folder / "traces"
        self.command = shown_command
        self.keeper_fault: str | None = None
        self.problems: tuple[str, ...] = ()
        self.pid = pid
        self.attached: bool = not keepers
        self.nodes = tuple(nodes)
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
        self._keepers = tuple(keepers)
        self._release = release
        self._created = created
        self._left: tuple[str, ...] | None = None

    def is_alive(self) -> bool:
        """True while the server's process runs; for an attached server, while its port is open.

        This costs the server nothing; one on another machine gets a connection every few
        seconds.
        """
        if self.attached:
            return self._presence.is_there()
        if self.nodes:  # their pids may be those of other machines
            return all(keeper.ended is None for keeper in self._keepers)
        return process.is_alive(self.pid, self._created)

    def exit_reason(self) -> ServerDied | None:
        """Why the server died, with its exit status and lines of its log; None while it lives."""
        if self.is_alive():
            return None
        if self.attached:
            return ServerDied(
                f"nothing listens at {self.url} any more",
                hint="pytest-sglprof did not start this server: look at its log",
            )
        over = [node for node in self.nodes if node.link.ended is not None]
        for node in sorted(over, key=lambda node: node.link.ended or 0.0):  # the others follow it
            if exited := node.link.last_event(Exited):
                node.link.catch_up()
                return died(node.log, exited.status, node.name)
            return lost_keeper(node.link, node.folder, "while the server ran")
        (keeper,) = self._keepers
        exited = keeper.wait_for(Exited, EXIT_LIMIT)
        if exited is None and keeper.death():
            return lost_keeper(keeper, self.folder, "while the server ran")
        return died(self.log, exited.status if exited else None)

    @property
    def is_gathered(self) -> bool:
        """Whether files of a node come here a moment later than they are written."""
        return any(keeper.is_gathered for keeper in self._keepers)

    @cached_property
    def driver_kind(self) -> LauncherName:
        """The launcher whose load drivers are used: its own, or that of the embedded ones."""
        if self._is_any_driver and not command.has_load_driver(self.python):
            return "standin"
        return self.kind

    def scheduler_ranks(self) -> dict[int, Rank]:
        """pid -> rank, from the titles of processes; {} for a server on other machines.

        Each of `nodes` has those of its own.
        """
        if self.nodes:
            return {}
        if not self.attached:
            return process.scheduler_ranks(self.pid)
        if not is_local_url(self.url):
            return {}
        pid = lease.listener_of(self.port)
        return process.scheduler_ranks(pid) if pid else {}

    def node_names(self) -> dict[str, str]:
        """Rank label -> the node that it runs on; {} for a server of one machine."""
        if not self.nodes:
            return {}
        names = {node.rank: node.name for node in self.nodes}
        return {rank.label: names[self.sizes.node_of(rank)] for rank in self.sizes.ranks()}

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
        everywhere = backend is None or BACKENDS[backend].is_per_node
        for keeper in self._keepers if everywhere else self._keepers[:1]:
            keeper.send(Window(backend, time.time()))

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
            # A keeper whose server has ended by itself ends, too.
            deaths = [None if each.last_event(Exited) else each.death() for each in self._keepers]
            close_keepers(self._keepers, self.spec)
            deaths += [each.death() for each in self._keepers]
            self._left = tuple(text for each in self._keepers for text in each.left)
            self._left += self._release()
            self.problems = tuple(text for each in self._keepers for text in each.problems)
            self.keeper_fault = next(filter(None, deaths), None)
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
    start = NodesStart(plan, progress) if is_on_nodes(spec) else None
    keepers: list[KeeperLink] = []
    try:
        if start is None:
            keepers.append(KeeperLink(plan))
            started = wait_started(keepers[0], plan, progress)
            return _when_ready([(plan, keepers[0])], started, progress)
        nodes = start.run(keepers)
        return _when_ready(start.keepers, nodes[0].started, progress, nodes, start.close)
    except BaseException as error:
        close_keepers(keepers, spec)
        left = [text for each in keepers for text in each.left]
        left += start.close() if start else ()
        if left and isinstance(error, SglprofError):
            text = f"left behind: {', '.join(left)}"
            error.hint = f"{error.hint}; {text}" if error.hint else text
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
    keepers: Sequence[tuple[Plan, KeeperLink]],
    started: Started,
    progress: Progress | None,
    nodes: Sequence[Node] = (),
    release: Callable[[], tuple[str, ...]] = tuple,
) -> Server:
    """Waits until the server takes requests; raises as `wait_until_ready` does."""
    plan, keeper = keepers[0]
    began, began_at = time.time(), time.monotonic()
    log = ServerLog(plan.folder / "server.log")
    spec = command.merged_spec(plan.spec, plan.entry)
    files = tls.certificates(spec.args)
    url = command.local_url(started.host, started.port, tls=bool(files))
    verify = tls.trust(files, any_name=True)
    client = SglangClient(url, api_key=plan.api_key, admin_key=plan.admin_key, verify=verify)
    try:
        wait_until_ready(keepers, client, progress)
        ready_s = time.monotonic() - began_at
        info = patiently(client.server_info)
    except BaseException:
        client.close()
        raise
    locked = keeper.last_event(Clocks)
    return Server(
        spec=spec,
        kind=plan.entry.kind,
        url=tls.named(url, verify),
        folder=plan.folder,
        python=plan.entry.python,
        client=client,
        info=info,
        log=log,
        nsys=nodes[0].session if nodes else _session(plan, started),
        shown_command=started.command,
        keepers=[link for _, link in keepers],
        nodes=nodes,
        release=release,
        pid=started.pid,
        created=started.created,
        locked_clocks=locked.clocks if locked else {},
        started=began,
        ready_s=ready_s,
        driver_variables=tls.bundle_variables(files, plan.folder),
    )


def _session(plan: Plan, started: Started) -> NsysSession | None:
    if not plan.nsys:
        return None
    tool = NsysTool(plan.nsys, plan.nsys_version)
    return NsysSession(tool, started.session, tmpdir=started.tmpdir)


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


def close_keepers(keepers: Sequence[KeeperLink], spec: ServerSpec) -> None:
    """Asks all for their teardown, and waits for all."""
    limit = teardown_limit(spec.stop_timeout, nsys=spec.nsys)
    for keeper in keepers[1:]:
        keeper.begin_close()
    for keeper in keepers:
        keeper.close(limit)
