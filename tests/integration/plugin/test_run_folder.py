"""A run's folder: names, journal, what is left of killed runs, and what is pruned."""

from __future__ import annotations

import fcntl
import json
import os
from pathlib import Path

import pytest

from pytest_sglprof._report.model import Record
from pytest_sglprof._run.folder import RunBook, RunFolder, new_run_id, prune, write_run_file

FACTS = {
    "command": ["pytest"],
    "host": "here",
    "versions": {
        "pytest_sglprof": "0",
        "python": "3",
        "pytest": "9",
        "pandas": "2",
        "sglang": "",
        "nsys": "",
    },
    "min_steps": 30,
}


def record(nodeid: str = "test_a.py::test_a", outcome: str = "passed", padding: int = 0) -> Record:
    from msgspec.structs import replace

    from pytest_sglprof._report.model import NOTHING
    from pytest_sglprof._report.results import attempt_document

    attempt = attempt_document(
        nodeid=nodeid,
        number=1,
        outcome=outcome,
        verdict=None,
        reason="",
        duration_s=1.0,
        windows=[],
        worker="",
    )
    return replace(NOTHING, attempt=attempt, problems=("x" * padding,))


def run_folders(output: Path) -> list[str]:
    return sorted(path.name for path in output.glob("run-*"))


def test_run_ids_sort_by_time_and_differ():
    first, second = new_run_id(), new_run_id()
    assert first != second
    assert first.startswith("run-2")
    assert first[:-5] <= second[:-5]


def test_folders_are_new_each_time_and_safe(tmp_path):
    folder = RunFolder(tmp_path, "run-1")
    nodeid = "tests/a/test_x.py::test_it[a/b-../../etc]"
    first, second = folder.window("steady", nodeid), folder.window("steady", nodeid)
    assert first != second
    assert first.parent == second.parent == tmp_path / "run-1" / "windows"
    assert (first.name[-2:], second.name[-2:]) == (".1", ".2")
    assert folder.server("default+nsys") == tmp_path / "run-1" / "servers" / "default+nsys.1"
    assert folder.load(nodeid).parent.name == "loads"


def test_workers_of_one_run_never_meet(tmp_path):
    folders = [RunFolder(tmp_path, "run-1", worker=worker).server("s") for worker in ("gw0", "gw1")]
    assert [folder.name for folder in folders] == ["gw0-s.1", "gw1-s.1"]


def test_very_long_node_ids_make_folders_that_a_file_system_takes(tmp_path):
    folder = RunFolder(tmp_path, "run-1", worker="gw0")
    names = {folder.window("w", "test_x.py::test_it[" + "ü" * 300 + f"{n}]").name for n in range(2)}
    assert len(names) == 2
    assert all(len(os.fsencode(name)) < 200 for name in names)


def test_the_journal_holds_every_record_of_a_killed_run(tmp_path):
    book = RunBook(tmp_path, "run-1", FACTS)
    book.open()
    book.add(record("test_a.py::one"))
    book.add(record("test_a.py::two"))
    lines = (tmp_path / "run-1" / "journal.jsonl").read_text().splitlines()
    assert [json.loads(line)["attempt"]["nodeid"] for line in lines] == [
        "test_a.py::one",
        "test_a.py::two",
    ]
    results = book.finish(0)
    assert results == tmp_path / "run-1" / "results.json"
    names = sorted(path.name for path in results.parent.iterdir())
    assert names == ["results.json", "run.json"]
    assert json.loads(results.read_text())["run"]["exit_status"] == 0
    assert (tmp_path / "latest").resolve() == (tmp_path / "run-1").resolve()


def test_a_run_without_records_leaves_nothing(tmp_path):
    book = RunBook(tmp_path / "out", "run-1", FACTS)
    book.open()
    assert book.finish(5) is None
    assert not (tmp_path / "out").exists()


def test_a_run_without_records_keeps_the_servers_logs(tmp_path):
    book = RunBook(tmp_path, "run-1", FACTS)
    book.open()
    (RunFolder(tmp_path, "run-1").server("s") / "server.log").write_text("why")
    assert book.finish(2) is None
    assert (tmp_path / "run-1" / "servers" / "s.1" / "server.log").read_text() == "why"
    names = sorted(path.name for path in (tmp_path / "run-1").iterdir())
    assert names == ["run.json", "servers"]


def test_a_book_that_was_never_opened_writes_nothing(tmp_path):
    book = RunBook(tmp_path, "run-1", FACTS)
    book.add(record())
    assert book.finish(0) is None
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def five_runs(tmp_path):
    for number in range(5):
        folder = tmp_path / f"run-{number}"
        folder.mkdir()
        (folder / "results.json").write_bytes(b"x" * 1000)
        write_run_file(folder, started=0.0, version="0")
    return tmp_path


def test_the_oldest_runs_are_pruned(five_runs):
    assert prune(five_runs, keep_runs=2, keep_bytes=10**9) == ["run-0", "run-1", "run-2"]
    assert run_folders(five_runs) == ["run-3", "run-4"]
    assert prune(five_runs, keep_runs=2, keep_bytes=10**9) == []


def test_runs_are_pruned_by_size_but_never_the_newest(five_runs):
    assert prune(five_runs, keep_runs=10, keep_bytes=3000) == ["run-0", "run-1", "run-2"]
    assert prune(five_runs, keep_runs=10, keep_bytes=1) == ["run-3"]
    assert run_folders(five_runs) == ["run-4"]


def test_a_run_in_use_is_kept_and_one_of_the_dead_is_not(five_runs):
    # run-1's process was killed: its journal is there, but nobody holds its lock.
    (five_runs / "run-1" / "journal.jsonl").touch()
    held = os.open(five_runs / "run-0", os.O_RDONLY)
    try:
        fcntl.flock(held, fcntl.LOCK_EX)
        assert prune(five_runs, keep_runs=2, keep_bytes=10**9) == ["run-1", "run-2", "run-3"]
    finally:
        os.close(held)
    assert run_folders(five_runs) == ["run-0", "run-4"]


def test_an_open_book_is_in_use(five_runs):
    book = RunBook(five_runs, "run-0", FACTS)
    book.open()
    assert "run-0" not in prune(five_runs, keep_runs=1, keep_bytes=10**9)
    book.add(record())
    book.finish(0)
    assert prune(five_runs, keep_runs=1, keep_bytes=10**9) == ["run-0"]


def test_other_files_in_the_output_folder_are_not_ours(five_runs):
    (five_runs / "notes").mkdir()
    (five_runs / "run-0.txt").touch()
    prune(five_runs, keep_runs=1, keep_bytes=1)
    assert (five_runs / "notes").is_dir()
    assert (five_runs / "run-0.txt").exists()
