"""Which files an nsys report may come in: exports, reports, folders, and broken ones."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from pytest_sglprof._errors import NotATrace, NsysMissing, TraceError
from pytest_sglprof._nsys import NsysTool
from pytest_sglprof._nsys_export import export
from pytest_sglprof._trace.nsys.report import read_report
from pytest_sglprof._trace.paths import reader_of, window_files
from pytest_sglprof._trace.read import read_window
from tests.support.exporting_nsys import ROWS, ExportingNsys
from tests.support.nsys_exports import (
    CPU_FILES,
    GPU_FILES,
    STRINGS,
    by_name,
    kernel,
    make_export,
    to_parquet,
)


def test_files_that_are_no_export(tmp_path: Path) -> None:
    text = tmp_path / "x.sqlite"
    text.write_text("this is text, not a database, however long it may be\n" * 40)
    with pytest.raises(NotATrace, match="not an SQLite database"):
        read_report(text)
    empty = tmp_path / "empty.sqlite"
    empty.touch()
    with pytest.raises(NotATrace, match="none of an nsys export's tables"):
        read_report(empty)
    for name in ("missing.sqlite", "missing.nsys-rep"):
        with pytest.raises(NotATrace, match="does not exist"):
            read_report(tmp_path / name)


def test_what_a_file_holds_decides_not_its_name(tmp_path: Path, shared_data: Path) -> None:
    export = next((shared_data / "nsys").glob("*.sqlite"))
    trace = next((shared_data / "torch").rglob("*.trace.json.gz"))
    for source, name, reader in ((export, "a.json", "nsys"), (trace, "b.sqlite", "torch")):
        renamed = tmp_path / name
        renamed.write_bytes(source.read_bytes())
        assert reader_of(renamed).name == reader_of(source).name == reader
        columns = ["full_name", "start_ns", "dur_ns"]
        found, expected = (read_window(path).frame[columns] for path in (renamed, source))
        assert found.astype(str).equals(expected.astype(str))
        assert len(found) > 0


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


@pytest.fixture
def fake(tmp_path: Path) -> ExportingNsys:
    return ExportingNsys(tmp_path)


@pytest.mark.parametrize(("types", "ending"), [("", ".sqlite"), ("parquetdir", ".parquetdir")])
def test_a_report_is_exported_once_and_again_when_it_holds_something_else(
    tmp_path: Path, types: str, ending: str
) -> None:
    fake = ExportingNsys(tmp_path, types)
    report = fake.report
    for _ in range(2):
        assert fake.read() == ROWS
    assert fake.exports == 1
    (kept,) = fake.kept
    assert kept.name.startswith(".w.")
    assert kept.suffix == ending
    # Neither the time nor the size tells the new report from the old one.
    times = report.stat()
    report.write_bytes(b"y")
    os.utime(report, ns=(times.st_atime_ns, times.st_mtime_ns))
    fake.read()
    assert fake.exports == 2
    assert not kept.exists()
    assert len(fake.kept) == 1


def test_an_export_that_a_window_left_is_used_for_its_report_only(fake: ExportingNsys) -> None:
    beside = fake.report.with_suffix(".sqlite")
    tool = NsysTool(str(fake.nsys), "2023.4.4")
    export(tool, fake.report, "sqlite", beside, 30)
    assert len(read_report(fake.report, nsys=str(fake.nsys))) == 1
    assert fake.exports == 1
    fake.report.write_bytes(b"another one")
    before = beside.read_bytes()
    fake.read()
    assert fake.exports == 2
    assert beside.read_bytes() == before


def test_a_folder_with_a_stale_export_gives_the_report(fake: ExportingNsys) -> None:
    report = fake.report
    beside = report.with_suffix(".sqlite")
    export(NsysTool(str(fake.nsys), "2023.4.4"), report, "sqlite", beside, 30)
    assert window_files(report.parent) == [beside]
    times = report.stat()
    report.write_bytes(b"y")
    os.utime(report, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert window_files(report.parent) == [report]
    make_export(report.with_name("v.sqlite"), CUPTI_ACTIVITY_KIND_KERNEL=[kernel(0, 1)])
    other = report.with_name("v.nsys-rep")
    other.write_bytes(b"older")
    os.utime(other, ns=(0, 0))
    assert window_files(report.parent) == [report.with_name("v.sqlite"), report]
    os.utime(other)
    os.utime(report.with_name("v.sqlite"), ns=(0, 0))
    assert window_files(report.parent) == [other, report]


def test_an_export_of_unknown_origin_is_neither_used_nor_touched(
    tmp_path: Path, fake: ExportingNsys
) -> None:
    beside = fake.report.with_suffix(".sqlite")
    make_export(beside, CUPTI_ACTIVITY_KIND_KERNEL=[kernel(0, 999)], StringIds=STRINGS)
    before = beside.read_bytes()
    assert fake.read() == ROWS
    assert beside.read_bytes() == before
    with pytest.raises(NsysMissing) as caught:
        fake.report.write_bytes(b"z")
        read_report(fake.report, nsys=str(tmp_path / "no-nsys"))
    assert f"or give {beside} itself" in caught.value.hint


def test_a_parquet_export_that_fails_gives_way_to_sqlite(tmp_path: Path) -> None:
    fake = ExportingNsys(tmp_path, "parquetdir")
    shutil.rmtree(fake.parquet)
    assert len(read_report(fake.report, nsys=str(fake.nsys))) == 1
    assert fake.export_types == ["--type=parquetdir", "--type=sqlite"]


def test_credentials_are_in_no_parquet_export(tmp_path: Path) -> None:
    arrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    fake = ExportingNsys(tmp_path, "parquetdir")
    texts = ["HOME=/x;HF_TOKEN=hush-hush-1;A=1", "plain", None]
    table = arrow.table({"globalVid": [1, 2, 3], "value": texts})
    parquet.write_table(table, fake.parquet / "TARGET_INFO_SYSTEM_ENV.parquet")
    read_report(fake.report, nsys=str(fake.nsys))
    (kept,) = fake.report.parent.glob(".w.*")
    assert all(b"hush-hush-1" not in file.read_bytes() for file in kept.iterdir())
    found = parquet.read_table(kept / "TARGET_INFO_SYSTEM_ENV.parquet")["value"].to_pylist()
    assert found[0].startswith("HOME=/x;HF_TOKEN=")
    assert found[1:] == ["plain", None]


def test_a_report_in_a_folder_that_cannot_be_written(
    fake: ExportingNsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = fake.report.parent
    access = os.access  # a superuser may write anywhere, so permissions alone show nothing
    monkeypatch.setattr(os, "access", lambda path, mode: path != folder and access(path, mode))
    assert len(read_report(fake.report, nsys=str(fake.nsys))) == 1
    assert [file.name for file in folder.iterdir()] == ["w.nsys-rep"]


def test_a_report_without_nsys(tmp_path: Path, fake: ExportingNsys) -> None:
    with pytest.raises(NsysMissing):
        read_report(fake.report, nsys=str(tmp_path / "no-nsys"))


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
