"""Windows that are opened several times, on the stand-in: runs that are seen from many sides."""

from __future__ import annotations

from itertools import pairwise

import pytest

from pytest_sglprof._report.results import validate
from tests.integration.plugin.conftest import OutcomeOf, RunProjects
from tests.support.project import SERVERS

# Each is a project of its own: a load that lasts three windows takes 15 s. A load that is too short
# has fewer passes than the windows ask for, so that it is so on a machine of any speed.
TESTS = {
    "test_marked": """
@pytest.mark.profile_window(num_steps=60, repeat=3)
def test_marked(load):
    load(2600)
""",
    "test_marked_slow": """
@pytest.mark.sglang_server("slow")
@pytest.mark.profile_window(num_steps=60, repeat=3)
def test_marked_slow(load):
    load(2600)
""",
    "test_too_short": """
@pytest.mark.profile_window(num_steps=400, repeat=4)
def test_too_short(load):
    load(1000)
""",
    "test_by_hand": """
@pytest.mark.sglang_server("slow")
def test_by_hand(bench_serving, profile_window):
    with bench_serving.running(num_prompts=4, max_concurrency=4, random_input_len=8,
                               random_output_len=2600, random_range_ratio=1.0, warm_up=False,
                               disable_stream=True):
        limits = {"moe": 2.0, "compute": 2.0}
        with profile_window("w", num_steps=60, repeat=2, slowdown=limits) as window:
            window.wait()
    assert len(window.windows) == 2
    assert window.check("slowdown", 1.6, scope="moe") == pytest.approx(1.4, rel=0.02)
""",
    "test_certain": """
@pytest.mark.sglang_server("slow")
@pytest.mark.profile_window(num_steps=60, repeat="certain")
def test_certain(load):
    load(2600)
""",
    "test_certain_but_short": """
@pytest.mark.sglang_server("slow")
@pytest.mark.profile_window(num_steps=60, repeat="certain", max_time=0.1)
def test_certain_but_short(load):
    load(1000)
""",
    "test_whole_body": """
def test_that_ends_by_hand(drive, profile_window):
    with profile_window("w", repeat=2):
        drive()

@pytest.mark.profile_window(whole_body=True)
def test_whole_body(drive):
    drive()
""",
}


@pytest.fixture(scope="module")
def outcome_of(run_projects: RunProjects) -> OutcomeOf:
    """The outcome of the project of a test."""
    return run_projects(TESTS, "--sglprof-set=output.keep=all")


@pytest.mark.parametrize(
    ("name", "outcome_word", "verdict", "windows"),
    [
        ("test_marked", "passed", "pass", 3),
        ("test_marked_slow", "failed", "fail", 3),
        ("test_by_hand", "passed", "pass", 2),
        ("test_certain", "failed", "fail", 2),
        ("test_whole_body", "passed", "pass", 1),
    ],
)
def test_windows_and_verdicts(outcome_of, name, outcome_word, verdict, windows):
    outcome = outcome_of(name)
    assert (outcome.test(name)["outcome"], outcome.test(name)["verdict"]) == (outcome_word, verdict)
    found = outcome.windows(name)
    assert len(found) == windows
    assert {window["verdict"] for window in found} == {verdict}
    if windows == 1:
        assert [(w["repeat_of"], w["repeats"]) for w in found] == [(None, None)]
        return
    assert [w["repeat_index"] for w in found] == list(range(1, windows + 1))
    assert {w["repeat_of"] for w in found} == {found[0]["id"]}
    assert len({w["id"] for w in found}) == windows
    opened = [(w["opened"], w["closed"]) for w in found]
    assert all(before[1] <= after[0] for before, after in pairwise(opened))


def test_the_spread_is_that_of_the_windows_own_figures(outcome_of):
    found = outcome_of("test_marked_slow").windows("test_marked_slow")
    for number, spread in enumerate(found[0]["repeats"]["spread"]):
        values = [window["judgements"][number]["value"] for window in found]
        assert spread["values"] == values
        assert (spread["min"], spread["max"]) == (min(values), max(values))
        assert spread["median"] == sorted(values)[1]
    moe = next(s for s in found[0]["repeats"]["spread"] if s["threshold"]["scope"] == "moe")
    assert moe["median"] == pytest.approx(1.4, rel=0.02)
    assert all(window["repeats"] == {**found[0]["repeats"], "own_reason": own(window)}
               for window in found)  # fmt: skip


def test_windows_until_certain_say_over_how_many(outcome_of):
    outcome = outcome_of("test_certain")
    first, second = outcome.windows("test_certain")
    assert {window["spec"]["repeat"] for window in (first, second)} == {"certain"}
    assert first["repeats"]["count"] == 2
    assert first["reason"] == second["reason"]
    assert first["reason"].startswith("slowdown of moe is 1.40 over 2 windows (limit 1.10)")
    assert all(window["judgements"][0]["estimate"]["steps"] >= 50 for window in (first, second))


def test_one_window_alone_decides_nothing_where_certainty_was_asked_for(outcome_of):
    outcome = outcome_of("test_certain_but_short")
    name = "test_certain_but_short"
    assert (outcome.test(name)["outcome"], outcome.test(name)["verdict"]) == (
        "failed",
        "inconclusive",
    )
    (window,) = outcome.windows(name)
    assert "one window alone decides nothing" in window["reason"]
    assert window["repeats"]["own_verdict"] == "fail"


def own(window):
    return window["repeats"]["own_reason"]


def test_the_failure_says_median_and_spread_once(outcome_of):
    outcome = outcome_of("test_marked_slow")
    section = outcome.section("test_marked_slow")
    assert "in the median of 3 windows (limit 1.10), from 1." in section
    assert "the window in the middle: TP1 is 1.40x slower" in section
    assert section.count("compute ms") == 1
    assert outcome.text.count("FAIL test_job.py::test_marked_slow window") == 1


def test_windows_that_never_opened_decide_nothing(outcome_of):
    outcome = outcome_of("test_too_short")
    assert outcome.test("test_too_short")["verdict"] == "inconclusive"
    found = outcome.windows("test_too_short")
    assert 1 <= len(found) < 4
    assert "of 4 windows can be judged" in found[0]["reason"]
    assert "never opened" in found[0]["reason"]


def test_a_window_that_ends_by_hand_cannot_be_repeated(outcome_of):
    outcome = outcome_of("test_whole_body")
    assert "repeat=2 without num_steps or duration" in outcome.section("test_that_ends_by_hand")


@pytest.mark.parametrize("name", TESTS)
def test_results_and_files(outcome_of, name):
    outcome = outcome_of(name)
    validate(outcome.results)
    assert outcome.results["windows"]
    for window in outcome.results["windows"]:
        assert [a["rank"] for a in window["artifacts"]] == ["TP0", "TP1"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("whole_body=True, repeat=2", "one of the two: the body runs once"),
        ("repeat=0", "repeat=0"),
        ("repeat='x'", "repeat='x'"),
    ],
)
def test_wrong_repeats_are_found_at_collection(pytester, run_here, arguments, words):
    tests = f"@pytest.mark.profile_window({arguments})\ndef test_it(sglang_server): pass\n"
    pytester.makepyfile("import pytest\n" + tests)
    outcome = run_here("--sglprof", config=SERVERS)
    assert outcome.ret == pytest.ExitCode.INTERRUPTED
    assert words in outcome.stdout.str()
