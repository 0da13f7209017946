"""`window.check()`: whatever it finds stays with the window, in every view of the run."""

from __future__ import annotations

import pytest

from pytest_sglprof._report.results import validate

HEAD = """
from pytest_sglprof import Inconclusive

slow = pytest.mark.sglang_server("slow")
ABSENT = {"kernel": "no_kernel_is_called_so"}
LIMITS = {"moe": 2.0, "compute": 2.0}

def too_little(window, **what):
    with pytest.raises(Inconclusive):
        window.check("slowdown", 1.5, **(what or ABSENT))
"""
TESTS = """
@pytest.fixture
def window(drive, profile_window):
    with profile_window("hand", slowdown=LIMITS) as window:
        drive()
    return window

def test_raised(window):
    window.check("slowdown", 1.5, **ABSENT)

def test_caught(window):
    too_little(window)

def test_in_order(window):
    assert window.check("slowdown", 1.5, scope="moe") < 1.1
    too_little(window)
    window.check("lost_share", 0.5)
    window.check("slowdown", 1.5, scope="moe")
    too_little(window)

@slow
def test_worst(window):
    too_little(window)
    assert window.check("slowdown", 1.2, scope="moe") == pytest.approx(1.4, rel=0.02)
    window.check("slowdown", 1.6, scope="moe")

@slow
def test_fails_then_too_little(window):
    window.check("slowdown", 1.2, scope="moe")
    window.check("slowdown", 1.5, **ABSENT)

def test_body_fails(window):
    too_little(window)
    assert 1 + 1 == 3, "the body's own words"

def test_body_skips(window):
    too_little(window)
    pytest.skip("the body skips")

def test_body_xfails(window):
    too_little(window)
    pytest.xfail("the body gives up")

@slow
def test_skips_after_a_bad_figure(window):
    window.check("slowdown", 1.2, scope="moe")
    pytest.skip("the body skips")

def test_open(drive, profile_window):
    with profile_window("hand", slowdown=LIMITS) as window:
        drive()
        with pytest.raises(Exception, match="not closed yet"):
            window.check("slowdown", 1.1)
    window.check("slowdown", 1.5, scope="gemm")

@pytest.fixture
def checked_too_late(window):
    yield
    with pytest.raises(Exception, match="results of this window's test are written"):
        window.check("slowdown", 1.5)

def test_torn_down(checked_too_late):
    pass

@pytest.mark.parametrize(
    "name, arguments, meant",
    [
        ("slowdown", {"scope": "meo"}, "moe"),
        ("slowdown", {"scope": "comput"}, "compute"),
        ("slowdown", {"stage": "decod"}, "decode"),
        ("slow_down", {}, "slowdown"),
        ("slowdown", {"kernel": "(", "scope": "moe"}, "regular expression"),
        ("slowdown", {"limit": 0.5}, "limit is 0.5"),
    ],
    ids=["scope", "special", "stage", "metric", "kernel", "limit"],
)
def test_mistyped(profile_window, name, arguments, meant):
    never_opened = profile_window("hand")
    with pytest.raises(Exception, match=meant):
        never_opened.check(name, **{"limit": 1.2, **arguments})
    pytest.skip("nothing was measured")

WRONG = [{"slowdown": {"meo": 1.1}}, {"num_steps": 49}, {"bakend": 1}]

@pytest.mark.parametrize("arguments", WRONG)
def test_wrong_by_hand(profile_window, arguments):
    profile_window("hand", **arguments)
"""


@pytest.fixture(scope="module")
def ran(make_project):
    return make_project(HEAD + TESTS).run("-p", "no:cacheprovider")


# name -> the outcome, the verdict, and (limit, verdict) of the checks in their order
CHECKS = {
    "test_raised": ("failed", "inconclusive", [(1.5, "inconclusive")]),
    "test_caught": ("failed", "inconclusive", [(1.5, "inconclusive")]),
    "test_in_order": (
        "failed",
        "inconclusive",
        [(1.5, "pass"), (1.5, "inconclusive"), (0.5, "pass")],
    ),
    "test_worst": ("failed", "fail", [(1.5, "inconclusive"), (1.2, "fail"), (1.6, "pass")]),
    "test_fails_then_too_little": ("failed", "fail", [(1.2, "fail"), (1.5, "inconclusive")]),
    "test_body_fails": ("failed", "inconclusive", [(1.5, "inconclusive")]),
    "test_body_skips": ("skipped", "inconclusive", [(1.5, "inconclusive")]),
    "test_body_xfails": ("xfailed", "inconclusive", [(1.5, "inconclusive")]),
    "test_skips_after_a_bad_figure": ("skipped", "fail", [(1.2, "fail")]),
    "test_open": ("passed", "pass", [(1.5, "pass")]),
    "test_torn_down": ("passed", "pass", []),
}


@pytest.mark.parametrize("name", CHECKS)
def test_fault_19_every_check_stays_with_its_window(ran, name):
    outcome, verdict, checks = CHECKS[name]
    assert (ran.test(name)["outcome"], ran.test(name)["verdict"]) == (outcome, verdict)
    (window,) = ran.windows(name)
    assert window["verdict"] == verdict
    kept = [j for j in window["judgements"] if j["threshold"]["origin"] == "check"]
    assert [(j["threshold"]["limit"], j["verdict"]) for j in kept] == checks
    assert all(j["reason"] for j in kept)


def test_fault_19_all_views_name_a_check_that_is_inconclusive(ran):
    validate(ran.results)
    reason = "no activity of a kernel like /no_kernel_is_called_so/"
    summary = ran.text[ran.text.index("= sglprof =") :]
    page = (ran.run_folder / "report.html").read_text()
    for name in ("test_raised", "test_caught", "test_body_fails", "test_body_skips"):
        (window,) = ran.windows(name)
        assert reason in window["reason"]
        assert f"INCONCLUSIVE test_job.py::{name} window" in summary
        assert window["id"] in page
        assert dict(ran.properties(name))["verdict"] == "inconclusive"
        assert reason in dict(ran.properties(name))["reason"]
    assert summary.count(f"  {reason}") >= 4
    assert page.count(reason) >= 4


def test_fault_19_a_failing_check_is_not_hidden_by_a_later_inconclusive_one(ran):
    text = ran.section("test_fails_then_too_little")
    assert "\nprofile window verdict: fail\n" in text
    assert dict(ran.properties("test_fails_then_too_little"))["verdict"] == "fail"


@pytest.mark.parametrize("case", ["scope", "special", "stage", "metric", "kernel", "limit"])
def test_fault_8_a_wrong_check_is_refused_at_the_call(ran, case):
    assert ran.test(f"test_mistyped[{case}]")["outcome"] == "skipped"
    assert ran.windows(f"test_mistyped[{case}]") == []


def test_fault_8_a_wrong_window_by_hand_is_refused_at_the_call(ran):
    for number, said in enumerate(
        ("did you mean moe?", "num_steps=49 is below min_steps=50", "did you mean backend?")
    ):
        assert said in ran.section(f"test_wrong_by_hand[arguments{number}]")
        assert ran.windows(f"test_wrong_by_hand[arguments{number}]") == []


def test_fault_19_a_body_that_is_run_again_keeps_the_checks_of_both_runs(make_project):
    tests = """
from pytest_sglprof import Inconclusive

runs = []

@pytest.mark.flaky(reruns=1)
def test_it(drive, profile_window):
    runs.append(1)
    with profile_window("hand") as window:
        drive()
    window.check("slowdown", 1.5, kernel="no_kernel_is_called_so" if len(runs) == 1 else "moe")
"""
    ran = make_project(tests).run()
    assert (ran.test("test_it")["outcome"], ran.test("test_it")["verdict"]) == ("passed", "pass")
    first, second = ran.windows("test_it")
    assert (first["attempt"], second["attempt"]) == (1, 2)
    for window, word in ((first, "inconclusive"), (second, "pass")):
        (check,) = [j for j in window["judgements"] if j["threshold"]["origin"] == "check"]
        assert (check["verdict"], window["verdict"]) == (word, word)
