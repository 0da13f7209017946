"""Small nsys exports, each made for one trap."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from pytest_sglprof._trace.nsys.report import read_report
from pytest_sglprof._trace.nsys.rows import impossible
from tests.support.nsys_exports import STRINGS, by_name, global_id, kernel, make_export, nvtx, one


def test_names_fall_back_from_the_demangled_to_the_short_one(tmp_path: Path) -> None:
    rows = [kernel(0, 5), kernel(10, 12, None, shortName=9), kernel(20, 21, 555)]
    path = make_export(tmp_path / "x.sqlite", CUPTI_ACTIVITY_KIND_KERNEL=rows, StringIds=STRINGS)
    assert by_name(one(read_report(path))) == {
        "void a<int>(int)": (1, 5),
        "s": (1, 2),
        "unnamed kernel": (1, 1),
    }


def test_a_version_with_few_columns_and_no_other_table(tmp_path: Path) -> None:
    rows = [{"start": 3, "end": 8, "deviceId": 1, "globalPid": global_id(4), "shortName": 2}]
    path = make_export(tmp_path / "x.sqlite", CUPTI_ACTIVITY_KIND_KERNEL=rows)
    found = one(read_report(path, gpu_ranks={1: "TP1"}))
    assert (found.rank, found.start.tolist(), found.dur.tolist()) == ("TP1", [3], [5])
    assert found.stream.tolist() == [-1]
    assert found.step.tolist() == [-1]


def test_copies_and_sets_have_names_of_their_own(tmp_path: Path) -> None:
    place = {"deviceId": 0, "streamId": 1, "globalPid": global_id(100)}
    path = make_export(
        tmp_path / "x.sqlite",
        CUPTI_ACTIVITY_KIND_MEMCPY=[
            {"start": 0, "end": 2, "copyKind": kind, **place} for kind in (10, 99, None)
        ],
        CUPTI_ACTIVITY_KIND_MEMSET=[{"start": 5, "end": 6, **place}],
    )
    found = one(read_report(path))
    assert by_name(found) == {
        "[CUDA memcpy Peer-to-Peer]": (1, 2),
        "[CUDA memcpy Unknown]": (2, 4),
        "[CUDA memset]": (1, 1),
    }
    assert [found.kinds[code] for code in found.kind_codes] == ["memcpy"] * 3 + ["memset"]


def test_kernels_belong_to_the_batch_that_launched_them(tmp_path: Path) -> None:
    calls = [
        # A driver call inside the runtime call has the same id and starts later.
        {"start": 25, "globalTid": global_id(100, 101), "correlationId": 1},
        {"start": 12, "globalTid": global_id(100, 101), "correlationId": 1},
        {"start": 45, "globalTid": global_id(100, 102), "correlationId": 2},
        {"start": 30, "globalTid": global_id(100, 102), "correlationId": 3},
        # The same id in another process is another launch.
        {"start": 46, "globalTid": global_id(200, 200), "correlationId": 3},
    ]
    kernels = [
        kernel(41, 44, correlationId=1),
        kernel(60, 61, correlationId=2),
        kernel(62, 63, correlationId=3),
        kernel(64, 65, correlationId=4),
        kernel(66, 67, correlationId=None),
        kernel(60, 64, correlationId=3, globalPid=global_id(200), deviceId=1),
    ]
    other = global_id(200, 200)
    ranges = [
        nvtx(40, 50, "scheduler.run_batch"),
        nvtx(10, 20, 2),
        nvtx(12, 14, "scheduler.run_batch"),
        nvtx(40, 50, "scheduler.run_batch", globalTid=other),
        nvtx(30, None, "scheduler.run_batch"),
        nvtx(30, 35, "scheduler.run_batch", eventType=34),
    ]
    ranges[1]["eventType"] = 60
    strings = [{"id": 1, "value": "a"}, {"id": 2, "value": "scheduler.run_batch"}]
    path = make_export(
        tmp_path / "x.sqlite",
        CUPTI_ACTIVITY_KIND_KERNEL=kernels,
        CUPTI_ACTIVITY_KIND_RUNTIME=calls,
        NVTX_EVENTS=ranges,
        StringIds=strings,
    )
    first, second = read_report(path, pid_ranks={100: "TP0", 200: "TP1"})
    # The outermost of nested batches is the step.
    assert [(step.step, step.start_ns, step.end_ns) for step in first.steps] == [
        (0, 10, 20),
        (1, 40, 50),
    ]
    assert first.step.tolist() == [0, 1, -1, -1, -1]
    assert [(step.step, step.start_ns) for step in second.steps] == [(0, 40)]
    assert second.step.tolist() == [0]
    assert first.source == "gpu"


def test_a_batch_without_launches_is_a_step_all_the_same(tmp_path: Path) -> None:
    path = make_export(
        tmp_path / "x.sqlite",
        CUPTI_ACTIVITY_KIND_KERNEL=[kernel(1, 2, correlationId=3)],
        NVTX_EVENTS=[nvtx(0, 9, "scheduler.run_batch")],
        StringIds=STRINGS,
    )
    found = one(read_report(path))
    assert len(found.steps) == 1
    assert found.step.tolist() == [-1]


def test_impossible_kernels_are_excluded_and_said(tmp_path: Path) -> None:
    rows = [
        kernel(0, 1_000_000, 1),  # holds the next two, of which only one overlaps its end
        kernel(10, 30, 2),
        kernel(25, 40, 2),  # an overlap, as with programmatic dependent launch
        kernel(0, 500, 2, streamId=8),  # alone on its stream
        kernel(0, 500, 2, deviceId=1),
        kernel(0, 500, 2, streamId=9, graphNodeId=4),  # nodes of a graph run side by side
        kernel(10, 20, 2, streamId=9, graphNodeId=5),
        kernel(50, 60, 2, graphNodeId=0),
    ]
    path = make_export(tmp_path / "x.sqlite", CUPTI_ACTIVITY_KIND_KERNEL=rows, StringIds=STRINGS)
    first, second = read_report(path, gpu_ranks={0: "TP0", 1: "TP1"})
    assert by_name(first) == {"b": (6, 20 + 15 + 500 + 500 + 10 + 10)}
    assert by_name(second) == {"b": (1, 500)}
    assert any(
        note.startswith("excluded 1 kernels (1.000 ms) that contain a whole")
        for note in first.notes
    )


@settings(max_examples=80, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 15), st.integers(0, 15), st.integers(0, 1)), max_size=9))
def test_impossible_is_containing_a_later_one_of_the_stream(
    spans: list[tuple[int, int, int]],
) -> None:
    rows = [(start, start + dur, group) for start, dur, group in spans]
    truth = [
        any(a <= c and d < b and g == h for c, d, h in rows if (c, d) > (a, b) or c > a)
        for a, b, g in rows
    ]
    start, end, group = np.array(rows, dtype=np.int64).reshape(-1, 3).T
    found = impossible(start, end, group, np.ones(len(rows), dtype=bool))
    assert found.tolist() == truth


def test_rows_without_a_time_are_counted(tmp_path: Path) -> None:
    rows = [kernel(5, None), kernel(9, 4), kernel(10, 11)]
    path = make_export(tmp_path / "x.sqlite", CUPTI_ACTIVITY_KIND_KERNEL=rows, StringIds=STRINGS)
    found = one(read_report(path))
    assert found.dur.tolist() == [1]
    assert "skipped 2 GPU activities with a missing or negative duration" in found.notes


def test_graphs_recorded_as_a_whole_are_said(tmp_path: Path) -> None:
    graph = {"start": 0, "end": 2_500_000, "deviceId": 0, "globalPid": global_id(100)}
    path = make_export(
        tmp_path / "x.sqlite",
        CUPTI_ACTIVITY_KIND_GRAPH_TRACE=[graph, graph],
        NVTX_EVENTS=[nvtx(0, 9, "scheduler.run_batch")],
    )
    found = one(read_report(path, pid_ranks={100: "TP0"}))
    assert (found.rank, found.source, len(found.start), len(found.steps)) == ("TP0", "gpu", 0, 1)
    assert found.notes[0].startswith("2 launches of CUDA graphs (5.000 ms) were recorded as a")
    assert "--cuda-graph-trace=node" in found.notes[0]


def test_two_processes_with_one_device_number_stay_apart(tmp_path: Path) -> None:
    rows = [kernel(0, 4), kernel(1, 3, globalPid=global_id(200))]
    path = make_export(tmp_path / "x.sqlite", CUPTI_ACTIVITY_KIND_KERNEL=rows, StringIds=STRINGS)
    # Each process sees its own GPU as number 0: the device tells nothing.
    found = read_report(path, gpu_ranks={0: "TP0", 1: "TP1"})
    assert [(part.rank, part.dur.tolist()) for part in found] == [
        ("GPU0 pid 100", [4]),
        ("GPU0 pid 200", [2]),
    ]
    assert "several processes on that device number" in found[0].notes[0]


def test_a_stranger_on_the_device_of_a_known_rank_is_not_that_rank(tmp_path: Path) -> None:
    rows = [kernel(0, 4), kernel(1, 3, globalPid=global_id(200))]
    path = make_export(
        tmp_path / "x.sqlite",
        CUPTI_ACTIVITY_KIND_KERNEL=rows,
        StringIds=STRINGS,
        PROCESSES=[{"globalPid": global_id(pid), "name": "x"} for pid in (100, 200)],
    )
    found = read_report(path, pid_ranks={100: "TP0"}, gpu_ranks={0: "TP0"})
    assert [(part.rank, part.dur.tolist()) for part in found] == [("GPU0", [2]), ("TP0", [4])][::-1]


def test_devices_step_in_where_no_process_id_is_right(tmp_path: Path) -> None:
    """A server in a container of its own counts its processes otherwise."""
    path = make_export(
        tmp_path / "x.sqlite",
        CUPTI_ACTIVITY_KIND_KERNEL=[kernel(0, 4)],
        StringIds=STRINGS,
        PROCESSES=[{"globalPid": global_id(100), "name": "x"}],
    )
    found = one(read_report(path, pid_ranks={7: "TP0"}, gpu_ranks={0: "TP0"}))
    assert (found.rank, found.dur.tolist()) == ("TP0", [4])
    assert "process 7 (TP0) is not in the nsys report" in found.notes


def test_ranges_of_other_processes_are_left_out(tmp_path: Path) -> None:
    ranges = [nvtx(0, 9, "a"), nvtx(0, 5, "b", globalTid=global_id(300, 300)), nvtx(2, None, "c")]
    path = make_export(tmp_path / "x.sqlite", NVTX_EVENTS=ranges)
    found = one(read_report(path, pid_ranks={100: "TP0"}))
    assert by_name(found) == {"a": (1, 9)}
    assert found.stream.tolist() == [100]
    assert "left out 1 NVTX ranges of process 300, which is not a rank" in found.notes
    assert "skipped 1 NVTX ranges without an end" in found.notes


def test_threads_nest_each_for_itself_and_start_end_ranges_do_not_count(tmp_path: Path) -> None:
    ranges = [
        nvtx(0, 10, "a"),
        nvtx(2, 5, 1),
        nvtx(3, 20, "b", globalTid=global_id(100, 101)),
        nvtx(0, 100, "c", eventType=60),
        nvtx(6, 6, ""),
    ]
    strings = [{"id": 1, "value": "r"}]
    path = make_export(tmp_path / "x.sqlite", NVTX_EVENTS=ranges, StringIds=strings)
    found = one(read_report(path))
    assert by_name(found) == {"a": (1, 7), "r": (1, 3), "b": (1, 17), "unnamed": (1, 0)}


def test_ranges_without_the_text_column(tmp_path: Path) -> None:
    ranges = [nvtx(0, 10, 1)]
    del ranges[0]["text"]
    path = make_export(tmp_path / "x.sqlite", NVTX_EVENTS=ranges, StringIds=STRINGS)
    assert by_name(one(read_report(path))) == {"void a<int>(int)": (1, 10)}


def test_text_that_is_not_utf8_is_read(tmp_path: Path) -> None:
    path = make_export(
        tmp_path / "x.sqlite",
        CUPTI_ACTIVITY_KIND_KERNEL=[kernel(0, 1)],
        StringIds=[{"id": 1, "value": "x"}],
    )
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("UPDATE StringIds SET value = CAST(X'61FF' AS TEXT)")
        connection.commit()
    assert by_name(one(read_report(path))) == {"a\ufffd": (1, 1)}


def test_a_report_without_any_activity_is_an_answer(tmp_path: Path) -> None:
    path = make_export(tmp_path / "x.sqlite")
    assert read_report(path) == []
    found = one(read_report(path, pid_ranks={1: "TP0"}))
    assert (found.rank, len(found.start)) == ("TP0", 0)


def test_the_file_is_not_written_to(tmp_path: Path) -> None:
    path = make_export(
        tmp_path / "a b#?.sqlite", CUPTI_ACTIVITY_KIND_KERNEL=[kernel(0, 1)], StringIds=STRINGS
    )
    before = path.read_bytes()
    assert len(read_report(path)) == 1
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_more_names_than_one_statement_can_ask_for(tmp_path: Path) -> None:
    path = make_export(
        tmp_path / "x.sqlite",
        CUPTI_ACTIVITY_KIND_KERNEL=[kernel(2 * n, 2 * n + 1, n) for n in range(1, 1200)],
        StringIds=[{"id": n, "value": f"k{n}"} for n in range(1, 1200)],
    )
    assert set(by_name(one(read_report(path)))) == {f"k{n}" for n in range(1, 1200)}
