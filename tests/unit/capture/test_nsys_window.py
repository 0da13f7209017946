"""nsys windows against a session that behaves as the measured one does."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import pytest

from pytest_sglprof._capture import nsys
from pytest_sglprof._config.backends import BACKENDS
from pytest_sglprof._config.model import ServerSpec
from pytest_sglprof._errors import (
    NsysError,
    NsysSessionError,
    ServerDied,
    WindowError,
    WindowRefused,
)
from pytest_sglprof._nsys import NsysSession, NsysTool
from pytest_sglprof._ranks import Rank
from pytest_sglprof._server.sizes import ServerSizes
from pytest_sglprof._trace.nsys.ranks import ranks_beside


class FakeSession:
    """A session: its first window ignores where its report should go, and any range."""

    def __init__(self, folder: Path) -> None:
        self.tool = NsysTool("/nowhere/nsys", "2023.4.4")
        self.name = "s"
        self.first = folder / "nsys" / "first.nsys-rep"
        self.now = "DelayedCollection"
        self.started: list[tuple[str, str | None]] = []
        self.windows = 0
        self.fails_to_stop: NsysError | None = None
        self.output: Path | None = None
        self.remarks: tuple[str, ...] = ()

    def state(self) -> str:
        return self.now

    def start(self, output: Path, *, capture_range: str | None = None, timeout: float = 60) -> None:
        assert timeout > 0
        self.started.append((output.name, capture_range))
        if self.now == "":
            raise NsysSessionError("there is no nsys session 's'")
        self.output = output if self.windows else self.first
        self.now = "StartRange" if capture_range and self.windows else "Collection"

    def write(self) -> Path:
        assert self.output is not None
        self.output.parent.mkdir(parents=True, exist_ok=True)
        self.output.write_text("report")
        self.windows += 1
        return self.output

    def stop(self, *, timeout: float, progress: Any = None) -> Path:
        if self.fails_to_stop:
            raise self.fails_to_stop
        self.now = "Launched"
        return self.write()

    def size(self, report: Path) -> int:
        return NsysSession.size(self, report)  # type: ignore[arg-type]

    def fetch(self, file: Path, timeout: float) -> Path:
        assert timeout > 0
        return file


@pytest.fixture
def session(server, tmp_path, monkeypatch):
    made = FakeSession(tmp_path)
    server.nsys = made
    server.pids = {11: Rank(tp=0), 12: Rank(tp=1)}

    def export(tool, report, kind, target, timeout):
        assert report.is_file()
        assert kind == "sqlite"
        target.write_text("tables")
        return target

    monkeypatch.setattr(nsys, "export", export)
    monkeypatch.setattr(nsys, "POLL", 0.01)
    monkeypatch.setattr(nsys, "LAST_WORDS", 0.5)
    return made


def names(capture):
    return [(artifact.kind, artifact.path.name) for artifact in capture.artifacts]


def test_windows_again_and_again_each_with_report_and_export(session, server, new_window):
    for number in (1, 2, 3):
        with new_window(f"w{number}", backend="nsys", duration=0.01) as opened:
            assert server.announced[-1] == "nsys"
            opened.wait()
        capture = opened.close()
        assert capture.state == "complete"
        assert names(capture) == [
            ("nsys-rep", f"w{number}.nsys-rep"),
            ("sqlite", f"w{number}.sqlite"),
        ]
        assert all(artifact.path.parent == opened.folder for artifact in capture.artifacts)
        assert capture.pid_ranks == {11: "TP0", 12: "TP1"}
        assert capture.expected_ranks == ("TP0", "TP1")
        assert capture.gpu_ranks == {}
        beside = ranks_beside(opened.folder / f"w{number}.sqlite")
        assert beside.pid_ranks == capture.pid_ranks
    assert not session.first.exists(), "the first report was moved from where it went"


def test_without_steps_or_duration_it_waits_five_seconds(session, new_window, monkeypatch):
    assert BACKENDS["nsys"].default_seconds == 5.0
    opened = new_window(backend="nsys")
    assert opened._duration() == 5.0
    opened.open()
    capture = opened.close()
    assert capture.state == "complete", "by hand it closes at once"


def test_devices_map_to_ranks_on_gpu_servers(session, server, new_window):
    server.sizes = ServerSizes(tp=2)
    with new_window(backend="nsys") as opened:
        pass
    assert opened.close().gpu_ranks == {0: "TP0", 1: "TP1"}
    server.spec = ServerSpec(env=(("SGLANG_ONE_VISIBLE_DEVICE_PER_PROCESS", "1"),))
    with new_window(backend="nsys") as opened:
        pass
    assert opened.close().gpu_ranks == {}, "there every rank calls its device 0"


def test_unknown_pids_are_told(session, server, new_window):
    server.pids = {11: Rank(tp=0)}
    with new_window(backend="nsys") as opened:
        pass
    assert "the pids of 1 of 2 ranks" in opened.close().notes[-1]


def test_a_server_without_nsys_is_refused_with_both_ways_out(new_window):
    with pytest.raises(WindowRefused) as error:
        new_window(backend="nsys").open()
    assert "sglang_server(nsys=True)" in error.value.hint
    assert "--sglprof-nsys-session" in error.value.hint


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"profile_by_stage": True}, "profile_by_stage"),
        ({"merge_profiles": True}, "merge_profiles"),
        ({"start_step": 4}, "start_step"),
        ({"activities": ("CPU",)}, "activities"),
        ({"num_steps": 0}, "num_steps=0"),
        ({"num_steps": 5}, "on a CPU server"),
    ],
)
def test_options_that_nsys_windows_do_not_have(session, new_window, options, told):
    with pytest.raises(WindowRefused, match=told):
        new_window(backend="nsys", **options).open()


def test_a_leftover_window_is_ended_first(session, new_window):
    session.now, session.output = "Collection", session.first
    with new_window(backend="nsys") as opened:
        pass
    assert opened.close().state == "complete"
    assert "ended first" in opened.close().notes[0]


def test_a_gone_session_is_an_error_in_opening(session, server, new_window):
    session.now = ""
    with pytest.raises(NsysSessionError):
        new_window(backend="nsys").open()
    assert server.announced[-1] is None
    assert not server.lock.locked()


def test_a_stop_that_fails_is_reported_in_nsyss_words_and_left_to_the_teardown(
    session, server, new_window
):
    session.fails_to_stop = NsysError("only a .qdstrm was written", log=("Importer error status",))
    with new_window(backend="nsys") as opened:
        pass
    capture = opened.close()
    assert (capture.state, capture.log) == ("failed", ("Importer error status",))
    assert ".qdstrm" in capture.reason
    assert server.announced == ["nsys"]
    session.fails_to_stop = None
    with new_window(backend="nsys") as later:
        pass
    assert later.close().state == "complete"


def test_a_failed_export_keeps_the_report(session, new_window, monkeypatch):
    def fail(*args):
        raise NsysError("broken importer")

    monkeypatch.setattr(nsys, "export", fail)
    with new_window(backend="nsys") as opened:
        pass
    capture = opened.close()
    assert capture.state == "incomplete"
    assert "broken importer" in capture.reason
    assert [artifact.kind for artifact in capture.artifacts] == ["nsys-rep"]


def test_the_report_of_a_server_that_died_is_kept(session, server, new_window):
    opened = new_window(backend="nsys", duration=30)
    opened.open()

    def die():
        session.now = ""
        session.write()
        server.died = ServerDied("ended with -9", log=("why",))

    threading.Timer(0.1, die).start()
    opened.wait()
    capture = opened.close()
    assert (capture.state, capture.reason, capture.log) == ("failed", "ended with -9", ("why",))
    assert [kind for kind, _ in names(capture)] == ["nsys-rep", "sqlite"]


def test_a_death_without_a_report(session, server, new_window):
    opened = new_window(backend="nsys", duration=30)
    opened.open()
    server.died = ServerDied("gone")
    session.now = ""
    start = time.monotonic()
    opened.wait()
    capture = opened.close()
    assert time.monotonic() - start < 3
    assert (capture.state, capture.artifacts) == ("failed", ())


def test_a_death_while_stopping(session, server, new_window):
    opened = new_window(backend="nsys", duration=0.01)
    opened.open()
    opened.wait()

    class Dying(NsysSessionError):
        pass

    session.fails_to_stop = Dying("There are no active sessions.")
    real = session.stop

    def stop(**options):
        server.died = ServerDied("killed")
        return real(**options)

    session.stop = stop
    capture = opened.close()
    assert (capture.state, capture.reason) == ("failed", "killed")


def test_errors_of_the_importer_are_told_with_the_window(session, new_window):
    session.remarks = ("Importation succeeded with non-fatal errors.", "Status: TargetFailed")
    with new_window(backend="nsys") as opened:
        pass
    capture = opened.close()
    assert capture.state == "complete"
    assert "non-fatal errors.; Status: TargetFailed" in capture.notes[0]


def test_discard_ends_the_window_without_a_report(session, server, new_window):
    opened = new_window(backend="nsys")
    opened.open()
    opened.discard()
    assert session.now == "Launched"
    assert not list(opened.folder.glob("*")) or not opened.folder.exists()
    assert server.announced[-1] is None


class TestBySteps:
    """As far as a machine without a GPU can go: the commands and the requests."""

    @pytest.fixture(autouse=True)
    def _gpu(self, server, http, session):
        server.sizes = http.sizes = ServerSizes(tp=2, version="0.5.23")

    def test_the_range_is_asked_for_after_one_burnt_window(self, session, http, new_window):
        def end(body):
            session.now = "Launched"
            session.write()

        http.on_start = end
        http.steps_end = False
        with new_window("steps", backend="nsys", num_steps=7) as opened:
            opened.wait()
        capture = opened.close()
        assert session.started == [
            ("burnt.nsys-rep", None),
            ("steps.nsys-rep", "cudaProfilerApi"),
        ]
        assert http.bodies() == [{"activities": ["CUDA_PROFILER"], "num_steps": 7}]
        assert capture.state == "complete"
        assert not session.first.exists(), "the burnt report is dropped"
        with new_window("again", backend="nsys", num_steps=7) as opened:
            opened.wait()
        assert session.started[2:] == [("again.nsys-rep", "cudaProfilerApi")]

    def test_steps_that_never_come_are_stopped_and_told(self, session, http, new_window):
        http.steps_end = False
        with new_window("idle", backend="nsys", num_steps=7, timeout=0.3) as opened:
            opened.wait()
        capture = opened.close()
        assert capture.state == "incomplete"
        assert "its 7 steps were not over" in capture.reason
        assert session.now == "Launched"

    def test_a_report_that_does_not_come_is_told(self, session, http, new_window, monkeypatch):
        def end(body):
            session.now = "Launched"

        http.on_start = end
        http.steps_end = False
        with new_window("lost", backend="nsys", num_steps=7, timeout=0.5) as opened:
            opened.wait()
        assert opened.close().state == "failed"
        assert "is not there" in opened.close().reason

    @pytest.mark.parametrize("state", ["RangeGeneration", "SomethingNew"])
    def test_a_range_that_waits_for_a_stop_is_stopped(self, session, http, new_window, state):
        def end(body):
            session.now = state

        http.on_start = end
        http.steps_end = False
        with new_window("waits", backend="nsys", num_steps=7, timeout=20) as opened:
            opened.wait()
        capture = opened.close()
        assert (capture.state, session.now) == ("complete", "Launched")

    def test_a_refused_start_ends_the_session_s_window(self, session, http, new_window):
        http.start_status = 500
        with pytest.raises(WindowError, match="refused to count"):
            new_window(backend="nsys", num_steps=7).open()
        assert session.now == "Launched"
