"""What happens around one attempt of one test: its windows, its loads, its verdict."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from pytest_sglprof.session.load_state import LoadState
from pytest_sglprof.session.server_life import check_alive, server_document
from pytest_sglprof.session.window_run import WindowRun
from pytest_sglprof.session.window_watch import WindowWatch
from pytest_sglprof.values import VerdictWord, WindowSpec

if TYPE_CHECKING:
    from collections.abc import Callable

    from pytest_sglprof.bench_serving.load import BenchServing
    from pytest_sglprof.server.server import Server
    from pytest_sglprof.session.run import RunFolder
    from pytest_sglprof.settings import Settings

RANKING: tuple[VerdictWord, ...] = ("fail", "inconclusive", "pass")  # worst first


class TestRun:
    """One attempt. Its life: prepare (setup), begin, end (call), record (report)."""

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
    ) -> None:
        self.nodeid = nodeid
        self.attempt = attempt
        self.server: Server | None = None
        self.windows: list[WindowRun] = []
        self.verdict: VerdictWord | None = None
        self.reason = ""
        self._settings = settings
        self._folder = folder
        self._marked = marked
        self._drives_load = drives_load
        self._progress = progress
        self._load = LoadState()
        self._bench: BenchServing | None = None
        self._watch: WindowWatch | None = None
        self._watched: WindowRun | None = None
        self._documents: list[dict[str, Any]] | None = None

    def prepare(self, server: Server | None) -> None:
        """After the fixtures: the server must live; a window of the whole body opens now."""
        self.server = server
        if server is None:
            return
        check_alive(server)
        if self._marked is not None and self._marked.whole_body:
            self._watched = self.new_window(self._marked)
            self._watched.open()

    def new_window(self, spec: WindowSpec) -> WindowRun:
        """A window of this test, not opened yet."""
        assert self.server is not None, "a window needs the server fixture"
        folder = self._folder.window(spec.name, self.nodeid)
        window = WindowRun(self.server, spec, self._settings, folder, self._progress)
        self.windows.append(window)
        return window

    def bench_serving(self) -> BenchServing:
        """The load driver, telling the watching window when its load begins and ends."""
        from pytest_sglprof.bench_serving.load import BenchServing

        if self._bench is None:
            assert self.server is not None
            self._bench = BenchServing(
                self.server,
                folder=self._folder.load(self.nodeid),
                progress=self._show_load,
                on_start=self._load.start,
                on_end=self._load.end,
            )
        return self._bench

    def begin(self) -> None:
        """Before the body: a marked window begins to wait for steady load."""
        if self._marked is None or self._marked.whole_body or self.server is None:
            return
        self._watched = self.new_window(self._marked)
        self._watch = WindowWatch(
            self._watched, self.server, self._load, drives_load=self._drives_load
        )
        self._watch.start()

    def end(self) -> None:
        """After the body: closes and judges every window; raises what went wrong in them."""
        self._end_watch()
        if self._watched is not None:
            self._watched.close()
        for window in self.windows:
            window.close()
        self._conclude()

    def abandon(self, *, discard: bool) -> None:
        """After a body that failed (or skipped: `discard`): nothing stays open."""
        try:
            self._end_watch()
        finally:
            for window in self.windows:
                if discard:
                    window.discard()
                else:
                    window.close()
        if discard:
            self.windows.clear()
        else:
            self._conclude()

    def forget_attempt(self) -> None:
        """Before the body runs again for an inconclusive verdict: its windows stay recorded."""
        self.verdict, self.reason = None, ""

    def inconclusive(self, reason: str) -> None:
        """The body itself found too little data."""
        self.verdict, self.reason = "inconclusive", reason

    def record(self, outcome: str) -> dict[str, Any]:
        """This attempt as plain data, which travels with the test's report."""
        return {
            "nodeid": self.nodeid,
            "attempt": self.attempt,
            "outcome": outcome,
            "verdict": self.verdict,
            "reason": self.reason,
            "windows": self.documents(),
            "servers": [server_document(self.server)] if self.server else [],
            "loads": self._load_documents(),
        }

    def message(self) -> str:
        """The bad verdict as a tired engineer wants to read it."""
        from pytest_sglprof.report.terminal import rank_table

        parts = [f"profile window verdict: {self.verdict}", self.reason]
        for document in self.documents():
            if document["verdict"]["word"] != "pass":
                parts += ["", *rank_table(document)]
        return "\n".join(parts)

    def documents(self) -> list[dict[str, Any]]:
        """The windows as plain data; made once, since tables are large."""
        if self._documents is None or len(self._documents) != len(self.windows):
            self._documents = [self._document(window) for window in self.windows]
        return self._documents

    def drop_artifacts(self) -> None:
        """Deletes the windows' traces where `--sglprof-keep` says so."""
        import shutil

        keep = self._settings.keep
        if keep == "all" or (keep == "failed" and self.verdict != "pass"):
            return
        for window in self.windows:
            shutil.rmtree(window.folder, ignore_errors=True)
        for document in self.documents():
            document["artifacts_kept"] = False

    def _show_load(self, elapsed: float, line: str) -> None:
        if self._progress is not None:
            self._progress(f"load: {elapsed:.0f} s: {line}")

    def _end_watch(self) -> None:
        watch, self._watch = self._watch, None
        if watch is not None:
            watch.finish()

    def _conclude(self) -> None:
        judged = [(w.verdict.word, w.spec.name, w.verdict.reason) for w in self.windows]
        for word in RANKING:
            reasons = [f"{name}: {reason}" for found, name, reason in judged if found == word]
            if reasons:
                self.verdict, self.reason = word, "\n".join(reasons)
                return

    def _document(self, window: WindowRun) -> dict[str, Any]:
        assert self.server is not None
        return window.document(
            nodeid=self.nodeid,
            attempt=self.attempt,
            server_key=self.server.spec.key,
            standin=self.server.kind == "standin",
            load=None,
        )

    def _load_documents(self) -> list[dict[str, Any]]:
        results = self._bench.results if self._bench is not None else []
        return [{"nodeid": self.nodeid, "attempt": self.attempt, **asdict(r)} for r in results]
