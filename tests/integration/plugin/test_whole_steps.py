"""Limits on whole steps in markers and checks, on windows of a server of two ranks."""

from __future__ import annotations

import pytest

from pytest_sglprof._report.results import validate

TESTS = """
@pytest.mark.profile_window(whole_body=True, pass_wall={"decode": 1000.0})
def test_within(drive):
    drive()

@pytest.mark.profile_window(whole_body=True, pass_wall={"decode": 0.001})
def test_beyond(drive):
    drive()

def test_checked(drive, profile_window):
    with profile_window("hand", slowdown=2.0) as window:
        drive()
    share = window.check("idle_share", 0.99, stage="decode")
    wall = window.check("pass_wall", 1000.0, stage="decode")
    assert 0 < share < 1 and wall > 0

def test_of_a_scope(profile_window):
    profile_window("hand", idle_share={"moe": 0.5})
"""


@pytest.fixture(scope="module")
def ran(make_project):
    return make_project(TESTS).run("-p", "no:cacheprovider")


@pytest.mark.parametrize(
    ("name", "verdict"),
    [("test_within", "pass"), ("test_beyond", "fail"), ("test_checked", "pass")],
)
def test_they_are_judged_and_kept(ran, name, verdict):
    assert ran.test(name)["verdict"] == verdict
    (window,) = ran.windows(name)
    of_steps = [j for j in window["judgements"] if j["threshold"]["metric"] in WHOLE]
    assert {j["verdict"] for j in of_steps} == {verdict}
    for judgement in of_steps:
        assert judgement["finding"] is None
        assert judgement["budget"]["stage"] == "decode"
        assert [rank["rank"] for rank in judgement["budget"]["ranks"]] == window["ranks"]
    for budget in window["budgets"]:
        for rank in budget["ranks"]:
            parts = ("compute_ns", "communication_ns", "copies_ns", "idle_ns")
            assert sum(rank[part] for part in parts) == rank["wall_ns"]


WHOLE = ("idle_share", "pass_wall")


def test_all_views_name_the_figure(ran):
    validate(ran.results)
    (window,) = ran.windows("test_beyond")
    assert "a decode step takes " in window["reason"]
    assert "what a mean decode step is made of, ms" in ran.text
    page = (ran.run_folder / "report.html").read_text()
    assert "a decode step takes " in page


def test_a_scope_is_refused(ran):
    assert ran.test("test_of_a_scope")["outcome"] in ("error", "failed")
    assert "idle_share is of whole steps" in ran.text
