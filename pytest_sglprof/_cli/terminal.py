"""A person's terminal: single keys, Enter on standard input, and a line of progress."""

from __future__ import annotations

import contextlib
import os
import select
import shutil
import signal
import sys
import termios
from collections import deque
from pathlib import Path
from typing import IO, Any

from pytest_sglprof._errors import SettingsError

RESUMED = "resumed"  # a "key": the program was stopped and continues, so the screen is not its own
_ERASE = "\r\x1b[K"


def is_interactive(out: IO[str]) -> bool:
    """Whether a person can press keys and see what they do."""
    return sys.stdin is not None and sys.stdin.isatty() and out.isatty()


class Keyboard:
    """Reads single keys, without echo and without Enter, in a `with` block of the main thread.

    The terminal has its own modes again after the block, and while the program is stopped (Ctrl-Z).
    Ctrl-C and Ctrl-Z remain signals.
    """

    def __init__(self) -> None:
        self._terminal = sys.stdin.fileno()
        self._keys: deque[str] = deque()
        self._modes: list[Any] = []
        self._handlers: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Keyboard:
        self._modes = termios.tcgetattr(self._terminal)
        self._handlers = {
            signal.SIGTSTP: signal.signal(signal.SIGTSTP, self._stop),
            signal.SIGCONT: signal.signal(signal.SIGCONT, self._resume),
        }
        self._take()
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._give_back()

    def read(self, timeout: float) -> str:
        """The next key, or `RESUMED`; "" if there is none within `timeout` s."""
        if not self._keys and select.select([self._terminal], [], [], timeout)[0]:
            text = os.read(self._terminal, 64).decode(errors="replace")
            if not text:
                raise KeyboardInterrupt  # the terminal is gone
            if not text.startswith("\x1b"):  # an arrow or another key that means nothing here
                self._keys.extend(text)
        return self._keys.popleft() if self._keys else ""

    def _take(self) -> None:
        modes = [*self._modes[:6], list(self._modes[6])]
        modes[3] &= ~(termios.ICANON | termios.ECHO)
        modes[6][termios.VMIN], modes[6][termios.VTIME] = 1, 0
        self._set(modes)

    def _give_back(self) -> None:
        self._set(self._modes)

    def _set(self, modes: list[Any]) -> None:
        if self._is_in_front():  # else the kernel would stop it for trying
            with contextlib.suppress(OSError, termios.error):  # a terminal that was closed
                termios.tcsetattr(self._terminal, termios.TCSADRAIN, modes)

    def _is_in_front(self) -> bool:
        try:
            return os.tcgetpgrp(self._terminal) == os.getpgrp()
        except OSError:  # a terminal without job control
            return True

    def _stop(self, number: int, frame: object) -> None:
        self._give_back()
        signal.signal(signal.SIGTSTP, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGTSTP)  # stops here until SIGCONT, if a shell can send it
        signal.signal(signal.SIGTSTP, self._stop)
        self._take()  # also where SIGCONT was handled before, or the kernel stopped nobody

    def _resume(self, number: int, frame: object) -> None:
        self._take()
        self._keys.append(RESUMED)


def refuse_unreadable_input() -> None:
    """Raises `SettingsError` if nobody can press Enter on standard input."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        status = os.fstat(sys.stdin.fileno())
        if status.st_rdev != Path(os.devnull).stat().st_rdev:
            return
    raise SettingsError(
        "--until-enter: standard input cannot be read",
        expected="a terminal, or a pipe that ends when the window is to be closed",
        hint="give --seconds or --steps, or run it at a terminal",
    )


def was_entered(timeout: float) -> bool:
    """Waits for Enter or the end of standard input; False if neither comes within `timeout` s."""
    source = sys.stdin.fileno()
    if not select.select([source], [], [], timeout)[0]:
        return False
    text = os.read(source, 4096)
    return not text or b"\n" in text


def width() -> int:
    """Columns of the terminal."""
    return shutil.get_terminal_size().columns


class StatusLine:
    """A line of progress that replaces itself; nothing where `out` is no terminal."""

    def __init__(self, out: IO[str]) -> None:
        self._out = out
        self._is_shown = False

    def show(self, text: str) -> None:
        """Replaces the line; "" removes it."""
        if not self._out.isatty() or not (text or self._is_shown):
            return
        self._out.write(_ERASE + text[: width() - 1])
        self._out.flush()
        self._is_shown = bool(text)

    def __enter__(self) -> StatusLine:
        return self

    def __exit__(self, *error: object) -> None:
        self.show("")
