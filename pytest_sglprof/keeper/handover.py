"""Hands secrets to the exec step, and writes the server's log without its keys."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import select
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from pytest_sglprof.redact import longest_spelling, redact_bytes, redact_text
from pytest_sglprof.server.limits import PUMP_WAIT

CHUNK = 65536
MAX_LINE = 1 << 20  # bytes held back while a line is incomplete


def hand_over(
    fifo: Path, given: Mapping[str, Any], *, alive: Callable[[], bool], timeout: float
) -> bool:
    """Writes `given` as JSON once a reader is there; then the fifo is gone.

    False when `alive` says no, or after `timeout` s.
    """
    deadline = time.monotonic() + timeout
    try:
        while time.monotonic() < deadline:
            try:
                handle = os.open(fifo, os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC)
            except OSError as error:
                if error.errno != errno.ENXIO:  # ENXIO: nobody reads yet
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

    SGLang logs all its arguments at start, its keys among them, and requests when asked to;
    so a server with secrets writes through here, one without writes its log itself. Where
    the log cannot be written (a full disk) the pump goes on reading: a server must never
    wait for its log.
    """

    def __init__(self, fifo: Path, log: Path) -> None:
        self.fifo = fifo
        self._log = log.open("ab", buffering=0)
        os.mkfifo(fifo, 0o600)
        # Opened for both, so that the pump neither blocks now nor ends between writers.
        self._handle = os.open(fifo, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._run, name="log pump", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Writes what is left and ends; for after the server's end."""
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
        with contextlib.suppress(OSError):
            self._log.write(text.encode("utf-8", errors="surrogateescape"))
