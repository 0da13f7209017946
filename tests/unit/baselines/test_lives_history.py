"""The lives of all runs: one file a run."""

from __future__ import annotations

import json
from pathlib import Path

from jsonschema import Draft202012Validator

import pytest_sglprof
from pytest_sglprof._baselines.history import append_run, history_file, read_history
from pytest_sglprof._run.folder import prune, write_run_file
from tests.support.lives import life

SCHEMAS = Path(pytest_sglprof.__file__).parent / "schemas"


def test_each_run_has_a_file_and_all_are_read_in_order_of_time(tmp_path: Path) -> None:
    late, early, other = (life(night=night) for night in (20, 3, 10))
    first = append_run(tmp_path, "run-b", [late, early])
    second = append_run(tmp_path, "run-a", [other])
    assert (first, second) == (history_file(tmp_path, "run-b"), history_file(tmp_path, "run-a"))
    assert sorted(path.name for path in (tmp_path / "history").iterdir()) == [
        "run-a.jsonl",
        "run-b.jsonl",
    ]
    assert read_history(tmp_path) == [early, other, late]


def test_a_run_may_add_to_its_file(tmp_path: Path) -> None:
    lives = [life(night=1), life(night=2)]
    for each in lives:
        append_run(tmp_path, "run-a", [each])
    assert read_history(tmp_path) == lives
    assert append_run(tmp_path, "run-b", []) is None


def test_no_history_is_no_life(tmp_path: Path) -> None:
    assert read_history(tmp_path) == []


def test_broken_lines_are_left_out_and_reported(tmp_path: Path) -> None:
    lives = [life(night=1), life(night=2)]
    path = append_run(tmp_path, "run-a", lives)
    assert path is not None
    good = path.read_bytes().splitlines()
    newer = good[1].replace(b'"format":[1,0]', b'"format":[2,0]')
    minor = (
        good[1].replace(b'"format":[1,0]', b'"format":[1,9]').replace(b'"apart"', b'"x":1,"apart"')
    )
    path.write_bytes(b"\n".join([good[0], b"{half of a li", b"", newer, b"[]", minor]) + b"\n")
    problems: list[str] = []
    found = read_history(tmp_path, problems=problems)
    assert [each.id for each in found] == [each.id for each in lives]
    assert [line.partition(",")[2].partition(":")[0] for line in problems] == [
        " line 2",
        " line 4",
        " line 5",
    ]
    assert "of format 2, left out" in problems[1]


def test_runs_that_are_removed_leave_their_lives(tmp_path: Path) -> None:
    for name in ("run-1", "run-2"):
        (tmp_path / name).mkdir()
        write_run_file(tmp_path / name, started=0.0, version="1")
        append_run(tmp_path, name, [life()])
    assert prune(tmp_path, keep_runs=1, keep_bytes=1e9) == ["run-1"]
    assert len(read_history(tmp_path)) == 2


def test_a_line_fits_its_schema(tmp_path: Path) -> None:
    path = append_run(tmp_path, "run-a", [life()])
    assert path is not None
    schema = json.loads((SCHEMAS / "life.schema.json").read_text())
    Draft202012Validator(schema).validate(json.loads(path.read_text()))
