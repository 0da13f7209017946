"""A log that grows, is rotated, is cut short, or is not there yet."""

from __future__ import annotations

from pathlib import Path

import pytest

from pytest_sglprof._errors import SglprofError
from pytest_sglprof._load.sources import BLOCK, LogFollower, read_log


def line(number: int) -> str:
    return (
        f"[2026-11-24 03:13:{number % 60:02d} DP0] Decode batch, #running-req: {number}, "
        "#token: 70, token usage: 0.00, gen throughput (token/s): 0.19, #queue-req: 0\n"
    )


def running(log: LogFollower) -> list[int]:
    return [sample.running for sample in log.poll()]  # type: ignore[union-attr]  # only batch lines


def test_only_whole_lines_are_read_each_once(tmp_path: Path) -> None:
    path = tmp_path / "server.log"
    with LogFollower(path) as log:
        assert running(log) == []
        path.write_text(line(1) + line(2)[:40])
        assert running(log) == [1]
        with path.open("a") as stream:
            stream.write(line(2)[40:])
        assert running(log) == [2]
        assert running(log) == []


def test_a_rotated_log_loses_no_line(tmp_path: Path) -> None:
    path = tmp_path / "server.log"
    path.write_text(line(1))
    with LogFollower(path) as log, path.open("a") as writer:
        assert running(log) == [1]
        path.rename(tmp_path / "server.log.1")
        writer.write(line(2))
        writer.flush()
        assert running(log) == [2]
        path.write_text(line(4))
        writer.write(line(3))
        writer.flush()
        assert running(log) == [3, 4]


def test_a_log_that_is_cut_is_read_from_its_start(tmp_path: Path) -> None:
    path = tmp_path / "server.log"
    path.write_text(line(1) + line(2))
    with LogFollower(path) as log:
        assert running(log) == [1, 2]
        path.write_text(line(3))
        assert running(log) == [3]


def test_from_the_end_only_what_comes_counts(tmp_path: Path) -> None:
    path = tmp_path / "server.log"
    path.write_text(line(1))
    with LogFollower(path, from_end=True) as log:
        with path.open("a") as stream:
            stream.write(line(2))
        assert running(log) == [2]
    with LogFollower(tmp_path / "later.log", from_end=True) as log:
        log.path.write_text(line(3))
        assert running(log) == [3]


def test_a_large_log_is_read_in_blocks(tmp_path: Path) -> None:
    path = tmp_path / "server.log"
    count = 3 * BLOCK // len(line(1))
    path.write_text("".join(line(number) for number in range(count)))
    assert [s.running for s in read_log(path)] == list(range(count))  # type: ignore[union-attr]  # as above


def test_a_last_line_without_an_end_counts_in_a_finished_log(tmp_path: Path) -> None:
    path = tmp_path / "server.log"
    path.write_text(line(1) + line(2).rstrip("\n"))
    assert len(read_log(path)) == 2


def test_a_folder_is_no_log(tmp_path: Path) -> None:
    with pytest.raises(SglprofError, match="cannot be read"):
        read_log(tmp_path)
