"""Which files an nsys report may come in: exports, reports, folders, and broken ones."""

from __future__ import annotations

import os
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from nsys_exports import (
    CPU_FILES,
    GPU_FILES,
    STRINGS,
    by_name,
    kernel,
    make_export,
    one,
)

from pytest_sglprof.errors import NotATrace, NsysMissing, TraceError
from pytest_sglprof.trace.nsys_report import read_report


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
