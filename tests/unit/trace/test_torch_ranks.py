"""Whose a trace is, ranks without activities, and files that are no traces."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from pytest_sglprof._errors import NotATrace, TraceError
from pytest_sglprof._trace.read import read_window
from tests.support.kineto import KERNELS, ROWS, document, event, kernel, rows, write

# Whose it is -------------------------------------------------------------------------------


def test_the_device_is_not_the_rank(tmp_path: Path) -> None:
    path = write(tmp_path, document([kernel("gemm", 1, 2, pid=9)], rank=0), "1-TP-3.trace.json")
    table = read_window(path)
    assert table.ranks == ("TP3",)
    assert "1-TP-3.trace.json: its name says TP3, its distributedInfo rank 0 of 2" in table.notes[0]


@pytest.mark.parametrize(
    ("name", "info", "rank"),
    [
        ("1-TP-1-DP-0-EP-1.trace.json", None, "DP0 TP1 EP1"),
        ("TP-7-1-TP-1-PP-2-DECODE.trace.json", None, "PP2 TP1"),
        ("1-TP-1-DP-3.trace.json", {"rank": 0, "world_size": 2}, "DP3 TP1"),
        ("rank-2.json", {"rank": 0, "world_size": 1}, "TP2"),
        ("run_rank3.trace.json", None, "TP3"),
        ("whatever.json", {"rank": 5, "world_size": 8}, "TP5"),
        ("whatever.json", {"rank": 0}, "TP0"),
        ("whatever.json", {"rank": "one"}, "TP0"),
        ("whatever.json", {"rank": -1}, "TP0"),
        ("whatever.json", None, "TP0"),
        ("whatever.json", {"world_size": 1}, "TP0"),
    ],
)
def test_ranks(tmp_path: Path, name: str, info: dict[str, Any] | None, rank: str) -> None:
    path = write(tmp_path, document(KERNELS, distributedInfo=info), name)
    table = read_window(path)
    assert (table.ranks, table.notes) == ((rank,), ())


def test_one_of_many_without_a_rank_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path, document(KERNELS, distributedInfo={"world_size": 8}), "whatever.json")
    with pytest.raises(TraceError, match="has no rank"):
        read_window(path)


def test_a_merged_file_is_split_by_its_pids(tmp_path: Path) -> None:
    events = [
        kernel("a", 1, 2, pid="[TP00-DP00] 0"),
        kernel("b", 1, 3, pid="[TP00-DP01] 0"),
        {"ph": "M", "name": "process_name", "pid": "[TP10-DP01] 0", "tid": 0, "args": {}},
    ]
    table = read_window(write(tmp_path, json.dumps(document(events)), "merged-1.trace.json"))
    assert table.ranks == ("DP0 TP0", "DP1 TP0", "DP1 TP10")
    pairs = zip(table.frame["rank"], table.frame["name"], strict=True)
    assert [(str(r), str(n)) for r, n in pairs] == [("DP0 TP0", "a"), ("DP1 TP0", "b")]


@pytest.mark.parametrize("other", ["1-TP-0.trace.json", "2-TP-0.trace.json", "a/1-TP-0.trace.json"])
def test_a_rank_twice_is_refused(tmp_path: Path, other: str) -> None:
    first = write(tmp_path, document(KERNELS))
    second = write(tmp_path, document(KERNELS), other)
    with pytest.raises(TraceError, match="rank TP0"):
        read_window([first, second])


def test_a_merged_file_beside_a_rank_of_it_is_refused(tmp_path: Path) -> None:
    merged = write(tmp_path, document([kernel("a", 1, 2, pid="[TP00] 0")]), "merged-1.trace.json")
    with pytest.raises(TraceError, match="is in two files"):
        read_window([merged, write(tmp_path, document(KERNELS))])


# Nothing on the GPU ------------------------------------------------------------------------


def test_no_events_are_an_answer(tmp_path: Path) -> None:
    idle = write(tmp_path, json.dumps(document([])), "1-TP-1.trace.json")
    alone = read_window(idle)
    assert (alone.ranks, len(alone.frame), len(alone.steps)) == (("TP1",), 0, 0)
    assert list(alone.by("rank", "name").columns) == ["rank", "name", "count", "total_ns"]
    both = read_window([write(tmp_path, document(KERNELS)), idle])
    assert (both.ranks, both.source, rows(both)) == (("TP0", "TP1"), "gpu", ROWS)


def test_cpu_operators_beside_gpu_ranks_are_left_out_and_told(tmp_path: Path) -> None:
    operators = [event("cpu_op", "aten::mm", 1, 2)]
    first = write(tmp_path, document([*KERNELS, *operators]))
    second = write(tmp_path, document(operators), "1-TP-1.trace.json")
    table = read_window([first, second])
    assert (table.ranks, table.source, rows(table)) == (("TP0", "TP1"), "gpu", ROWS)
    assert table.notes == ("TP1: no gpu activities; its cpu_op rows are left out",)


def test_operators_count_their_self_time_and_collectives_their_whole(tmp_path: Path) -> None:
    events = [
        event("cpu_op", "aten::linear", 0, 100, 9, 1),
        event("cpu_op", "aten::addmm", 10, 60, 9, 1),
        event("cpu_op", "aten::mm", 20, 30, 9, 1),
        event("cpu_op", "aten::mm", 20, 30, 9, 2),  # another thread: nested in nothing
        event("cpu_op", "c10d::allreduce_", 75, 20, 9, 1),
        event("user_annotation", "gloo:all_reduce", 76, 500, 9, 3),
        event("user_annotation", "other", 0, 900, 9, 3),
    ]
    table = read_window(write(tmp_path, document(events)))
    assert table.source == "cpu_op"
    assert rows(table) == [
        ("aten::addmm", 10_000, 30_000),
        ("aten::linear", 0, 40_000),
        ("aten::mm", 20_000, 30_000),
        ("aten::mm", 20_000, 30_000),
        ("gloo:all_reduce", 76_000, 500_000),
    ]
    sums = table.by("category").set_index("category")["total_ns"].to_dict()
    assert sums["communication"] == 500_000


# Files that are none -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "is empty"),
        (b"not json at all", "is not a torch trace"),
        (b"\x00\x01\x02", "is not a torch trace"),
        (b"[]", "is not a torch trace"),
        (b"null", "is not a torch trace"),
        (b'{"a": 1}', "no traceEvents"),
        (b'{"traceEvents": null}', "no traceEvents"),
        (b"SQLite format 3\x00 and so on", "SQLite"),
    ],
)
def test_other_files_are_refused_by_name(tmp_path: Path, content: bytes, words: str) -> None:
    with pytest.raises(NotATrace, match=words) as caught:
        read_window(write(tmp_path, content))
    assert "1-TP-0.trace.json" in caught.value.what
    assert caught.value.expected
    assert caught.value.hint


def test_an_empty_member_is_not_a_trace(tmp_path: Path) -> None:
    with pytest.raises(NotATrace):
        read_window(write(tmp_path, gzip.compress(b""), "1-TP-0.trace.json"))


def test_missing_paths_and_folders_without_traces(tmp_path: Path) -> None:
    with pytest.raises(NotATrace, match="does not exist"):
        read_window(tmp_path / "none.json")
    with pytest.raises(NotATrace, match="no trace to read in"):
        read_window(tmp_path)
    with pytest.raises(NotATrace, match="no trace"):
        read_window([])


def test_a_folder_reads_traces_and_leaves_other_json(tmp_path: Path) -> None:
    write(tmp_path, document(KERNELS))
    write(tmp_path, '{"window": 1}', "window.json")
    write(tmp_path, document([kernel("b", 1, 2)]), "1-TP-1.trace.json.gz")
    table = read_window(tmp_path)
    assert table.ranks == ("TP0", "TP1")
    assert [Path(file).name for file in table.files] == [
        "1-TP-0.trace.json",
        "1-TP-1.trace.json.gz",
    ]
