"""The keeper, ``python -m pytest_sglprof._server.keeper``: the process that owns a server.

It runs in a process session of its own, ignores Ctrl-C, and exchanges the messages of
`protocol` with pytest. When pytest asks for it, dies, or closes the pipe, the keeper tears
the server down.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import queue
import signal
import sys
import threading
import time
from pathlib import Path

import msgspec

from pytest_sglprof import _process as process
from pytest_sglprof._config.backends import Backend
from pytest_sglprof._errors import SglprofError
from pytest_sglprof._redact import learn, redact_text
from pytest_sglprof._server.command import learn_secrets, merged_spec
from pytest_sglprof._server.journal import end_server
from pytest_sglprof._server.keeper.gather import send_files
from pytest_sglprof._server.keeper.life import ServerLife, log_gpus
from pytest_sglprof._server.keeper.protocol import (
    END_ORPHANS,
    LIFE,
    SEEN,
    SEND_FILES,
    Ask,
    Clocks,
    Event,
    Exited,
    Launch,
    Order,
    Orphans,
    Plan,
    ProgressEvent,
    Started,
    Stop,
    Stopped,
    Window,
    decode_order,
    encode,
    end_orphans,
    error_message,
    is_shown,
)
from pytest_sglprof._server.keeper.questions import answer
from pytest_sglprof._server.keeper.teardown import tear_down

log = logging.getLogger("sglprof.keeper")

TICK = 0.25  # s between two checks whether the server runs
FIRST_LOOK = 0.5  # s between two looks at what the server has made; twice as long each time
LAST_LOOKS = 30.0
ALONE_LIMIT = 20.0  # s for closing a window when pytest no longer waits for it


class _Formatter(logging.Formatter):
    """Hides secrets, also in tracebacks."""

    def format(self, record: logging.LogRecord) -> str:
        return redact_text(super().format(record))


class Keeper:
    """Takes orders from stdin, looks after one server, and writes events to stdout."""

    def __init__(self) -> None:
        self._inbox: queue.SimpleQueue[Order | None] = queue.SimpleQueue()
        self._ending = threading.Event()
        self._saying = threading.Lock()
        self._alone = False
        self._window: Backend | None = None
        self._opened = 0.0
        self._parent = 0

    def run(self) -> int:
        """Runs one server from start to teardown; returns 1 if something is left, else 0."""
        process.adopt_orphans()
        for number in (signal.SIGINT, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, lambda *_: self._end_alone())
        threading.Thread(target=self._read, name="inbox", daemon=True).start()
        first = self._inbox.get()
        if not isinstance(first, Launch):
            return 2
        plan = first.plan
        learn((plan.api_key, plan.admin_key))
        learn_secrets(merged_spec(plan.spec, plan.entry), {**os.environ, **plan.private})
        self._log_to(plan)
        self._parent = os.getppid() if plan.is_remote else plan.parent
        os.environ[LIFE] = plan.life  # a launcher may not have passed it on
        if plan.node:
            if is_shown(plan):
                (plan.folder / SEEN).write_text(plan.life, encoding="utf-8")
            self._say(ProgressEvent(f"server {plan.spec.key}: node {plan.node} starts"))
        os.environ.pop("PYTHONPATH", None)
        if plan.pythonpath:
            os.environ["PYTHONPATH"] = plan.pythonpath
        life = ServerLife(
            plan,
            cancelled=self._is_ending,
            progress=lambda text: self._say(ProgressEvent(text)),
            locked=lambda clocks: self._say(Clocks(dict(clocks))),
        )
        left: list[str] = []
        try:
            if self._start(life):
                self._loop(life)
        except Exception:
            log.exception("the keeper failed and tears the server down")
        finally:
            limit = plan.spec.stop_timeout
            limit = min(limit, ALONE_LIMIT) if self._alone else limit
            left = tear_down(life, self._window, self._opened, limit)
            with life.journal():
                end_server(plan.folder, plan.life, tuple(left))
            self._say(Stopped(tuple(left), life.problems))
        return 1 if left else 0

    def _start(self, life: ServerLife) -> bool:
        try:
            life.start()
        except SglprofError as error:
            log.warning("not started: %s", error)
            self._say(error_message(error))
            return False
        self._say(
            Started(
                pid=life.pid,
                created=life.created,
                host=life.host,
                port=life.port,
                command=tuple(life.words),
                session=life.session.name if life.session else "",
                tmpdir=life.tmpdir,
                head=life.head,
                is_shared=is_shown(life.plan),
            )
        )
        return True

    def _loop(self, life: ServerLife) -> None:
        pause, due = FIRST_LOOK, 0.0
        while not self._is_ending():
            if time.monotonic() >= due:  # what ranks have made is not known once they have ended
                life.remember()
                pause = min(2 * pause, LAST_LOOKS)
                due = time.monotonic() + pause
            with contextlib.suppress(queue.Empty):
                self._take(self._inbox.get(timeout=TICK), life)
            if not life.is_alive():
                life.remember()
                life.end_ranks()
                status = life.exit_status()
                log.warning("the server ended by itself, status %s", status)
                self._say(Exited(status))
                return
            if life.launcher is not None and life.launcher.poll() is not None:
                process.reap_orphans()
        with contextlib.suppress(queue.Empty):
            while True:
                self._take(self._inbox.get_nowait(), life)

    def _take(self, order: Order | None, life: ServerLife) -> None:
        if isinstance(order, Ask):  # it may take a minute, in which the server is still watched
            threading.Thread(
                target=lambda: self._say(answer(life, order)), name=order.what, daemon=True
            ).start()
        if isinstance(order, Window):
            self._window, self._opened = order.backend, order.opened
            log.info("window: %s", self._window)

    def _is_ending(self) -> bool:
        """True once a teardown is due, also if pytest died while another process holds the pipe."""
        if os.getppid() != self._parent:
            self._end_alone()
        return self._ending.is_set()

    def _read(self) -> None:
        # As text: a thread that waits in the binary buffer would crash the interpreter's exit.
        for line in sys.stdin:
            with contextlib.suppress(ValueError):
                order = decode_order(line)
                self._inbox.put(order)
                if isinstance(order, Stop):
                    self._ending.set()
        self._end_alone()
        self._inbox.put(None)

    def _end_alone(self) -> None:
        self._alone = True
        self._ending.set()

    def _say(self, event: Event) -> None:
        line = encode(event)
        # pytest may have closed the pipe
        with self._saying, contextlib.suppress(OSError, ValueError):
            sys.stdout.buffer.write(line)
            sys.stdout.buffer.flush()

    def _log_to(self, plan: Plan) -> None:
        plan.folder.mkdir(parents=True, exist_ok=True)
        handler = logging.FileHandler(plan.folder / "keeper.log", encoding="utf-8")
        handler.setFormatter(_Formatter("%(asctime)s %(levelname)s %(message)s"))
        log.addHandler(handler)
        log.setLevel(logging.INFO)
        log.propagate = False
        log.info("keeper %d of process %d; %s", os.getpid(), plan.parent, log_gpus())


def _clean() -> int:
    """Ends what a keeper of this node left that was killed, see `protocol.Orphans`."""
    orphans = msgspec.json.decode(sys.stdin.buffer.read(), type=Orphans)
    os.environ.pop(LIFE, None)
    left = end_orphans(orphans.server, Path(orphans.folder), leader=orphans.leader)
    sys.stdout.write(json.dumps(left))
    return 0


COMMANDS = {"": lambda: Keeper().run(), END_ORPHANS: _clean, SEND_FILES: send_files}

if __name__ == "__main__":
    sys.exit(COMMANDS[" ".join(sys.argv[1:])]())
