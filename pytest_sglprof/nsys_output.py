"""What nsys prints, read: its list of sessions, and the progress and result of `nsys stop`."""

from __future__ import annotations

import os
import re
import select
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

from pytest_sglprof.errors import NsysError

_SESSION = re.compile(r"^\s*\d+\s+\S+\s+([A-Za-z]+)\s+\d+\s+(\S.*?)\s*$")
_PROGRESS = re.compile(r"^\[(\d+)/(\d+)\]\s*\[\D*?(\d+)%\s*\]\s*(.*)$")
_GENERATING = re.compile(r"^Generating '(.+)'")


def read_sessions(text: str) -> dict[str, str]:
    """Name -> state, from ``nsys sessions list`` (ID, TIME, STATE, LAUNCH, NAME).

    A name is the last column and may hold blanks.
    """
    matches = (_SESSION.match(line) for line in text.splitlines())
    return {match[2]: match[1] for match in matches if match}


class StopOutput:
    """Collects what ``nsys stop`` prints while it runs."""

    def __init__(self, progress: Callable[[str], None] | None = None) -> None:
        self._progress = progress
        self._text = ""
        self._unread = ""

    def follow(self, process: subprocess.Popen[bytes], timeout: float) -> bool:
        """Reads until the command ends; False when `timeout` s were not enough."""
        assert process.stdout is not None
        stream = process.stdout.fileno()
        deadline = time.monotonic() + timeout
        while (left := deadline - time.monotonic()) > 0:
            if not select.select([stream], [], [], left)[0]:
                return False
            data = os.read(stream, 65536)
            if not data:
                return self._ends(process, deadline)
            self.feed(data.decode("utf-8", errors="replace"))
        return False

    def feed(self, text: str) -> None:
        """Takes the next piece of output; tells the progress that stands in it."""
        self._text += text
        # A progress bar redraws its line with a carriage return.
        *lines, self._unread = re.split(r"[\r\n]", self._unread + text)
        for line in lines:
            if self._progress is not None and (match := _PROGRESS.match(line)):
                self._progress(f"{match[4]}: {match[3]} %")

    def tail(self) -> tuple[str, ...]:
        """The last lines that are no progress bars."""
        return tuple(line for line in self._lines() if not _PROGRESS.match(line))[-8:]

    def stream(self) -> Path | None:
        """The raw ``.qdstrm`` that was left instead of a report: its import failed."""
        named = [*self._generated(), *self._streams()]
        return next((path for path in named if path.suffix == ".qdstrm" and path.exists()), None)

    def report(self, status: int | None) -> Path:
        """The report that was generated, from the ``Generated:`` lines."""
        for path in self._generated():
            if path.suffix in (".nsys-rep", ".qdrep") and _has_content(path):
                return path
        raise NsysError(
            f"`nsys stop` named no report that exists (exit {status})",
            expected="a path ending in .nsys-rep below its line `Generated:`",
            hint="check the free space of the report's folder and of TMPDIR",
            log=self.tail(),
        )

    def _ends(self, process: subprocess.Popen[bytes], deadline: float) -> bool:
        try:
            process.wait(max(deadline - time.monotonic(), 0.1))
        except subprocess.TimeoutExpired:
            return False
        return True

    def _lines(self) -> list[str]:
        return [line for line in re.split(r"[\r\n]+", self._text) if line.strip()]

    def _generated(self) -> list[Path]:
        # The head may follow a progress bar on its line: importer and command write at once.
        _, head, rest = self._text.rpartition("Generated:")
        found = []
        for line in rest.splitlines()[1:] if head else ():
            if not line.startswith((" ", "\t")):
                break
            found.append(Path(line.strip()))
        return found

    def _streams(self) -> list[Path]:
        matches = (_GENERATING.match(line) for line in self._lines())
        return [Path(match[1]) for match in matches if match]


def _has_content(path: Path) -> bool:
    try:
        return path.stat().st_size > 0
    except OSError:
        return False
