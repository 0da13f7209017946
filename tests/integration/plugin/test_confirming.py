"""Tests that run again on further servers: beside pytest-xdist, pytest-rerunfailures and fixtures.

Each project has a baseline that its lives cannot reach, so every run looks slower. About 12 lives.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from msgspec.structs import replace

from pytest_sglprof._baselines.history import read_history
from pytest_sglprof._baselines.records import LifeRecord
from pytest_sglprof._baselines.store import BaselineFolder
from tests.integration.plugin.conftest import MakeProject
from tests.support.lives import life
from tests.support.project import Outcome, Project

CONFIG = """
[server]
kind = "standin"
args = ["--tp", "2"]
standin_args = ["--step-ms", "4", "--layers", "1", "--life-noise", "0.005"]

[baseline]
dir = "baselines"
confirm = 1

[[threshold]]
limit = 1.2
"""
TESTS = """
calls = []

@pytest.fixture(scope="session")
def dear():
    calls.append("dear")
    yield
    calls.append("dear gone")

@pytest.fixture
def own(tmp_path):
    calls.append("own")
    (tmp_path / "fresh").mkdir()
    yield tmp_path
    calls.append("own gone")

@pytest.mark.profile_window("steady", whole_body=True, regression=1.05)
class TestSlow:
    state = 0

    def test_decode(self, drive, sglang_server, own, dear, load_watch):
        self.state += 1
        assert self.state == 1
        calls.append(sglang_server.url)
        drive(60)

def test_after(sglang_server):
    urls = [each for each in calls if "http" in each]
    others = [each for each in calls if "http" not in each]
    assert others == ["dear", "own", "own gone", "own", "own gone"]
    assert len(set(urls)) == 2
    assert sglang_server.url == urls[-1]
"""
CHECK = """
def test_check(drive, profile_window):
    with profile_window("one") as one:
        drive(60)
    ratio = one.check("regression", 1.05, scope="moe")
    assert 1.4 < ratio < 1.6
    with pytest.raises(Exception, match="no load was complete before its first window"):
        one.check("ttft_p99", 100.0)
"""
BODY = """
lives = []

@pytest.mark.profile_window("steady", whole_body=True, regression=1.05)
def test_second_life_fails(drive):
    drive(60)
    lives.append(1)
    assert len(lives) == 1, "the second life says no"
"""


def with_baseline(project: Project, factor: float) -> None:
    """Runs once, and accepts five lives that took 1 / `factor` of the time."""
    first = project.run("--sglprof-set=baseline.dir=none", "-k", "not after")
    (record, *_) = read_history(project.folder / ".sglprof")
    accept(project, record, factor)
    assert "confirming" not in first.text


def accept(project: Project, record: LifeRecord, factor: float) -> None:
    lives = [
        life(*record.groups, scale=scale / factor, key=record.key, provenance=record.provenance)
        for scale in (0.999, 1.0, 1.001, 1.0, 1.002)
    ]
    BaselineFolder(project.folder / "baselines").accept(lives)


@pytest.fixture(scope="module")
def slow(make_project: MakeProject) -> Project:
    project = make_project(TESTS, CONFIG)
    with_baseline(project, 1.5)
    return project


def is_confirmed(outcome: Outcome) -> None:
    assert outcome.test("test_decode")["verdict"] == "fail"
    assert len(outcome.windows("test_decode")) == 2
    assert re.search(r"compute is 1\.[45]", outcome.test("test_decode")["reason"])


def test_fixtures_of_the_test_and_of_the_server_are_new_the_others_stay(slow: Project) -> None:
    outcome = slow.run()
    assert "1 failed, 1 passed in" in outcome.text
    is_confirmed(outcome)
    is_one = [each for each in outcome.results["tests"] if "test_decode" in each["nodeid"]]
    assert [a["number"] for a in is_one[0]["attempts"]] == [1, 2]
    assert {w["attempt"] for w in outcome.windows("test_decode")} == {1, 2}


def test_a_worker_of_xdist_confirms_and_the_controller_writes(slow: Project) -> None:
    before = len(read_history(slow.folder / ".sglprof"))
    outcome = slow.run("-n1", "-k", "test_decode")
    assert "1 failed in" in outcome.text
    is_confirmed(outcome)
    assert len(read_history(slow.folder / ".sglprof")) == before + 2
    assert BaselineFolder(slow.folder / "baselines").list()[0].lives[-1].record.run != "latest"


def test_a_rerun_adds_its_life_and_does_not_clear_the_failure(slow: Project) -> None:
    outcome = slow.run("--reruns=1", "-k", "test_decode")
    assert "1 failed, 1 rerun in" in outcome.text.replace("1 deselected, ", "")
    test = outcome.test("test_decode")
    assert [attempt["verdict"] for attempt in test["attempts"]] == ["fail", "fail", "fail"]
    assert outcome.text.count("confirming on") == 1


def test_check_returns_the_ratio_of_this_life_and_the_end_confirms(
    make_project: MakeProject,
) -> None:
    project = make_project(CHECK.replace('scope="moe"', 'scope="compute"'), CONFIG)
    first = project.run()
    assert first.status == 1  # without accepted lives the ratio is not a number
    assert "nan" in first.text
    (project.folder / "test_job.py").write_text(f"import pytest\n{CHECK}")
    (record, *_) = read_history(project.folder / ".sglprof")
    accept(project, record, 1.5)
    outcome = project.run()
    assert "confirming on a second life" in outcome.text
    assert outcome.test("test_check")["verdict"] == "fail"
    assert re.search(r"moe is 1\.[45]", outcome.test("test_check")["reason"])


def test_a_check_without_comparable_lives_can_be_accepted_with_a_reason(
    make_project: MakeProject,
) -> None:
    project = make_project(CHECK, CONFIG)
    assert project.run("--sglprof-set=baseline.dir=none").status == 1
    (record, *_) = read_history(project.folder / ".sglprof")
    accept(project, replace(record, key=replace(record.key, kv_dtype="fp8_e5m2")), 1.5)
    outcome = project.run()
    assert outcome.test("test_check")["verdict"] == "inconclusive"
    assert "kv_dtype: fp8_e5m2 before" in outcome.test("test_check")["reason"]
    last = read_history(project.folder / ".sglprof")[-1]
    assert (last.verdict, last.not_acceptable) == ("inconclusive", ())
    folder = BaselineFolder(project.folder / "baselines")
    assert [each.refused for each in folder.accept([last], reason="bf16 KV cache")] == [""]


def test_a_body_that_fails_on_the_second_life_fails_the_test(make_project: MakeProject) -> None:
    project = make_project(BODY, CONFIG)
    with_baseline(project, 1.5)
    outcome = project.run()
    assert "the second life says no" in outcome.text
    assert "1 failed in" in outcome.text
    last = read_history(project.folder / ".sglprof")[-1]
    assert last.not_acceptable[-1] == "its test failed by itself"


def test_the_folder_of_the_option_is_relative_to_the_working_folder(slow: Project) -> None:
    inner = Path(slow.folder / "inner")
    inner.mkdir()
    shown = slow.run("--sglprof-baselines=inner", "--sglprof-show-config")
    assert f"baselines = {inner}" in shown.text
    refused = slow.run("--sglprof-accept=new", "--sglprof-set", "baseline={}")
    assert "without a folder of baselines" in refused.text
