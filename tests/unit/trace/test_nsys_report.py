"""Real nsys exports against SQL and plain Python; what was made of ranges and ranks."""

from __future__ import annotations

import sqlite3
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pytest_sglprof._trace.nsys.report import read_report
from pytest_sglprof._trace.steps import self_times
from tests.support.nsys_exports import CPU_FILES, CPU_PIDS, GPU_FILES, by_name

COPY_LABELS = {1: "Host-to-Device", 2: "Device-to-Host", 8: "Device-to-Device"}


def sql(path: Path, words: str) -> list[tuple[Any, ...]]:
    with closing(sqlite3.connect(f"{path.as_uri()}?immutable=1", uri=True)) as connection:
        return connection.execute(words).fetchall()


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
