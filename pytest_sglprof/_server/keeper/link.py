"""`KeeperLink`: pytest's end of the pipe to a keeper, on this machine or on a node."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from pytest_sglprof import _process as process
from pytest_sglprof._errors import ServerError, ServerMissing
from pytest_sglprof._files import RUN_FILE, unwritten
from pytest_sglprof._process import ProcessId
from pytest_sglprof._server.command import PACKAGE_ROOT
from pytest_sglprof._server.journal import KeptServer, end_server, note_server, run_of
from pytest_sglprof._server.keeper.gather import Gathering
from pytest_sglprof._server.keeper.protocol import (
    END_ORPHANS,
    FROZEN_LIMIT,
    LIFE,
    NODE_CLEAN_LIMIT,
    ORPHAN_GRACE,
    SEND_FILES,
    Answer,
    Ask,
    Clocks,
    Closed,
    Event,
    Exited,
    Launch,
    Order,
    Orphans,
    Plan,
    Started,
    Stop,
    Stopped,
    decode_event,
    encode,
    end_orphans,
    error_from,
    show,
)

OnNode = Callable[[Sequence[str]], list[str]]  # a command -> the words that run it on a node
LOOK_EVERY = 0.5  # s between two checks whether the keeper runs
SILENT_END = 3.0  # s for a launcher to end whose node never said anything
READ_LIMIT = 5.0  # s to read the last messages of a keeper that has ended

_Event = TypeVar("_Event")


class KeeperLink:
    """Starts a keeper, talks to it, and cleans up after it if it is killed.

    run: the words that run a command on the plan's node; None on this machine. ended: when its
    server, or it, ended by itself (monotonic, s); None before. Events are kept until they are asked
    for. left: what could not be removed. problems: a line for each file that could not be written.
    """

    def __init__(self, plan: Plan, run: OnNode | None = None) -> None:
        self._plan = plan
        self._run = run
        self._log = plan.folder / "keeper.log"
        self._closed = threading.Event()
        self._ending = threading.Event()
        self._fault: str | None = None
        self.left: tuple[str, ...] = ()
        self.problems: tuple[str, ...] = ()
        self._events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self._last: dict[type[Any], Any] = {}
        self._asked = itertools.count()
        self._answers: dict[int, Answer] = {}
        self.ended: float | None = None
        self._gathering: Gathering | None = None
        plan.folder.mkdir(parents=True, exist_ok=True)
        show(plan)
        self._process = self._spawned(_command(run), {LIFE: plan.life})
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

    def _spawned(
        self, words: list[str], variables: Mapping[str, str] | None = None
    ) -> subprocess.Popen[bytes]:
        with self._log.open("ab") as errors:
            return _spawn(
                words,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                env={**_environment(self._plan.private), **(variables or {})},
                start_new_session=True,
            )

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

    def ask(self, what: str, values: dict[str, Any], timeout: float) -> Any:
        """The answer of the keeper to a question of `questions.QUESTIONS`.

        Raises what it raised there, or `ServerError` if none comes within `timeout` s.
        """
        number = next(self._asked)
        self.send(Ask(number, what, values))
        deadline = time.monotonic() + timeout
        while (answer := self._answers.pop(number, None)) is None:
            if self.last_event(Closed) is not None or time.monotonic() > deadline:
                where = f"node {self._plan.node}" if self._plan.node else "the keeper"
                raise ServerError(
                    f"{where} did not answer {what} "
                    + (f"within {timeout:.0f} s" if self.is_running() else "any more"),
                    expected="a keeper that lives as long as its server",
                    hint=f"read {self._log}",
                    log=keeper_log_end(self._plan.folder),
                )
            time.sleep(0.01)
        if answer.error:
            raise error_from(answer)
        return answer.value

    # Files of a node that has another folder than pytest, see `gather`.

    def gather(self) -> None:
        """Brings the files of the node here from now on."""
        process = self._spawned(_command(self._run, SEND_FILES))
        self._gathering = Gathering(process, run_of(self._plan.folder), self._plan.node)

    @property
    def is_gathered(self) -> bool:
        """Whether files come from the node a moment later than they are written there."""
        return self._gathering is not None

    def catch_up(self) -> None:
        """Returns when all is here that the node has written until now."""
        if self._gathering is not None:
            self._gathering.catch_up()

    def bring(self, path: Path, timeout: float) -> Path:
        """`path`, once the complete file is here; raises `ServerError` if it does not come."""
        return path if self._gathering is None else self._gathering.bring(path, timeout)

    def death(self) -> str | None:
        """How the keeper ended; None while it runs, or if it ended because `close` asked it to."""
        status = self._process.poll()
        if status is None and self.last_event(Closed) is not None:
            with contextlib.suppress(subprocess.TimeoutExpired):  # about to end
                status = self._process.wait(READ_LIMIT)
        if status is None or (self._ending.is_set() and self.last_event(Stopped) is not None):
            return None
        who = f"the keeper process (pid {self.pid})"
        who = f"the keeper of node {self._plan.node}" if self._plan.node else who
        if self._fault:
            return f"{who} {self._fault}, so it was killed"
        if self.last_event(Stopped) is not None:
            return f"{who} was sent SIGTERM by another process"
        how = f"was killed by signal {-status}" if status < 0 else f"ended with status {status}"
        return f"{who} {how}"

    def begin_close(self) -> None:
        """Asks for the teardown; `close` waits for it."""
        self._ending.set()
        self.send(Stop())

    def close(self, timeout: float) -> bool:
        """Asks for the teardown and waits for it; afterwards `left` holds what it left.

        False if the keeper was dead, stayed stopped or took more than `timeout` s. Then it
        is killed, and this process ends whatever it left behind.
        """
        self.begin_close()
        if self._run is not None and not self._last:
            timeout = min(timeout, SILENT_END)  # it never came, so there is nothing to tear down
        try:
            self._watch.join(timeout)
            if self._watch.is_alive() and self.is_running():
                self._kill(f"did not tear down within {timeout:.0f} s")
            self._watch.join()
            self._end_gathering()
        finally:  # also after a Ctrl-C: then the keeper goes on alone
            if self._process.stdin is not None:
                with contextlib.suppress(OSError):
                    self._process.stdin.close()
        return self.last_event(Stopped) is not None

    def _end_gathering(self) -> None:
        """Also notes the end of the server, which the keeper could do only on its node."""
        if self._gathering is None:
            return
        gathering, self._gathering = self._gathering, None
        self.left += gathering.close()
        if gathering.fault:
            self.problems += (f"files of node {self._plan.node}: {gathering.fault}",)
        with self._writing():
            end_server(self._plan.folder, self._plan.life, self.left)

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
        if self._run is not None and not self._last.keys() - {Closed}:
            self.left = ()  # it never came
        elif self._run is None:
            self.left = end_orphans(orphaned, folder, leader=started.pid if started else 0)
        else:
            self.left = _end_on_node(self._run, orphaned, folder)
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
            node=plan.node if self._run else "",
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
        if self._run is not None:  # what it started here, also a shell's children
            with contextlib.suppress(OSError):
                os.killpg(self.pid, signal.SIGKILL)
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
        if isinstance(event, Answer):
            self._answers[event.number] = event
            return
        if isinstance(event, Exited | Closed):
            self.ended = self.ended or time.monotonic()
        self._last[type(event)] = event
        self._events.put(event)


def _command(run: OnNode | None, *words: str) -> list[str]:
    """The words that start a keeper; on another node also with the path to this package."""
    start = [sys.executable, "-m", "pytest_sglprof._server.keeper", *words]
    return start if run is None else run(["env", f"PYTHONPATH={_paths()}", *start])


def _spawn(words: list[str], **options: Any) -> subprocess.Popen[bytes]:
    try:
        return subprocess.Popen(words, **options)
    except OSError as error:
        raise ServerMissing(
            f"{words[0]} could not be started: {error.strerror or error}",
            expected="a command that starts a process on a node",
            hint="check launcher and node_command of the server",
        ) from error


def _paths() -> str:
    paths = [str(PACKAGE_ROOT), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    return os.pathsep.join(path for path in paths if path)


def _environment(private: Container[str]) -> dict[str, str]:
    """The keeper's variables: this process's without secrets, and a path to this package."""
    variables = {k: v for k, v in os.environ.items() if k not in private}
    variables.pop("PYTEST_CURRENT_TEST", None)  # the server outlives the test that runs now
    return {**variables, "PYTHONPATH": _paths()}


def keeper_log_end(folder: Path, limit: int = 8) -> list[str]:
    """The last lines of a keeper's log."""
    with contextlib.suppress(OSError):
        return (folder / "keeper.log").read_text(errors="replace").splitlines()[-limit:]
    return []


def _end_on_node(run: OnNode, server: KeptServer, folder: Path) -> tuple[str, ...]:
    """As `end_orphans`, by a command on the node of the server."""
    leader = server.server.pid if server.server else 0
    order = msgspec.json.encode(Orphans(server, str(folder), leader))
    try:
        ended = subprocess.run(
            _command(run, END_ORPHANS),
            input=order,
            capture_output=True,
            timeout=NODE_CLEAN_LIMIT,
            check=True,
            start_new_session=True,
        )
        return tuple(f"{left} of node {server.node}" for left in json.loads(ended.stdout))
    except (OSError, subprocess.SubprocessError, ValueError) as error:
        why = (getattr(error, "stderr", b"") or b"").decode(errors="replace").strip()
        last = why.splitlines()[-1] if why else type(error).__name__
        return (f"what runs on node {server.node}, which cannot be reached ({last})",)
