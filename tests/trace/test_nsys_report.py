"""nsys exports against SQL and plain Python, and small exports made for one trap each."""

from __future__ import annotations

import os
import sqlite3
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pytest_sglprof.errors import NotATrace, NsysMissing, TraceError
from pytest_sglprof.trace.nsys_gpu import impossible
from pytest_sglprof.trace.nsys_ranges import self_times
from pytest_sglprof.trace.nsys_report import read_report
from pytest_sglprof.trace.table import RankActivities

GPU_FILES = ("mfu_2gpu_before.sqlite", "mfu_2gpu_after.sqlite", "saxpy_perlmutter0.sqlite")
CPU_FILES = ("sglang_cpu_tp2_first.sqlite", "sglang_cpu_tp2_win_b.sqlite")
CPU_PIDS = {31205: "TP0", 31206: "TP1"}
COPY_LABELS = {1: "Host-to-Device", 2: "Device-to-Host", 8: "Device-to-Device"}

Table = Sequence[Mapping[str, Any]]


def global_id(pid: int, tid: int = 0) -> int:
    return (0x1_0000 << 32) | (pid << 24) | tid


def make_export(path: Path, **tables: Table) -> Path:
    """An export with these tables; the first row of each gives its columns."""
    with closing(sqlite3.connect(path)) as connection:
        for name, rows in {"META_DATA_EXPORT": [{"name": "x", "value": "y"}], **tables}.items():
            columns = list(rows[0])
            quoted = ", ".join(f'"{column}"' for column in columns)
            marks = ", ".join("?" * len(columns))
            connection.execute(f"CREATE TABLE {name} ({quoted})")
            values = [[row[column] for column in columns] for row in rows]
            connection.executemany(f"INSERT INTO {name} VALUES ({marks})", values)
        connection.commit()
    return path


def kernel(start: int, end: int | None, name: int | None = 1, **more: Any) -> dict[str, Any]:
    row = {
        "start": start,
        "end": end,
        "deviceId": 0,
        "streamId": 7,
        "globalPid": global_id(100),
        "correlationId": 0,
        "demangledName": name,
        "shortName": 9,
        "graphNodeId": None,
    }
    return {**row, **more}


def nvtx(start: int, end: int | None, text: str | int, **more: Any) -> dict[str, Any]:
    row = {
        "start": start,
        "end": end,
        "eventType": 59,
        "globalTid": global_id(100, 100),
        "text": text if isinstance(text, str) else None,
        "textId": text if isinstance(text, int) else None,
    }
    return {**row, **more}


STRINGS = [{"id": 1, "value": "void a<int>(int)"}, {"id": 2, "value": "b"}, {"id": 9, "value": "s"}]


def by_name(activities: RankActivities) -> dict[str, tuple[int, int]]:
    """Count and ns of each name, added up in plain Python."""
    found: dict[str, tuple[int, int]] = {}
    pairs = zip(activities.name_codes.tolist(), activities.dur.tolist(), strict=True)
    for code, dur in pairs:
        count, total = found.get(activities.names[code], (0, 0))
        found[activities.names[code]] = (count + 1, total + dur)
    return found


def sql(path: Path, words: str) -> list[tuple[Any, ...]]:
    with closing(sqlite3.connect(f"{path.as_uri()}?immutable=1", uri=True)) as connection:
        return connection.execute(words).fetchall()


def one(found: Sequence[RankActivities]) -> RankActivities:
    assert len(found) == 1
    return found[0]


@pytest.mark.parametrize("name", GPU_FILES)
def test_gpu_sums_are_those_of_sql(shared_data: Path, name: str) -> None:
    path = shared_data / "nsys" / name
    truth: dict[str, dict[str, tuple[int, int]]] = defaultdict(dict)
    words = (
        "SELECT k.deviceId, s.value, COUNT(*), SUM(k.end - k.start) "
        "FROM CUPTI_ACTIVITY_KIND_KERNEL k JOIN StringIds s ON s.id = k.demangledName GROUP BY 1, 2"
    )
    for device, text, count, total in sql(path, words):
        truth[f"GPU{device}"][text] = (count, total)
    words = (
        "SELECT deviceId, copyKind, COUNT(*), SUM(end - start) "
        "FROM CUPTI_ACTIVITY_KIND_MEMCPY GROUP BY 1, 2"
    )
    for device, copy, count, total in sql(path, words):
        truth[f"GPU{device}"][f"[CUDA memcpy {COPY_LABELS[copy]}]"] = (count, total)
    words = "SELECT deviceId, COUNT(*), SUM(end - start) FROM CUPTI_ACTIVITY_KIND_MEMSET GROUP BY 1"
    for device, count, total in sql(path, words):
        truth[f"GPU{device}"]["[CUDA memset]"] = (count, total)
    found = read_report(path)
    assert {activities.rank: by_name(activities) for activities in found} == dict(truth)
    assert {activities.source for activities in found} == {"gpu"}
    for activities in found:
        assert np.all(np.diff(activities.start) >= 0)
        kinds = Counter(activities.kinds[code] for code in activities.kind_codes.tolist())
        assert kinds["kernel"] == sum(
            count for text, (count, _) in by_name(activities).items() if text[0] != "["
        )


@pytest.mark.parametrize("name", GPU_FILES[:2])
def test_process_ids_and_devices_name_the_same_ranks(shared_data: Path, name: str) -> None:
    path = shared_data / "nsys" / name
    words = "SELECT DISTINCT (globalPid >> 24) & 0xFFFFFF, deviceId FROM CUPTI_ACTIVITY_KIND_KERNEL"
    pids = {pid: f"TP{device}" for pid, device in sql(path, words)}
    first, second = (
        read_report(path, pid_ranks=pids),
        read_report(path, gpu_ranks={0: "TP0", 1: "TP1"}),
    )
    assert [part.rank for part in first] == [part.rank for part in second] == ["TP0", "TP1"]
    assert [by_name(part) for part in first] == [by_name(part) for part in second]
    assert first[0].notes == ["ranks of nsys activities: by process id"]
    assert "by device" in second[0].notes[0]


def stack_self_times(rows: Iterable[tuple[int, int, int]]) -> dict[int, int]:
    """Self time by row number, with a stack; ranges (start, end, thread) nest properly."""
    own: dict[int, int] = {}
    order = sorted(enumerate(rows), key=lambda row: (row[1][2], row[1][0], -row[1][1]))
    stack: list[tuple[int, int, int]] = []
    for number, (start, end, thread) in order:
        while stack and (stack[-1][2] != thread or stack[-1][1] <= start):
            stack.pop()
        own[number] = end - start
        if stack:
            assert end <= stack[-1][1], "crossing ranges"
            own[stack[-1][0]] -= end - start
        stack.append((number, end, thread))
    return own


@pytest.mark.parametrize("name", CPU_FILES)
def test_ranges_of_a_cpu_server_count_with_their_self_time(shared_data: Path, name: str) -> None:
    path = shared_data / "nsys" / name
    rows = sql(
        path,
        "SELECT n.start, n.end, n.globalTid, COALESCE(n.text, s.value) FROM NVTX_EVENTS n "
        "LEFT JOIN StringIds s ON s.id = n.textId WHERE n.eventType = 59",
    )
    own = stack_self_times((start, end, thread) for start, end, thread, _ in rows)
    truth: dict[str, dict[str, tuple[int, int]]] = {"TP0": {}, "TP1": {}}
    for number, (_, _, thread, text) in enumerate(rows):
        names = truth[CPU_PIDS[(thread >> 24) & 0xFFFFFF]]
        count, total = names.get(text, (0, 0))
        names[text] = (count + 1, total + own[number])
    found = read_report(path, pid_ranks=CPU_PIDS)
    assert {part.rank: by_name(part) for part in found} == truth
    assert {part.source for part in found} == {"nvtx"}
    for part in found:
        batches = sorted(
            (start, end)
            for start, end, thread, text in rows
            if text == "scheduler.run_batch"
            if CPU_PIDS[(thread >> 24) & 0xFFFFFF] == part.rank
        )
        assert [(step.start_ns, step.end_ns) for step in part.steps] == batches
        assert [step.step for step in part.steps] == list(range(len(batches)))
        texts = [part.names[code] for code in part.name_codes.tolist()]
        expected = [
            next((n for n, (a, b) in enumerate(batches) if a <= start < b), -1)
            for start in part.start.tolist()
        ]
        assert part.step.tolist() == expected
        assert all(
            step >= 0 for step, text in zip(expected, texts, strict=True) if "run_batch" in text
        )


def test_cpu_server_under_load_has_32_steps_a_rank(shared_data: Path) -> None:
    found = read_report(shared_data / "nsys" / CPU_FILES[1], pid_ranks=CPU_PIDS)
    assert [len(part.steps) for part in found] == [32, 32]
    assert {step.stage for part in found for step in part.steps} == {"unknown"}


def test_cpu_processes_without_known_ids_stay_apart(shared_data: Path) -> None:
    found = read_report(shared_data / "nsys" / CPU_FILES[0], gpu_ranks={0: "TP0", 1: "TP1"})
    assert [part.rank for part in found] == ["pid 31205", "pid 31206"]
    assert "rank unknown: process 31205 is named by its id" in found[0].notes


def test_known_processes_without_activity_are_there_and_empty(shared_data: Path) -> None:
    pids = {**CPU_PIDS, 31207: "TP2", 5: "TP3"}
    found = read_report(shared_data / "nsys" / CPU_FILES[0], pid_ranks=pids)
    assert {part.rank: len(part.start) for part in found} == {
        "TP0": 15,
        "TP1": 15,
        "TP2": 0,
        "TP3": 0,
    }
    assert "process 5 (TP3) is not in the nsys report" in found[0].notes
    assert not any("31207" in note for note in found[0].notes)


# Nested ranges: cuts of a time line, each level inside the one above.
@st.composite
def nested_ranges(draw: st.DrawFn) -> list[tuple[int, int, int]]:
    rows: list[tuple[int, int, int]] = []

    def fill(low: int, high: int, thread: int, depth: int) -> None:
        at = low
        for _ in range(draw(st.integers(0, 3))):
            if at >= high:
                return
            start = draw(st.integers(at, high))
            end = draw(st.integers(start, high))
            rows.append((start, end, thread))
            if depth and end > start:
                fill(start, end, thread, depth - 1)
            at = max(end, start + 1)

    for thread in range(draw(st.integers(1, 3))):
        fill(0, draw(st.integers(1, 40)), thread, 3)
    return draw(st.permutations(rows))


def covered(rows: Sequence[tuple[int, int, int]], thread: int) -> int:
    return len({t for start, end, own in rows if own == thread for t in range(start, end)})


@settings(max_examples=80, deadline=None)
@given(nested_ranges())
def test_self_times_of_any_nesting(rows: list[tuple[int, int, int]]) -> None:
    start, end, thread = np.array(rows, dtype=np.int64).reshape(-1, 3).T
    own = self_times(start, end - start, thread)
    # Equal ranges may share their time either way; sums over equal ones cannot differ.
    truth: Counter[tuple[int, int, int]] = Counter()
    for number, value in stack_self_times(rows).items():
        truth[rows[number]] += value
    found: Counter[tuple[int, int, int]] = Counter()
    for row, value in zip(rows, own.tolist(), strict=True):
        found[row] += value
    assert found == truth
    for number in set(thread.tolist()):
        assert own[thread == number].sum() == covered(rows, number)


@settings(max_examples=80, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 20), st.integers(0, 20), st.integers(0, 2)), max_size=12))
def test_self_times_add_up_to_the_union_even_when_ranges_cross(
    spans: list[tuple[int, int, int]],
) -> None:
    rows = [(start, start + dur, thread) for start, dur, thread in spans]
    start, end, thread = np.array(rows, dtype=np.int64).reshape(-1, 3).T
    own = self_times(start, end - start, thread)
    assert np.all(own >= 0)
    for number in set(thread.tolist()):
        assert own[thread == number].sum() == covered(rows, number)


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
    assert "left out 1 NVTX ranges of process 300, which is no rank" in found.notes
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


def test_files_that_are_no_export(tmp_path: Path) -> None:
    text = tmp_path / "x.sqlite"
    text.write_text("this is text, not a database, however long it may be\n" * 40)
    with pytest.raises(NotATrace, match="no SQLite database"):
        read_report(text)
    empty = tmp_path / "empty.sqlite"
    empty.touch()
    with pytest.raises(NotATrace, match="none of an nsys export's tables"):
        read_report(empty)
    for name in ("missing.sqlite", "missing.nsys-rep"):
        with pytest.raises(NotATrace, match="does not exist"):
            read_report(tmp_path / name)


def test_a_cut_off_export(tmp_path: Path, shared_data: Path) -> None:
    whole = (shared_data / "nsys" / GPU_FILES[0]).read_bytes()
    path = tmp_path / "cut.sqlite"
    for size in (len(whole) // 2, len(whole) - 4096):
        path.write_bytes(whole[:size])
        with pytest.raises(TraceError, match=r"cut\.sqlite cannot be read") as caught:
            read_report(path)
        assert "export the .nsys-rep again" in caught.value.hint


def test_a_recording_without_its_report(tmp_path: Path) -> None:
    path = tmp_path / "w.qdstrm"
    path.touch()
    with pytest.raises(TraceError, match="has made no report") as caught:
        read_report(path)
    assert "libssh" in caught.value.hint


FAKE_NSYS = """#!/bin/sh
case "$1" in
  --version) echo "NVIDIA Nsight Systems version 2023.4.4.54-234433681190v0" ;;
  profile) echo "  -Y, --start-later=" ;;
  export)
    echo export >> "{calls}"
    for word in "$@"; do
      case "$word" in --output=*) cp "{database}" "${{word#--output=}}" ;; esac
    done ;;
esac
"""


@pytest.fixture
def fake_nsys(tmp_path: Path) -> Path:
    """An nsys that exports one database, and notes each export in calls.txt."""
    database = make_export(
        tmp_path / "source.db", CUPTI_ACTIVITY_KIND_KERNEL=[kernel(0, 5)], StringIds=STRINGS
    )
    script = tmp_path / "nsys"
    script.write_text(FAKE_NSYS.format(calls=tmp_path / "calls.txt", database=database))
    script.chmod(0o755)
    return script


def test_a_report_is_exported_once_and_again_when_it_is_new(
    tmp_path: Path, fake_nsys: Path
) -> None:
    folder = tmp_path / "w"
    folder.mkdir()
    report = folder / "w.nsys-rep"
    report.write_bytes(b"x")
    for _ in range(2):
        assert by_name(one(read_report(report, nsys=str(fake_nsys)))) == {
            "void a<int>(int)": (1, 5)
        }
    assert sorted(file.name for file in folder.iterdir()) == ["w.nsys-rep", "w.sqlite"]
    calls = tmp_path / "calls.txt"
    assert calls.read_text().split() == ["export"]
    later = (folder / "w.sqlite").stat().st_mtime_ns + 10**9
    os.utime(report, ns=(later, later))
    read_report(report, nsys=str(fake_nsys))
    assert calls.read_text().split() == ["export"] * 2


def test_a_report_in_a_folder_that_cannot_be_written(
    tmp_path: Path, fake_nsys: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "w"
    folder.mkdir()
    report = folder / "w.nsys-rep"
    report.write_bytes(b"x")
    access = os.access  # a superuser may write anywhere, so permissions alone show nothing
    monkeypatch.setattr(os, "access", lambda path, mode: path != folder and access(path, mode))
    assert len(read_report(report, nsys=str(fake_nsys))) == 1
    assert [file.name for file in folder.iterdir()] == ["w.nsys-rep"]


def test_a_report_without_nsys(tmp_path: Path) -> None:
    report = tmp_path / "w.nsys-rep"
    report.write_bytes(b"x")
    with pytest.raises(NsysMissing):
        read_report(report, nsys=str(tmp_path / "no-nsys"))


def to_parquet(database: Path, folder: Path) -> Path:
    """The tables as `nsys export --type=parquetdir` stores them: ids unsigned, one file each."""
    arrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    folder.mkdir()
    with closing(sqlite3.connect(f"{database.as_uri()}?immutable=1", uri=True)) as connection:
        connection.text_factory = lambda raw: raw.decode("utf-8", "replace")
        for (table,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'"):
            cursor = connection.execute(f'SELECT * FROM "{table}"')
            names = [column[0] for column in cursor.description]
            rows = cursor.fetchall()
            if not rows:
                continue
            columns: dict[str, Any] = {}
            for name, values in zip(names, zip(*rows, strict=True), strict=True):
                unsigned = name in ("globalPid", "globalTid", "graphNodeId")
                columns[name] = arrow.array(values, type=arrow.uint64() if unsigned else None)
            parquet.write_table(arrow.table(columns), folder / f"{table}.parquet")
    return folder


@pytest.mark.parametrize("name", [*GPU_FILES, *CPU_FILES])
def test_parquet_says_the_same_as_sqlite(shared_data: Path, tmp_path: Path, name: str) -> None:
    path = shared_data / "nsys" / name
    folder = to_parquet(path, tmp_path / "pq")
    for first, second in zip(read_report(path), read_report(folder), strict=True):
        assert first.rank == second.rank
        assert by_name(first) == by_name(second)
        assert first.step.tolist() == second.step.tolist()
        assert list(first.steps) == list(second.steps)
        assert list(first.notes) == list(second.notes)


def test_folders_that_are_no_export(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    with pytest.raises(NotATrace, match="no file is named like its tables"):
        read_report(tmp_path)
    (tmp_path / "NVTX_EVENTS.parquet").write_bytes(b"PAR1 but no more than that")
    with pytest.raises(TraceError, match=r"NVTX_EVENTS\.parquet cannot be read"):
        read_report(tmp_path)


def test_parquet_with_text_for_numbers(tmp_path: Path) -> None:
    arrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    table = arrow.table({"start": ["a"], "end": ["b"]})
    parquet.write_table(table, tmp_path / "NVTX_EVENTS.parquet")
    with pytest.raises(TraceError, match="cannot be read"):
        read_report(tmp_path)


def test_parquet_without_pyarrow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(TraceError, match="need pyarrow") as caught:
        read_report(tmp_path)
    assert "pytest-sglprof[parquet]" in caught.value.hint
