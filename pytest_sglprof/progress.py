"""Progress of long work, written to the terminal past pytest's capturing."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pytest

PLAIN_INTERVAL = 15.0  # s between lines where the terminal cannot overwrite one (CI logs)


class TerminalProgress:
    """Callable with one line of progress; overwrites itself on a terminal.

    Silent in xdist workers, whose output nobody sees.
    """

    def __init__(self, config: pytest.Config, *, silent: bool = False) -> None:
        self._capture = config.pluginmanager.getplugin("capturemanager")
        self._silent = silent or config.getoption("verbose", 0) < 0
        self._last = 0.0
        self._dirty = False

    def __call__(self, line: str) -> None:
        """Shows `line`, at most once a second (every 15 s in a plain log)."""
        now = time.monotonic()
        live = sys.__stderr__ is not None and sys.__stderr__.isatty()
        if self._silent or now - self._last < (1.0 if live else PLAIN_INTERVAL):
            return
        self._last = now
        text = " ".join(line.split())[:150]
        self._write(f"\r\x1b[K{text}" if live else f"\nsglprof: {text}")
        self._dirty = live

    def clear(self) -> None:
        """Removes the line again, once the work is over."""
        if self._dirty:
            self._write("\r\x1b[K")
            self._dirty = False

    def _write(self, text: str) -> None:
        if self._capture is None:
            self._emit(text)
        else:
            with self._capture.global_and_fixture_disabled():
                self._emit(text)

    @staticmethod
    def _emit(text: str) -> None:
        if sys.__stderr__ is not None:
            sys.__stderr__.write(text)
            sys.__stderr__.flush()
