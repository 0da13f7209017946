"""`Window`: one profile window of a server: open it, wait, close, measure and check it."""

from __future__ import annotations

import math
import threading
import time
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any, Literal

from pytest_sglprof._capture.experts import ExpertRecording
from pytest_sglprof._capture.recording import POLL, LifeWatch, Progress, WindowCapture
from pytest_sglprof._config.backends import BACKENDS
from pytest_sglprof._config.load import Settings
from pytest_sglprof._config.model import CERTAIN, MOST_WINDOWS, Across, Threshold, WindowSpec
from pytest_sglprof._config.thresholds import check_threshold, of_role
from pytest_sglprof._errors import (
    Incomparable,
    Inconclusive,
    SglprofError,
    WindowError,
    WindowRefused,
)
from pytest_sglprof._files import safe_name
from pytest_sglprof._metrics import METRICS, VerdictWord
from pytest_sglprof._run.cost import cost_of, least_steps, remember, sized
from pytest_sglprof._run.measure import Measured, judge_table, read_and_judge, without_verdict
from pytest_sglprof._run.opening import LoadState, await_driven_load
from pytest_sglprof._server.log_lines import ServerFacts, read_log_facts
from pytest_sglprof._server.nvml import ClockWatch, GpuClocks, watch_clocks
from pytest_sglprof._server.series import SeriesWatch, watch_series
from pytest_sglprof._server.sizes import SERVER_INFO, role_of, write_settings
from pytest_sglprof._verdict.judge import Verdict, undecided
from pytest_sglprof._verdict.repeats import RepeatedVerdict, judge_together, judge_until_certain

if TYPE_CHECKING:
    from collections.abc import Callable

    from pytest_sglprof._config.model import Moment
    from pytest_sglprof._load.onset import Onset
    from pytest_sglprof._load.watcher import LoadWatch
    from pytest_sglprof._report.model import RecordedSources, RecordedWindow
    from pytest_sglprof._server.launch import Server
    from pytest_sglprof._trace.table import KernelTable
    from pytest_sglprof._verdict.regression import JudgedFigure

CLOSE_SECONDS = 30.0  # s to close a window after its deadline, at most its `timeout`
ENDING_SECONDS = 3.0  # s to wait at the close for the end of the last steps


class Window:
    """A profile window. Open it with `with`, or with `open` and `close`.

    Only one window of a server can be open at a time, across processes. After the close, `table`,
    `verdict` and `check` read its files. At the end of a test each of its windows is judged
    against its thresholds, even if the test does not ask.

    folder: for its files. window_id: unique within a run (default: the name of the folder).
    settings: for its verdict. load: of its test. make_next: makes the next window if `repeat`
    asks for several. progress: called with lines about what is happening.
    """

    __module__ = "pytest_sglprof"

    def __init__(
        self,
        server: Server,
        spec: WindowSpec,
        folder: Path,
        *,
        window_id: str | None = None,
        settings: Settings | None = None,
        load: LoadState | None = None,
        make_next: Callable[[WindowSpec], Window] | None = None,
        progress: Progress | None = None,
    ) -> None:
        self.server = server
        self.role = role_of(server.info)
        self.spec = replace(spec, thresholds=of_role(spec.thresholds, self.role))
        self.folder = Path(folder)
        self.id = window_id or self.folder.name
        self.state: Literal["new", "open", "closed"] = "new"
        self.windows: list[Window] = [self]  # shared by the windows that repeat each other
        self.load_index = 0
        self.log_start = 0  # size of the server's log when it was opened, bytes
        self.load_problem: str | None = None  # why the last request for the load failed
        self.onset: Onset | None = None  # at which a trigger opened it
        self.watch: LoadWatch | None = None  # has the load around it
        self.moment: Moment | None = None  # seen from the onset that opened `moment_of`
        self.moment_of = ""
        self.sources: RecordedSources | None = None  # set after a fail
        self.sampled: list[tuple[float, dict[str, float]]] = []  # Unix s, log ratios of its ranks
        self.drop: Callable[[], object] = lambda: None  # as if it had never been opened
        self.compare: Callable[[Window, Threshold], JudgedFigure] | None = None  # with lives
        self._settings = settings or Settings(self.folder)
        self._load = load or LoadState()
        self._make_next = make_next
        self._progress = progress
        self._opened = 0.0  # Unix time, s
        self._opened_at = 0.0  # monotonic, as is the deadline
        self._deadline = 0.0
        self._timed_out = False
        self._clocks: ClockWatch | None = None
        self._series: SeriesWatch | None = None
        self._from_metrics = ServerFacts()  # what the server's metrics say
        self._not_opened: tuple[VerdictWord | None, str] | None = None
        self._held = ExitStack()
        self._closing = threading.Lock()  # also held during an export, so only for closing
        self._recorded: WindowCapture | None = None
        self._capture: WindowCapture | None = None
        self._judging = threading.Lock()  # guards `_measured` and `_checks`
        self._measured: Measured | None = None
        self._checks: list[Threshold] = []
        self._is_documented = False
        self._prepare()

    def _prepare(self) -> None:
        self._backend = BACKENDS[self.spec.backend]
        self._life = LifeWatch(self.server)
        self._recording = self._backend.load()(
            self.server,
            self.spec,
            window_id=safe_name(self.id),
            folder=self.folder,
            life=self._life,
            progress=self._progress,
        )
        self._experts = ExpertRecording(self.server, self.folder, self._life)

    @property
    def was_opened(self) -> bool:
        """True once the server began to profile."""
        return self.state != "new"

    @property
    def is_judged(self) -> bool:
        """False for a short window beside another one."""
        return self.moment in (None, "at")

    @property
    def repeat_index(self) -> int:
        """Its number among the windows that repeat each other, from 1."""
        return 1 + self.windows.index(self)

    def refuse(self) -> None:
        """Raises what `open` would refuse, without touching the server's profiler."""
        self._recording.refuse()

    def open(self) -> None:
        """Starts to record after `delay` seconds.

        Raises `WindowRefused` for what would break the server or the data, `LeaseError` if
        another window of this server is open, and `ServerDied`, `NsysError` or `WindowError`
        if the recording does not start.
        """
        if self.state != "new":
            raise WindowError(
                f"window {self.id!r} is {self.state} already",
                expected="a new window: each is opened once",
            )
        self._limit()
        start = time.monotonic()
        log = self.server.log
        self.log_start = log.position() if log is not None else 0
        self._recording.refuse()
        self._delay()
        self._deadline = start + self.spec.delay + self.spec.timeout
        self._held.enter_context(self.server.window_lock())
        try:
            self._prepare()  # the log of this window begins here
            self.server.announce_window(self.spec.backend)
            self._raise_death()
            self._experts.start()
            if self.watch is not None:
                self._held.enter_context(self.watch.disturbances.window())
            self._opened = time.time()
            self._recording.start(self._deadline)
        except BaseException as error:
            self.state = "closed"
            what = error.what if isinstance(error, SglprofError) else type(error).__name__
            lines = error.log if isinstance(error, SglprofError) else ()
            with ExitStack() as ending:  # runs all of these, even if one of them raises
                ending.callback(self._release, still_open=False)
                ending.callback(self._experts.abort)
                if not isinstance(error, WindowRefused):
                    ending.callback(self._recording.abort)
                failed = self._failed(f"it did not open: {what}", self._opened)
                self._recorded = self._describe(replace(failed, log=lines))
            raise
        self._opened_at = time.monotonic()
        self.state = "open"
        self._clocks = watch_clocks(self.server)
        self._series = watch_series(self.server)
        self.load_index = self._load.load_index

    def _limit(self) -> None:
        """Records less than was asked for where `max_stall` or `max_mib` allow no more."""
        if self.spec.max_stall is None and self.spec.max_mib is None:
            return
        self.spec = sized(self, self._settings, self._progress)
        if self.spec.num_steps is not None and self.spec.num_steps < self._settings.min_steps:
            least = least_steps(self.spec, self._settings)
            self._settings = replace(self._settings, min_steps=least)

    def _delay(self) -> None:
        over = time.monotonic() + self.spec.delay
        while (left := over - time.monotonic()) > 0:
            self._raise_death()
            time.sleep(min(POLL, left))

    def _raise_death(self) -> None:
        if death := self._life.death():
            raise death

    def saw_load(self, problem: str | None) -> None:
        """Notes the outcome of a request for the load before the window opens."""
        self.load_problem = problem

    def conclude_unopened(self, word: VerdictWord | None, reason: str) -> None:
        """Ends a window that was never opened. word: its verdict (None: that of thresholds)."""
        self._not_opened = (word, reason)

    def wait(self, stop: threading.Event | None = None) -> None:
        """Waits for the end of its steps or duration.

        Also returns after its `timeout`, if the server dies, if `stop` is set, or if the load that
        it counts steps of ends; the result of `close` says which.
        """
        if self.state != "open":
            return
        duration = self._duration()
        if duration is None and self.spec.num_steps is None:
            raise WindowError(
                f"window {self.id!r} has neither num_steps nor duration, so it never ends by "
                "itself",
                hint="set one of them, or close the window yourself",
            )
        over = None if duration is None else self._opened_at + duration
        target, load_ended = self._load.driven
        pause = stop or (load_ended if target and self.spec.num_steps else threading.Event())
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
        return self._backend.default_seconds

    def close(self) -> WindowCapture:
        """Closes the window and returns what it recorded; further calls return the same.

        An incomplete window does not raise: `state` and `reason` of the result say so.
        """
        if self._capture is None:
            with self._closing:
                if self._capture is None:
                    self._capture = self._close()
                    remember(self)
        return self._capture

    def _close(self) -> WindowCapture:
        if self._not_opened is not None and not self.was_opened:
            word, reason = self._not_opened
            unopened = self._failed(reason, time.time())
            return replace(unopened, state="complete") if word == "pass" else unopened
        clocks: tuple[GpuClocks, ...] = ()
        notes: tuple[str, ...] = ()
        try:
            clocks, notes = self._end_clocks()  # before the export, in which GPUs are idle
            if self._series is not None:
                self._from_metrics, problems = self._series.finish()
                notes += problems
        finally:
            recorded = self._recorded or self._end_recording()
        if self.load_problem:
            notes += (f"it opened although its load could not be read: {self.load_problem}",)
        return self._with_facts(replace(recorded, gpus=clocks, notes=(*recorded.notes, *notes)))

    def _end_clocks(self) -> tuple[tuple[GpuClocks, ...], tuple[str, ...]]:
        watch, self._clocks = self._clocks, None
        return watch.stop() if watch is not None else ((), ())

    def _end_recording(self) -> WindowCapture:
        if self.state != "open":
            raise WindowError(
                f"window {self.id!r} was never open", expected="open() before close()"
            )
        interrupted = self._failed("closing was interrupted", self._opened)
        capture = replace(interrupted, is_still_open=True)
        try:
            unfinished = self._unfinished()
            floor = time.monotonic() + min(self.spec.timeout, CLOSE_SECONDS)
            deadline = max(self._deadline, floor)
            if self.watch is not None and not self._recording.is_done():
                self.watch.disturbances.stopping()
            capture = self._recording.stop(interrupted, deadline, unfinished=unfinished)
            notes = (*capture.notes, *self._experts.finish(), *self._keep_settings(capture))
            capture = replace(capture, notes=notes)
        finally:
            self.state = "closed"
            try:
                self._recorded = self._describe(capture)
            finally:
                self._release(still_open=capture.is_still_open)
        return self._recorded

    def _keep_settings(self, capture: WindowCapture) -> tuple[str, ...]:
        """Writes the server's settings beside the traces; a note if that fails."""
        try:
            if capture.artifacts:
                write_settings(self.folder, self.server.info)
        except OSError as error:
            return (f"{SERVER_INFO} could not be written: {error.strerror or error}",)
        return ()

    def _unfinished(self) -> str | None:
        """Why the window closes before the end of its steps, or None."""
        steps = self.spec.num_steps
        if steps is None or self._life.death():
            return None
        patience = time.monotonic() + (0.0 if self._timed_out else ENDING_SECONDS)
        while not self._recording.is_done():
            if time.monotonic() >= patience:
                seconds = time.monotonic() - self._opened_at
                how = "not over within" if self._timed_out else "not over when it closed after"
                return f"its {steps} steps were {how} {seconds:.0f} s"
            time.sleep(POLL)
        return None

    def _failed(self, reason: str, opened: float) -> WindowCapture:
        return WindowCapture(self.id, self.spec, "failed", opened, time.time(), reason=reason)

    def _describe(self, capture: WindowCapture) -> WindowCapture:
        """Adds the time of the close, and the ranks that it should contain."""
        sizes = self.server.sizes
        ranks = sizes.ranks()
        if self._backend.is_per_node and not self.server.nodes:
            ranks = tuple(rank for rank in ranks if sizes.node_of(rank) == sizes.node_rank)
        # A server that does not tell its sizes has the ranks that were recorded.
        labels = tuple(rank.label for rank in ranks) or capture.expected_ranks
        nodes = self.server.node_names()
        return replace(capture, closed=time.time(), expected_ranks=labels, nodes=nodes)

    def _with_facts(self, capture: WindowCapture) -> WindowCapture:
        """Adds facts from the server's metrics, and its log; attached servers have no log."""
        log, measured = self.server.log, self._from_metrics
        if log is None:
            return replace(capture, facts=measured)
        facts = read_log_facts(log.each(self.log_start), capture.closed, capture.opened)
        balancedness = measured.balancedness or facts.balancedness
        facts = replace(facts, balancedness=balancedness, sync_waits=measured.sync_waits)
        return replace(capture, facts=facts)

    def _release(self, *, still_open: bool) -> None:
        try:
            if not still_open:  # otherwise the teardown of the server has to close it
                self.server.announce_window(None)
        finally:
            self._held.close()

    def discard(self) -> None:
        """Ends an open window and drops what it recorded."""
        with self._closing, ExitStack() as ending:
            was_open, self.state = self.state == "open", "closed"
            if was_open:
                ending.callback(self._release, still_open=False)
                ending.callback(self._recording.abort)
                ending.callback(self._experts.abort)
            self._end_clocks()

    def __enter__(self) -> Window:
        await_driven_load(self, self._load, self._progress)
        self.open()
        return self

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        self.close()
        while error is None and (following := self.next()) is not None:
            try:
                await_driven_load(following, self._load, self._progress)
            except Inconclusive as why:  # those before it are judged without it
                following.conclude_unopened(None, why.what)
                return
            following.open()
            try:
                target, ended = following._load.driven
                following.wait(ended if target else None)
            finally:
                following.close()
        if error is None and self.spec.source_lines:
            from pytest_sglprof._run.sources import record_sources

            record_sources(self, self._load, threading.Event())

    def beside(self, moment: Moment, spec: WindowSpec) -> Window:
        """A new window of this test that is not judged, before or after what opens this one."""
        assert self._make_next is not None, "the windows of tests have others beside them"
        beside = self._make_next(spec)
        beside.moment, beside.moment_of = moment, self.id
        return beside

    def next(self) -> Window | None:
        """The next window that repeats this one; None after the last.

        This one is closed. Until the verdict is certain, it is read and judged here.
        """
        if self._make_next is None or not self._wants_more():
            return None
        following = self._make_next(self.spec)
        self.windows.append(following)
        following.windows = self.windows
        return following

    def _wants_more(self) -> bool:
        """Whether another window is opened after the last of `windows`."""
        repeat, opened = self.spec.repeat, len(self.windows)
        if repeat != CERTAIN:
            assert not isinstance(repeat, str)
            return opened < (repeat or 1)
        spent = time.time() - self.windows[0].capture.opened
        if opened >= MOST_WINDOWS or spent >= (self.spec.max_time or math.inf):
            return False
        together = judge_until_certain([window.verdict for window in self.windows])
        if self._progress is not None:
            self._progress(f"window {self.spec.name}: {opened} so far: {together.word}")
        return opened < 2 or together.word == "inconclusive"

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
        """The table and the verdict. The first use reads the files."""
        capture = self.capture
        with self._judging:
            word, reason = self._not_opened or (None, "")
            if self._measured is None and word is not None:
                self._measured = Measured(None, Verdict(word, reason), reason)
            if self._measured is None:
                try:
                    self._measured = read_and_judge(capture, self._settings, self._checks)
                    if not self.is_judged:
                        self._measured = without_verdict(self._measured, self.moment or "")
                except Exception as error:
                    if isinstance(error.__cause__, KeyboardInterrupt):
                        raise KeyboardInterrupt from None  # compiled code noticed it too late
                    # Raised once, in the test; later uses get an inconclusive verdict.
                    reason = f"reading or judging the window failed: {error!r}"
                    verdict = undecided((*self.spec.thresholds, *self._checks), reason)
                    self._measured = Measured(None, verdict, reason)
                    raise
            return self._measured

    @property
    def table(self) -> KernelTable:
        """The kernel table; raises `Inconclusive` if there is nothing to read."""
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
        """The verdict on its thresholds, and on those that were checked so far."""
        return self.measured.verdict

    @property
    def of_lives(self) -> tuple[Threshold, ...]:
        """Its thresholds, and those that were checked so far, that server lives are judged by."""
        every = (*self.spec.thresholds, *self._checks)
        return tuple(each for each in every if METRICS[each.metric].is_of_lives)

    @property
    def was_checked(self) -> bool:
        """True after a call of `check`."""
        return bool(self._checks)

    def check(
        self,
        metric: str,
        limit: float,
        *,
        scope: str = "compute",
        kernel: str = "",
        stage: str = "",
        across: Across = "",
        min_us: float = 0.0,
    ) -> float:
        """Judges one more threshold, and returns the figure that it limits.

        If the figure is worse than `limit`, the test fails at its end. The figure is infinite if
        only one rank has activity in the scope, and the median of windows that repeat each
        other. Figures of server lives are those of this life, which may need more of them to
        fail, and NaN where too few lives are accepted. Raises `Inconclusive` for too little data,
        and `SettingsError` for names that do not exist. The judgement stays with the window.
        """
        threshold = check_threshold(
            Threshold(metric, limit, scope, kernel, stage, "check", across, min_us),
            self._settings.category_names,
            f"check({metric!r}, {limit!r})",
        )
        if self._is_documented:
            raise WindowError(
                f"check({metric!r}, {limit!r}): the results of this window's test are written",
                expected="a check in the body of the test",
                hint="the teardown of a fixture is too late for a verdict",
            )
        for window in self.windows:
            _ = window.capture  # raises if one of them is not closed, before any is judged
        if METRICS[metric].is_of_lives:
            return self._check_lives(threshold)
        verdicts = [window._judge_also(threshold) for window in self.windows]
        together: Verdict | RepeatedVerdict = verdicts[0]
        if len(verdicts) > 1:
            together = judge_together(self.spec, verdicts)
        if together.word == "inconclusive":
            raise Inconclusive(
                f"{threshold.describe()}: {together.reason}",
                expected=f"at least {self._settings.min_steps} steps of every rank",
                hint="give the window more steps, or the server a longer load",
            )
        return median(_figure(verdict) for verdict in verdicts if verdict.word != "inconclusive")

    def _check_lives(self, threshold: Threshold) -> float:
        """Of this server life alone; the verdict at the end of the test is of all that it takes."""
        assert self.compare is not None, "the windows of tests are compared"
        judged = self.compare(self, threshold)
        for window in self.windows:
            if threshold not in window._checks:
                window._checks.append(threshold)
        if judged.word == "inconclusive" and not judged.is_beyond:
            raise Incomparable(
                f"{threshold.describe()}: {judged.reason}",
                expected="accepted lives that this one can be compared with",
                hint="`sglprof baseline list` shows them; where it is meant to differ, accept it: "
                'sglprof baseline accept latest --reason "…"',
            )
        return math.nan if judged.value is None else judged.value

    def _judge_also(self, threshold: Threshold) -> Verdict:
        """Adds a threshold to those of this window, and returns its verdict on it."""
        _ = self.measured  # reads the files
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

    def document(self, *, is_final: bool = True, **about: Any) -> RecordedWindow:
        """The window as in results.json. After the final one `check` raises `WindowError`."""
        from msgspec.structs import replace as changed

        from pytest_sglprof._report.results import window_document
        from pytest_sglprof._run.around import load_document

        self._is_documented = is_final
        measured, began = self.measured, time.monotonic()
        around = load_document(self, measured.table)
        document = window_document(
            self.capture, measured.table, measured.verdict, **about, **around
        )
        spent = measured.seconds + time.monotonic() - began
        return changed(document, cost=cost_of(self, spent))


def _figure(verdict: Verdict) -> float:
    """The figure that decided; infinite if only one rank has activity in the scope."""
    value = verdict.deciding.value if verdict.deciding is not None else None
    return math.inf if value is None else value
