"""The rows of nsys's real behaviour that `pytest_sglprof._nsys` relies on or corrects."""

from __future__ import annotations

import os
import secrets
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from pytest_sglprof._errors import NsysSessionError
from pytest_sglprof._nsys import NsysSession, NsysTool, find_nsys, profile_prefix
from pytest_sglprof._nsys_export import can_export_parquet, digest_of, export, exported_from
from pytest_sglprof._trace.nsys.report import read_report
from tests.support.real_env import real_nsys

pytestmark = pytest.mark.real_nsys

TARGET = "import time\nprint('up', flush=True)\ntime.sleep(600)"


@pytest.fixture(scope="module")
def tool() -> NsysTool:
    return find_nsys(real_nsys())


class Profiled:
    """A sleeping Python under a session of its own."""

    def __init__(self, tool: NsysTool, folder: Path) -> None:
        self.folder = folder
        tmpdir = folder / "tmp"
        tmpdir.mkdir()
        self.session = NsysSession(tool, f"test-{secrets.token_hex(4)}", tmpdir=tmpdir)
        first = folder / "first.nsys-rep"
        prefix = profile_prefix(tool, self.session.name, first, (), gpu=False)
        self.command = subprocess.Popen(
            [*prefix, sys.executable, "-c", TARGET],
            stdout=subprocess.PIPE,
            env={**os.environ, "TMPDIR": str(tmpdir)},
            start_new_session=True,
        )
        assert self.command.stdout is not None
        assert self.command.stdout.readline() == b"up\n"

    def end(self) -> None:
        self.session.shutdown(timeout=20, discard=True)
        self.command.wait(20)
        assert self.command.stdout is not None
        self.command.stdout.close()


@pytest.fixture
def profiled(tool: NsysTool, tmp_path: Path) -> Iterator[Profiled]:
    target = Profiled(tool, tmp_path)
    yield target
    target.end()


def test_many_windows_in_one_life_each_where_it_was_asked(profiled, tmp_path):
    mine = profiled.session
    assert mine.state() == "DelayedCollection"
    for number in range(3):
        wanted = tmp_path / "windows" / f"{number}" / "w.nsys-rep"
        mine.start(wanted)
        assert mine.state() == "Collection"
        with pytest.raises(NsysSessionError, match="already collects"):
            mine.start(tmp_path / "other.nsys-rep")
        assert mine.stop(timeout=60) == wanted
        assert wanted.stat().st_size > 0
        assert mine.state() == "Launched"
    assert not (tmp_path / "first.nsys-rep").exists()  # the first window's, moved
    with pytest.raises(NsysSessionError, match="no open window"):
        mine.stop(timeout=10)


def test_a_report_replaces_an_older_file(profiled, tmp_path):
    wanted = tmp_path / "w.nsys-rep"
    for _ in range(2):
        wanted.write_bytes(b"old")
        profiled.session.start(wanted)
        assert profiled.session.stop(timeout=60) == wanted
        assert wanted.read_bytes() != b"old"


def test_an_open_window_is_not_lost_by_a_shutdown(profiled, tmp_path):
    profiled.session.start(tmp_path / "w.nsys-rep")
    with pytest.raises(NsysSessionError, match="still has an open window"):
        profiled.session.shutdown()
    assert profiled.session.stop(timeout=60).is_file()
    profiled.session.shutdown()
    assert profiled.session.state() in ("", "Shutdown")


def test_an_unknown_name_creates_no_stray_session(tool, tmp_path):
    stray = NsysSession(tool, "nobody", tmpdir=tmp_path)
    with pytest.raises(NsysSessionError, match="there is no nsys session"):
        stray.start(tmp_path / "w.nsys-rep")
    assert stray.state() == ""


def test_a_session_is_recovered_by_name_after_its_command_was_killed(profiled, tmp_path):
    profiled.command.send_signal(signal.SIGKILL)
    profiled.command.wait(10)
    profiled.session.start(tmp_path / "w.nsys-rep")
    assert profiled.session.stop(timeout=60) == tmp_path / "w.nsys-rep"


def test_sigterm_to_the_command_in_a_window_is_the_second_way_out(profiled, tmp_path):
    profiled.session.start(tmp_path / "w.nsys-rep")
    profiled.command.terminate()
    profiled.command.wait(30)
    assert (tmp_path / "first.nsys-rep").stat().st_size > 0


def test_an_export_has_the_processes_and_no_credentials(profiled, tool, tmp_path, monkeypatch):
    secret = secrets.token_hex(16)
    other = subprocess.Popen(["sleep", "60"], env={"SOME_API_KEY": secret, "PATH": "/bin"})
    try:
        profiled.session.start(tmp_path / "w.nsys-rep")
        time.sleep(0.2)
        report = profiled.session.stop(timeout=60)
    finally:
        other.kill()
        other.wait()
    exported = export(tool, report, "sqlite", tmp_path / "x" / "w.sqlite", 60)
    connection = sqlite3.connect(exported)
    (tables,) = connection.execute(
        "SELECT count(*) FROM sqlite_master WHERE name IN ('StringIds', 'PROCESSES')"
    ).fetchone()
    connection.close()
    assert tables == 2
    assert secret.encode() not in exported.read_bytes()
    assert [path.name for path in exported.parent.iterdir()] == ["w.sqlite"]
    assert exported_from(exported) == digest_of(report)
    # The same as Parquet, which this nsys can write, and read again by way of the report.
    assert can_export_parquet(tool)
    folder = export(tool, report, "parquet", tmp_path / "y" / "w", 60)
    assert any(file.name == "PROCESSES.parquet" for file in folder.iterdir())
    assert all(secret.encode() not in file.read_bytes() for file in folder.iterdir())
    assert read_report(report, nsys=tool.path) == read_report(exported)
    (kept,) = report.parent.glob(f".{report.stem}.*")
    assert kept.suffix == ".parquetdir"
