"""One attempt of one test: its server, its windows, its loads and its verdict."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

from pytest_sglprof._capture.recording import in_thread
from pytest_sglprof._config.model import WindowSpec
from pytest_sglprof._config.windows import repeats, window_by_hand
from pytest_sglprof._errors import Inconclusive, SettingsError, SglprofError, do_every
from pytest_sglprof._metrics import WORST_FIRST, VerdictWord
from pytest_sglprof._run.opening import LoadState, open_in_time, refuse_trigger
from pytest_sglprof._run.roles import RoleWindows, specs_by_server, together
from pytest_sglprof._run.servers import check_alive, describe_server, undisturbed
from pytest_sglprof._run.window import Window
from pytest_sglprof._server.command import LAUNCHERS
from pytest_sglprof._server.deployment import Deployment, processes_of, servers_of

if TYPE_CHECKING:
    from collections.abc import Sequence
    from concurrent.futures import Future

    from pytest_sglprof._baselines.records import LifeRecord
    from pytest_sglprof._bench_serving.bench import BenchServing
    from pytest_sglprof._config.load import Settings
    from pytest_sglprof._config.model import Threshold
    from pytest_sglprof._load.watcher import LoadWatch
    from pytest_sglprof._report.build import Repeat
    from pytest_sglprof._report.model import (
        Outcome,
        Record,
        RecordedLoad,
        RecordedWindow,
    )
    from pytest_sglprof._run.folder import RunFolder
    from pytest_sglprof._run.lives import TestLives
    from pytest_sglprof._run.shapes import ProfileShapes
    from pytest_sglprof._server.launch import Server
    from pytest_sglprof._verdict.regression import JudgedFigure
    from pytest_sglprof._verdict.repeats import RepeatedVerdict


class TestRun:
    """One attempt of one test.

    The plugin calls `prepare` after the setup, `begin` before the body, `end` or `abandon` after
    it, and `record` for the report.
    """

    __test__ = False  # pytest must not collect it

    def __init__(
        self,
        nodeid: str,
        attempt: int,
        settings: Settings,
        folder: RunFolder,
        marked: WindowSpec | None,
        *,
        drives_load: bool,
        progress: Callable[[str], None] | None = None,
        lives: TestLives | None = None,
    ) -> None:
        self.nodeid = nodeid
        self.attempt = attempt
        self.server: Server | None = None
        self.windows: list[Window] = []
        self.verdict: VerdictWord | None = None
        self.reason = ""
        self.message_shows_windows = False  # the test's own failure message shows the windows
        self.earlier: list[TestRun] = []  # on the server lives before, which decide with this one
        self.wants_life = False  # one more server life is needed for the verdict
        self._settings = settings
        self._folder = folder
        self._marked = marked
        self._drives_load = drives_load
        self._progress = progress
        self._load = LoadState()
        self._bench: BenchServing | None = None
        self._made: list[Window] = []  # all of them; `windows` has those that are closed
        self._of_marker: list[Window] = []  # one for each server that it is opened on
        self._openings: list[Future[None]] = []  # open these beside the body
        self._body_is_over = threading.Event()
        self._documents: list[RecordedWindow] | None = None
        self._lives = lives
        self._alone: tuple[VerdictWord | None, str] = None, ""  # the verdict without other lives
        self._measured: list[RecordedWindow] = []  # its documents without them
        self.is_in_body = False
        self.has_failed_subtest = False
        self._has_failed = False  # by an exception of the body
        self._is_incomparable = False  # that exception says no more than this
        self._ended: float | None = None  # where another server life follows
        self._started = time.monotonic()
        self._load_watches: dict[str, LoadWatch] = {}  # by the URL of the server

    def prepare(self, server: Server | None) -> None:
        """After the setup: checks that the server lives, and opens a window of the whole body."""
        self.server = server
        if server is None:
            return
        check_alive(server)
        self._open_whole_body()
        if self._of_marker or self._marked is None:
            return
        self._of_marker = self.new_windows(self._marked)
        for window in self._of_marker:
            refuse_trigger(self._marked.trigger, window.server)
            with contextlib.suppress(Inconclusive):  # a full disk may have space when it opens
                window.refuse()

    def new_window(self, spec: WindowSpec) -> Window:
        """A new window of this test, on its only server."""
        (window,) = self.new_windows(spec)
        return window

    def new_by_hand(self, spec: WindowSpec) -> Window | RoleWindows:
        """The window that a body opens; on a deployment one for each of its servers."""
        windows = self.new_windows(spec)
        return RoleWindows(windows) if isinstance(self.server, Deployment) else windows[0]

    def new_windows(self, spec: WindowSpec) -> list[Window]:
        """A new window of this test for each server that it is opened on."""
        assert self.server is not None, "a window needs the server fixture"
        spec = replace(spec, repeat=repeats(spec, self._settings))
        return [self._make_window(*each) for each in specs_by_server(spec, self.server)]

    def _make_window(self, server: Server, spec: WindowSpec) -> Window:
        window = Window(
            server,
            spec,
            self._folder.window(spec.name, self.nodeid),
            settings=self._settings,
            load=self._load,
            make_next=partial(self._make_window, server),
            progress=self._progress,
        )
        window.watch = self._load_watches.get(server.url)
        window.compare = self._compared
        window.drop = partial(self._drop, window)
        self._made.append(window)
        return window

    def _drop(self, window: Window) -> None:
        """Forgets a closed window, and deletes its files."""
        import shutil

        self._made.remove(window)
        shutil.rmtree(window.folder, ignore_errors=True)

    def bench_serving(self) -> BenchServing:
        """The load driver. Windows wait for its loads."""
        from pytest_sglprof._bench_serving.bench import BenchServing

        if self._bench is None:
            assert self.server is not None
            self._bench = BenchServing(
                self.server,
                folder=self._folder.load(self.nodeid),
                progress=self._progress,
                on_start=self._load.start,
                on_end=self._load.end,
                on_result=self.server.note_load,
            )
        return self._bench

    def profile_shapes(self) -> ProfileShapes:
        """Drives batches of fixed shapes, with a window of this test for each."""
        from pytest_sglprof._run.shapes import ProfileShapes

        self._refuse_deployment("profile_shapes")
        folder = self._folder.load(self.nodeid)
        return ProfileShapes(
            self._settings, self.new_window, self.bench_serving(), self._load, folder
        )

    def load_watch(self, server: Server | None = None) -> LoadWatch:
        """Watches the load of a server's ranks until the end of the test."""
        if server is None:
            self._refuse_deployment("load_watch")
            server = self.server
        assert server is not None, "load is that of the server fixture"
        if server.url not in self._load_watches:
            from pytest_sglprof._load.watcher import server_watch

            watch = self._load_watches[server.url] = server_watch(
                server.url,
                api_key=server.client.api_key,
                log=server.log.path if server.log is not None else None,
                metrics=bool(server.info.get("enable_metrics")),
                waits=True,
                verify=server.client.verify,
            )
            watch.start()
            for window in self._made:
                window.watch = self._load_watches.get(window.server.url)
        return self._load_watches[server.url]

    def _refuse_deployment(self, fixture: str) -> None:
        if isinstance(self.server, Deployment):
            raise SettingsError(
                f"{fixture} on the deployment {self.server.spec.name}",
                expected="a server alone: it is about one server",
                hint='@pytest.mark.sglang_server("NAME") with NAME of [servers.NAME]',
            )

    @contextlib.contextmanager
    def measuring(self) -> Iterator[None]:
        """Keeps other tests from measuring on the same hardware during the block."""
        if self.server is None:
            yield
            return
        with undisturbed(self.server, self._progress):
            yield

    def begin(self) -> None:
        """Before the body: starts to wait for the moment to open the marked window."""
        if self._marked is None or self._marked.whole_body or self.server is None:
            return
        for window in self._of_marker:
            if window.spec.trigger is not None:
                window.watch = self.load_watch(window.server)
            begun = window, self._load, self._body_is_over
            opening = partial(open_in_time, *begun, drives_load=self._drives_load)
            self._openings.append(in_thread("sglprof-window", opening))

    def end(self) -> None:
        """After the body: closes and judges each window, and raises their errors."""
        do_every(self._ending())

    def abandon(
        self, *, discard: bool, keep_closed: bool = False, is_incomparable: bool = False
    ) -> None:
        """After a body that raised: closes each window, and raises their errors.

        discard: the test was skipped or interrupted, so that windows are dropped without a
        verdict, except those that the body has checked, and with keep_closed those that it has
        closed. is_incomparable: it found no accepted life to compare with, which is no fault of
        what it measured.
        """
        self._has_failed, self._is_incomparable = True, is_incomparable
        do_every(self._abandoning(discard, keep_closed))

    def _ending(self) -> Iterator[Callable[[], object]]:
        yield self._end_opening
        for window in self._made:
            if window.was_opened or (window.repeat_index == 1 and window.is_judged):
                yield partial(self._close, window)
        yield self._conclude
        yield self._compare_lives
        yield self._end_load_watch

    def _abandoning(self, discard: bool, keep_closed: bool) -> Iterator[Callable[[], object]]:
        for step in (self._end_opening, self._end_load_watch):
            yield partial(_without_our_errors, step) if discard else step
        for window in self._made:
            is_closed = window.state == "closed"
            is_kept = window.was_checked or not discard or (keep_closed and is_closed)
            if window.was_opened and is_kept:
                yield partial(self._close, window)
            else:
                yield window.discard
        yield self._conclude
        yield self._compare_lives

    def _close(self, window: Window) -> None:
        if window.was_opened or window in self._of_marker:
            window.close()
            self.windows.append(window)
        _ = window.capture  # raises an error for a window that was never opened

    def inconclusive(self, reason: str) -> None:
        """The body raised `Inconclusive`. A window with the verdict fail still wins."""
        if self.verdict != "fail":
            self.verdict, self.reason = "inconclusive", reason

    def record(self, outcome: Outcome, problems: Sequence[str]) -> Record:
        """The record of this attempt. problems: one line for each file that was not written."""
        from pytest_sglprof._report.model import Record
        from pytest_sglprof._report.results import attempt_document

        windows = self.documents()
        return Record(
            attempt=attempt_document(
                nodeid=self.nodeid,
                number=self.attempt,
                outcome=outcome,
                verdict=self.verdict,
                reason=self.reason,
                duration_s=(self._ended or time.monotonic()) - self._started,
                windows=[window.id for window in windows],
                worker=self._folder.worker,
            ),
            windows=tuple(windows),
            servers=tuple(
                describe_server(each, self._folder.path)
                for each in (processes_of(self.server) if self.server else ())
            ),
            loads=self._load_documents(),
            problems=tuple(problems),
            lives=tuple(self._records(windows)),
            before=tuple(earlier.record(outcome, ()) for earlier in self.earlier),
        )

    def message(self) -> str:
        """The failure message of the test: a rank table for each bad window, or the reason.

        Its first line is the finding, since lists of failed tests show no more.
        """
        from pytest_sglprof._report.terminal import headline, rank_table

        self.message_shows_windows = True
        bad = [window for window in self.documents() if window.verdict != "pass"]
        shown = [rank_table(window) for window in bad if _is_shown(window)]
        worst = [window for window in bad if window.verdict == self.verdict]
        first = headline(worst[0]) if worst else f"{self.verdict}: {self.reason}".partition("\n")[0]
        parts = [first, f"profile window verdict: {self.verdict}"]
        if not shown:
            parts += self.reason.splitlines()[0 if worst else 1 :]
        for lines in shown:
            parts += ["", *lines]
        return "\n".join(parts)

    @property
    def has_recorded(self) -> bool:
        """Whether there is anything to keep of an attempt that was interrupted."""
        return bool(self.windows or (self._bench is not None and self._bench.results))

    def documents(self) -> list[RecordedWindow]:
        """The windows as in results.json; made once, since their tables are large."""
        if self._documents is None or len(self._documents) != len(self.windows):
            self._documents = [self._document(window) for window in self.windows]
        return self._documents

    def pictures(self) -> list[Path]:
        """Writes a heat map of each window that did not pass; returns the paths."""
        from pytest_sglprof._files import atomic_write, safe_name
        from pytest_sglprof._report.heat_map import heat_map_svg

        paths = []
        for window in self.documents():
            if window.verdict != "pass" and window.findings:
                name = safe_name(f"heat-map-{window.id}")
                paths.append(self._folder.path / f"{name}.svg")
                atomic_write(paths[-1], heat_map_svg(window))
        return paths

    def drop_artifacts(self) -> None:
        """Deletes the traces of the windows if `output.keep` says so."""
        import shutil

        keep = self._settings.keep
        if keep == "all" or (keep == "failed" and self.verdict != "pass"):
            return
        for window in self.windows:
            shutil.rmtree(window.folder, ignore_errors=True)
        self._documents = [_without_files(window) for window in self.documents()]
        self._measured = [_without_files(window) for window in self._measured]

    def forget(self) -> None:
        """After the report: drops windows and documents, because this object may live on.

        Python, pytest and its plugins keep exceptions, and with them the frames of a test.
        """
        for earlier in self.earlier:
            earlier.forget()
        self.windows, self._made, self._documents, self._measured = [], [], [], []
        self._of_marker, self._openings, self._load_watches, self._bench = [], [], {}, None

    def _end_opening(self) -> None:
        openings, self._openings = self._openings, []
        self._body_is_over.set()
        try:
            do_every(each.result for each in openings)
        except BaseException:
            # This error explains why its windows were never opened.
            self._made = [window for window in self._made if window.was_opened]
            raise

    def _end_load_watch(self) -> None:
        """Ends the watch and raises the error of its thread, if any; its samples stay readable."""
        do_every(each.stop for each in self._load_watches.values())

    def _open_whole_body(self) -> None:
        if self._marked is not None and self._marked.whole_body:
            self._of_marker = self.new_windows(self._marked)
            together([each.open for each in self._of_marker])

    def _conclude(self) -> None:
        """Sets the worst verdict of all windows. Reads each of them, even if another one fails."""
        closed = [each for each in self._made if each in self.windows and each.is_judged]
        try:
            do_every(partial(getattr, window, "verdict") for window in closed)
        finally:
            self._conclude_from(closed)

    def _conclude_from(self, windows: Sequence[Window]) -> None:
        judged = []
        for window in windows:
            repeated = self._repeated(window)
            if repeated is None:
                judged.append((window.verdict.word, window.spec.name, window.verdict.reason))
            elif window.repeat_index == 1:
                judged.append((repeated.word, window.spec.name, repeated.reason))
        for word in WORST_FIRST:
            reasons = [f"{name}: {reason}" for each, name, reason in judged if each == word]
            if reasons:
                self.verdict, self.reason = word, "\n".join(reasons)
                return

    # ---- beside accepted server lives ------------------------------------------------------

    def _compare_lives(self) -> None:
        """Judges what this attempt left together with the other new lives of the test."""
        from pytest_sglprof._run.lives import NewLife

        if self._lives is None or self.server is None or not self.windows:
            return
        self._measured, self._alone = self.documents(), (self.verdict, self.reason)
        records = {record.id.rpartition("/")[2]: record for record in self._records(self._measured)}
        new = [
            NewLife(window.spec.name, records.get(window.id), window.of_lives)
            for window in self.windows
            if window.repeat_index == 1 and window.was_opened and window.is_judged
        ]
        self._lives.add(new)
        is_over = self.verdict == "fail" or self._has_failed or self.has_failed_subtest
        self.wants_life = self._lives.judge(can_confirm=not self.server.attached, is_over=is_over)
        self._ended = time.monotonic() if self.wants_life else None
        for attempt in (*self.earlier, self):
            attempt._judge_together()

    def _judge_together(self) -> None:
        """Sets the verdicts of this attempt and of its windows, with those of all its lives."""
        assert self._lives is not None
        self._documents = self._lives.merged(self._measured)
        self.verdict, self.reason = self._lives.together(*self._alone)

    def _compared(self, window: Window, threshold: Threshold) -> JudgedFigure:
        """One threshold of lives, for this life alone, while the body runs."""
        from pytest_sglprof._run.lives import NewLife

        assert self._lives is not None, "tests of the plugin have lives"
        document = self._document(window, is_final=False)
        (record, *_) = (*self._records([document]), None)
        return self._lives.check(NewLife(window.spec.name, record, (threshold,)))

    def _records(self, windows: Sequence[RecordedWindow]) -> list[LifeRecord]:
        """What these windows leave of their server life."""
        if self.server is None or self._lives is None:
            return []
        has_failed = (self._has_failed and not self._is_incomparable) or self.has_failed_subtest
        return [
            record
            for server in servers_of(self.server).values()
            for record in self._lives.records(
                [each for each in windows if each.is_judged and each.server == server.spec.key],
                server,
                describe_server(server, self._folder.path),
                self._load_commands(),
                has_failed=has_failed,
            )
        ]

    def _repeated(self, window: Window) -> RepeatedVerdict | None:
        """The verdict over all windows that repeat this one; None if it is not repeated."""
        from pytest_sglprof._verdict.repeats import judge_together

        if window.spec.repeat == 1:
            return None
        verdicts = [each.verdict for each in window.windows if each in self.windows]
        return judge_together(window.spec, verdicts)

    def _repeat(self, window: Window) -> Repeat | None:
        from pytest_sglprof._report.build import Repeat

        verdict = self._repeated(window)
        if verdict is None:
            return None
        closed = [each for each in window.windows if each in self.windows]
        typical = closed[verdict.typical].id
        return Repeat(window.windows[0].id, window.repeat_index, typical, verdict)

    def _document(self, window: Window, *, is_final: bool = True) -> RecordedWindow:
        return window.document(
            is_final=is_final,
            nodeid=self.nodeid,
            attempt=self.attempt,
            server_key=window.server.spec.key,
            standin=LAUNCHERS[window.server.kind].is_standin,
            role=window.role or None,
            load=self._load_id(window.load_index) if window.load_index else None,
            root=self._folder.path,
            repeat=self._repeat(window),
        )

    def _load_documents(self) -> tuple[RecordedLoad, ...]:
        from pytest_sglprof._report.results import load_document

        if self._bench is None:
            return ()
        return tuple(
            load_document(
                result,
                load_id=self._load_id(number),
                nodeid=self.nodeid,
                attempt=self.attempt,
                server_key=self._server_key,
                standin=self._standin,
            )
            for number, result in zip(self._bench.numbers, self._bench.results, strict=True)
        )

    def _load_commands(self) -> dict[str, tuple[str, ...]]:
        """Of each load by its id; also of those that were stopped, which have no figures."""
        commands = self._bench.commands if self._bench is not None else []
        return {self._load_id(at): command for at, command in enumerate(commands, start=1)}

    def _load_id(self, number: int) -> str:
        return f"{self.nodeid}#{self.attempt}.{number}"

    @property
    def _server_key(self) -> str:
        return self.server.spec.key if self.server is not None else ""

    @property
    def _standin(self) -> bool:
        servers = servers_of(self.server).values() if self.server is not None else ()
        return any(LAUNCHERS[each.kind].is_standin for each in servers)


class ProfileWindow:
    """The value of the fixture `profile_window`: makes windows that a test opens itself.

    test_name: the name of a window without one. The options are in docs/windows.md. Raises
    `SettingsError` for options that do not exist or contradict each other.
    """

    __module__ = "pytest_sglprof"

    def __init__(
        self,
        settings: Settings,
        make: Callable[[WindowSpec], Window | RoleWindows],
        test_name: str = "window",
    ) -> None:
        self._settings, self._make, self._test_name = settings, make, test_name

    @overload
    def __call__(self, name: str = ..., *, roles: Sequence[str], **options: Any) -> RoleWindows: ...
    @overload
    def __call__(self, name: str = ..., **options: Any) -> Window: ...
    def __call__(self, name: str = "", **options: Any) -> Window | RoleWindows:
        """A new window of the current test; on a deployment one for each of its servers."""
        return self._make(window_by_hand(self._settings, name or self._test_name, options))


def _without_our_errors(step: Callable[[], object]) -> None:
    """Takes a step and ignores its `SglprofError`, but not a bug."""
    with contextlib.suppress(SglprofError):
        step()


def _is_shown(window: RecordedWindow) -> bool:
    """Whether to show a window: of windows that repeat each other only the median."""
    return window.repeats is None or window.id == window.repeats.typical


def _without_files(window: RecordedWindow) -> RecordedWindow:
    """The document of a window whose traces were deleted."""
    from msgspec.structs import replace as changed

    cost = None if window.cost is None else replace(window.cost, kept_bytes=0)
    return changed(window, artifacts=(), cost=cost)
