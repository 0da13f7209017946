"""Small nsys exports, and what a reader made of one, for tests."""

from __future__ import annotations

import sqlite3
from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from pytest_sglprof._trace.table import RankActivities

GPU_FILES = ("mfu_2gpu_before.sqlite", "mfu_2gpu_after.sqlite", "saxpy_perlmutter0.sqlite")
CPU_FILES = ("sglang_cpu_tp2_first.sqlite", "sglang_cpu_tp2_win_b.sqlite")
CPU_PIDS = {31205: "TP0", 31206: "TP1"}

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


def one(found: Sequence[RankActivities]) -> RankActivities:
    assert len(found) == 1
    return found[0]


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
