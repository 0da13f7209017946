"""One profile window without pytest: the path of a test, and a run's folder of its own."""

from __future__ import annotations

import contextlib
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pytest_sglprof._capture.recording import POLL
from pytest_sglprof._errors import ExitStatus, SettingsError
from pytest_sglprof._process import uninterrupted
from pytest_sglprof._run.attempt import TestRun
from pytest_sglprof._run.folder import RunBook, RunFolder, run_facts
from pytest_sglprof._run.sources import record_sources
from pytest_sglprof._run.window import Window

if TYPE_CHECKING:
    from pytest_sglprof._capture.recording import Progress
    from pytest_sglprof._config.load import Settings
    from pytest_sglprof._config.model import WindowSpec
    from pytest_sglprof._load.onset import Onset
    from pytest_sglprof._load.watcher import LoadWatch
    from pytest_sglprof._report.model import RecordedWindow
    from pytest_sglprof._server.launch import Server

NODEID = "record"  # of its window and its test in results.json


@dataclass(frozen=True)
class WindowRun:
    """A window that was recorded and judged, and where it is.

    page: None if it could not be written. problems: a line for each file that could not be.
    """

    folder: Path
    window: RecordedWindow
    page: Path | None
    problems: tuple[str, ...]

    @property
    def status(self) -> ExitStatus:
        """By the verdict; a default limit, which nobody gave, is not exceeded."""
        return window_status(self.window)


def window_status(window: RecordedWindow) -> ExitStatus:
    """The exit status that follows from the verdict of a window."""
    if window.verdict == "inconclusive":
        return ExitStatus.INCONCLUSIVE
    failed = [each for each in window.judgements if each.verdict == "fail"]
    is_given = any(each.threshold.origin != "default" for each in failed)
    return ExitStatus.EXCEEDED if is_given else ExitStatus.DONE


@contextlib.contextmanager
def window_folder(folder: Path) -> Iterator[Path]:
    """A new folder for a window and its server. If the block raises, it is removed again.

    Traces that are whole stay. Raises `SettingsError` if the folder has content already.
    """
    folder = folder.absolute()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise SettingsError(
            f"{folder} exists",
            expected="a new or an empty folder for the results of the window",
            hint="choose another one with -o",
        )
    try:
        yield folder
    except BaseException:
        with uninterrupted():
            if not recorded_files(folder):
                shutil.rmtree(folder, ignore_errors=True)
        raise


def recorded_files(folder: Path) -> list[Path]:
    """The traces and reports in the folder of a window's run."""
    return sorted(path for path in folder.glob("windows/*/*") if path.is_file())


def record_window(
    server: Server,
    spec: WindowSpec,
    settings: Settings,
    folder: Path,
    *,
    command: Sequence[str],
    wait: Callable[[Window], None] = Window.wait,
    onset: Onset | None = None,
    watch: LoadWatch | None = None,
    progress: Progress | None = None,
) -> WindowRun:
    """Opens a window, waits for its end, closes and judges it, and writes results and page.

    folder: of `window_folder`. command: what was asked for, as words. wait: returns when the
    window is to be closed. onset, watch: what opened it, and the load around it. If `wait` or the
    closing raises, what was recorded is dropped, with nothing left open on the server.
    """
    facts = run_facts(command, settings)
    book = RunBook(folder.parent, folder.name, facts, settings.stored, is_alone=True)
    book.open()
    try:
        run_folder = RunFolder(folder.parent, folder.name)
        test = TestRun(NODEID, 1, settings, run_folder, None, drives_load=False, progress=progress)
        test.prepare(server)
        window = test.new_window(spec)
        window.onset, window.watch = onset, watch
        _record(test, window, wait, progress or (lambda text: None))
        (document,) = (each for each in test.documents() if each.is_judged)
        book.add(test.record("passed" if document.verdict == "pass" else "failed", ()))
        book.finish(window_status(document))
    finally:
        book.finish(ExitStatus.INTERRUPTED)  # does nothing after the one above
    return WindowRun(folder, document, book.page, tuple(book.problems))


def _record(
    test: TestRun, window: Window, wait: Callable[[Window], None], progress: Progress
) -> None:
    try:
        window.open()
        wait(window)
        progress("closing the window")
        window.close()
    except BaseException:
        with uninterrupted():
            test.abandon(discard=True)
            shutil.rmtree(window.folder.parent, ignore_errors=True)  # with those beside it
        raise
    progress("reading what was recorded")
    record_sources(window, None, threading.Event())
    test.end()


def wait_until(window: Window, is_over: Callable[[float], bool]) -> None:
    """Waits for the end of a window that is closed by hand, its timeout, or the server's death.

    is_over: waits up to so many seconds; True once the window is to be closed.
    """
    deadline = time.monotonic() + window.spec.timeout
    while not is_over(POLL):
        if time.monotonic() >= deadline or not window.server.is_alive():
            return
