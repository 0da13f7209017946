"""`ServerLife`: one server, with its nsys and its leases, from start to end."""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import re
import select
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pytest_sglprof import _nsys as nsys
from pytest_sglprof import _process as process
from pytest_sglprof._errors import LeaseError, ServerDied, ServerNotReady, SettingsError
from pytest_sglprof._files import RUN_FILE, unwritten
from pytest_sglprof._redact import (
    known_values,
    longest_spelling,
    redact_bytes,
    redact_command,
    redact_text,
)
from pytest_sglprof._server import command, lease, tls
from pytest_sglprof._server.arguments import has_option, option
from pytest_sglprof._server.journal import change_server
from pytest_sglprof._server.keeper.protocol import (
    HURRIED_WAIT,
    INJECTION,
    PORT_WAIT,
    PUMP_WAIT,
    RANK_GRACE,
    START_LIMIT,
    STATUS_WAIT,
    Plan,
    remove_injection,
    remove_tmpdir,
)
from pytest_sglprof._server.nvml import ClockLock, Nvml

log = logging.getLogger("sglprof.keeper")

FULL = 1 << 16  # bytes; with less, a server can write neither its log nor its files
SOCKET_ROOM = 60  # longest path of TMPDIR in bytes: SGLang's sockets in it may have 107

Show = Callable[[str], None]


class ServerLife:
    """Starts a server and knows whether it is alive; `teardown.tear_down` ends it.

    merged: the spec with what its `--config FILE` holds among its `args`. certificates: see
    `tls.certificates`.
    cancelled: true once the start is to be given up. progress: called with lines for people.
    locked: called with UUID -> MHz as soon as GPU clocks are locked. clocks: that lock, None
    if none was asked for.
    """

    def __init__(
        self,
        plan: Plan,
        *,
        cancelled: Callable[[], bool],
        progress: Show,
        locked: Callable[[Mapping[str, int]], None] = lambda clocks: None,
    ) -> None:
        self.plan = plan
        self.folder = plan.folder
        self.spec = command.spec_on_node(plan.spec, address() if plan.is_remote else "")
        self.merged = command.merged_spec(self.spec, plan.entry)
        self.head = plan.head
        self.host = option(self.merged.args, "--host") or command.HOST
        self.certificates = tls.certificates(self.merged.args)
        self.port = 0
        self.pid = 0
        self.created = 0.0
        self.words: list[str] = []
        self.session: nsys.NsysSession | None = None
        self.launcher: subprocess.Popen[bytes] | None = None
        self.pump: LogPump | None = None
        self.tmpdir = self.folder / "tmp"
        self.seen: set[int] = set()
        self.shared: set[Path] = set()
        self.clocks: ClockLock | None = None
        self.problems: tuple[str, ...] = ()  # a line for each file that could not be written
        self._leases: list[lease.Lease] = []
        self._link: Path | None = None
        self._injection = ""
        self._began = time.time()
        self._cancelled = cancelled
        self._progress = progress
        self._locked = locked
        self._noted: tuple[list[process.ProcessId], list[str]] = ([], [])

    def start(self) -> None:
        """Takes the leases, then starts the server's process; it is not ready yet on return."""
        lease.sweep()
        self._make_tmpdir()
        for name in ("tmp", "traces", "nsys"):
            (self.folder / name).mkdir(parents=True, exist_ok=True)
        # Else a death would be explained by the log of an earlier server.
        (self.folder / "server.log").unlink(missing_ok=True)
        gpus = self._lease_gpus()
        self.port, nccl_port = self._lease_ports()
        names = [each.name for each in self._leases]
        self.note(
            gpus=[name.removeprefix("gpu-") for name in names if name.startswith("gpu-")],
            ports=[int(name.removeprefix("port-")) for name in names if name.startswith("port-")],
        )
        self._shorten_tmpdir()
        plan = self.plan
        words = command.server_words(self.spec, plan.entry, self.port, nccl_port)
        words += command.node_words(self.merged, plan.nodes, plan.node_rank, self.head)
        shown, hidden = command.split_secret_words(words)
        hidden += command.key_words(self.merged, plan.api_key, plan.admin_key)
        self.words = redact_command(command.shown_command(plan.entry, [*shown, *hidden]))
        environment, private = command.server_environment(
            plan.spec, plan.entry, {**os.environ, **plan.private}, self.tmpdir
        )
        if gpus is not None:
            environment[VISIBLE] = ",".join(gpus)
        fifo = self.folder / "tmp" / "handover.fifo"
        os.mkfifo(fifo, 0o600)
        line = [*self._nsys_words(), *command.exec_command(plan.entry, fifo, shown)]
        log.info("starting %s", " ".join(redact_command(line)))
        if known_values():
            self.pump = LogPump(self.folder / "tmp" / "log.fifo", self.folder / "server.log")
        self._spawn(line, environment)
        self._hand_over(fifo, self._secrets(hidden, private))
        self._wait_for_pid()
        self.note(server=process.identity(self.pid))

    def is_alive(self) -> bool:
        """True while the server's process runs, even if nsys has ended."""
        return bool(self.pid) and process.is_alive(self.pid, self.created)

    def end_ranks(self) -> None:
        """Ends the ranks of a dead server, which can linger for a minute, and nsys with them."""
        process.kill_all(process.wait_gone(process.of_session(self.pid), RANK_GRACE))

    def exit_status(self) -> int | None:
        """The server's exit status after its end; None if unknown.

        Under nsys it is known only once the report of the open window is written.
        """
        if self.launcher is None:
            return None
        deadline = time.monotonic() + STATUS_WAIT
        while (status := self.launcher.poll()) is None:
            if time.monotonic() > deadline:
                return None
            if self._cancelled():
                deadline = min(deadline, time.monotonic() + HURRIED_WAIT)
            time.sleep(0.05)
        # If nsys was killed, this status is that of nsys, not of the server.
        return None if self.plan.nsys and status < 0 else status

    def remember(self) -> None:
        """Notes the server's processes, and the shared memory that they would leave if killed."""
        members = process.descendants(os.getpid())
        self.seen.update(member.pid for member in members)
        if new := process.shared_memory(members, self._began) - self.shared:
            self.shared |= new
            log.info("shared memory: %s", ", ".join(sorted(path.name for path in new)))
        alive = [each for each in (process.identity(member.pid) for member in members) if each]
        files = [self._injection, str(self.plan.short_tmpdir), *map(str, sorted(self.shared))]
        if (now := (alive, [file for file in files if file])) != self._noted:
            self._noted = now
            self.note(processes=now[0], files=now[1])

    def note(self, **changes: Any) -> None:
        """Writes into the run's journal what there is of this life now."""
        with self.journal():
            change_server(self.folder, self.plan.life, **changes)

    @contextlib.contextmanager
    def journal(self) -> Iterator[None]:
        """A journal that cannot be written is a problem, and ends nothing."""
        try:
            yield
        except (OSError, ValueError) as error:
            log.warning("%s", problem := unwritten(RUN_FILE, error))
            if problem not in self.problems:
                self.problems += (problem,)

    def free(self) -> None:
        """Removes temporary files and frees the leases, after the server's end."""
        if self.pump is not None:
            self.pump.close()
            self.problems += self.pump.problems
        if self._link is not None:
            remove_tmpdir(self._link)
        remove_injection(self._injection)
        process.remove_shared_memory(self.shared)
        remove_tmpdir(self.folder / "tmp")
        for held in self._leases:
            held.release()
        self._leases.clear()
        with contextlib.suppress(LeaseError):  # no folder, so no leases
            lease.sweep()  # a pytest that was killed may have left the lock of its window

    def _lease_gpus(self) -> list[str] | None:
        """Leases the GPUs; returns their names if the server is to see only these, else None."""
        spec = self.plan.spec
        if not self._on_gpu:
            return None
        visible = visible_gpus({**os.environ, **dict(spec.env)})
        chosen = choose_gpus(spec.gpus, visible)
        for name in sorted(chosen):  # every keeper takes them in one order, so none deadlocks
            self._leases.append(
                lease.acquire(
                    f"gpu-{name}",
                    timeout=spec.ready_timeout,
                    what=f"GPU {name}",
                    progress=self._progress,
                    cancelled=self._cancelled,
                )
            )
        if spec.lock_clocks:
            order = {**os.environ, **dict(spec.env)}.get("CUDA_DEVICE_ORDER")
            by_bus = order == "PCI_BUS_ID"
            self.clocks = ClockLock(chosen, spec.lock_clocks, by_bus=by_bus)
            self._locked(self.clocks.held)
            self.note(clocks=dict(self.clocks.held))
            log.info("locked at %d MHz: %s", spec.lock_clocks, ", ".join(self.clocks.held))
        if spec.gpus == "all" or VISIBLE in dict(spec.env):
            return None
        return None if option(self.merged.args, "--base-gpu-id") else chosen

    def _lease_ports(self) -> tuple[int, int | None]:
        wanted = command.user_port(self.merged)
        if wanted is None:
            port, leases = lease.free_server_ports()
            self._leases += leases
        else:
            port = wanted
            self._lease_wanted_port(port)
        if self.plan.nodes > 1 and not self.head and not self.plan.node_rank:
            head, leases = lease.free_server_ports()  # the ranks take some ports from there on
            self._leases += leases
            self.head = f"{self.host}:{head}"
        if has_option(self.merged.args, "--nccl-port"):
            return port, None
        nccl_port, held = lease.free_port()
        self._leases.append(held)
        return port, nccl_port

    def _lease_wanted_port(self, port: int) -> None:
        self._leases.append(
            lease.acquire(
                lease.port_name(port),
                timeout=self.plan.spec.ready_timeout,
                what=f"port {port}",
                progress=self._progress,
                cancelled=self._cancelled,
            )
        )
        deadline = time.monotonic() + PORT_WAIT
        while not lease.port_is_free(port):
            pid = lease.listener_of(port)
            if pid is not None or time.monotonic() > deadline or self._cancelled():
                raise LeaseError(
                    f"port {port} is in use by {f'process {pid}' if pid else 'another process'}",
                    expected="a free port, since the server's port is set",
                    hint="end that process, set another port, or set none to get a free one",
                )
            time.sleep(0.1)

    def _make_tmpdir(self) -> None:
        """On a node the folder may be on a network disk, where sockets and fifos are slow or fail.

        So its temporary files are on a disk of the node, and the folder has a link to them.
        """
        if self.plan.is_remote:
            self.plan.short_tmpdir.mkdir(mode=0o700)
            self._link = self.plan.short_tmpdir
            (self.folder / "tmp").symlink_to(self._link, target_is_directory=True)
            self.tmpdir = self._link

    def _shorten_tmpdir(self) -> None:
        """Uses a link for a long path of TMPDIR, since the kernel limits the path of a socket."""
        if len(os.fsencode(self.tmpdir)) <= SOCKET_ROOM:
            return
        link = self.plan.short_tmpdir
        link.symlink_to(self.tmpdir.absolute(), target_is_directory=True)
        self._link = self.tmpdir = link

    def _nsys_words(self) -> list[str]:
        plan = self.plan
        if not plan.nsys:
            return []
        tool = nsys.NsysTool(plan.nsys, plan.nsys_version)
        name = plan.session_name
        self.session = nsys.NsysSession(tool, name, tmpdir=self.tmpdir)
        return nsys.profile_prefix(
            tool,
            name,
            self.folder / "nsys" / "first.nsys-rep",
            plan.spec.nsys_args,
            gpu=self._on_gpu,
        )

    def _spawn(self, line: list[str], environment: dict[str, str]) -> None:
        try:
            with self._log_target.open("ab", buffering=0) as output:
                self.launcher = subprocess.Popen(
                    line,
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    env=environment,
                    start_new_session=True,
                )
        except OSError as error:
            raise ServerDied(
                f"{line[0]} could not be started: {error.strerror or error}",
                hint="check --sglprof-python and --sglprof-nsys",
            ) from error

    def _secrets(self, hidden: list[str], private: dict[str, str]) -> dict[str, Any]:
        """What goes through the fifo; see `exec_step.py`."""
        return {
            # nsys writes the environment block of every process into its report.
            "environ": {} if self.plan.nsys else private,
            "private": private if self.plan.nsys else {},
            "args": hidden,
            "log": str(self._log_target),
            "pid_file": str(self._pid_file),
        }

    @property
    def _on_gpu(self) -> bool:
        on_cpu = option(self.merged.args, "--device") == "cpu"
        return command.LAUNCHERS[self.plan.entry.kind].uses_hardware and not on_cpu

    @property
    def _log_target(self) -> Path:
        """Where the server and its launcher write: the fifo of the pump if there is one."""
        return self.pump.fifo if self.pump is not None else self.folder / "server.log"

    @property
    def _pid_file(self) -> Path:
        return self.folder / "tmp" / "server.pid"

    def _hand_over(self, fifo: Path, given: dict[str, Any]) -> None:
        launcher = self.launcher
        assert launcher is not None

        def alive() -> bool:
            return launcher.poll() is None and not self._cancelled()

        if not hand_over(fifo, given, alive=alive, timeout=START_LIMIT):
            raise self._not_started()

    def _wait_for_pid(self) -> None:
        deadline = time.monotonic() + START_LIMIT
        while not self._pid_file.exists():
            assert self.launcher is not None
            over = time.monotonic() > deadline or self._cancelled()
            ended = self.launcher.poll() is not None
            if over or (ended and not self._pid_file.exists()):  # it may have run since
                raise self._not_started()
            time.sleep(0.02)
        self.pid = int(self._pid_file.read_text())
        with contextlib.suppress(OSError):
            self._pid_file.unlink()
        self.created = process.create_time(self.pid) or 0.0  # 0.0: it has ended already
        if self.session is not None:
            self._injection = process.variable(self.pid, INJECTION)
        log.info("server is process %d", self.pid)

    def _not_started(self) -> ServerDied | ServerNotReady:
        status = self.launcher.poll() if self.launcher else None
        log_text = (self.folder / "server.log").read_text(errors="replace")
        lines = redact_text(log_text).splitlines()
        if self._cancelled():
            return ServerNotReady(
                f"the keeper process (pid {os.getpid()}) was sent SIGTERM while it started "
                "the server",
                expected="a keeper that lives as long as its server",
                hint="find out what sent it SIGTERM",
                log=lines[-12:],
            )
        if status is None:
            return ServerNotReady(
                f"the server's process did not start within {START_LIMIT:g} s",
                hint=f"read {self.folder / 'server.log'}",
                log=lines[-12:],
            )
        is_full = shutil.disk_usage(self.folder).free < FULL
        return ServerDied(
            f"the server's command ended with status {status} before the server ran"
            + (", and the disk of its folder is full" if is_full else ""),
            expected="a command that starts",
            hint=f"read the whole log: {self.folder / 'server.log'}",
            log=lines[-12:],
        )


# Passing secrets to the exec step, and keeping them out of the server's log.

CHUNK = 65536
MAX_LINE = 1 << 20  # bytes that are held back while a line is incomplete


def hand_over(
    fifo: Path, given: Mapping[str, Any], *, alive: Callable[[], bool], timeout: float
) -> bool:
    """Writes `given` as JSON once the fifo has a reader, then removes the fifo.

    False if `alive` returns False or `timeout` s pass before that.
    """
    deadline = time.monotonic() + timeout
    try:
        while time.monotonic() < deadline:
            try:
                handle = os.open(fifo, os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC)
            except OSError as error:
                if error.errno != errno.ENXIO:  # ENXIO: no reader yet
                    raise
                if not alive():
                    return False
                time.sleep(0.02)
                continue
            os.set_blocking(handle, True)
            with os.fdopen(handle, "w", encoding="utf-8") as stream, contextlib.suppress(OSError):
                json.dump(dict(given), stream)
            return True
        return False
    finally:
        fifo.unlink(missing_ok=True)


class LogPump:
    """Copies a fifo into a log file, line by line, with all known secrets hidden.

    SGLang logs all its arguments when it starts, keys included, and requests if asked to. So
    a server with secrets writes through a pump; one without writes its log itself. If the
    log cannot be written (a full disk) the pump keeps reading, since a server must never
    wait for its log.
    """

    def __init__(self, fifo: Path, log: Path) -> None:
        self.fifo = fifo
        self._log = log.open("ab", buffering=0)
        os.mkfifo(fifo, 0o600)
        # For reading and writing, so that the pump neither blocks here nor sees an end of file
        # between two writers.
        self._handle = os.open(fifo, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
        self._dropped = 0  # bytes
        self._fault: OSError | None = None
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._run, name="log pump", daemon=True)
        self._thread.start()

    @property
    def problems(self) -> tuple[str, ...]:
        """What of the log could not be written, as one line; empty if all of it could be."""
        if self._fault is None:
            return ()
        line = unwritten(self._log.name, self._fault)
        return (f"{line} (it lacks {self._dropped:,} bytes)",)

    def close(self) -> None:
        """Writes what is left and ends the pump, after the server's end."""
        self._ending.set()
        self._thread.join(timeout=PUMP_WAIT)
        self.fifo.unlink(missing_ok=True)

    def _run(self) -> None:
        held = b""
        with self._log:
            while True:
                ending = self._ending.is_set()
                data = self._read()
                head, newline, held = (held + data).rpartition(b"\n")
                if newline:
                    self._write(head + newline)
                if len(held) > MAX_LINE:  # the rest may be the beginning of a secret
                    held = redact_bytes(held)
                    cut = max(len(held) - longest_spelling(), 0)
                    self._write(held[:cut])
                    held = held[cut:]
                if ending and not data:
                    self._write(held)
                    break
        os.close(self._handle)

    def _read(self) -> bytes:
        if not select.select([self._handle], [], [], 0.1)[0]:
            return b""
        try:
            return os.read(self._handle, CHUNK)
        except BlockingIOError:
            return b""

    def _write(self, data: bytes) -> None:
        # surrogateescape: a log may hold any bytes, and they are kept
        text = redact_text(data.decode("utf-8", errors="surrogateescape"))
        rest = memoryview(text.encode("utf-8", errors="surrogateescape"))
        try:
            while rest:
                rest = rest[self._log.write(rest) :]
        except OSError as error:
            self._dropped += len(rest)
            self._fault = error


def address() -> str:
    """The address of this node that others reach it by, as far as it can be known here."""
    with contextlib.suppress(OSError):
        given = socket.gethostbyname(socket.gethostname())
        if not given.startswith("127."):
            return given
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect(
            ("192.0.2.1", 9)
        )  # sends nothing; the kernel chooses the address to send from
        return str(probe.getsockname()[0])
    return command.HOST


# Which GPUs are visible, and which processes NVML lists on them.

VISIBLE = "CUDA_VISIBLE_DEVICES"


def visible_gpus(environment: Mapping[str, str]) -> list[str]:
    """Names of the GPUs that a process would see: from CUDA_VISIBLE_DEVICES, else all indices."""
    listed = environment.get(VISIBLE)
    if listed is not None:
        return [name.strip() for name in listed.split(",") if name.strip() not in ("", "-1")]
    nodes = (re.fullmatch(r"nvidia(\d+)", path.name) for path in Path("/dev").glob("nvidia*"))
    return [str(number) for number in sorted(int(node[1]) for node in nodes if node)]


def choose_gpus(wanted: Literal["all"] | Sequence[int], visible: Sequence[str]) -> list[str]:
    """The GPUs of a server. wanted: "all", or indices into `visible`."""
    if wanted == "all":
        return list(visible)
    beyond = [index for index in wanted if int(index) >= len(visible)]
    if beyond:
        raise SettingsError(
            f"gpus: device {beyond[0]} does not exist",
            expected=f"indices below {len(visible)}, the number of visible GPUs",
            hint=f"check nvidia-smi and ${VISIBLE}",
        )
    return [visible[int(index)] for index in wanted]


def processes_on_gpus(pids: Iterable[int]) -> list[int]:
    """Those of `pids` that NVML lists as having a context; [] where there is no NVML."""
    try:
        nvml = Nvml()
    except (ImportError, OSError):
        return []
    try:
        listed = {pid for uuid in nvml.uuids() for pid in nvml.pids(uuid)}
    except OSError:
        return []
    finally:
        nvml.close()
    return sorted(listed & set(pids))


def log_gpus() -> str:
    """One line for the keeper's log."""
    return f"visible GPUs: {', '.join(visible_gpus(os.environ)) or 'none'}"
