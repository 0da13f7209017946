"""The windows of `ci.gpu_recordings` by a real nsys, of a command that needs no GPU."""

from __future__ import annotations

import json
import sqlite3
import sys
from contextlib import closing
from pathlib import Path

import pytest

from ci import gpu_recordings
from ci.gpu_answers import REPORTS, NotRun
from tests.support.real_env import real_nsys

pytestmark = pytest.mark.real_nsys

PLANNED = {"graphs": {"4": 20}}
WAITS = f"""
import pathlib, sys, time
folder = pathlib.Path(sys.argv[1])
(folder / "planned.json").write_text({json.dumps(PLANNED)!r})
while not (folder / "stop").exists():
    time.sleep(0.05)
"""


@pytest.fixture(autouse=True)
def nsys_by_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SGLPROF_NSYS", real_nsys())


def test_two_windows_of_one_session(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("A_VARIABLE_OF_THE_MACHINE", "which is in no export")
    command = [sys.executable, "-c", WAITS, str(tmp_path)]
    assert gpu_recordings.nsys_windows(tmp_path, command) == PLANNED
    for name in REPORTS:
        with closing(sqlite3.connect(tmp_path / name)) as connection:
            tables = {row[0] for row in connection.execute("SELECT name FROM sqlite_master")}
        assert "META_DATA_EXPORT" in tables
        assert b"A_VARIABLE_OF_THE_MACHINE" not in (tmp_path / name).read_bytes()
    left = {file.name for file in tmp_path.iterdir()}
    assert left == {*REPORTS, "planned.json", "stop"}


def test_a_command_that_ends_before_it_is_ready(tmp_path: Path) -> None:
    with pytest.raises(NotRun, match="was not ready within 60 s, or it ended"):
        gpu_recordings.nsys_windows(tmp_path, [sys.executable, "-c", "", str(tmp_path)])
