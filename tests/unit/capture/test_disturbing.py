"""Every window tells the watch of its test that it disturbs the load, however it ends."""

from __future__ import annotations

import math

import pytest

from pytest_sglprof._errors import WindowError
from pytest_sglprof._load.watcher import LoadWatch


@pytest.fixture
def watch() -> LoadWatch:
    return LoadWatch([])


def test_a_window_by_hand_disturbs_the_load_until_its_files_are_there(
    new_window, http, watch: LoadWatch
) -> None:
    http.stop_hangs = 0.5
    window = new_window(duration=60.0)
    window.watch = watch
    window.open()
    (during,) = watch.disturbances.windows
    assert math.isinf(during.until)
    assert during.opened <= window.close().opened
    (after,) = watch.disturbances.windows
    assert after.closed >= window.capture.opened + 0.5
    assert 0.5 <= after.stopped_s <= after.closed - after.opened
    assert after.until == pytest.approx(after.closed + 2 * after.stopped_s)


def test_of_a_window_that_ended_by_its_steps_the_whole_time_is_taken(
    new_window, watch: LoadWatch
) -> None:
    window = new_window(num_steps=5)
    window.watch = watch
    with window:
        window.wait()
    (disturbance,) = watch.disturbances.windows
    assert disturbance.stopped_s == pytest.approx(disturbance.closed - disturbance.opened)


def test_one_that_does_not_open_or_is_dropped_ends_it_too(
    new_window, http, watch: LoadWatch
) -> None:
    http.start_status = 500
    refused = new_window(num_steps=5)
    refused.watch = watch
    with pytest.raises(WindowError):
        refused.open()
    http.start_status = 200
    dropped = new_window(duration=60.0)
    dropped.watch = watch
    dropped.open()
    dropped.discard()
    assert [math.isfinite(each.closed) for each in watch.disturbances.windows] == [True, True]
