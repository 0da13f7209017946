"""Several threads around the end of one window, and what fails in it."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pytest_sglprof._config.load import Settings
from pytest_sglprof._config.model import WindowSpec
from pytest_sglprof._errors import Inconclusive, WindowError
from pytest_sglprof._run import window as window_run
from pytest_sglprof._run.opening import LoadState
from pytest_sglprof._run.window import Window

PATIENCE = 20.0  # s
AT_ONCE = 1.0  # s; what waits for an export takes all of PATIENCE


class Call(threading.Thread):
    """A call in a thread of its own, and its result or error."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        super().__init__(daemon=True)
        self._call = lambda: function(*arguments)
        self.result: Any = None
        self.error: BaseException | None = None
        self.start()

    def run(self) -> None:
        try:
            self.result = self._call()
        except BaseException as error:
            self.error = error

    def is_over(self, within: float = PATIENCE) -> bool:
        self.join(within)
        return not self.is_alive()


class Export:
    """Makes the server's stop, which writes the traces, last until it is let go."""

    def __init__(self, http: Any) -> None:
        self.began, self.may_end = threading.Event(), threading.Event()
        http.on_stop = self._write

    def _write(self) -> None:
        self.began.set()
        self.may_end.wait(PATIENCE)


@pytest.fixture
def export(http):
    slow = Export(http)
    yield slow
    slow.may_end.set()


@pytest.fixture
def window(server, tmp_path: Path) -> Window:
    settings = Settings(tmp_path)
    spec = WindowSpec(timeout=PATIENCE)
    return Window(server, spec, tmp_path / "windows" / "w", settings=settings)


def stops(http: Any) -> int:
    return len(http.bodies("/stop_profile"))


def test_fault_15_while_a_window_is_exported_other_threads_are_answered(window, export, http):
    window.open()
    closing = Call(window.close)
    assert export.began.wait(PATIENCE)
    for question in (
        lambda: window.was_opened,
        lambda: window.verdict,
        lambda: window.capture,
        lambda: window.check("slowdown", 1.1),
        lambda: window.was_checked,
        lambda: window.next(),
    ):
        assert Call(question).is_over(AT_ONCE)
    second = Call(window.close)
    assert not second.is_over(0.3)
    export.may_end.set()
    assert closing.is_over()
    assert second.is_over()
    assert closing.result is second.result is window.capture
    assert stops(http) == 1


def test_fault_15_a_window_that_is_being_exported_is_not_aborted_beside_it(window, export, http):
    window.open()
    closing = Call(window.close)
    assert export.began.wait(PATIENCE)
    discarding = Call(window.discard)
    assert not discarding.is_over(0.3)
    export.may_end.set()
    assert closing.is_over()
    assert discarding.is_over()
    assert closing.error is discarding.error is None
    assert stops(http) == 1
    assert window.capture.artifacts


def test_fault_15_the_window_below_is_exported_once_too(new_window, export, http):
    window = new_window()
    window.open()
    calls = [Call(window.close) for _ in range(4)]
    assert export.began.wait(PATIENCE)
    export.may_end.set()
    assert all(call.is_over() for call in calls)
    assert {call.error for call in calls} == {None}
    assert len({id(call.result) for call in calls}) == 1
    assert stops(http) == 1


def test_fault_15_while_a_window_is_read_it_can_be_closed_again(window, monkeypatch):
    reading, may_end = threading.Event(), threading.Event()
    read_and_judge = window_run.read_and_judge

    def slowly(*arguments: Any) -> Any:
        reading.set()
        may_end.wait(PATIENCE)
        return read_and_judge(*arguments)

    monkeypatch.setattr(window_run, "read_and_judge", slowly)
    window.open()
    window.close()
    asking = [Call(lambda: window.measured) for _ in range(2)]
    assert reading.wait(PATIENCE)
    again = Call(window.close)
    at_once = again.is_over(AT_ONCE)
    may_end.set()
    assert at_once
    assert again.result is window.capture
    assert all(call.is_over() for call in asking)
    assert asking[0].result is asking[1].result


def test_fault_15_checks_of_several_threads_are_all_kept(window):
    window.open()
    window.close()
    limits = [1.0 + n / 100 for n in range(1, 17)]
    calls = [Call(window.check, "slowdown", limit) for limit in limits]
    assert all(call.is_over() for call in calls)
    assert {type(call.error) for call in calls} == {Inconclusive}  # the fake's trace has no kernel
    kept = [j.threshold.limit for j in window.verdict.judgements if j.threshold.origin == "check"]
    assert sorted(kept) == limits


def test_fault_15_a_load_changes_all_at_once_or_not_at_all():
    load = LoadState()
    for change, driven in ((lambda: load.start(4), True), (load.end, False)):
        with load._changed:
            changing = Call(change)
            assert not changing.is_over(0.2)
            assert (load._started, load._ended.is_set()) == (0 if driven else 1, False)
        assert changing.is_over()
        target, ended = load.driven
        assert (bool(target), ended.is_set()) == (driven, not driven)


def test_fault_14_a_window_is_closed_although_its_clocks_cannot_be_read(window, http, server):
    class Broken:
        def stop(self) -> None:
            raise ValueError("the clocks")

    for end in ("close", "discard"):
        window = Window(server, window.spec, window.folder, settings=window._settings)
        window.open()
        window._clocks = Broken()
        with pytest.raises(ValueError, match="the clocks"):
            getattr(window, end)()
        assert http.current is None
        assert not server.lock.locked()


def test_fault_14_a_window_that_cannot_be_described_is_given_back(new_window, server, monkeypatch):
    def planted(*arguments: object) -> None:
        raise ValueError("planted")

    window = new_window()
    window.open()
    monkeypatch.setattr(window, "_describe", planted)
    with pytest.raises(ValueError, match="planted"):
        window.close()
    assert not server.lock.locked()
    with pytest.raises(WindowError, match="never open"):
        window.close()
    server.http.start_status = 500
    other = new_window()
    monkeypatch.setattr(other, "_describe", planted)
    with pytest.raises(ValueError, match="planted"):
        other.open()
    assert not server.lock.locked()
