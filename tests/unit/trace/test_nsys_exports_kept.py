"""One report and several readers: what is read of it, who exports it, and what is removed."""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from pytest_sglprof import _nsys_export as nsys_export
from pytest_sglprof._nsys_export import BLOCK, BLOCKS, EDGE, digest_of, exported_from, sample_of
from pytest_sglprof._trace.nsys.files import readable
from pytest_sglprof._trace.nsys.report import read_report
from pytest_sglprof._trace.paths import window_files
from tests.support.exporting_nsys import ROWS, ExportingNsys
from tests.support.nsys_exports import STRINGS, by_name, kernel, make_export, one

READ = """
import sys
from pathlib import Path
from pytest_sglprof._trace.nsys.report import read_report
(found,) = read_report(Path(sys.argv[1]), nsys=sys.argv[2])
print(len(found.dur), int(found.dur.sum()))
"""
LARGE = 2 * EDGE + BLOCKS * BLOCK + 40 * (1 << 20)
ENDINGS = {"parquetdir": ".parquetdir", "": ".sqlite"}


def rewrite(path: Path, at: int, *, same_time: bool) -> None:
    """Changes one byte; neither the size nor, if so wanted, the time tells."""
    before = path.stat()
    with path.open("r+b") as stream:
        stream.seek(at)
        byte = stream.read(1)
        stream.seek(at)
        stream.write(bytes([byte[0] ^ 1]))
    moved = before.st_mtime_ns + (0 if same_time else 1_000_000)
    os.utime(path, ns=(before.st_atime_ns, moved))


def bytes_read() -> int:
    """What this process has read from anywhere so far."""
    text = Path("/proc/self/io").read_text()
    return int(next(line.split()[1] for line in text.splitlines() if line.startswith("rchar")))


@pytest.mark.parametrize("types", ["", "parquetdir"])
def test_fault_16_a_large_report_is_not_read_again(tmp_path: Path, types: str) -> None:
    fake = ExportingNsys(tmp_path, types)
    with fake.report.open("r+b") as stream:
        stream.truncate(300 * (1 << 20))
    assert fake.read() == ROWS
    before = bytes_read()
    for _ in range(3):
        assert fake.read() == ROWS
        assert window_files(fake.report.parent) == [fake.report]
    assert bytes_read() - before < 60 * (1 << 20)
    assert fake.exports == 1


def test_fault_16_a_window_beside_its_report_is_found_without_reading_that(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pytest_sglprof._nsys import NsysTool
    from pytest_sglprof._nsys_export import export

    fake = ExportingNsys(tmp_path)
    with fake.report.open("r+b") as stream:
        stream.truncate(3 * (1 << 30))
    beside = fake.report.with_suffix(".sqlite")
    monkeypatch.setattr(nsys_export, "digest_of", lambda path: "0" * 64)  # 3 GB, once
    export(NsysTool(str(fake.nsys), "2023.4.4"), fake.report, "sqlite", beside, 30)
    monkeypatch.delattr(nsys_export, "digest_of")
    began = time.process_time()  # to read it all takes 3 s of it
    assert window_files(fake.report.parent) == [beside]
    assert fake.read() == ROWS
    assert time.process_time() - began < 1.0
    assert fake.exports == 1


@pytest.mark.parametrize("at", [0, EDGE - 1, EDGE, LARGE - EDGE - 1, LARGE - EDGE, LARGE - 1])
def test_fault_16_what_is_sampled_may_not_differ(tmp_path: Path, at: int) -> None:
    fake = ExportingNsys(tmp_path)
    with fake.report.open("r+b") as stream:
        stream.truncate(LARGE)
    assert fake.read() == ROWS
    (first,) = fake.kept
    rewrite(fake.report, at, same_time=True)
    assert fake.read() == ROWS
    assert fake.exports == 2
    assert first not in fake.kept


def test_fault_16_samples_lie_all_over_the_file(tmp_path: Path) -> None:
    path = tmp_path / "r"
    path.touch()
    os.truncate(path, LARGE)
    whole = sample_of(path)
    step = (LARGE - 2 * EDGE) // BLOCKS + 2 * BLOCK
    changed = 0
    for at in range(EDGE, LARGE - EDGE, step):
        with path.open("r+b") as stream:
            stream.seek(at)
            stream.write(b"\1" * step)
        changed += sample_of(path) != whole
        os.truncate(path, at)
        os.truncate(path, LARGE)
    assert changed == len(range(EDGE, LARGE - EDGE, step))
    os.truncate(path, LARGE + 1)
    assert sample_of(path) != whole


def test_fault_16_a_middle_that_changed_is_told_by_the_time(tmp_path: Path) -> None:
    fake = ExportingNsys(tmp_path)
    with fake.report.open("r+b") as stream:
        stream.truncate(LARGE)
    assert fake.read() == ROWS
    between = (LARGE - 2 * EDGE - BLOCK) // (BLOCKS - 1)  # from one sampled block to the next
    sampled = sample_of(fake.report)
    rewrite(fake.report, EDGE + between // 2 + BLOCK, same_time=False)
    assert sample_of(fake.report) == sampled
    assert fake.read() == ROWS
    assert fake.exports == 2


@pytest.mark.parametrize("types", ["", "parquetdir"])
def test_fault_16_a_copy_of_a_window_needs_no_nsys(tmp_path: Path, types: str) -> None:
    fake = ExportingNsys(tmp_path, types)
    with fake.report.open("r+b") as stream:
        stream.truncate(LARGE)
    assert fake.read() == ROWS
    shutil.copytree(fake.report.parent, tmp_path / "copy")
    copy = tmp_path / "copy" / "w.nsys-rep"
    os.utime(copy, ns=(1, 1))
    assert by_name(one(read_report(copy, nsys=str(tmp_path / "no-nsys")))) == ROWS
    # Another report that was copied over it, with its time and its size, has none.
    other = tmp_path / "other.nsys-rep"
    other.write_bytes(b"y")
    os.truncate(other, LARGE)
    os.utime(other, ns=(1, 1))
    shutil.copy2(other, copy)
    assert by_name(one(read_report(copy, nsys=str(fake.nsys)))) == ROWS
    assert fake.exports == 2


@pytest.mark.parametrize("types", ["", "parquetdir"])
def test_fault_16_processes_at_once_export_once(tmp_path: Path, types: str) -> None:
    fake = ExportingNsys(tmp_path, types, seconds=1.0)
    command = [sys.executable, "-c", READ, str(fake.report), str(fake.nsys)]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    assert [process.communicate(timeout=60)[0].split() for process in running] == [["1", "5"]] * 3
    assert fake.exports == 1
    (kept,) = fake.kept
    assert kept.suffix == ENDINGS[types]


@pytest.mark.parametrize("types", ["", "parquetdir"])
def test_fault_16_threads_at_once_export_once(tmp_path: Path, types: str) -> None:
    fake = ExportingNsys(tmp_path, types, seconds=0.5)
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(lambda _: fake.read(), range(4))) == [ROWS] * 4
    assert fake.exports == 1
    assert len(fake.kept) == 1


@pytest.mark.parametrize("types", ["", "parquetdir"])
def test_fault_16_without_locks_the_first_export_stays(
    tmp_path: Path, types: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: Any) -> None:
        raise OSError("no locks here")

    fake = ExportingNsys(tmp_path, types, seconds=0.4)
    monkeypatch.setattr(fcntl, "flock", refuse)
    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(lambda _: fake.read(), range(2))) == [ROWS] * 2
    assert fake.exports == 2
    assert len(fake.kept) == 1
    fake.report.write_bytes(b"y")
    assert fake.read() == ROWS
    assert len(fake.kept) == 2  # nobody knows whether the old one is being read


@pytest.mark.parametrize("types", ["", "parquetdir"])
def test_fault_16_an_export_that_is_read_is_not_removed(tmp_path: Path, types: str) -> None:
    fake = ExportingNsys(tmp_path, types)
    with readable(fake.report, str(fake.nsys)) as export:
        fake.report.write_bytes(b"another one")
        command = [sys.executable, "-c", READ, str(fake.report), str(fake.nsys)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        assert done.stdout.split() == ["1", "5"], done.stderr
        assert export.exists()
        assert len(fake.kept) == 2
        assert by_name(one(read_report(export))) == ROWS  # the old one, to its end
    fake.report.write_bytes(b"a third one")
    assert fake.read() == ROWS
    assert not export.exists()
    assert len(fake.kept) == 1


@pytest.mark.parametrize("types", ["", "parquetdir"])
def test_fault_16_reading_goes_on_while_the_report_changes_and_changes(
    tmp_path: Path, types: str
) -> None:
    fake = ExportingNsys(tmp_path, types)
    stop = threading.Event()
    errors: list[BaseException] = []

    def read() -> None:
        while not stop.is_set():
            try:
                assert fake.read() == ROWS
            except BaseException as error:
                errors.append(error)
                return

    readers = [threading.Thread(target=read) for _ in range(2)]
    for reader in readers:
        reader.start()
    for number in range(12):
        time.sleep(0.1)
        fresh = tmp_path / "fresh"
        fresh.write_bytes(b"report %d" % number)
        fresh.replace(fake.report)
    stop.set()
    for reader in readers:
        reader.join(30)
    assert not errors
    fake.report.write_bytes(b"the last one")
    assert fake.read() == ROWS
    assert len(fake.kept) == 1


def test_fault_16_an_old_signature_still_counts(tmp_path: Path) -> None:
    import sqlite3
    from contextlib import closing

    fake = ExportingNsys(tmp_path)
    beside = fake.report.with_suffix(".sqlite")
    make_export(beside, CUPTI_ACTIVITY_KIND_KERNEL=[kernel(0, 5)], StringIds=STRINGS)
    with closing(sqlite3.connect(beside)) as connection:
        connection.execute("CREATE TABLE SGLPROF_EXPORT (report_sha256 TEXT)")
        connection.execute("INSERT INTO SGLPROF_EXPORT VALUES (?)", (digest_of(fake.report),))
        connection.commit()
    assert exported_from(beside) == digest_of(fake.report)
    assert fake.read() == ROWS
    assert fake.exports == 0
    fake.report.write_bytes(b"z")
    assert fake.read() == ROWS
    assert fake.exports == 1
