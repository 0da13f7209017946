"""Logs of servers that live all night: little is read, little is held, nothing twice."""

from __future__ import annotations

import os
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pytest_sglprof._capture.torch import STEP_BYTES, ProgressReader, last_step, refusal_reason
from pytest_sglprof._redact import learn
from pytest_sglprof._server.log import LONGEST_LINE, PIECE, REASON_BYTES, LogGrowth, ServerLog
from pytest_sglprof._server.log_lines import read_log_facts

GB = 2**30
CRASH = """\
[2026-11-24 03:28:27 TP1] Scheduler hit an exception: Traceback (most recent call last):
  File "/sglang/scheduler.py", line 7, in run
    raise ValueError("broken")
ValueError: broken
[2026-11-24 03:28:27] SIGQUIT received. signum=None
"""


def decode(step: int, rank: str = "TP0") -> str:
    return f"[2026-11-24 03:13:05 {rank}] Decode batch [{step}], #running-req: 3, #token: 70\n"


def begins(rank: str, profile_id: str = "mine") -> str:
    return f"[2026-11-24 03:13:05 {rank}] Profiling starts. (with profile id: {profile_id})\n"


@pytest.fixture
def log(tmp_path: Path) -> ServerLog:
    return ServerLog(tmp_path / "server.log")


def append(log: ServerLog, text: str) -> None:
    with log.path.open("a") as stream:
        stream.write(text)


def bytes_read() -> int:
    text = Path("/proc/self/io").read_text()
    return int(next(line.split()[1] for line in text.splitlines() if line.startswith("rchar")))


def cost(action: Callable[[], Any]) -> tuple[Any, int, int, float]:
    """What it returns, the bytes that it read, its peak of memory, and its seconds."""
    before, began = bytes_read(), time.monotonic()
    tracemalloc.start()
    try:
        answer = action()
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    return answer, bytes_read() - before, peak, time.monotonic() - began


def test_fault_17_a_log_of_3_gb_is_looked_at_from_its_end(log: ServerLog) -> None:
    log.path.write_text(decode(1))
    os.truncate(log.path, 3 * GB)
    append(log, "\n" + decode(8_000) + decode(7_999, "TP1") + CRASH)
    for action, answer in (
        (log.reason, "ValueError: broken"),
        (log.last_line, "[2026-11-24 03:28:27] SIGQUIT received. signum=None"),
        (lambda: last_step(log), 8_000),
    ):
        told, read, peak, seconds = cost(action)
        assert answer in (told, *(told if isinstance(told, tuple) else ()))
        assert read < 2 * STEP_BYTES
        assert peak < 64 * 2**20
        assert seconds < 3.0  # tracing memory makes it slow


def test_fault_17_steps_are_read_once(log: ServerLog) -> None:
    log.path.write_text(decode(900, "DP0") + "x" * 100 + "\n" + decode(20, "DP1"))
    assert last_step(log) == 900
    os.truncate(log.path, GB)
    append(log, "\n" + decode(30, "DP1"))
    assert last_step(log) == 900  # known, though it stands a gigabyte before
    append(log, decode(31, "DP1") + decode(2_000)[:-1])
    highest, read, _, _ = cost(lambda: last_step(log))
    assert highest == 900  # the last line has no end yet
    assert read < 100_000
    append(log, "\n")
    assert last_step(log) == 2_000
    other = ServerLog(log.path)
    assert last_step(other) == 2_000


def test_fault_17_a_windows_progress_is_read_once(log: ServerLog) -> None:
    log.path.write_text("".join(decode(step) for step in range(50_000)))
    start = log.position()
    window = ProgressReader(log, start, "mine")
    append(log, begins("TP0") + begins("TP1") + begins("TP1", "another") * 2)
    assert window.read().pending() == [(0, 0, 0), (0, 0, 1)]
    append(log, "".join(decode(step) for step in range(50_000)))
    assert window.read().batches == 50_000
    append(log, "[2026-11-24 03:13:05 TP0] Profiling done\n[2026-11-24 03:13:05 TP1] Profi")
    progress, read, peak, _ = cost(window.read)
    assert progress.pending() == [(0, 0, 1)]
    assert progress.strangers == ("another",)
    assert read < 50_000
    assert peak < 2 * PIECE
    append(log, "ling done\n")
    assert window.read().pending() == []
    assert progress.pending() == [(0, 0, 1)]  # what was told before stays as it was


@pytest.mark.parametrize("how", ["cut short", "replaced", "renamed and begun anew"])
def test_fault_17_a_log_that_is_rotated_is_read_from_its_start(log: ServerLog, how: str) -> None:
    log.path.write_text(begins("TP0", "another") + decode(500) * 3)
    window = ProgressReader(log, 0, "mine")
    assert window.read().batches == 3
    assert last_step(log) == 500
    offset = log.position()
    if how == "cut short":
        os.truncate(log.path, 0)
    elif how == "replaced":
        fresh = log.path.with_name("fresh")
        # Longer than the old one, so that its size does not tell.
        fresh.write_text("y" * (offset + 10) + "\n")
        fresh.replace(log.path)
    else:
        log.path.rename(log.path.with_name("server.log.1"))
        assert window.read().batches == 3
    append(log, begins("TP0") + decode(501))
    progress = window.read()
    assert progress.begun == {(0, 0, 0): 1}
    assert progress.batches == 4
    assert last_step(log) == 501
    if how != "replaced":
        assert log.read(offset)[0] == [begins("TP0")[:-1], decode(501)[:-1]]
        append(log, CRASH)
        assert "ValueError: broken" in log.reason(10**6)


def test_fault_17_lines_are_held_by_the_piece_only(log: ServerLog) -> None:
    peaks = []
    for count in (12_000, 36_000):
        log.path.write_text("".join(decode(step) for step in range(count)) + "ValueError: x\n")
        answer, read, peak, _ = cost(lambda: refusal_reason(log, 0))
        assert answer == ("ValueError: x",)
        assert read >= log.position()
        facts, _, peak_of_facts, _ = cost(lambda: read_log_facts(log.each(), 0.0))
        assert facts.accepted == ()
        peaks.append((peak, peak_of_facts))
    assert all(large < 1.5 * small for small, large in zip(*peaks, strict=True))


@pytest.mark.parametrize("size", [0, 1, PIECE - 1, PIECE, PIECE + 1, 3 * PIECE + 7])
def test_fault_17_pieces_lose_no_line_and_give_none_twice(log: ServerLog, size: int) -> None:
    lines = [f"{number}:{'x' * (number % 300)}" for number in range(size // 160)]
    log.path.write_text("".join(f"{line}\n" for line in lines) + "unfinished")
    growth = LogGrowth(log.path)
    assert list(log.new(growth)) == lines
    assert list(log.new(growth)) == []
    append(log, " no more\n")
    assert list(log.new(growth)) == ["unfinished no more"]
    assert growth.offset == log.position()


def test_fault_17_a_line_without_an_end_costs_no_memory(log: ServerLog) -> None:
    log.path.write_text("first\n")
    os.truncate(log.path, 200 * 2**20)
    append(log, "tail\nlast\n")
    lines, _, peak, _ = cost(lambda: [line[-4:] for line in log.each()])
    assert lines[0] == "irst"
    assert lines[-1] == "last"
    assert peak < 16 * LONGEST_LINE


@pytest.mark.usefixtures("secrets_end_here")
def test_fault_17_half_a_secret_is_not_shown(tmp_path: Path) -> None:
    secret = "k" * 4_000
    learn([secret])
    log = ServerLog(tmp_path / "server.log")
    for count in (REASON_BYTES, 65_536):
        end = (
            "\n" + ("[2026-11-24 03:28:27] it ends here\n" * (count // 35))[: count - 2_001] + "\n"
        )
        log.path.write_text(f"before {secret}{end}")
        assert log.position() > count
        assert "kkkk" not in log.last_line()
        assert "kkkk" not in " ".join(log.reason(limit=10**6))
    log.path.write_text("Loading 1%\r" * 10_000 + "Loading 99%")
    assert log.last_line() == "Loading 99%"
    log.path.write_text(secret * 40)
    assert "k" not in log.last_line()
