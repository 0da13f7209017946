"""`KeeperLink`: pytest's end of the pipe to the process that owns the server."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Container, Mapping
from pathlib import Path
from typing import Any

from pytest_sglprof.server.command import PACKAGE_ROOT
from pytest_sglprof.server.plan import Plan

Message = dict[str, Any]


class KeeperLink:
    """Starts a keeper and talks to it. Events are kept until somebody asks for them."""

    def __init__(self, plan: Plan) -> None:
        self._log = plan.folder / "keeper.log"
        self._events: queue.SimpleQueue[Message] = queue.SimpleQueue()
        self._told: dict[str, Message] = {}
        plan.folder.mkdir(parents=True, exist_ok=True)
        with self._log.open("ab") as errors:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "pytest_sglprof.keeper"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                env=_environment(plan.private),
                start_new_session=True,
            )
        threading.Thread(target=self._read, name="sglprof keeper", daemon=True).start()
        self.send({"op": "launch", "plan": plan.to_plain()})

    @property
    def pid(self) -> int:
        """The keeper's pid."""
        return self._process.pid

    def is_running(self) -> bool:
        """True while the keeper's process runs."""
        return self._process.poll() is None

    def send(self, message: Mapping[str, Any]) -> None:
        """Sends one message; a keeper that is gone is not told, which is no error here."""
        stream = self._process.stdin
        if stream is None or stream.closed:
            return
        with contextlib.suppress(OSError):
            stream.write(json.dumps(message).encode() + b"\n")
            stream.flush()

    def next_event(self, timeout: float) -> Message | None:
        """The next event that was not yet taken; None when there is none in `timeout` s."""
        try:
            return self._events.get(timeout=max(timeout, 0.0))
        except queue.Empty:
            return None

    def told(self, event: str) -> Message | None:
        """The last event of this kind, taken or not."""
        return self._told.get(event)

    def wait_told(self, event: str, timeout: float) -> Message | None:
        """`told`, waited for; ends early when the keeper does."""
        deadline = time.monotonic() + timeout
        while (found := self.told(event)) is None and time.monotonic() < deadline:
            if self.told("closed"):
                return self.told(event)
            time.sleep(0.02)
        return found

    def close(self, timeout: float) -> bool:
        """Asks for the teardown, waits for the keeper's end; False when it outlasts `timeout` s."""
        self.send({"op": "stop"})
        try:
            self._process.wait(timeout)
            ended = True
        except subprocess.TimeoutExpired:
            ended = False
        if self._process.stdin is not None:
            with contextlib.suppress(OSError):
                self._process.stdin.close()
        if ended:
            self.wait_told("closed", 5.0)
        return ended

    def _read(self) -> None:
        stream = self._process.stdout
        assert stream is not None
        with stream:
            for line in stream:
                with contextlib.suppress(ValueError):
                    self._take(json.loads(line))
        self._take({"event": "closed"})

    def _take(self, message: Message) -> None:
        self._told[str(message.get("event"))] = message
        self._events.put(message)


def _environment(private: Container[str]) -> dict[str, str]:
    """Ours without secrets, this very package's folder first, wherever that may lie."""
    paths = [str(PACKAGE_ROOT), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    ours = {k: v for k, v in os.environ.items() if k not in private}
    return {**ours, "PYTHONPATH": os.pathsep.join(path for path in paths if path)}


def keeper_said(folder: Path, limit: int = 8) -> list[str]:
    """The last lines of a keeper's log."""
    with contextlib.suppress(OSError):
        return (folder / "keeper.log").read_text(errors="replace").splitlines()[-limit:]
    return []
