"""Logs of any size: what is held of them is the same, and nobody waits for their end."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import io
import json
import sys
import threading
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pytest_sglprof._cli.main import main
from pytest_sglprof._load.change_points import LoadOutline, finished_load
from pytest_sglprof._load.onset import OnsetRule
from pytest_sglprof._load.samples import BalanceSample, LoadSample
from pytest_sglprof._load.sources import BLOCK, MOST_RANKS, FinishedLog, LineReader, read_log
from pytest_sglprof._load.watcher import LOG_INTERVAL, LoadWatch, LogSource

BEGIN = 1_795_490_000.0


def line(moment: float, rank: int | None, running: int) -> str:
    stamp = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(moment))
    tag = "" if rank is None else f" DP{rank}"
    return (
        f"[{stamp}.{int(moment * 1000) % 1000:03d}{tag}] Decode batch, #running-req: {running}, "
        f"#token: {running * 50}, token usage: 0.10, cuda graph: True, "
        "gen throughput (token/s): 512.00, #queue-req: 0\n"
    )


def write(path: Path, lines: int, *, unequal: tuple[float, float] = (0.4, 0.6)) -> Path:
    """A log of two ranks, unequal in a part of it; the same time, however many lines."""
    with path.open("w") as stream:
        for number in range(lines // 2):
            part = 2 * number / lines
            loads = (34, 6) if unequal[0] <= part < unequal[1] else (20, 20)
            for rank in (0, 1):
                stream.write(line(BEGIN + 600 * part, rank, loads[rank]))
    return path


def peak_of(action: Callable[[], Any]) -> tuple[Any, int]:
    gc.collect()
    tracemalloc.start()
    try:
        answer = action()
        return answer, tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def run(*words: str) -> tuple[int, str]:
    with contextlib.redirect_stdout(io.StringIO()) as out:
        return main(["watch", "--check", *words]), out.getvalue()


def test_fault_10_a_finished_log_is_not_held(tmp_path: Path) -> None:
    small, large = (write(tmp_path / f"{count}.log", count) for count in (5_000, 15_000))
    run(str(small))  # imports
    peaks = []
    for path in (small, large):
        (status, shown), peak = peak_of(lambda path=path: run(str(path)))
        assert status == 1
        assert shown.count("onset ") == 1
        assert "DP0 has 34 running requests" in shown
        peaks.append(peak)
    assert large.stat().st_size >= 3 * small.stat().st_size
    assert peaks[1] < 1.3 * peaks[0]


def test_fault_10_json_lines_are_written_as_they_are_read(tmp_path: Path) -> None:
    path = write(tmp_path / "server.log", 3_000)
    status, _ = run(str(path), "--jsonl", str(tmp_path / "out.jsonl"))
    rows = [json.loads(text) for text in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert status == 1
    assert len([row for row in rows if "event" not in row]) == 3_000
    assert rows[-1]["event"] == "onset"


def test_fault_10_a_list_and_a_log_that_is_read_anew_give_the_same(tmp_path: Path) -> None:
    log = FinishedLog(write(tmp_path / "server.log", 4_000))
    samples = [sample for sample in read_log(log.path) if isinstance(sample, LoadSample)]
    again = (s for block in log for s in block if isinstance(s, LoadSample))
    of_list = finished_load(samples, OnsetRule(), milliseconds=True)
    assert of_list == finished_load(
        again, OnsetRule(), milliseconds=True, outline=LoadOutline(samples)
    )
    assert len(of_list.onsets) == 1
    assert of_list.span == (samples[0].time, samples[-1].time)
    assert log.has_milliseconds


def test_fault_10_the_order_of_the_lines_does_not_matter_for_the_figures() -> None:
    samples = [
        LoadSample(BEGIN + at / 2, f"DP{rank}", 34 if rank == 0 and at > 200 else 12, 0, None)
        for at in range(400)
        for rank in (0, 1)
    ]
    glued = list(samples)
    for at in range(20, 780, 50):  # some entries come late
        glued[at], glued[at + 1] = glued[at + 1], glued[at]
    assert finished_load(samples, OnsetRule()).onsets == finished_load(glued, OnsetRule()).onsets


def test_fault_10_only_balances_stand_in_a_log(tmp_path: Path) -> None:
    path = tmp_path / "server.log"
    text = "[Expert Balancedness] forward_pass_id={} current_pass_balancedness=0.300\n"
    batches = [line(BEGIN + at, None, 30) for at in range(40)]
    path.write_text(
        "".join(b + b.partition("]")[0] + "] " + text.format(at) for at, b in enumerate(batches))
    )
    status, shown = run(str(path))
    assert status == 1
    assert "the fullest has 3.33x the mean" in shown


def test_fault_10_samples_are_small() -> None:
    samples = LineReader().read(line(BEGIN + at, at % 2, 20) for at in range(2_000))
    assert not hasattr(samples[0], "__dict__")
    assert not hasattr(BalanceSample(0.0, "", "experts", 1.0), "__dict__")
    assert len({id(sample.rank) for sample in samples}) == 2
    assert sys.getsizeof(samples[0]) < 150


def test_fault_10_a_rank_that_cannot_be_costs_nothing() -> None:
    samples = LineReader().read([line(BEGIN, 10**12, 3), line(BEGIN, MOST_RANKS - 1, 3)])
    assert [sample.rank for sample in samples] == ["", f"DP{MOST_RANKS - 1}"]


def test_fault_10_a_long_log_is_followed_in_pieces(tmp_path: Path) -> None:
    path = write(tmp_path / "server.log", 20_000)

    async def follow() -> tuple[list[int], list[float]]:
        source = LogSource(path, from_end=False)
        sizes, delays = [], []
        while not delays or not delays[-1]:
            sizes.append(len(await source.poll()))
            delays.append(source.delay)
        with path.open("a") as stream:
            stream.write(line(BEGIN + 700, 0, 5))
        assert [s.running for s in await source.poll()] == [5]
        assert source.delay == LOG_INTERVAL
        assert await source.poll() == []
        await source.close()
        return sizes, delays

    sizes, delays = asyncio.run(follow())
    assert sum(sizes) == 20_000
    assert max(sizes) <= 2 * BLOCK // len(line(BEGIN, 1, 6)) + 2
    assert delays == [0.0] * (len(delays) - 1) + [LOG_INTERVAL]
    assert len(delays) > 5


def test_fault_10_other_sources_are_asked_while_a_long_log_is_read(tmp_path: Path) -> None:
    path = write(tmp_path / "server.log", 60_000)
    asked: list[float] = []
    read = threading.Event()
    count = 0

    class Clock:
        delay = 0.0

        async def poll(self) -> list[Any]:
            asked.append(time.monotonic())
            return []

        async def close(self) -> None:
            pass

    def take(samples: Any, now: float) -> None:
        nonlocal count
        count += len(samples)
        if count == 60_000:
            read.set()

    log = LogSource(path, from_end=False)
    watch = LoadWatch([log, Clock()], keep=0)
    watch.listen(take)
    with watch:
        assert read.wait(60)
    assert watch.samples == ()
    # As often as the log gave a piece, and not only before and after all of it.
    assert len(asked) >= path.stat().st_size // (2 * BLOCK)


def test_fault_10_following_holds_the_newest_samples_only(tmp_path: Path) -> None:
    path = write(tmp_path / "server.log", 4_000)
    watch = LoadWatch([LogSource(path, from_end=False)], keep=100)
    with watch:
        until = time.monotonic() + 30
        while len(watch.samples) < 100 and time.monotonic() < until:
            time.sleep(0.05)
    newest = read_log(path)[-100:]
    assert list(watch.samples) == newest


@pytest.mark.parametrize("rotated", [False, True])
def test_fault_10_a_log_that_changes_between_two_pieces_loses_nothing(
    tmp_path: Path, rotated: bool
) -> None:
    path = write(tmp_path / "server.log", 12_000)

    async def follow() -> list[int]:
        source = LogSource(path, from_end=False)
        found = [s.running for s in await source.poll()]
        assert source.delay == 0.0
        if rotated:
            path.rename(tmp_path / "server.log.1")
        with path.open("a") as stream:
            stream.write(line(BEGIN + 700, 0, 77))
        for _ in range(20):
            found += [s.running for s in await source.poll()]
        await source.close()
        return found

    found = asyncio.run(follow())
    assert len(found) == 12_001
    assert found[-1] == 77


def test_fault_10_an_old_log_of_one_rank_before_that_of_several_can_be_followed(
    tmp_path: Path,
) -> None:
    path = tmp_path / "server.log"
    with path.open("w") as stream:
        for at in range(6_000):
            stream.write(line(BEGIN + at / 10, None, 20))
        now = time.time()
        for at in range(20):
            stream.write(line(now - 2 + at / 10, at % 2, 20))
    status, shown = run(str(path), "--follow", "--for", "2")
    assert status in (0, 3)
    assert "cannot be known here" not in shown
