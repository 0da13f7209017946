"""The nodes of one server: which they are, how a process is started on one, what runs there.

A keeper runs on each node and starts the node's part of the server, with an nsys session of its
own. It is started through the node's launcher and talks over that command's stdin and stdout, so
it needs no port. If pytest dies, or the connection, it tears its part down.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shlex
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from pytest_sglprof._config.model import ServerSpec
from pytest_sglprof._errors import (
    NsysError,
    ServerError,
    ServerMissing,
    ServerNotReady,
    SettingsError,
)
from pytest_sglprof._files import safe_name
from pytest_sglprof._nsys import NsysSession, NsysTool
from pytest_sglprof._ranks import Rank
from pytest_sglprof._server.keeper.link import KeeperLink
from pytest_sglprof._server.keeper.protocol import Plan, Started
from pytest_sglprof._server.log import ServerLog
from pytest_sglprof._server.starting import wait_started

ALLOCATION_END = 30.0  # s for Slurm to take an allocation back
ASK_LIMIT = 30.0  # s for a keeper to look something up
SLACK = 15.0  # s beyond the limit that was given to what a keeper does

Say = Callable[[str], None]


@dataclass(frozen=True)
class Nodes:
    """names: the first node first. words: number of a node and a command -> the words that run it
    there; None runs it on this machine. close: gives back what was taken for them.
    """

    names: tuple[str, ...]
    words: Callable[[int, Sequence[str]], list[str]] | None = None
    close: Callable[[], tuple[str, ...]] = lambda: ()


def nodes_of(spec: ServerSpec, life: str, say: Say | None) -> Nodes:
    """The nodes of a server; waits for them where they have to be allocated.

    Raises `SettingsError`, `ServerMissing` (no Slurm) or `ServerNotReady` (no nodes in time).
    """
    return NODE_LAUNCHERS[spec.launcher](spec, life, say)


def is_on_nodes(spec: ServerSpec) -> bool:
    """Whether a server has keepers on nodes, instead of one of this machine."""
    return spec.nodes != 1 or spec.launcher != "local"


def count_of(spec: ServerSpec) -> int:
    """How many nodes a server spans."""
    return spec.nodes if isinstance(spec.nodes, int) else len(spec.nodes)


def _names(spec: ServerSpec) -> tuple[str, ...]:
    if isinstance(spec.nodes, int):
        return tuple(f"node{number}" for number in range(spec.nodes))
    return spec.nodes


# The launchers.


def _local(spec: ServerSpec, life: str, say: Say | None) -> Nodes:
    return Nodes(_names(spec))


def _command(spec: ServerSpec, life: str, say: Say | None) -> Nodes:
    names, template = _names(spec), spec.node_command
    if not template:
        raise SettingsError(
            f'server {spec.name!r}: launcher = "command" without node_command',
            expected="the words that run a command on a node, with {command} among them",
            hint="docs/nodes.md has those of ssh and of Kubernetes",
        )
    if callable(template):
        return Nodes(names, lambda rank, words: list(template(spec, names[rank], rank, words)))

    def words(rank: int, command: Sequence[str]) -> list[str]:
        values = {"{node}": names[rank], "{rank}": str(rank), "{quoted}": shlex.join(command)}
        line: list[str] = []
        for word in template:
            for name, value in values.items():
                word = word.replace(name, value)
            line += command if word == "{command}" else [word]
        return line

    return Nodes(names, words)


def _slurm(spec: ServerSpec, life: str, say: Say | None) -> Nodes:
    """Steps of the job that pytest runs in, or of a job that ends with this process."""
    if shutil.which("srun") is None:
        raise ServerMissing(
            f'server {spec.name!r}: launcher = "slurm", but there is no srun here',
            expected="the commands of Slurm: srun, salloc, scontrol",
            hint="run pytest where jobs are submitted, or inside of an allocation",
        )
    job, listed = os.environ.get("SLURM_JOB_ID", ""), os.environ.get("SLURM_JOB_NODELIST", "")
    allocation = None if job else Allocation(spec, life, say)
    if allocation is not None:
        job, listed = allocation.job, allocation.listed
    try:
        names = _chosen(spec, job, _hostnames(listed))
    except BaseException:
        if allocation is not None:
            allocation.close()
        raise
    options = [] if allocation is not None else [*spec.launcher_args]

    def words(rank: int, command: Sequence[str]) -> list[str]:
        step = ["srun", f"--jobid={job}", "--nodes=1", "--ntasks=1", f"--nodelist={names[rank]}"]
        step += ["--overlap", "--kill-on-bad-exit=0", f"--job-name=sglprof-{life}"]
        return [*step, *options, *command]

    return Nodes(names, words, allocation.close if allocation is not None else lambda: ())


NODE_LAUNCHERS: Mapping[str, Callable[[ServerSpec, str, Say | None], Nodes]] = {
    "local": _local,
    "slurm": _slurm,
    "command": _command,
}


def _chosen(spec: ServerSpec, job: str, hosts: Sequence[str]) -> tuple[str, ...]:
    wanted = spec.nodes
    missing = [] if isinstance(wanted, int) else sorted(set(wanted) - set(hosts))
    if missing or len(hosts) < count_of(spec):
        raise SettingsError(
            f"server {spec.name!r} needs {', '.join(missing) or f'{wanted} nodes'}, and Slurm job "
            f"{job} has {', '.join(hosts) or 'none'}",
            expected="a job that holds the nodes of the server",
            hint="ask for more nodes (salloc -N …), or set fewer in sglprof.toml",
        )
    return tuple(hosts[:wanted]) if isinstance(wanted, int) else wanted


def _hostnames(listed: str) -> list[str]:
    """`n[1-2]` -> n1, n2."""
    command = ["scontrol", "show", "hostnames", listed]
    answer = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    return answer.stdout.split()


class Allocation:
    """A job of Slurm that lives as long as the pipe to it, so it ends with this process.

    job: its number. listed: its nodes, as Slurm writes them.
    """

    def __init__(self, spec: ServerSpec, life: str, say: Say | None) -> None:
        names = [] if isinstance(spec.nodes, int) else [f"--nodelist={','.join(spec.nodes)}"]
        self._process = subprocess.Popen(
            [
                *("salloc", f"--nodes={count_of(spec)}", *names, f"--job-name=sglprof-{life}"),
                *spec.launcher_args,
                *("sh", "-c", 'echo "$SLURM_JOB_ID $SLURM_JOB_NODELIST"; exec cat'),
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        self.job, self.listed = "", ""
        self._said: list[str] = []
        self._readers = [
            threading.Thread(target=self._read, daemon=True),
            threading.Thread(target=self._listen, daemon=True),
        ]
        for reader in self._readers:
            reader.start()
        try:
            self._wait(spec, say)
        except BaseException:
            self.close()
            raise

    def _read(self) -> None:
        assert self._process.stdout is not None
        self.job, _, self.listed = self._process.stdout.readline().strip().partition(" ")

    def _listen(self) -> None:
        assert self._process.stderr is not None
        self._said.extend(line.rstrip() for line in self._process.stderr)

    def _wait(self, spec: ServerSpec, say: Say | None) -> None:
        began = time.monotonic()
        while not self.listed:
            seconds = time.monotonic() - began
            ended = self._process.poll() is not None
            if ended:
                for reader in self._readers:
                    reader.join(SLACK)
            if ended or seconds > spec.ready_timeout:
                what = "Slurm refused" if ended else f"Slurm did not give in {seconds:.0f} s"
                wanted = f"{spec.nodes}" if isinstance(spec.nodes, int) else ", ".join(spec.nodes)
                raise ServerNotReady(
                    f"{what} the nodes of server {spec.name!r} ({wanted})",
                    expected="an allocation by salloc",
                    hint="look at `sinfo` and `squeue`; launcher_args has further options of "
                    "salloc (--partition=…), ready_timeout is the limit of this wait",
                    log=self._said[-8:],
                )
            if say is not None and seconds >= 1:
                count = count_of(spec)
                say(f"server {spec.key}: waiting for {count} nodes of Slurm, {seconds:.0f} s")
            time.sleep(0.5)

    def close(self) -> tuple[str, ...]:
        """Gives the nodes back; returns what is left."""
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):
            self._process.stdin.close()
        try:
            self._process.wait(ALLOCATION_END)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
            return (f"Slurm job {self.job}",) if self.job else ()
        return ()


# What runs on the nodes.


class NodesStart:
    """Starts the parts of a server on its nodes; `close` gives the nodes back.

    keepers: those that were started, each with its plan.
    """

    def __init__(self, plan: Plan, say: Say | None) -> None:
        self._plan = plan
        self._say = say
        self._nodes = nodes_of(plan.spec, plan.life, say)
        self.keepers: list[tuple[Plan, KeeperLink]] = []

    @property
    def close(self) -> Callable[[], tuple[str, ...]]:
        """Gives the nodes back; returns what is left."""
        return self._nodes.close

    def run(self, links: list[KeeperLink]) -> list[Node]:
        """Starts the first node, then all others; adds each keeper to `links` at once.

        Raises as `wait_started` does.
        """
        self._start(0, "", links)
        nodes = [self._started(0)]
        for rank in range(1, len(self._nodes.names)):
            self._start(rank, nodes[0].started.head, links)
        return nodes + [self._started(rank) for rank in range(1, len(self.keepers))]

    def _start(self, rank: int, head: str, links: list[KeeperLink]) -> None:
        name, folder = self._nodes.names[rank], self._plan.folder
        plan = replace(
            self._plan,
            spec=replace(self._plan.spec, launcher="local", nodes=1, node_command=None),
            folder=folder.with_name(f"{folder.name}.{safe_name(name)}") if rank else folder,
            node=name,
            node_rank=rank,
            nodes=len(self._nodes.names),
            is_remote=self._nodes.words is not None,
            head=head,
            life=secrets.token_hex(6) if rank else self._plan.life,
        )
        words = self._nodes.words
        links.append(KeeperLink(plan, partial(words, rank) if words else None))
        self.keepers.append((plan, links[-1]))

    def _started(self, rank: int) -> Node:
        plan, link = self.keepers[rank]
        return Node(plan, link, wait_started(link, plan, self._say))


class Node:
    """One node of a running server: its keeper, its log, its nsys session."""

    def __init__(self, plan: Plan, link: KeeperLink, started: Started) -> None:
        self.started = started
        self.name = plan.node
        self.rank = plan.node_rank
        self.folder = plan.folder
        self.log = ServerLog(plan.folder / "server.log")
        self.link = link
        self.session = None
        if plan.nsys:
            tool = NsysTool(plan.nsys, plan.nsys_version)
            self.session = NodeSession(link, tool, started.session)

    def scheduler_ranks(self) -> dict[int, Rank]:
        """pid on that node -> rank."""
        ranks = self.link.ask("ranks", {}, ASK_LIMIT)
        parsed = {int(pid): Rank.parse(label) for pid, label in ranks.items()}
        return {pid: rank for pid, rank in parsed.items() if rank is not None}


class NodeSession(NsysSession):
    """The nsys session of a node: what is done with it, the node's keeper does there."""

    def __init__(self, link: KeeperLink, tool: NsysTool, name: str) -> None:
        super().__init__(tool, name)
        self._link = link

    def state(self) -> str:
        """Its state in ``nsys sessions list`` of the node."""
        return str(self._link.ask("nsys_state", {}, ASK_LIMIT))

    def start(
        self, output: Path, *, capture_range: str | None = None, timeout: float = 60.0
    ) -> None:
        """As `NsysSession.start`."""
        values = {"output": str(output), "capture_range": capture_range, "timeout": timeout}
        self._link.ask("nsys_start", values, timeout + SLACK)

    def stop(self, *, timeout: float, progress: Say | None = None) -> Path:
        """As `NsysSession.stop`."""
        self.remarks = ()
        answer = self._link.ask("nsys_stop", {"timeout": timeout}, timeout + SLACK)
        self.remarks = tuple(answer["remarks"])
        return self.fetch(Path(answer["report"]), timeout)

    def size(self, report: Path) -> int:
        """As `NsysSession.size`."""
        return int(self._link.ask("nsys_size", {"report": str(report)}, ASK_LIMIT))

    def export(self, report: Path, target: Path, timeout: float) -> Path:
        """As `_nsys_export.export` to SQLite."""
        values = {"report": str(report), "target": str(target), "timeout": timeout}
        return self.fetch(Path(self._link.ask("nsys_export", values, timeout + SLACK)), timeout)

    def fetch(self, file: Path, timeout: float) -> Path:
        """As `NsysSession.fetch`."""
        try:
            return self._link.bring(file, timeout)
        except ServerError as error:
            raise NsysError(error.what, expected=error.expected, hint=error.hint) from error
