"""Torch windows from opening to closing, against a server that answers as the real one."""

from __future__ import annotations

import threading
import time

import pytest

from pytest_sglprof._errors import LeaseError, ServerDied, WindowError
from pytest_sglprof._run import window


def test_a_step_window_ends_by_itself_and_its_files_are_collected(server, http, new_window):
    opened = new_window(num_steps=5)
    opened.open()
    assert server.announced == ["torch"]
    opened.wait()
    capture = opened.close()
    assert (capture.state, capture.reason, capture.missing_ranks) == ("complete", "", ())
    assert [(a.kind, a.rank) for a in capture.artifacts] == [("torch", "TP0"), ("torch", "TP1")]
    assert all(a.path.is_file() and a.path.parent == opened.folder for a in capture.artifacts)
    assert capture.expected_ranks == ("TP0", "TP1")
    assert capture.opened <= capture.closed
    assert len(http.bodies("/stop_profile")) == 1, "a stop, whose 500 is ignored, ends each window"
    assert server.announced == ["torch", None]
    assert not list(server.trace_root.iterdir())
    assert opened.close() is capture


def test_the_request_holds_what_was_asked_and_a_safe_id(http, new_window):
    opened = new_window("tests/x.py::t[a/b]", num_steps=5, profile_prefix="my/prefix")
    opened.open()
    opened.close()
    body = http.bodies()[0]
    assert "/" not in body["profile_id"] + body["profile_prefix"]
    assert body["activities"] == ["CPU"]
    assert body["num_steps"] == 5
    assert (body["with_stack"], body["record_shapes"]) == (False, False)
    assert body["detailed_annotations"] is True
    assert "start_step" not in body
    assert "profile_by_stage" not in body


def test_by_hand_open_until_closed(http, new_window):
    with new_window() as opened:
        assert http.current is not None
        assert "num_steps" not in http.bodies()[0]
        with pytest.raises(WindowError, match="neither num_steps nor duration"):
            opened.wait()
    assert http.current is None
    assert opened.close().state == "complete"


def test_duration_closes_after_so_long_and_delay_waits_before(http, new_window):
    opened = new_window(delay=0.2, duration=0.3)
    start = time.monotonic()
    opened.open()
    assert time.monotonic() - start >= 0.2
    assert len(http.bodies()) == 1
    opened.wait()
    assert time.monotonic() - start >= 0.5
    assert opened.close().state == "complete"


def test_an_idle_server_is_incomplete_with_that_reason(http, new_window):
    http.steps_end, http.running = False, 0
    opened = new_window(num_steps=5, timeout=0.3)
    opened.open()
    opened.wait()
    capture = opened.close()
    assert capture.state == "incomplete"
    assert "no forward pass was run" in capture.reason
    assert "its 5 steps were not over within" in capture.reason
    assert http.current is None, "stopped, so that it cannot fire later"


def test_a_busy_server_that_is_too_slow_is_not_called_idle(http, new_window):
    http.steps_end = False
    opened = new_window(num_steps=5, timeout=0.3)
    opened.open()
    http.entry("TP0", "Decode batch, #running-req: 4")
    opened.wait()
    reason = opened.close().reason
    assert reason.startswith("its 5 steps were not over within")


def test_closed_before_its_steps_were_over(http, new_window):
    http.steps_end = False
    with new_window(num_steps=500) as opened:
        pass
    assert opened.close().state == "incomplete"
    assert "not over when it closed" in opened.close().reason


def test_the_last_files_are_waited_for(http, new_window):
    http.delay_write = 0.1
    with new_window(num_steps=5) as opened:
        pass
    assert opened.close().state == "complete"


def test_a_missing_rank_is_named(http, new_window):
    http.silent_ranks = {"TP1"}
    with new_window() as opened:
        pass
    capture = opened.close()
    assert capture.state == "incomplete"
    assert capture.missing_ranks == ("TP1",)
    assert "no complete trace of TP1" in capture.reason
    assert "TP1 began but never reported 'Profiling done'" in capture.reason


def test_a_cut_file_is_named_kept_and_no_artifact(http, new_window):
    http.cut_ranks = {"TP0"}
    with new_window() as opened:
        pass
    capture = opened.close()
    assert capture.missing_ranks == ("TP0",)
    assert "cut off: " in capture.reason
    assert [a.rank for a in capture.artifacts] == ["TP1"]
    kept = sorted(path.suffix for path in opened.folder.iterdir())
    assert kept == [".gz", ".gz", ".json"]  # two traces and the settings


def test_no_file_at_all_is_a_failure(http, new_window):
    http.silent_ranks = {"TP0", "TP1"}
    with new_window() as opened:
        pass
    assert opened.close().state == "failed"


def test_death_in_the_window_ends_the_wait_at_once(server, http, new_window):
    http.steps_end = False
    opened = new_window(num_steps=5, timeout=30)
    opened.open()

    def die() -> None:
        http.log(
            'Traceback (most recent call last):\n  File "x.py", line 1, in y\nValueError: bang'
        )
        server.died = ServerDied("the server ended with status -9")

    threading.Timer(0.2, die).start()
    start = time.monotonic()
    opened.wait()
    capture = opened.close()
    assert time.monotonic() - start < 3
    assert capture.state == "failed"
    assert "status -9" in capture.reason
    assert capture.log[-1] == "ValueError: bang"
    assert server.announced[-1] is None


def test_a_crashed_scheduler_counts_as_death_while_its_server_lingers(http, new_window):
    http.stop_hangs = 20.0

    def crash() -> None:
        http.entry("TP1", "Scheduler hit an exception: Traceback (most recent call last):")
        http.log('  File "y.py", line 2, in z\nOSError: no room')

    http.on_stop = crash
    opened = new_window(timeout=30)
    opened.open()
    start = time.monotonic()
    capture = opened.close()
    assert time.monotonic() - start < 3, "the hanging request was not waited for"
    assert capture.state == "failed"
    assert "crashed" in capture.reason
    assert capture.log[-1] == "OSError: no room"


def test_a_hanging_stop_is_bounded_reported_and_left_to_the_teardown(
    server, http, new_window, monkeypatch
):
    monkeypatch.setattr(window, "CLOSE_SECONDS", 0.5)
    http.stop_hangs = 5.0
    opened = new_window(timeout=1.0)
    opened.open()
    start = time.monotonic()
    capture = opened.close()
    assert time.monotonic() - start < 4
    assert capture.state == "failed"
    assert "did not answer within" in capture.reason
    assert server.announced == ["torch"], "the teardown must still stop it"
    http.stop_hangs = 0.0
    with new_window(num_steps=3) as later:
        later.wait()
    assert later.close().state == "complete"
    assert "ended first" in later.close().notes[0]


def test_a_refused_start_tells_the_logs_own_reason(server, http, new_window):
    http.start_status = 500
    opened = new_window()
    with pytest.raises(WindowError, match="refused to start") as error:
        opened.open()
    assert error.value.log == (
        "RuntimeError: Profiling is already in progress. Call /stop_profile first.",
    )
    assert opened.state == "closed"
    assert (opened.close().state, opened.close().log) == ("failed", error.value.log)
    assert opened.close().reason.startswith("it did not open: the server refused")
    assert server.announced[-1] is None
    http.start_status = 200
    with new_window(num_steps=2) as later:
        later.wait()
    assert later.close().state == "complete"


def test_a_dead_server_is_not_profiled(server, http, new_window):
    server.died = ServerDied("gone", log=("why",))
    with pytest.raises(ServerDied, match="gone"):
        new_window().open()
    assert http.bodies() == []


def test_one_window_of_a_server_at_a_time(new_window):
    with new_window():
        second = new_window()
        with pytest.raises(LeaseError):
            second.open()
    second.open()
    second.close()


def test_an_interrupt_inside_leaves_the_window_closed(server, http, new_window):
    with pytest.raises(KeyboardInterrupt), new_window():
        raise KeyboardInterrupt
    assert http.current is None
    assert server.announced[-1] is None
    assert not server.lock.locked()


def test_an_interrupt_while_opening_stops_the_profile(server, http, new_window, monkeypatch):
    real = server.client.start_profile

    def interrupted(body, timeout):
        real(body, timeout)
        raise KeyboardInterrupt

    monkeypatch.setattr(server.client, "start_profile", interrupted)
    with pytest.raises(KeyboardInterrupt):
        new_window().open()
    assert http.current is None
    assert not server.lock.locked()
    assert not list(server.trace_root.iterdir())


def test_discard_stops_and_leaves_nothing(server, http, new_window):
    opened = new_window()
    opened.open()
    opened.discard()
    opened.discard()
    assert http.current is None
    assert not opened.folder.exists()
    assert not list(server.trace_root.iterdir())
    assert opened.state == "closed"
    fresh = new_window()
    fresh.discard()
    assert fresh.state == "closed"


def test_a_window_is_opened_once_and_closed_only_when_open(new_window):
    with pytest.raises(WindowError, match="never open"):
        new_window().close()
    opened = new_window()
    opened.open()
    opened.close()
    with pytest.raises(WindowError, match="closed already"):
        opened.open()
    opened.wait()


def test_wait_ends_when_it_is_told_to(http, new_window):
    http.steps_end = False
    stop = threading.Event()
    opened = new_window(num_steps=5)
    opened.open()
    threading.Timer(0.1, stop.set).start()
    start = time.monotonic()
    opened.wait(stop)
    assert time.monotonic() - start < 2
    opened.close()
