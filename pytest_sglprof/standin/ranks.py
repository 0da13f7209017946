"""The front's handle on its rank processes: start them, ask them, end them."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any

from pytest_sglprof.standin.model import Place


class RankGone(Exception):
    """The process of `rank` has ended without being asked to."""

    def __init__(self, rank: RankProcess) -> None:
        super().__init__(rank.place.label)
        self.rank = rank


class RankProcess:
    """One running rank. Messages are answered in order, one line each."""

    def __init__(self, place: Place, argv: Sequence[str]) -> None:
        self.place = place
        command = [sys.executable, "-m", "pytest_sglprof.standin.rank", place.title]
        self.process = subprocess.Popen(
            [*command, str(place.index), str(os.getpid()), *argv],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        )

    @property
    def pid(self) -> int:
        """Process id."""
        return self.process.pid

    def send(self, message: dict[str, Any]) -> None:
        """Sends without waiting; RankGone when nobody listens."""
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps(message).encode() + b"\n")
            self.process.stdin.flush()
        except (OSError, ValueError) as error:  # ValueError: closed by `end_all` meanwhile
            raise RankGone(self) from error

    def receive(self) -> dict[str, Any]:
        """The next answer; RankGone at the end of its output."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line.endswith(b"\n"):
            raise RankGone(self)
        answer: dict[str, Any] = json.loads(line)
        return answer

    def exit_status(self, patience: float = 2.0) -> int | None:
        """Its exit status once it has ended, negative for a signal; None while it runs."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            return self.process.wait(patience)
        return None


def ask_all(ranks: Sequence[RankProcess], message: dict[str, Any]) -> list[dict[str, Any]]:
    """One message to all, then the answers of all, in order."""
    for rank in ranks:
        rank.send(message)
    return [rank.receive() for rank in ranks]


def end_all(ranks: Sequence[RankProcess], grace: float = 1.0) -> None:
    """Ends all and reaps them: they see the end of stdin, then SIGTERM, then SIGKILL.

    grace: seconds before SIGKILL; a third of it passes before SIGTERM.
    """
    for rank in ranks:
        if rank.process.stdin is not None:
            with contextlib.suppress(OSError):
                rank.process.stdin.close()
    deadline = time.monotonic() + grace / 3
    for rank in ranks:
        with contextlib.suppress(subprocess.TimeoutExpired):
            rank.process.wait(max(0.0, deadline - time.monotonic()))
    for rank in ranks:
        if rank.process.poll() is None:
            rank.process.terminate()
    for rank in ranks:
        try:
            rank.process.wait(grace)
        except subprocess.TimeoutExpired:
            rank.process.kill()
            rank.process.wait()
