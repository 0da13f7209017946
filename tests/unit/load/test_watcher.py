"""The watching thread: its samples, its errors, and that it leaves nothing."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from pytest_sglprof._load.samples import LoadSample
from pytest_sglprof._load.sources import Sample
from pytest_sglprof._load.watcher import LoadWatch, LogSource, server_watch
from tests.support.running import standin


class Counting:
    """A source whose samples count up; it breaks at `limit`."""

    delay = 0.005

    def __init__(self, limit: int = 10**9) -> None:
        self.count = 0
        self.limit = limit
        self.closed = 0

    async def poll(self) -> list[Sample]:
        self.count += 1
        if self.count >= self.limit:
            raise ZeroDivisionError("the source's own mistake")
        return [LoadSample(float(self.count), "DP0", self.count, 0)]

    async def close(self) -> None:
        self.closed += 1


def threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name == "sglprof-watch"]


def until(there: Callable[[], object]) -> None:
    deadline = time.monotonic() + 20
    while not there():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def wait_until(watch: LoadWatch, count: int) -> None:
    until(lambda: len(watch.samples) >= count)


def test_samples_are_there_during_and_after() -> None:
    source = Counting()
    with LoadWatch([source]) as watch:
        wait_until(watch, 3)
        assert list(watch.frame["running"][:3]) == [1, 2, 3]
    assert source.closed == 1
    assert threads() == []
    assert len(watch.frame) == len(watch.samples) >= 3
    assert list(watch.frame.columns)[:3] == ["time", "rank", "running"]


def test_it_goes_on_after_it_was_stopped() -> None:
    watch = LoadWatch([Counting()])
    for _ in range(2):
        before = len(watch.samples)
        watch.start()
        wait_until(watch, before + 2)
        watch.stop()
        watch.stop()
    assert threads() == []


def test_an_error_of_a_source_is_raised_once_where_it_is_stopped() -> None:
    source = Counting(limit=3)
    watch = LoadWatch([source, Counting()])
    watch.start()
    until(lambda: not threads())
    with pytest.raises(ZeroDivisionError, match="the source's own mistake"):
        watch.check()
    with pytest.raises(ZeroDivisionError):
        watch.stop()
    watch.stop()
    assert threads() == []


def test_an_error_of_a_listener_ends_it_too() -> None:
    def broken(samples: object, now: float) -> None:
        raise KeyError("listener")

    source = Counting()
    watch = LoadWatch([source])
    watch.listen(broken)
    with pytest.raises(KeyError), watch:
        until(lambda: source.closed)
    assert source.closed == 1
    assert threads() == []


def test_the_blocks_own_error_matters_more() -> None:
    watch = LoadWatch([Counting(limit=1)])
    with pytest.raises(IndexError), watch:
        raise IndexError
    assert threads() == []


def test_a_running_server_is_read_from_both_sources(tmp_path: Path) -> None:
    with standin(tmp_path, "--dp", "2", "--step-ms", "2") as running:
        with server_watch(running.url, log=running.log_file) as watch:
            running.generate(400, routed_dp_rank=1)
            until(lambda: {sample.source for sample in watch.samples} == {"loads", "log"})
            until(lambda: {s.rank for s in watch.samples if s.source == "loads"} > {"DP0"})
        frame = watch.frame
    assert set(frame["source"]) == {"loads", "log"}
    log = frame[frame["source"] == "log"]
    assert set(log["rank"]) == {"DP1"}
    assert set(frame.loc[frame["source"] == "loads", "rank"]) == {"DP0", "DP1"}


def test_a_log_is_read_from_now_on(tmp_path: Path) -> None:
    path = tmp_path / "server.log"
    old = "[2026-11-24 03:13:51 DP0] Decode batch, #running-req: 1, #queue-req: 0\n"
    path.write_text(old)
    looked = threading.Event()
    watch = LoadWatch([LogSource(path)])
    watch.listen(lambda samples, now: looked.set())
    with watch:
        assert looked.wait(20)
        with path.open("a") as stream:
            stream.write(old.replace(": 1", ": 7"))
        wait_until(watch, 1)
    assert [sample.running for sample in watch.samples] == [7]


def test_fault_14_a_source_that_cannot_be_closed_leaves_no_other_one_open() -> None:
    class Stuck(Counting):
        async def close(self) -> None:
            await super().close()
            raise OSError(f"cannot be closed: {self.limit}")

    sources = [Stuck(10**6), Counting(), Stuck(10**7)]
    watch = LoadWatch(sources)
    watch.start()
    wait_until(watch, 3)
    with pytest.raises(OSError, match="cannot be closed"):
        watch.stop()
    assert [source.closed for source in sources] == [1, 1, 1]
    assert threads() == []


class Losing(Counting):
    """Loses each cancellation, as `asyncio.wait_for` may: its answer came at the same moment."""

    async def poll(self) -> list[Sample]:
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.sleep(0.05)
        return await super().poll()


def test_a_source_that_loses_its_cancellation_is_ended_all_the_same() -> None:
    watch = LoadWatch([Losing()])
    watch.start()
    time.sleep(0.07)
    ending = threading.Thread(target=watch.stop, daemon=True)
    ending.start()
    ending.join(10)
    assert not ending.is_alive()
