"""Every command reads with the configuration that pytest would have, or that a run stored."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pytest_sglprof import read_window
from pytest_sglprof._cli.main import COMMANDS, main
from pytest_sglprof._errors import ExitStatus
from pytest_sglprof._report.results import write_results
from pytest_sglprof._run.folder import write_run_file
from tests.integration.cli.test_perfetto_command import trace
from tests.support.windows import run, window

Output = pytest.CaptureFixture[str]
MINE = [{"name": "mine", "pattern": "script"}]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two ranks, the second slower, in `deep/window`; the working folder is `deep`."""
    place = tmp_path / "deep" / "window"
    place.mkdir(parents=True)
    for rank in range(2):
        text = json.dumps(trace(rank, 1.4 if rank else 1.0))
        (place / f"p-1-TP-{rank}.trace.json").write_text(text)
    monkeypatch.chdir(tmp_path / "deep")
    return place


@pytest.fixture
def run_folder(folder: Path, tmp_path: Path) -> Path:
    """A run that recorded the same, with a category of its own."""
    place = tmp_path / "run-1"
    kept = place / "windows" / "w1"
    kept.parent.mkdir(parents=True)
    folder.rename(kept)
    document = run([window(read_window(kept))])
    document["windows"][0]["artifacts"] = [
        {"path": f"windows/w1/{file.name}", "kind": "torch", "rank": f"TP{at}"}
        for at, file in enumerate(sorted(kept.iterdir()))
    ]
    write_results(document, place / "results.json")
    stored = {"category": MINE, "gate": {"min_steps": 61}}
    write_run_file(place, started=0.0, version="0", settings=stored)
    return place


def config(folder: Path) -> None:
    (folder / "sglprof.toml").write_text(
        '[[category]]\nname = "mine"\npattern = "script"\n[[threshold]]\nscope = "mine"\n'
        "limit = 1.3\n"
    )


def checked(capsys: Output, *words: object) -> tuple[int, dict[str, Any]]:
    status = main(["check", *map(str, words), "--format", "json"])
    document: dict[str, Any] = json.loads(capsys.readouterr().out)
    return status, document


def test_thresholds_and_categories_are_those_of_the_configuration(
    folder: Path, tmp_path: Path, capsys: Output
) -> None:
    assert checked(capsys, folder)[0] == ExitStatus.DONE  # the default limit was given by nobody
    (tmp_path / ".git").mkdir()
    config(tmp_path)
    status, document = checked(capsys, folder)
    assert (status, document["verdict"]) == (ExitStatus.EXCEEDED, "fail")
    (check,) = document["checks"]
    assert (check["scope"], check["limit"], check["slowest"]) == ("mine", 1.3, "TP1")
    assert document["stragglers"]["groups"][0]["ranks"]
    assert checked(capsys, folder, "--exit-zero")[0] == ExitStatus.DONE
    assert checked(capsys, folder, "--set", "gate.min_steps=61")[0] == ExitStatus.INCONCLUSIVE
    words = ("--exit-zero", "--min-steps", "61")
    status, document = checked(capsys, folder, *words)
    assert (status, document["verdict"]) == (ExitStatus.DONE, "inconclusive")
    assert main(["check", str(folder), "--set", "gate.minsteps=4"]) == ExitStatus.UNUSABLE
    assert "did you mean min_steps?" in capsys.readouterr().err


def test_two_thresholds_are_two_checks_in_every_form(folder: Path, capsys: Output) -> None:
    both = "threshold=[{scope='compute', limit=1.1}, {metric='lost_share', limit=0.9}]"
    status, document = checked(capsys, folder, "--set", both)
    assert status == ExitStatus.EXCEEDED
    assert [check["verdict"] for check in document["checks"]] == ["fail", "pass"]
    assert main(["check", str(folder), "--set", both]) == ExitStatus.EXCEEDED
    text = capsys.readouterr().out
    assert text.startswith("fail: TP1 is ")
    assert "\npass: " in text
    assert main(["check", str(folder), "--set", both, "--format", "csv"]) == ExitStatus.EXCEEDED
    assert len(capsys.readouterr().out.splitlines()) == 1 + 2 * 2


def test_every_command_knows_the_categories(folder: Path, tmp_path: Path, capsys: Output) -> None:
    config(tmp_path / "deep")
    assert main(["kernels", str(folder), "--by", "category", "--format", "csv"]) == 0
    assert "\nmine,240," in capsys.readouterr().out
    out = tmp_path / "m.json"
    words = ["export", "--to", "perfetto", "--only", "kernels", str(folder), "-o", str(out)]
    assert main(words) == 0
    assert "compute" in out.read_text()


def test_readers_of_a_run_use_what_it_stored(run_folder: Path, capsys: Output) -> None:
    assert main(["kernels", str(run_folder), "--by", "category", "--format", "csv"]) == 0
    assert "\nmine,240," in capsys.readouterr().out
    kept = run_folder / "windows" / "w1"
    assert main(["kernels", str(kept), "--by", "category", "--format", "csv"]) == 0
    assert "\nmine,240," in capsys.readouterr().out
    status, document = checked(capsys, run_folder, "--scope", "mine", "--limit", "1.1")
    assert (status, "61 are needed" in document["reason"]) == (ExitStatus.INCONCLUSIVE, True)
    judged = [check["limit"] for check in checked(capsys, run_folder, "--exit-zero")[1]["checks"]]
    few = ("--set", "gate.min_steps=50", "--exit-zero")
    assert [check["limit"] for check in checked(capsys, run_folder, *few)[1]["checks"]] == judged
    other = ("--set", "threshold=[{limit=1.9}]", "--exit-zero")
    assert [c["limit"] for c in checked(capsys, run_folder, *other)[1]["checks"]] == [1.9]
    more = ("--scope", "mine", "--limit", "1.1", "--min-steps", "50")
    assert checked(capsys, run_folder, *more)[0] == ExitStatus.EXCEEDED
    assert main(["report", str(run_folder), "--step", "3"]) == 0
    assert main(["check", str(run_folder), "--window", "none"]) == ExitStatus.UNUSABLE
    assert "there is no window none" in capsys.readouterr().err


def test_a_configuration_that_is_named_wins_over_what_a_run_stored(
    run_folder: Path, tmp_path: Path, capsys: Output
) -> None:
    (tmp_path / "other.toml").write_text("[gate]\nmin_steps = 2\n")
    words = ("--config", tmp_path / "other.toml", "--limit", "1.1")
    assert checked(capsys, run_folder, *words)[0] == ExitStatus.EXCEEDED


def test_the_rank_of_a_process_may_be_told(shared_data: Path, capsys: Output) -> None:
    report = shared_data / "nsys" / "mfu_2gpu_after.sqlite"
    assert main(["export", "--to", "nsight", str(report), "--format", "json"]) == 0
    pid = json.loads(capsys.readouterr().out)[0]["pid"]
    words = ["kernels", str(report), "--by", "rank", "--format", "json", "--rank", f"{pid}=TP7"]
    assert main(words) == 0
    assert "TP7" in {row["rank"] for row in json.loads(capsys.readouterr().out)}


def test_only_the_largest_rows_and_into_a_file(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "rows.csv"
    words = ["kernels", str(folder), "--format", "csv", "--top", "3", "-o", str(out)]
    assert main(words) == 0
    assert len(out.read_text().splitlines()) == 4
    first = next(folder.iterdir())
    assert main([*words[:-1], str(first)]) == ExitStatus.UNUSABLE


def test_every_status_stands_on_the_page(project_root: Path) -> None:
    text = (project_root / "docs" / "exit-status.md").read_text()
    for status in ExitStatus:
        assert f"| {status.value} |" in text
    for command in COMMANDS:
        assert f"`{command}`" in text


@pytest.mark.parametrize("command", ["kernels", "check", "report"])
def test_what_a_run_recorded_is_never_the_output(
    run_folder: Path, capsys: Output, command: str
) -> None:
    kept = next((run_folder / "windows" / "w1").iterdir())
    before = kept.read_bytes()
    words = [command, str(run_folder / "results.json"), "-o", str(kept)]
    assert main(words) == ExitStatus.UNUSABLE
    assert "is one of the files that are read" in capsys.readouterr().err
    assert kept.read_bytes() == before


def test_one_function_reads_windows_for_the_plugin_and_all_commands(project_root: Path) -> None:
    package = project_root / "pytest_sglprof"
    callers = {
        str(file.relative_to(package))
        for room in ("_cli", "_plugin", "_run")
        for file in (package / room).glob("*.py")
        if "read_window(" in file.read_text()
    }
    assert callers == {"_run/measure.py"}


def test_a_picture_says_what_it_needs(run_folder: Path, capsys: Output) -> None:
    assert main(["export", "--to", "svg", str(run_folder)]) == ExitStatus.UNUSABLE
    assert "-o heat.svg" in capsys.readouterr().err
    assert main(["export", str(run_folder), "-o", "x.svg"]) == ExitStatus.UNUSABLE
    assert "--to" in capsys.readouterr().err
