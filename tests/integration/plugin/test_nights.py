"""Nights on the stand-in, each a run of its own: accepted lives, a regression, a new level.

13 server lives in eight runs: about a minute.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from pytest_sglprof._baselines.history import read_history
from pytest_sglprof._report.results import load_results
from tests.integration.plugin.conftest import MakeProject
from tests.support.project import Outcome, Project

TESTS = """
@pytest.mark.profile_window("steady", whole_body=True, regression={"moe": 1.05})
def test_decode(drive):
    drive(60)
"""
CONFIG = """
[server]
kind = "standin"
args = ["--tp", "2"]
standin_args = ["--step-ms", "4", "--layers", "1", "--life-noise", "0.005"{more}]

[baseline]
dir = "baselines"

[[threshold]]
limit = 1.2
"""
SLOW = ', "--slow", "rank=all,category=moe,factor=1.15"'
ACCEPT = "--sglprof-accept=all"


class Nights:
    """One project over several nights."""

    def __init__(self, project: Project) -> None:
        self.project = project
        self.summary = project.folder / "summary.md"

    def run(self, *options: str, more: str = "") -> Outcome:
        (self.project.folder / "sglprof.toml").write_text(CONFIG.format(more=more))
        self.summary.write_text("")
        return self.project.run(*options, GITHUB_STEP_SUMMARY=str(self.summary))

    def baselines(self) -> dict[str, bytes]:
        folder = self.project.folder / "baselines"
        return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}

    def sglprof(self, *words: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "pytest_sglprof", *words]
        return subprocess.run(
            command, cwd=self.project.folder, env=self.project.environment(), text=True,
            capture_output=True, check=False,
        )  # fmt: skip

    def git(self, *words: str) -> str:
        identity = ["-c", "user.name=x", "-c", "user.email=x@y"]
        command = ["git", *identity, *words]
        ran = subprocess.run(
            command, cwd=self.project.folder, text=True, capture_output=True, check=True
        )
        return ran.stdout


@pytest.fixture(scope="module")
def nights(make_project: MakeProject) -> Nights:
    """Five accepted nights, committed."""
    nights = Nights(make_project(TESTS))
    (nights.project.folder / ".gitignore").write_text(
        "leases\njunit.xml\nsummary.md\n__pycache__\n"
    )
    for number in range(1, 6):
        outcome = nights.run(ACCEPT)
        assert outcome.status == 0
        assert f"({number - 1} of 5 accepted lives)" in outcome.text
        assert "1 life accepted into" in outcome.text
    nights.git("init", "-q")
    nights.git("add", "-A")
    nights.git("commit", "-qm", "five nights")
    return nights


def test_nights(nights: Nights) -> None:
    """Unchanged passes, slower fails and is never accepted unasked, accepted with a reason."""
    accepted = nights.baselines()
    unchanged = nights.run()
    assert unchanged.status == 0
    reason = unchanged.windows("test_decode")[0]["reason"]
    assert re.search(r"as in the accepted lives \(([01]\.\d\d, )?limit 1\.05\)", reason)
    assert "BASELINE test_job.py::test_decode" in unchanged.text
    assert re.search(r"with 5 accepted lives \(sd [0-9.]+ %\)", unchanged.text)
    assert nights.git("status", "--porcelain") == ""

    failed = nights.run(ACCEPT, more=SLOW)
    assert failed.status == 1
    assert re.search(r"confirming on a second life, about \d+ s\n", failed.text)
    page = (failed.run_folder / "report.html").read_text()
    assert page.count('<section class="regression"') >= 1
    everywhere = (failed.text, page, dict(failed.properties("test_decode"))["reason"])
    for text in (*everywhere, nights.summary.read_text().replace("\\", "")):
        assert "moe is 1.1" in text
        assert "fused_moe_kernel" in text
        assert "new lives beside 5 accepted" in text
    assert "it failed by regression, which is accepted with a reason only" in failed.text
    assert nights.baselines() == accepted
    assert nights.git("status", "--porcelain").split() == ["M", "sglprof.toml"]
    _several_lives_are_one_verdict(failed)

    refused = nights.sglprof("baseline", "accept", "latest")
    assert "with a reason only" in refused.stdout + refused.stderr
    assert nights.baselines() == accepted
    taken = nights.sglprof("baseline", "accept", "latest", "--reason", "a larger expert")
    assert taken.returncode == 0, taken.stderr
    assert nights.baselines() != accepted

    again = nights.run(more=SLOW)
    assert again.status == 0
    (window,) = again.windows("test_decode")
    assert window["verdict"] == "pass"
    assert window["regression"]["confirming"] == 0
    _history_shows_both(nights)


def _several_lives_are_one_verdict(failed: Outcome) -> None:
    """One report; every attempt is recorded, and has the verdict of all."""
    test = failed.test("test_decode")
    windows = failed.windows("test_decode")
    assert len(test["attempts"]) == len(windows) >= 2
    assert {window["verdict"] for window in windows} == {"fail"}
    assert len({window["reason"] for window in windows}) == 1
    assert failed.text.count("\nFAIL test_job.py::test_decode") == 1
    assert "1 failed in" in failed.text
    assert len(failed.results["servers"]) == len(windows)
    load_results(failed.run_folder / "results.json")


def _history_shows_both(nights: Nights) -> None:
    lives = read_history(nights.project.folder / ".sglprof")
    words = [(life.verdict, life.failed) for life in lives]
    assert words[:6] == [("pass", ())] * 6
    assert set(words[6:-1]) == {("fail", ("regression",))}
    assert words[-1] == ("pass", ())
    shown = nights.sglprof("history")
    assert shown.returncode == 0, shown.stderr
    assert "a larger expert" in shown.stdout


def test_each_file_of_a_night_is_below_the_folder_for_results(nights: Nights) -> None:
    ignored = Path(nights.project.folder / ".sglprof" / ".gitignore").read_text()
    assert ignored == "*\n"
