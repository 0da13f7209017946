"""`ProfileWindow`: one capture of a running server, from opening to its files."""

from __future__ import annotations

import threading
import time
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Literal

from pytest_sglprof.capture.backend import Outcome, Progress, Recording, WindowServer
from pytest_sglprof.capture.life import POLL, LifeWatch
from pytest_sglprof.capture.nsys_window import DEFAULT_SECONDS, NsysRecording
from pytest_sglprof.capture.torch_profiler import TorchRecording
from pytest_sglprof.errors import ServerDied, SglprofError, WindowError, WindowRefused
from pytest_sglprof.files import safe_name
from pytest_sglprof.values import WindowCapture, WindowSpec

CLOSE_SECONDS = 30.0  # to close a window that has used up its time; never more than `timeout`
ENDING_SECONDS = 3.0  # a window that is closed while its last files are being written
WindowState = Literal["new", "open", "closed"]


class ProfileWindow:
    """Opens, waits for and closes one profile window of `server`.

    ``open()`` ... ``close()``, or a ``with`` block. Only one window of a server is open at
    a time, across processes. window_id: unique within a run; any text. folder: where the
    artifacts end up. progress: told what is going on.
    """

    def __init__(
        self,
        server: WindowServer,
        spec: WindowSpec,
        *,
        window_id: str,
        folder: Path,
        progress: Progress | None = None,
    ) -> None:
        self.server = server
        self.spec = spec
        self.window_id = window_id
        self.folder = Path(folder)
        self.state: WindowState = "new"
        self._progress = progress
        self._held = ExitStack()
        self._ending = threading.Lock()  # held through an export, by whoever ends the window
        self._capture: WindowCapture | None = None
        self._opened = 0.0  # Unix time, s
        self._opened_at = 0.0  # monotonic, as are the deadlines
        self._deadline = 0.0
        self._timed_out = False
        self._prepare()

    def _prepare(self) -> None:
        self._life = LifeWatch(self.server)
        kind = NsysRecording if self.spec.backend == "nsys" else TorchRecording
        self._recording: Recording = kind(
            self.server,
            self.spec,
            window_id=safe_name(self.window_id),
            folder=self.folder,
            life=self._life,
            progress=self._progress,
        )

    def check(self) -> None:
        """Raises what `open` would refuse, without touching the server's profiler."""
        self._recording.refuse()

    def open(self) -> None:
        """Starts to record, after `delay` seconds.

        Raises `WindowRefused` for what would break the server or the data, `LeaseError`
        when another window of this server is open, `ServerDied`, `NsysError` or
        `WindowError` when it does not start.
        """
        if self.state != "new":
            raise WindowError(
                f"window {self.window_id!r} is {self.state} already",
                expected="a new window: each is opened once",
            )
        start = time.monotonic()
        self._recording.refuse()
        self._delay()
        self._deadline = start + self.spec.delay + self.spec.timeout
        self._held.enter_context(self.server.window_lock())
        try:
            self._prepare()  # the log of this window begins here
            self.server.announce_window(self.spec.backend)
            self._raise_death()
            self._opened = time.time()
            self._recording.start(self._deadline)
        except BaseException as error:
            self.state = "closed"
            what = error.what if isinstance(error, SglprofError) else type(error).__name__
            log = error.log if isinstance(error, SglprofError) else ()
            with ExitStack() as ending:  # each of these happens, whatever the one before raises
                ending.callback(self._release, still_open=False)
                if not isinstance(error, WindowRefused):
                    ending.callback(self._recording.abort)
                outcome = Outcome("failed", f"it did not open: {what}", log=log)
                self._capture = self._describe(outcome)
            raise
        self._opened_at = time.monotonic()
        self.state = "open"

    def _delay(self) -> None:
        over = time.monotonic() + self.spec.delay
        while (left := over - time.monotonic()) > 0:
            self._raise_death()
            time.sleep(min(POLL, left))

    def _raise_death(self) -> None:
        if death := self._life.death():
            raise death

    @property
    def death(self) -> ServerDied | None:
        """What the server died of since the window was made; None while it lives."""
        return self._life.death()

    def wait(self, stop: threading.Event | None = None) -> None:
        """Returns when the window's steps or duration are over, its `timeout` has passed,
        the server has died, or `stop` is set; `close` tells which.
        """
        if self.state != "open":
            return
        duration = self._duration()
        if duration is None and self.spec.num_steps is None:
            raise WindowError(
                f"window {self.window_id!r} has neither num_steps nor duration: to wait for it "
                "would never end",
                hint="give one of them, or close the window yourself",
            )
        over = None if duration is None else self._opened_at + duration
        pause = stop or threading.Event()
        while not self._life.death():
            now = time.monotonic()
            if over is not None and now >= over:
                return
            if self._recording.is_done():
                return
            if now >= self._deadline:
                self._timed_out = True
                return
            until = min(self._deadline, over) if over is not None else self._deadline
            if pause.wait(max(min(POLL, until - now), 0.001)):
                return

    def _duration(self) -> float | None:
        if self.spec.duration is not None or self.spec.num_steps is not None:
            return self.spec.duration
        return DEFAULT_SECONDS if self.spec.backend == "nsys" else None

    def close(self) -> WindowCapture:
        """Ends the window and tells what it left; a second call waits, and tells the same.

        A window that is merely incomplete does not raise: `state` and `reason` say so.
        """
        with self._ending:
            return self._capture or self._close()

    def _close(self) -> WindowCapture:
        if self.state != "open":
            raise WindowError(
                f"window {self.window_id!r} was never open", expected="open() before close()"
            )
        outcome = Outcome("failed", "closing was interrupted", still_open=True)
        try:
            unfinished = self._unfinished()
            floor = time.monotonic() + min(self.spec.timeout, CLOSE_SECONDS)
            outcome = self._recording.stop(max(self._deadline, floor), unfinished=unfinished)
        finally:
            self.state = "closed"
            try:
                self._capture = self._describe(outcome)
            finally:
                self._release(still_open=outcome.still_open)
        return self._capture

    def _unfinished(self) -> str:
        """Why the window closes before its steps are over; "" when it does not."""
        steps = self.spec.num_steps
        if steps is None or self._life.death():
            return ""
        patience = time.monotonic() + (0.0 if self._timed_out else ENDING_SECONDS)
        while not self._recording.is_done():
            if time.monotonic() >= patience:
                seconds = time.monotonic() - self._opened_at
                how = "not over within" if self._timed_out else "not over when it closed after"
                return f"its {steps} steps were {how} {seconds:.0f} s"
            time.sleep(POLL)
        return ""

    def _describe(self, outcome: Outcome) -> WindowCapture:
        sizes = self.server.sizes
        ranks = sizes.ranks()
        if self.spec.backend == "nsys":  # one report a node
            ranks = tuple(rank for rank in ranks if sizes.node_of(rank) == sizes.node_rank)
        return WindowCapture(
            window_id=self.window_id,
            spec=self.spec,
            state=outcome.state,
            opened=self._opened,
            closed=time.time(),
            artifacts=outcome.artifacts,
            expected_ranks=tuple(rank.label for rank in ranks),
            missing_ranks=outcome.missing_ranks,
            pid_ranks=outcome.pid_ranks,
            gpu_ranks=outcome.gpu_ranks,
            reason=outcome.reason,
            log=outcome.log,
            notes=outcome.notes,
        )

    def _release(self, *, still_open: bool) -> None:
        try:
            if not still_open:  # else a teardown of the server has to try once more
                self.server.announce_window(None)
        finally:
            self._held.close()

    def discard(self) -> None:
        """Ends the window and drops what it recorded; nothing happens to a closed one."""
        with self._ending:
            was_open, self.state = self.state == "open", "closed"
            if not was_open:
                return
            try:
                self._recording.abort()
            finally:
                self._release(still_open=False)

    def __enter__(self) -> ProfileWindow:
        if self.state == "new":
            self.open()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self.state == "open":
            self.close()
