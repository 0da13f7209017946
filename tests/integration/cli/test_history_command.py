"""`sglprof history`: a figure of every life, and where it changed."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import numpy as np
import pytest

from pytest_sglprof._baselines.history import append_run
from pytest_sglprof._baselines.records import LifeRecord
from pytest_sglprof._baselines.store import BaselineFolder
from pytest_sglprof._cli.main import main
from tests.support.lives import key, life, provenance

Captured = pytest.CaptureFixture[str]
NOISE: list[float] = np.random.default_rng(7).normal(0, 0.004, 30).tolist()


@pytest.fixture(autouse=True)
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SGLPROF_LEASE_DIR", str(tmp_path / "leases"))
    (tmp_path / "sglprof.toml").write_text('[baseline]\ndir = "perf"\n')
    return tmp_path


def night(number: int, scale: float = 1.0, **changes: object) -> LifeRecord:
    name = f"run-{number:02}"
    version = provenance(versions={"sglang": f"0.5.{number}"})
    fields = {"run": name, "id": f"{name}/w", "life": f"{name}/s", "provenance": version}
    return life(night=number, scale=scale * (1 + NOISE[number - 1]), **{**fields, **changes})


def recorded(project: Path, *lives: LifeRecord, folder: str = ".sglprof") -> None:
    for each in lives:
        append_run(project / folder, each.run, [each])


def called(capsys: Captured, *words: str) -> tuple[int, str, str]:
    status = main(["history", *words])
    shown = capsys.readouterr()
    return status, shown.out, shown.err


def regressed(project: Path) -> list[LifeRecord]:
    """Slower by 15 % since night 11; night 13 is accepted with a reason."""
    good = [night(number) for number in range(1, 11)]
    bad = [night(n, 1.15, verdict="fail", failed=("regression",)) for n in range(11, 21)]
    recorded(project, *good, *bad)
    folder = BaselineFolder(project / "perf")
    folder.accept(good[:8])
    folder.accept([bad[2]], reason="fp32 logits")
    return [*good, *bad]


def test_the_table_says_where_it_changed_and_between_which_versions(
    project: Path, capsys: Captured
) -> None:
    regressed(project)
    status, out, err = called(capsys)
    assert (status, err) == (0, "")
    lines = out.splitlines()
    assert lines[0] == f"{key().test}, window steady, NVIDIA H200: compute"
    assert sum(line.startswith("2026-11-") for line in lines) == 20
    assert next(line for line in lines if "fp32 logits" in line).startswith("2026-11-13")
    (changed,) = (line for line in lines if "changed by" in line)
    assert "changed by +1" in changed
    assert changed.endswith("before is 0.5.10 (run-10), the first after is 0.5.11 (run-11)")
    assert "  last good: 0.5.10 (run-10); first bad: 0.5.11 (run-11)" in lines


def test_csv_and_json_have_every_life(project: Path, capsys: Captured) -> None:
    lives = regressed(project)
    _, out, _ = called(capsys, "--format", "csv")
    rows = list(csv.DictReader(io.StringIO(out)))
    assert [row["run"] for row in rows] == [each.run for each in lives]
    assert [row["run"] for row in rows if row["accepted"]] == [
        *(f"run-{number:02}" for number in range(1, 9)),
        "run-13",
    ]
    assert [row["run"] for row in rows if row["is_change"] == "True"] == ["run-11"]
    (accepted,) = (row for row in rows if row["reason"])
    assert (accepted["begins_level"], accepted["reason"]) == ("True", "fp32 logits")
    values = [float(row["value"]) for row in rows]
    expected = [each.groups[0].strata[0].compute_ns for each in lives]
    assert values == pytest.approx(expected)
    _, out, _ = called(capsys, "--format", "json", "--metric", "ttft_p99")
    assert {row["value"] for row in json.loads(out)} == {250.0}
    assert {row["unit"] for row in json.loads(out)} == {"ms"}
    _, out, _ = called(capsys, "--format", "json", "--kernel", "moe")
    assert json.loads(out)[0]["metric"] == "/moe/"


def test_what_is_chosen(project: Path, capsys: Captured) -> None:
    recorded(project, night(1), night(20), night(21, key=key(window="burst")))
    assert len(json.loads(called(capsys, "--format", "json")[1])) == 3
    assert len(json.loads(called(capsys, "--format", "json", "--window", "burst")[1])) == 1
    assert len(json.loads(called(capsys, "--format", "json", "--since", "2026-11-19")[1])) == 2
    status, _, err = called(capsys, "--test", "nothing")
    assert (status, "no server life was recorded that fits" in err) == (2, True)
    status, _, err = called(capsys, "--since", "yesterday")
    assert (status, "--since yesterday is no date" in err) == (2, True)


@pytest.mark.parametrize(
    "words", [("--metric", "bogus"), ("--kernel", "no_such"), ("--stage", "x")]
)
def test_a_figure_that_no_life_has_is_an_error_with_those_there_are(
    project: Path, capsys: Captured, words: tuple[str, str]
) -> None:
    recorded(project, night(1), night(2))
    status, out, err = called(capsys, *words)
    assert (status, out) == (2, "")
    assert "none of these 2 lives has a figure" in err
    assert words[1] in err
    assert "compute, " in err
    assert "ttft_p99" in err


def test_a_load_that_was_not_measured(project: Path, capsys: Captured) -> None:
    recorded(project, night(1, load=None))
    status, _, err = called(capsys, "--metric", "ttft_p99")
    assert (status, "that ended before the window opened" in err) == (2, True)


def test_folders_of_several_machines_are_one_history(project: Path, capsys: Captured) -> None:
    recorded(project, night(1), folder="a")
    recorded(project, night(2), night(1), folder="b")
    _, out, _ = called(capsys, "a", "b", "--format", "json")
    assert [row["run"] for row in json.loads(out)] == ["run-01", "run-02"]


def test_without_a_life(project: Path, capsys: Captured) -> None:
    status, _, err = called(capsys)
    assert status == 2
    assert "no server life was recorded" in err


def test_an_unchanged_history_has_no_sentence(project: Path, capsys: Captured) -> None:
    recorded(project, *(night(number) for number in range(1, 21)))
    _, out, _ = called(capsys)
    assert "changed by" not in out
    assert "first bad" not in out


def test_a_page_has_every_life_of_every_key(project: Path, capsys: Captured) -> None:
    regressed(project)
    recorded(project, night(21, key=key(window="bs1")))
    status, shown, _ = called(capsys, "--page", "nights.html")
    assert (status, shown) == (0, "nights.html\n")
    text = (project / "nights.html").read_text()
    assert "History of 21 server lives" in text
    assert "accepted: fp32 logits" in text
    assert "Since 2026-11-11, 0.5.11 (before it 0.5.10): compute " in text
    assert called(capsys, "--window", "bs1", "--page", "one.html")[0] == 0
    assert "History of 1 server life" in (project / "one.html").read_text()


def test_a_page_never_replaces_what_is_read(project: Path, capsys: Captured) -> None:
    recorded(project, night(1))
    file = next((project / ".sglprof" / "history").iterdir())
    before = file.read_bytes()
    status, _, told = called(capsys, "--page", str(file))
    assert status == 2
    assert "--page" in told
    assert file.read_bytes() == before
