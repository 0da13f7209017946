"""Exports that nsys does not write: refused by name, never read as zeros."""

from __future__ import annotations

import json
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from pytest_sglprof._cli.main import main
from pytest_sglprof._errors import TraceError
from pytest_sglprof._trace.nsys.database import LONGEST_TEXT
from pytest_sglprof._trace.nsys.report import read_report
from pytest_sglprof._trace.nsys.sums import read_sums
from tests.support.nsys_exports import STRINGS, global_id, kernel, make_export, to_parquet

COPY = {"start": 5, "end": 9, "deviceId": 0, "streamId": 7, "globalPid": global_id(100)}
ENDLESS = "WITH RECURSIVE r(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM r)"
TABLES = ("kernel", "memcpy", "memset", "graph_trace")
VIEWS = ("CUPTI_ACTIVITY_KIND_KERNEL", "CUPTI_ACTIVITY_KIND_MEMCPY", "StringIds", "NVTX_EVENTS")


def export(folder: Path, name: str = "x.sqlite") -> Path:
    rows = [kernel(0, 400), kernel(500, 600, name=2)]
    tables = {f"CUPTI_ACTIVITY_KIND_{kind.upper()}": [COPY] for kind in TABLES[1:]}
    tables["CUPTI_ACTIVITY_KIND_KERNEL"] = rows
    return make_export(folder / name, **tables, StringIds=STRINGS, NVTX_EVENTS=[{"start": 1}])


def change(path: Path, statements: str) -> Path:
    with closing(sqlite3.connect(path)) as connection:
        connection.executescript(statements)
    return path


def refused_by_all(path: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """What the commands say of it; each way of reading refuses it, too."""
    for read in (read_report, read_sums):
        with pytest.raises(TraceError):
            read(path)
    said = set()
    for command in ("kernels", "check"):
        assert main([command, str(path)]) == 2
        out, err = capsys.readouterr()
        assert out == ""
        said.add(err)
    (text,) = said
    return text


@pytest.mark.parametrize("is_parquet", [False, True])
@pytest.mark.parametrize("column", ["start", "end"])
@pytest.mark.parametrize("kind", TABLES)
def test_a_table_without_times_is_refused(tmp_path, capsys, kind, column, is_parquet):
    table = f"CUPTI_ACTIVITY_KIND_{kind.upper()}"
    path = change(export(tmp_path), f'ALTER TABLE {table} DROP COLUMN "{column}"')
    if is_parquet:
        path = to_parquet(path, tmp_path / "parquet")
    assert f"its table {table} has no column {column}" in refused_by_all(path, capsys)


@pytest.mark.parametrize(
    "body", ["SELECT * FROM hidden", f"{ENDLESS} SELECT hidden.* FROM hidden, r"]
)
@pytest.mark.parametrize("table", VIEWS)
def test_a_view_is_refused_before_it_is_read(tmp_path, capsys, table, body):
    path = export(tmp_path)
    change(path, f"ALTER TABLE {table} RENAME TO hidden; CREATE VIEW {table} AS {body};")
    assert f"{table} is a view instead of a table" in refused_by_all(path, capsys)


def test_views_of_the_users_are_no_fault(tmp_path):
    path = change(export(tmp_path), f"CREATE VIEW all_of_mine AS {ENDLESS} SELECT x FROM r;")
    assert sum(read_sums(path).total_ns) == 500 + 2 * 4


def test_a_name_of_a_hundred_megabytes_is_cut(tmp_path, capsys):
    path = export(tmp_path)
    huge = "CAST(ZEROBLOB(100000000) AS TEXT)"
    change(path, f"UPDATE StringIds SET value = 'huge' || HEX({huge}) WHERE id = 1")
    assert main(["kernels", str(path), "--format", "json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    (row,) = (row for row in rows if row["name"].startswith("huge"))
    assert (row["count"], row["total_ns"]) == (1, 400)
    assert len(row["name"]) <= LONGEST_TEXT
    names = {name for part in read_report(path) for name in part.names}
    assert max(map(len, names)) <= LONGEST_TEXT
