"""Fifty changes of an export: its sums are those of plain SQL, or it is refused by name."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from pytest_sglprof._errors import SglprofError
from pytest_sglprof._trace.nsys.report import read_report, stream_rows
from pytest_sglprof._trace.nsys.sums import read_sums

SCRIPT = (Path(__file__).parents[2] / "data/fuzz/node.sql").read_text()
K = "CUPTI_ACTIVITY_KIND_KERNEL"
SOME = f"(SELECT rowid FROM {K} LIMIT 5)"
# What may be counted, in plain SQL; the limits are those that the documentation names.
TRUTH = f"""
    SELECT COUNT(*), TOTAL("end" - start) FROM {K}
    WHERE TYPEOF(start) = 'integer' AND TYPEOF("end") = 'integer' AND "end" >= start
    AND start > -(1 << 62) AND "end" < (1 << 62) AND "end" - start < (1 << 50)
"""
ENDLESS = "WITH RECURSIVE r(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM r)"
VALUES = (
    *(("end", value) for value in (
        "start - 100", "start", "NULL", "'abc'", "x'00ff'", "1e30", "start + 0.5", "'12'",
        "9223372036854775807", "start + 1125899906842624", "-1", "0",
    )),
    *(("start", value) for value in ("NULL", "'x'", "-9223372036854775807", "4611686018427387904")),
    *(("deviceId", value) for value in ("NULL", "-3", "'x'", "1e9", "4294967296")),
    *(("streamId", value) for value in ("NULL", "-1", "'x'")),
    *(("demangledName", value) for value in ("NULL", "99999999", "'x'", "-1")),
    *(("shortName", value) for value in ("NULL", "'x'")),
    *(("globalPid", value) for value in ("NULL", "'x'", "9223372036854775807", "0", "-1")),
    *(("correlationId", value) for value in ("NULL", "'x'", "1")),
    *(("graphNodeId", value) for value in ("'x'", "-1", "7")),
)  # fmt: skip
COLUMNS = ("end", "start", "deviceId", "streamId", "demangledName", "shortName", "globalPid",
           "correlationId", "graphNodeId")  # fmt: skip
CASES = {
    "as it is": "",
    **{f"{column} = {value}": f'UPDATE {K} SET "{column}" = {value} WHERE rowid IN {SOME}'
       for column, value in VALUES},
    **{f"no column {column}": f'ALTER TABLE {K} DROP COLUMN "{column}"' for column in COLUMNS},
    "no kernels table": f"DROP TABLE {K}",
    "no kernels": f"DELETE FROM {K}",
    "no names table": "DROP TABLE StringIds",
    "no names": "DELETE FROM StringIds",
    "names NULL": "UPDATE StringIds SET value = NULL",
    "names blobs": "UPDATE StringIds SET value = x'fffe00'",
    "names twice": "INSERT INTO StringIds SELECT * FROM StringIds",
    "names formulas": "UPDATE StringIds SET value = '=cmd|x'",
    "names of a megabyte": "UPDATE StringIds SET value = CAST(ZEROBLOB(1000000) AS TEXT)",
    "rows twice": f"INSERT INTO {K} SELECT * FROM {K}",
    "a view": f"ALTER TABLE {K} RENAME TO hidden; CREATE VIEW {K} AS SELECT * FROM hidden",
    "an endless view": f"ALTER TABLE {K} RENAME TO hidden; "
    f"CREATE VIEW {K} AS {ENDLESS} SELECT hidden.* FROM hidden, r",
    "names an endless view": "ALTER TABLE StringIds RENAME TO hidden; CREATE VIEW StringIds AS "
    f"{ENDLESS} SELECT x AS id, ZEROBLOB(1000000) AS value FROM r",
    "a trigger": f"CREATE TRIGGER t AFTER INSERT ON {K} BEGIN DELETE FROM {K}; END",
    "a column more": f"ALTER TABLE {K} ADD COLUMN more TEXT",
    "a generated column": f"ALTER TABLE {K} RENAME COLUMN deviceId TO d; ALTER TABLE {K} "
    "ADD COLUMN deviceId AS (LENGTH(HEX(ZEROBLOB(100000))))",
    "milliseconds": f'UPDATE {K} SET start = start / 1000000, "end" = "end" / 1000000',
    "without rowid": f"ALTER TABLE {K} RENAME TO hidden; CREATE TABLE {K} (start INTEGER PRIMARY "
    f'KEY, "end", deviceId, streamId, globalPid, demangledName) WITHOUT ROWID; INSERT OR IGNORE '
    f'INTO {K} SELECT start, "end", deviceId, streamId, globalPid, demangledName FROM hidden',
    "columns of another case": f'ALTER TABLE {K} RENAME COLUMN "end" TO "END"',
    "processes NULL": "UPDATE PROCESSES SET globalPid = NULL",
    "calls of one name": "UPDATE CUPTI_ACTIVITY_KIND_RUNTIME SET nameId = 'x', correlationId = 1",
    "ranges without an end": 'UPDATE NVTX_EVENTS SET "end" = NULL',
    "ranges without text": "UPDATE NVTX_EVENTS SET textId = 99, text = NULL",
    "copies of unknown kinds": "UPDATE CUPTI_ACTIVITY_KIND_MEMCPY SET copyKind = 'x'",
    "session times texts": "UPDATE TARGET_INFO_SESSION_START_TIME SET utcEpochNs = 'x'",
}  # fmt: skip


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("export") / "x.sqlite"
    with closing(sqlite3.connect(path)) as connection:
        connection.executescript(SCRIPT)
    return path.read_bytes()


def every_way(path: Path) -> list[tuple[int, int]]:
    """Count and ns of the kernels, by each way of reading."""
    report, sums, streams = read_report(path), read_sums(path), stream_rows(path)
    durs = [dur for part in report for dur in part.dur[part.is_kernel].tolist()]
    rows = zip(sums.kind, sums.count, sums.total_ns, strict=True)
    kernels = [(count, total) for kind, count, total in rows if kind == "kernel"]
    return [
        (len(durs), sum(durs)),
        (sum(count for count, _ in kernels), sum(total for _, total in kernels)),
        (sum(row.kernels for row in streams), sum(row.total_ns for row in streams)),
    ]


@pytest.mark.parametrize("name", CASES)
def test_a_changed_export_gives_the_sums_of_plain_sql_or_none(
    tmp_path: Path, export: bytes, name: str
) -> None:
    path = tmp_path / "x.sqlite"
    path.write_bytes(export)
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("PRAGMA synchronous = OFF")
        connection.executescript(CASES[name])
    try:
        totals = every_way(path)
    except SglprofError as error:
        assert "x.sqlite" in error.what
        assert error.expected
        assert error.hint
        assert name != "as it is"
        return
    with closing(sqlite3.connect(path)) as connection:
        assert totals == [connection.execute(TRUTH).fetchone()] * 3


def test_there_are_fifty() -> None:
    assert len(CASES) >= 50
