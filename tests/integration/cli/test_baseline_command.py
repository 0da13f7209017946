"""`sglprof baseline`: what is accepted, listed, shown and removed."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

import pytest

from pytest_sglprof._baselines.history import append_run
from pytest_sglprof._baselines.records import Floor, LifeRecord
from pytest_sglprof._baselines.store import BaselineFolder
from pytest_sglprof._cli.main import main
from pytest_sglprof._run.folder import write_run_file
from tests.support.lives import key, life

Captured = pytest.CaptureFixture[str]


@pytest.fixture(autouse=True)
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SGLPROF_LEASE_DIR", str(tmp_path / "leases"))
    (tmp_path / "sglprof.toml").write_text('[baseline]\ndir = "perf/baselines"\n')
    return tmp_path


def recorded(project: Path, name: str, *lives: LifeRecord) -> Path:
    """A run with these lives."""
    folder = project / ".sglprof" / name
    folder.mkdir(parents=True)
    write_run_file(folder, started=0.0, version="1")
    (folder / "results.json").write_text("{}")
    append_run(folder.parent, name, lives)
    return folder


def called(capsys: Captured, *words: str) -> tuple[int, str, str]:
    status = main(["baseline", *words])
    shown = capsys.readouterr()
    return status, shown.out, shown.err


def folder_of(project: Path) -> BaselineFolder:
    return BaselineFolder(project / "perf/baselines")


@pytest.mark.parametrize("how", ["id", "folder", "results.json", "latest", "removed"])
def test_a_run_is_accepted_however_it_is_named(project: Path, capsys: Captured, how: str) -> None:
    one = life()
    folder = recorded(project, "run-1", one)
    (project / ".sglprof/latest").symlink_to("run-1")
    name = {"folder": str(folder), "results.json": str(folder / "results.json")}.get(how, "run-1")
    if how == "removed":
        for path in folder.iterdir():
            path.unlink()
        folder.rmdir()
    status, out, err = called(capsys, "accept", "latest" if how == "latest" else name)
    assert (status, err) == (0, "")
    file = project / "perf/baselines" / key().file_name
    assert out == f"accepted: {key().test}, window steady -> {file} (new)\n"
    baseline = folder_of(project).find(key())
    assert baseline is not None
    assert [each.record for each in baseline.lives] == [one]
    assert baseline.lives[0].accepted.startswith("20")


def test_a_regression_needs_a_reason(project: Path, capsys: Captured) -> None:
    recorded(project, "run-1", life())
    slow = life(verdict="fail", failed=("regression",))
    recorded(project, "run-2", slow, life(key=key(window="burst"), verdict="fail", failed=("x",)))
    assert called(capsys, "accept", "run-1")[0] == 0
    before = (project / "perf/baselines" / key().file_name).read_bytes()
    status, out, _ = called(capsys, "accept", "run-2")
    assert status == 2
    assert "not accepted: tests/test_serving.py::test_decode, window steady: it failed by " in out
    assert "which is accepted with a reason only" in out
    assert (project / "perf/baselines" / key().file_name).read_bytes() == before
    status, out, _ = called(capsys, "accept", "run-2", "--reason", "fp32 logits")
    assert status == 0
    assert "window burst: it failed by x" in out
    baseline = folder_of(project).find(key())
    assert baseline is not None
    assert [(each.begins_level, each.reason) for each in baseline.lives] == [
        (False, ""),
        (True, "fp32 logits"),
    ]
    assert called(capsys, "accept", "run-2", "--window", "steady", "--reason", "x")[0] == 0  # known


def test_only_some_windows_are_accepted(project: Path, capsys: Captured) -> None:
    recorded(project, "run-1", life(), life(key=key(window="burst")), life(key=key(test="other")))
    assert called(capsys, "accept", "run-1", "--test", "serving", "--window", "burst")[0] == 0
    assert [each.key.window for each in folder_of(project).list()] == ["burst"]
    status, _, err = called(capsys, "accept", "run-1", "--window", "nowhere")
    assert status == 2
    assert "run run-1 has no such window" in err


def test_a_new_level_after_an_improvement(project: Path, capsys: Captured) -> None:
    recorded(project, "run-1", life())
    status, _, err = called(capsys, "accept", "run-1", "--new-level")
    assert (status, "--new-level without --reason" in err) == (2, True)
    assert called(capsys, "accept", "run-1", "--new-level", "--reason", "graphs")[0] == 0
    baseline = folder_of(project).find(key())
    assert baseline is not None
    assert (baseline.lives[0].begins_level, baseline.lives[0].reason) == (True, "graphs")


def test_a_run_without_lives_says_which_have_some(project: Path, capsys: Captured) -> None:
    recorded(project, "run-1", life())
    status, _, err = called(capsys, "accept", "run-9")
    assert status == 2
    assert "run run-9 left no record of a server life" in err
    assert "the newest are run-1" in err


def test_without_a_folder_of_baselines(project: Path, capsys: Captured) -> None:
    (project / "sglprof.toml").unlink()
    status, _, err = called(capsys, "list")
    assert status == 2
    assert "no folder of baselines is set" in err
    assert "--baselines DIR" in err
    status, _, err = called(capsys, "list", "--baselines", "elsewhere")
    assert (status, "elsewhere has no baseline" in err) == (0, True)


def filled(project: Path) -> BaselineFolder:
    folder = folder_of(project)
    folder.accept([life(night=night) for night in (1, 2, 3)])
    folder.accept([life(night=4, verdict="fail", failed=("regression",), scale=1.2)], reason="fp32")
    folder.accept([life(key=key(window="burst", gpu="", gpus=0))])
    floor = Floor(lives=10, sd={"compute": 0.012}, upper=1.65, measured="2026-11-20", host="h1")
    folder.set_floor(key(), floor)
    return folder


def test_list(project: Path, capsys: Captured) -> None:
    filled(project)
    status, out, err = called(capsys, "list", "--format", "json")
    assert (status, err) == (0, "")
    burst, steady = sorted(json.loads(out), key=lambda row: str(row["window"]))
    assert (steady["lives"], steady["level"], steady["hosts"]) == (4, 1, "h1")
    assert (steady["newest"], steady["sglang"]) == ("2026-11-04", "0.5.23")
    assert (steady["floor"], burst["floor"]) == ("10 lives, 2026-11-20", "")
    assert burst["gpu"] == "unknown"
    _, out, _ = called(capsys, "list")
    assert steady["file"] in out
    _, out, _ = called(capsys, "list", "--format", "csv")
    assert len(list(csv.DictReader(io.StringIO(out)))) == 2


def test_show(project: Path, capsys: Captured) -> None:
    filled(project)
    status, out, _ = called(capsys, "show", key().file_name)
    assert status == 0
    assert "  2 x NVIDIA H200; org/model; torch" in out
    assert "  server: attention_backend=fa3" in out
    assert "differ by (sd, 10 lives): compute 1.2 %" in out
    assert out.count("earlier") == 3
    assert "960.0" in out  # µs a step of the slower life
    assert "begins" in out
    assert "fp32" in out
    _, out, _ = called(capsys, "show", "test_serving", "--format", "json")
    shown: list[dict[str, Any]] = json.loads(out)
    assert sorted(len(each["lives"]) for each in shown) == [1, 4]
    status, _, err = called(capsys, "show", "test_nothing")
    assert status == 2
    assert "it has those of tests/test_serving.py::test_decode" in err


def test_what_cannot_be_read_is_told_and_the_rest_is_listed(
    project: Path, capsys: Captured
) -> None:
    filled(project)
    file = project / "perf/baselines" / key().file_name
    file.write_text("<<<<<<< HEAD\n")
    status, out, err = called(capsys, "list", "--format", "json")
    assert status == 2
    assert [row["window"] for row in json.loads(out)] == ["burst"]
    assert err.startswith(f"note: baseline {file} is damaged: ")
    assert file.read_text() == "<<<<<<< HEAD\n"


def test_prune(project: Path, capsys: Captured) -> None:
    filled(project)
    recorded(project, "run-1", life())
    status, _, err = called(capsys, "prune")
    assert (status, "nothing says what to remove" in err) == (2, True)
    _, out, _ = called(capsys, "prune", "--keep", "2", "--unused-by", "run-1", "--dry-run")
    assert "would remove 2 lives of" in out
    assert "would remove all lives of" in out
    assert "no run used it" in out
    assert sorted(len(each.lives) for each in folder_of(project).list()) == [1, 4]
    assert called(capsys, "prune", "--keep", "2", "--unused-by", "run-1")[0] == 0
    (left,) = folder_of(project).list()
    assert [each.record.recorded[8:10] for each in left.lives] == ["03", "04"]
    _, out, _ = called(capsys, "prune", "--older-than", "0.001")
    assert out.count("removed all lives of") == (
        1 if left.lives[-1].record.recorded < "2026-11-29" else 0
    )


def test_a_night_that_was_accepted_by_mistake_can_be_taken_out(
    project: Path, capsys: Captured
) -> None:
    folder = filled(project)
    baseline = folder.find(key())
    assert baseline is not None
    wrong = baseline.lives[1].record
    status, out, _ = called(capsys, "prune", "--run", wrong.run)
    assert (status, out.startswith("removed 1 life of")) == (0, True)
    baseline = folder.find(key())
    assert baseline is not None
    assert len(baseline.lives) == 3
    assert wrong.run not in {each.record.run for each in baseline.lives}


def test_prune_says_that_nothing_is_to_remove(project: Path, capsys: Captured) -> None:
    status, out, err = called(capsys, "prune", "--run", "run-mistyped")
    assert (status, out) == (0, "")
    assert f"nothing to remove in {project / 'perf'}" in err


@pytest.mark.parametrize("words", [[], ["accept"], ["show"], ["nothing"], ["prune", "--keep", "0"]])
def test_wrong_usage_is_2(words: list[str], capsys: Captured) -> None:
    assert called(capsys, *words)[0] == 2
