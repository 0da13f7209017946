"""Times that no clock gives: every way of reading an export leaves out the same rows."""

from __future__ import annotations

import json
import math
import sqlite3
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pytest_sglprof._cli.main import main
from pytest_sglprof._trace.nsys.report import read_report, stream_rows
from pytest_sglprof._trace.nsys.sums import read_sums
from tests.support.nsys_exports import (
    GPU_FILES,
    STRINGS,
    global_id,
    kernel,
    make_export,
    nvtx,
    to_parquet,
)

MISSING_NOTE = "skipped {} GPU activities with a missing or negative duration"
BEYOND_NOTE = "skipped {} GPU activities that last 13 days or lie outside of time"
# What may be counted, in plain SQL; the limits are those that the documentation names.
TRUTH = """
    SELECT COUNT(*), TOTAL("end" - start) FROM CUPTI_ACTIVITY_KIND_KERNEL
    WHERE TYPEOF(start) = 'integer' AND TYPEOF("end") = 'integer' AND "end" >= start
    AND start > -(1 << 62) AND "end" < (1 << 62) AND "end" - start < (1 << 50)
"""
ODD: list[tuple[Any, Any, bool]] = [  # start, end, whether it lacks a time
    (None, 50, True),
    (10, None, True),
    (None, None, True),
    (10, 9, True),
    (10, "abc", True),
    ("abc", 10**9, True),
    ("abc", "abd", True),
    (-10, "abc", True),
    (10, b"\x00\xff", True),
    (10.5, 30, True),
    (10, 1e30, True),
    (-1e30, 10, True),
    (10.25, 20.75, True),
    (10, 2**63 - 1, False),
    (-(2**63) + 1, 10, False),
    (-(2**62), 2**62, False),
    (0, 2**50, False),
    (2**62, 2**62 + 5, False),
]


def counted(path: Path) -> tuple[int, int]:
    with closing(sqlite3.connect(f"{path.as_uri()}?immutable=1", uri=True)) as connection:
        count, total = connection.execute(TRUTH).fetchone()
    return int(count), int(total)


def every_way(export: Path) -> tuple[list[tuple[int, int]], list[list[str]]]:
    """Count and ns of all kernels, and the notes, by each way of reading."""
    report = read_report(export)
    sums = read_sums(export)
    hints: list[str] = []
    streams = stream_rows(export, notes=hints)
    rows = [dur for part in report for dur in part.dur.tolist()]
    totals = [
        (len(rows), sum(rows)),
        (sum(sums.count), sum(sums.total_ns)),
        (sum(row.kernels for row in streams), sum(row.total_ns for row in streams)),
    ]
    notes = [[*dict.fromkeys(note for part in report for note in part.notes)], [*sums.notes]]
    return totals, [[n for n in each if n.startswith("skipped")] for each in (*notes, hints)]


@pytest.mark.parametrize(("start", "end", "lacks"), ODD)
def test_fault_2_a_row_with_an_odd_time_is_left_out_and_told(
    tmp_path: Path, start: Any, end: Any, lacks: bool
) -> None:
    rows = [kernel(0, 400, streamId=1), kernel(start, end, streamId=2), kernel(50, 650, streamId=3)]
    path = make_export(tmp_path / "x.sqlite", CUPTI_ACTIVITY_KIND_KERNEL=rows, StringIds=STRINGS)
    assert counted(path) == (2, 1_000)
    totals, notes = every_way(path)
    assert totals == [(2, 1_000)] * 3
    assert notes == [[(MISSING_NOTE if lacks else BEYOND_NOTE).format(1)]] * 3


def test_fault_2_a_row_without_an_end_has_no_place_in_the_hints(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [kernel(0, 1_000), kernel(1_100, None), kernel(2**62, 2**63 - 1, streamId=8)]
    path = make_export(tmp_path / "x.sqlite", CUPTI_ACTIVITY_KIND_KERNEL=rows, StringIds=STRINGS)
    assert main(["export", "--to", "nsight", str(path), "--format", "json"]) == 0
    out, err = capsys.readouterr()
    (row,) = json.loads(out)
    assert (row["kernels"], row["total_ns"], row["stream"]) == (1, 1_000, 7)
    assert f"note: {MISSING_NOTE.format(1)}\n" in err
    assert f"note: {BEYOND_NOTE.format(1)}\n" in err
    assert main(["kernels", str(path), "--format", "json"]) == 0
    out, err = capsys.readouterr()
    assert [(row["count"], row["total_ns"]) for row in json.loads(out)] == [(1, 1_000)]
    assert MISSING_NOTE.format(1) in err
    assert BEYOND_NOTE.format(1) in err


def test_fault_2_what_is_impossible_is_in_no_total(tmp_path: Path) -> None:
    rows = [kernel(0, 10**9), kernel(10, 1_010), kernel(2_000, None)]
    path = make_export(tmp_path / "x.sqlite", CUPTI_ACTIVITY_KIND_KERNEL=rows, StringIds=STRINGS)
    totals, _ = every_way(path)
    assert totals == [(1, 1_000)] * 3


@pytest.mark.parametrize("column", ["start", "end"])
@pytest.mark.parametrize("kind", ["INTEGER", "REAL", "TEXT", "BLOB", ""])
def test_fault_2_whatever_type_a_column_was_given(tmp_path: Path, kind: str, column: str) -> None:
    path = tmp_path / "x.sqlite"
    types = {"start": "INTEGER", "end": "INTEGER", column: kind}
    with closing(sqlite3.connect(path)) as connection:
        connection.execute(
            f"CREATE TABLE CUPTI_ACTIVITY_KIND_KERNEL (start {types['start']}, "
            f'"end" {types["end"]}, deviceId, streamId, globalPid, demangledName)'
        )
        rows = [(10, 30), (40, None), (50, "x"), ("x", 60), (-7, "7"), (5, 2.5e18), (9, 9)]
        connection.executemany(
            f"INSERT INTO CUPTI_ACTIVITY_KIND_KERNEL VALUES (?, ?, 0, ?, {global_id(1)}, 1)",
            [(*row, stream) for stream, row in enumerate(rows)],
        )
        connection.commit()
    totals, notes = every_way(path)
    assert len(set(totals)) == 1
    assert notes[0] == notes[1] == notes[2] != []
    if kind == "INTEGER":  # which makes "7" the number 7
        assert totals[0] == (3, 34) == counted(path)
    if kind == "TEXT":
        assert totals[0] == (0, 0)


odd_times = st.one_of(
    st.none(),
    st.integers(0, 40),
    st.integers(-(2**63), 2**63 - 1),
    st.sampled_from(
        [2**50, 2**62, -(2**62), 2**63 - 1, -(2**63), 1.5, 1e30, math.inf, "abc", "12"]
    ),
    st.floats(allow_nan=False),
    st.binary(max_size=2),
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(st.tuples(odd_times, odd_times, st.integers(0, 3)), min_size=1, max_size=6))
def test_fault_2_any_times_give_one_total(
    tmp_path_factory: pytest.TempPathFactory, rows: Sequence[tuple[Any, Any, int]]
) -> None:
    made = [
        kernel(start, end, streamId=stream, deviceId=at)
        for at, (start, end, stream) in enumerate(rows)
    ]
    path = make_export(
        tmp_path_factory.mktemp("x") / "x.sqlite", CUPTI_ACTIVITY_KIND_KERNEL=made,
        StringIds=STRINGS,
    )  # fmt: skip
    totals, notes = every_way(path)
    assert len(set(totals)) == 1
    assert 0 <= totals[0][1] < 6 * 2**50
    if not any(isinstance(time, float) and time.is_integer() for row in rows for time in row[:2]):
        assert totals[0] == counted(path)
    left_out = sum(int(note.split()[1]) for note in notes[0])
    assert totals[0][0] + left_out == len(rows)
    if -(2**63) not in [row[0] for row in rows]:
        assert notes[1] == notes[2] == notes[0]


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.lists(
        st.tuples(
            st.one_of(st.integers(-(2**63) + 1, 2**63 - 1), st.integers(0, 40)),
            st.one_of(st.none(), st.integers(-(2**63) + 1, 2**63 - 1), st.integers(0, 90)),
        ),
        min_size=1,
        max_size=6,
    )
)
def test_fault_2_parquet_leaves_out_the_same(
    tmp_path_factory: pytest.TempPathFactory, rows: Sequence[tuple[int, int | None]]
) -> None:
    folder = tmp_path_factory.mktemp("x")
    made = [kernel(start, end, streamId=at) for at, (start, end) in enumerate(rows)]
    path = make_export(folder / "x.sqlite", CUPTI_ACTIVITY_KIND_KERNEL=made, StringIds=STRINGS)
    if all(end is None for _, end in rows):
        return
    first, second = every_way(path), every_way(to_parquet(path, folder / "pq"))
    assert first == second
    assert first[0][0] == counted(path)


def test_fault_2_parquet_columns_of_fractions(tmp_path: Path) -> None:
    arrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    ends = [30.0, 30.5, math.nan, math.inf, 1e30, None, 2.0**62]
    columns = {
        "start": [10] * 7,
        "end": ends,
        "deviceId": [0] * 7,
        "streamId": range(7),
        "globalPid": [global_id(1)] * 7,
    }
    table = arrow.table({name: arrow.array(list(values)) for name, values in columns.items()})
    parquet.write_table(table, tmp_path / "CUPTI_ACTIVITY_KIND_KERNEL.parquet")
    totals, notes = every_way(tmp_path)
    assert totals == [(1, 20)] * 3
    assert notes == [[MISSING_NOTE.format(5), BEYOND_NOTE.format(1)]] * 3


def test_fault_2_whole_graphs_and_ranges_with_odd_times(tmp_path: Path) -> None:
    graph = {"deviceId": 0, "globalPid": global_id(100)}
    times = [(0, 2_000_000), (5, None), (5, "x"), (5, 2**63 - 1), (9, 3), (None, 4)]
    path = make_export(
        tmp_path / "x.sqlite",
        CUPTI_ACTIVITY_KIND_GRAPH_TRACE=[{"start": s, "end": e, **graph} for s, e in times],
    )
    (found,) = read_report(path)
    assert "6 launches of CUDA graphs (2.000 ms)" in " ".join(found.notes)
    assert list(read_sums(path).notes) == list(found.notes)
    ranges = [nvtx(0, 10, "a"), *(nvtx(5, end, "b") for end in (2**63 - 1, 2**50 + 5, None, "x"))]
    path = make_export(tmp_path / "y.sqlite", NVTX_EVENTS=ranges)
    (found,) = read_report(path)
    assert found.dur.tolist() == [10]
    assert "skipped 4 NVTX ranges without an end" in found.notes


@pytest.mark.parametrize("name", GPU_FILES[:2])  # the third has one kernel
@pytest.mark.parametrize(
    "change",
    ['"end" = NULL', '"end" = start - 100', '"end" = 9223372036854775807', "\"end\" = 'abc'",
     '"end" = 1e30', "start = NULL", "start = -9223372036854775807", "\"end\" = x'00ff'"],
)  # fmt: skip
def test_fault_2_a_real_export_that_was_changed(
    shared_data: Path, tmp_path: Path, name: str, change: str
) -> None:
    path = tmp_path / name
    table = "CUPTI_ACTIVITY_KIND_KERNEL"
    path.write_bytes((shared_data / "nsys" / name).read_bytes())
    with closing(sqlite3.connect(path)) as connection:
        # A copy of the table has no NOT NULL.
        connection.executescript(
            f"CREATE TABLE X AS SELECT * FROM {table}; DROP TABLE {table}; "
            f"ALTER TABLE X RENAME TO {table}; UPDATE {table} SET {change} WHERE rowid <= 5"
        )
        (all_rows,) = connection.execute(f"SELECT COUNT(*) FROM {table}").fetchone()
    assert counted(path)[0] == all_rows - 5
    with closing(sqlite3.connect(path)) as connection:
        for other in ("MEMCPY", "MEMSET"):
            connection.execute(f"DROP TABLE IF EXISTS CUPTI_ACTIVITY_KIND_{other}")
        connection.commit()
    totals, notes = every_way(path)
    assert totals == [counted(path)] * 3
    assert "skipped 5 GPU activities" in notes[0][0]
    assert notes[0] == notes[1] == notes[2]
