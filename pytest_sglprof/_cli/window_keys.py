"""The keys of `watch`: profile windows of a server that a person opens and closes."""

from __future__ import annotations

import argparse
import threading
import time
from concurrent.futures import Future, wait
from typing import TYPE_CHECKING

from pytest_sglprof._capture.recording import in_thread
from pytest_sglprof._cli.recording import fresh_folder, outcome_lines, window_of
from pytest_sglprof._cli.terminal import RESUMED, Keyboard
from pytest_sglprof._errors import SglprofError, in_shell
from pytest_sglprof._process import uninterrupted

if TYPE_CHECKING:
    from pytest_sglprof._cli.screen import Screen
    from pytest_sglprof._load.watcher import LoadWatch
    from pytest_sglprof._run.one_window import WindowRun
    from pytest_sglprof._run.window import Window

POLL = 0.1  # s between two looks at a window that is being closed


class WindowKeys:
    """Space opens a window and closes it, Enter shows the last one, `q` ends.

    A window is recorded in a thread of its own, so that the table stays live. At the end of the
    `with` block an open window is closed and judged; if the block raised, it is dropped.
    """

    def __init__(self, args: argparse.Namespace, screen: Screen, watch: LoadWatch) -> None:
        self._args = args
        self._screen = screen
        self._watch = watch
        self._keyboard = Keyboard()
        self._recording: Future[WindowRun] | None = None
        self._window: Window | None = None  # while it is open or being closed
        self._opened = 0.0
        self._close = threading.Event()
        self._drops = False
        self._progress = ""
        self._last: WindowRun | None = None

    def __enter__(self) -> WindowKeys:
        self._keyboard.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        try:
            self._end(drops=kind is not None)
        finally:
            self._keyboard.__exit__(kind, *rest)

    def wait(self, timeout: float) -> bool:
        """Waits for a key and does what it asks for; False after `q`."""
        key = self._keyboard.read(timeout)
        self._show_end()
        if key == " ":
            self._open_or_close()
        elif key in ("\n", "\r"):
            self._show_last()
        elif key == RESUMED:
            self._screen.forget()
        return key.lower() != "q"

    def lines(self) -> list[str]:
        """What is going on, and the keys."""
        is_open = self._window is not None and not self._close.is_set()
        state = self._progress
        if is_open:
            state = f"{self._args.backend} window: open for {time.time() - self._opened:.0f} s"
        space = "closes the window" if is_open else "opens a window"
        enter = "" if self._last is None else "   enter: its ranks"
        return [*filter(None, ["", state]), f"space: {space}{enter}   q: ends"]

    def _open_or_close(self) -> None:
        if self._recording is None:
            self._close.clear()
            self._progress = "opening a window"
            self._recording = in_thread("sglprof window", self._record)
        elif self._window is not None:
            self._close.set()

    def _record(self) -> WindowRun:
        """Records one window until it is closed; in a thread of its own."""
        from pytest_sglprof._cli.options import settings_of
        from pytest_sglprof._run.one_window import record_window, window_folder
        from pytest_sglprof._run.servers import attach_running

        settings = settings_of(self._args)
        spec = window_of(settings, "window", self._args.backend)
        with window_folder(fresh_folder()) as folder:
            server = attach_running(
                self._args.target,
                settings,
                folder / "servers" / "attached.1",
                finds_session=self._args.backend == "nsys",
            )
            try:
                return record_window(
                    server,
                    spec,
                    settings,
                    folder,
                    command=["sglprof", "watch", self._args.target],
                    wait=self._wait,
                    watch=self._watch,
                    progress=self._note,
                )
            finally:
                server.client.close()

    def _wait(self, window: Window) -> None:
        from pytest_sglprof._run.one_window import wait_until

        self._opened, self._window = time.time(), window
        wait_until(window, self._close.wait)
        self._close.set()
        if self._drops:
            raise KeyboardInterrupt

    def _note(self, text: str) -> None:
        self._progress = text

    def _end(self, *, drops: bool) -> None:
        """Closes an open window and waits until it is written, or drops it."""
        recording = self._recording
        if recording is None:
            return
        self._drops = drops
        self._close.set()
        self._say("dropping the window" if drops else "closing the window")
        with uninterrupted():  # until the server no longer profiles
            while not recording.done() and not (self._window and self._window.state == "closed"):
                wait([recording], POLL)
        while not recording.done():
            wait([recording], POLL)
        self._show_end()

    def _show_end(self) -> None:
        """Says how the recording ended, if it has just done so."""
        recording = self._recording
        if recording is None or not recording.done():
            return
        self._recording = self._window = None
        self._progress = ""
        error = recording.exception()
        if isinstance(error, SglprofError):
            self._say(f"no window: {in_shell(str(error))}")
        elif isinstance(error, KeyboardInterrupt):
            self._say("the window was dropped")
        else:
            self._last = recording.result()
            title, reason, *_, where = outcome_lines(self._last)
            self._say(title, reason, where)

    def _show_last(self) -> None:
        self._say(*(["no window so far"] if self._last is None else outcome_lines(self._last)))

    def _say(self, *lines: str) -> None:
        self._screen.clear()
        for line in lines:
            self._screen.say(line)
