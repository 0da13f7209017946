"""Opens a marked window while its test's body runs, at the moment when the load is steady,
or when its trigger fires."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

from pytest_sglprof.capture.steady import steady_load

if TYPE_CHECKING:
    from pytest_sglprof.server.server import Server
    from pytest_sglprof.session.load_state import LoadState
    from pytest_sglprof.session.window_run import WindowRun
    from pytest_sglprof.watch.watcher import LoadWatch


class WindowWatch:
    """A thread beside the body. An error in it is raised by `finish` in the test."""

    def __init__(
        self,
        window: WindowRun,
        server: Server,
        load: LoadState,
        *,
        drives_load: bool,
        watch: LoadWatch | None = None,
    ) -> None:
        self._window = window
        self._server = server
        self._load = load
        self._drives_load = drives_load
        self._watch = watch
        self._stop = threading.Event()
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="sglprof-window", daemon=True)

    def start(self) -> None:
        """Begins to watch."""
        self._thread.start()

    def finish(self) -> None:
        """The body is over: closes what is open and raises what went wrong."""
        self._stop.set()
        self._thread.join()
        if self._error is not None:
            raise self._error

    def _run(self) -> None:
        try:
            window: WindowRun | None = self._window
            while window is not None and self._is_time():
                window.open()
                try:
                    window.wait(self._stop)
                finally:
                    window.close()
                window = None if self._stop.is_set() else window.next()
        except BaseException as error:  # handed to the test by finish
            self._error = error

    def _is_time(self) -> bool:
        spec = self._window.spec
        if spec.trigger is not None and self._watch is not None:
            from pytest_sglprof.session.trigger_wait import TriggerWait

            wait = TriggerWait(
                self._window,
                self._server,
                self._load,
                self._watch,
                drives_load=self._drives_load,
            )
            return wait.wait(self._stop)
        if spec.delay > 0:
            return True  # opening waits for it
        while not self._stop.is_set():
            if self._drives_load and not self._load.wait_for_start(self._stop):
                return False
            target = self._load.target or 1
            if steady_load(
                self._server,
                target,
                timeout=spec.timeout,
                stop=self._stop,
                on_look=self._window.saw_load,
            ):
                return True
            if not self._drives_load:
                return False
        return False
