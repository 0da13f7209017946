"""`WindowRun`: one profile window of a test, from opening to its verdict."""

from __future__ import annotations

import contextlib
import math
import threading
import time
from dataclasses import replace
from pathlib import Path
from statistics import median
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal

from pytest_sglprof.capture.steady import steady_load
from pytest_sglprof.capture.window import ProfileWindow
from pytest_sglprof.errors import Inconclusive, WindowError
from pytest_sglprof.gate.judge import Verdict, undecided
from pytest_sglprof.gate.repeats import RepeatedVerdict, judge_repeats
from pytest_sglprof.gate.thresholds import check_threshold
from pytest_sglprof.server.gpu_clocks import ClockWatch, watch_clocks
from pytest_sglprof.session.measure import Measured, judge_table, measure
from pytest_sglprof.spelling import did_you_mean
from pytest_sglprof.values import (
    METRICS,
    GpuClocks,
    Metric,
    Threshold,
    VerdictWord,
    WindowCapture,
    WindowSpec,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from pytest_sglprof.analysis.unequal import Onset
    from pytest_sglprof.report.model import RecordedWindow
    from pytest_sglprof.server.server import Server
    from pytest_sglprof.session.load_state import LoadState
    from pytest_sglprof.settings import Settings
    from pytest_sglprof.trace.table import KernelTable
    from pytest_sglprof.watch.watcher import LoadWatch

STRIP_BEFORE = 120.0  # s of load before the window that its document keeps
STRIP_AFTER = 15.0


class WindowRun:
    """What the fixture `profile_window` gives: open it by `with`, or it was opened for you.

    After it is closed, `table`, `verdict` and `check` answer from its files. Every window
    is judged against its thresholds at the end of its test, whether asked here or not.
    """

    def __init__(
        self,
        server: Server,
        spec: WindowSpec,
        settings: Settings,
        folder: Path,
        load: LoadState,
        progress: Callable[[str], None] | None = None,
    ) -> None:
        self.spec = spec
        self.id = folder.name
        self.folder = folder
        self.load_number = 0
        self.retry_of: str | None = None
        self.repeat_of: str | None = None
        self.repeat_index = 1
        self.windows: list[WindowRun] = [self]  # shared by those that are opened together
        self.make_next: Callable[[], WindowRun] | None = None
        self._load = load
        self._log_start = 0
        self._clocks: ClockWatch | None = None
        self._unseen = ""  # why its load was not seen when it was last looked at
        self._server = server
        self._progress = progress
        self._settings = settings
        self._window = ProfileWindow(
            server, spec, window_id=self.id, folder=folder, progress=progress
        )
        self._capture: WindowCapture | None = None
        self._measured: Measured | None = None
        self._checks: list[Threshold] = []
        self._is_recorded = False
        self.onset: Onset | None = None  # what opened it, where its spec has a trigger
        self.watch: LoadWatch | None = None  # which has the load around it
        self._spared: tuple[VerdictWord, str] | None = None
        self._closing = threading.Lock()  # held through an export: for another close alone
        self._judging = threading.Lock()  # of `_measured` and `_checks`

    @property
    def was_opened(self) -> bool:
        """True once the server began to profile."""
        return self._window.state != "new"

    def refuse(self) -> None:
        """Raises now what opening would refuse; a full disk may be emptier by then."""
        with contextlib.suppress(Inconclusive):
            self._window.check()

    def open(self) -> None:
        """Opens the window; raises `WindowError`, `ServerError` or `NsysError`."""
        log = self._server.log
        self._log_start = log.position() if log is not None else 0
        self._window.open()
        self._clocks = watch_clocks(self._server)
        self.load_number = self._load.number

    def wait(self, stop: threading.Event | None = None) -> None:
        """Waits until its steps or seconds are over, or until `stop` is set."""
        self._window.wait(stop)

    def close(self) -> WindowCapture:
        """Closes the window (once) and returns what it left; a second call waits for the first."""
        if self._capture is None:
            with self._closing:
                if self._capture is None:
                    self._capture = self._close()
        return self._capture

    def _close(self) -> WindowCapture:
        clocks: tuple[GpuClocks, ...] = ()
        notes: tuple[str, ...] = ()
        try:
            clocks, notes = self._end_clocks()  # before the export, in which GPUs are idle
        finally:
            closed = self._window.close() if self.was_opened else self._unopened()
        if self._unseen and self.was_opened:
            notes += (f"it opened although its load could not be seen: {self._unseen}",)
        closed = replace(closed, gpus=clocks, notes=(*closed.notes, *notes))
        return self._with_facts(closed)

    def _end_clocks(self) -> tuple[tuple[GpuClocks, ...], tuple[str, ...]]:
        watch, self._clocks = self._clocks, None
        return watch.stop() if watch is not None else ((), ())

    def _with_facts(self, capture: WindowCapture) -> WindowCapture:
        """With what the log told meanwhile; an attached server's log is not known."""
        log = self._server.log
        if log is None or not self.was_opened:
            return capture
        from pytest_sglprof.server.log_facts import read_log_facts
        from pytest_sglprof.server.sizes import graph_batches

        facts = read_log_facts(log.each(self._log_start), capture.closed)
        facts = replace(facts, graph_batches=graph_batches(self._server.info))
        return replace(capture, facts=facts)

    def _await_steady_load(self) -> None:
        """A load of `bench_serving.running` takes seconds to arrive: the window waits for it."""
        target, ended = self._load.driven
        if target and not self.spec.delay:
            if self._progress is not None:
                self._progress(f"window {self.spec.name}: waiting for {target} requests to run")
            steady_load(
                self._server,
                target,
                timeout=self.spec.timeout,
                stop=ended,
                on_look=self.saw_load,
            )

    def saw_load(self, problem: str) -> None:
        """One look at the load before it opened; why there was no answer, "" where there was."""
        self._unseen = problem

    def spare(self, word: VerdictWord, reason: str) -> None:
        """Its trigger did not fire: it stays closed, and this is its verdict."""
        self._spared = (word, reason)

    def _unopened(self) -> WindowCapture:
        moment = time.time()
        if self._spared is not None:
            word, reason = self._spared
            state: Literal["complete", "failed"] = "complete" if word == "pass" else "failed"
            return WindowCapture(self.id, self.spec, state, moment, moment, reason=reason)
        return WindowCapture(
            window_id=self.id,
            spec=self.spec,
            state="failed",
            opened=moment,
            closed=moment,
            reason=f"the load could not be seen, so the window never opened: {self._unseen}"
            if self._unseen
            else "the test's body was over before the load was steady, so the window never "
            "opened: drive a longer load, or use whole_body=True",
        )

    def discard(self) -> None:
        """Closes the window and forgets it."""
        with self._closing:
            try:
                self._end_clocks()
            finally:
                self._window.discard()

    def __enter__(self) -> WindowRun:
        self._await_steady_load()
        self.open()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()
        while error is None and (following := self.next()) is not None:
            following._await_steady_load()
            following.open()
            try:
                target, ended = following._load.driven
                following.wait(ended if target else None)
            finally:
                following.close()

    def next(self) -> WindowRun | None:
        """The window to open after the last of these; None when all were opened."""
        is_last = len(self.windows) >= (self.spec.repeat or 1)
        return None if is_last or self.make_next is None else self.make_next()

    @property
    def capture(self) -> WindowCapture:
        """The closed window: its files, ranks and times."""
        if self._capture is None:
            raise WindowError(
                f"the window {self.spec.name} is not closed yet",
                expected="a closed window",
                hint="use it after its with block",
            )
        return self._capture

    @property
    def measured(self) -> Measured:
        """Table and verdict; the files are read at the first use."""
        capture = self.capture
        with self._judging:
            if self._measured is None and self._spared is not None:
                self._measured = Measured(None, Verdict(*self._spared), capture.reason)
            if self._measured is None:
                try:
                    self._measured = measure(capture, self._settings, self._checks)
                except Exception as error:
                    # Raised once, in the test; its report then tells the rest.
                    reason = f"reading or judging the window failed: {error!r}"
                    verdict = undecided((*self.spec.thresholds, *self._checks), reason)
                    self._measured = Measured(None, verdict, reason)
                    raise
            return self._measured

    @property
    def table(self) -> KernelTable:
        """The kernel table; `Inconclusive` when the window left nothing to read."""
        table = self.measured.table
        if table is None:
            raise Inconclusive(
                f"the window {self.spec.name} has no kernel table: {self.measured.verdict.reason}",
                expected="a complete window",
                hint="see the reason above",
            )
        return table

    @property
    def verdict(self) -> Verdict:
        """The verdict of its thresholds so far."""
        return self.measured.verdict

    @property
    def was_checked(self) -> bool:
        """True once `check` was asked something about the closed window."""
        return bool(self._checks)

    def check(
        self,
        metric: Metric,
        limit: float,
        *,
        scope: str = "compute",
        kernel: str = "",
        stage: str = "",
    ) -> float:
        """Judges one more threshold and returns the figure that it judges.

        The test fails at its end when the figure is above `limit`; it is infinite where only
        one rank has any of the scope. Too little data for a figure raises `Inconclusive` at
        once. Either way the judgement stays with the window. Windows that were opened
        together are judged together, and the figure is their median. `SettingsError` or
        `WindowError` for names that there are not.
        """
        if metric not in METRICS:
            raise WindowError(
                f"check({metric!r}, ...): there is no such metric",
                expected="one of " + ", ".join(METRICS),
                hint=did_you_mean([metric], METRICS, "correct the name"),
            )
        threshold = check_threshold(
            Threshold(metric, limit, scope, kernel, stage, origin="check"),
            self._settings.category_names,
            f"check({metric!r}, {limit!r})",
        )
        if self._is_recorded:
            raise WindowError(
                f"check({metric!r}, {limit!r}): the results of this window's test are written",
                expected="a check in the body of the test",
                hint="fixtures that are torn down are too late for a verdict",
            )
        for window in self.windows:
            _ = window.capture  # all of them are closed, before the first of them is judged
        verdicts = [window._judge_also(threshold) for window in self.windows]
        together: Verdict | RepeatedVerdict = verdicts[0]
        if len(verdicts) > 1:
            together = judge_repeats(verdicts, self.spec.repeat or 1)
        if together.word == "inconclusive":
            raise Inconclusive(
                f"{threshold.describe()}: {together.reason}",
                expected=f"at least {self._settings.min_steps} steps of every rank",
                hint="give the window more steps, or the server a longer load",
            )
        return median(_figure(verdict) for verdict in verdicts if verdict.word != "inconclusive")

    def _judge_also(self, threshold: Threshold) -> Verdict:
        """The verdict of this window on one more threshold, which it keeps."""
        _ = self.measured  # its files are read
        with self._judging:
            measured = self._measured
            assert measured is not None
            if threshold not in self._checks:
                self._checks.append(threshold)
            verdict = judge_table(
                self.capture, measured.table, measured.doubt, self._settings, self._checks
            )
            self._measured = replace(measured, verdict=verdict)
        return verdict.of(threshold)

    def document(self, **about: Any) -> RecordedWindow:
        """The window as results hold it; from now on it takes no check."""
        from pytest_sglprof.report.results import window_document

        self._is_recorded = True
        table = self.measured.table
        return window_document(
            self.capture, table, self.verdict, **about, **self._load_document(table)
        )

    def _load_document(self, table: KernelTable | None) -> dict[str, Any]:
        """What opened it and the load around it, joined with its kernels."""
        from pytest_sglprof.analysis.load_join import join_load
        from pytest_sglprof.report.load import load_strip, onset_document

        if self.watch is None:
            return {}
        capture, onset = self.capture, self.onset
        source = getattr(self.spec.trigger, "source", "loads")
        begin = min(capture.opened, onset.time if onset else capture.opened) - STRIP_BEFORE
        samples = self.watch.samples
        strip = load_strip(samples, source, begin, capture.closed + STRIP_AFTER)
        join = join_load(onset, table) if onset is not None and table is not None else None
        return {"onset": onset_document(onset, join), "load_samples": strip}


def _figure(verdict: Verdict) -> float:
    """The figure that decided; infinite for what only one rank has."""
    value = verdict.worst.value if verdict.worst is not None else None
    return math.inf if value is None else value
