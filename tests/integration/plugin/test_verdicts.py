"""What becomes of a test whose windows pass, fail or are inconclusive: one run, seen from many
sides."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from pytest_sglprof._report.results import validate

TESTS = """
from pytest_sglprof import VerdictFailed

whole = pytest.mark.profile_window(whole_body=True)
slow = pytest.mark.sglang_server("slow")
known = pytest.mark.xfail(raises=VerdictFailed, strict=True)

@whole
def test_pass(load):
    assert load().completed == 4

@slow
@whole
def test_fail(drive):
    drive()

@whole
@pytest.mark.parametrize("steps", [60, 80])
def test_parameters(drive, steps):
    drive(steps)

@slow
@whole
@known
def test_known_to_fail(drive):
    drive()

@whole
@known
def test_wrongly_known_to_fail(drive):
    drive()

@slow
@whole
@known
def test_too_short_is_no_known_failure(drive):
    drive(10)

@slow
@whole
def test_body_fails(drive):
    drive()
    assert 1 + 1 == 3, "the body's own words"

@slow
@whole
def test_body_skips(drive):
    drive()
    pytest.skip("the body skips")

@whole
def test_body_xfails(drive):
    drive()
    pytest.xfail("the body gives up")

@slow
def test_checks(drive, profile_window):
    with profile_window("one", slowdown={"moe": 2.0, "compute": 2.0}) as one:
        drive()
    with profile_window("two", slowdown={"moe": 2.0, "compute": 2.0}) as two:
        drive()
    assert one.verdict.word == "pass"
    assert one.check("slowdown", 1.5, scope="moe") == pytest.approx(1.4, rel=0.02)
    assert two.check("slowdown", 1.3, scope="moe") == pytest.approx(1.4, rel=0.02)
    assert two.verdict.word == "fail"
    assert set(two.table.ranks) == {"TP0", "TP1"}
    with pytest.raises(Exception, match="is not a metric"):
        one.check("speed", 1.0)

def test_of_no_concern():
    pass

@pytest.mark.flaky(reruns=1, only_rerun=["VerdictFailed"])
@slow
@whole
def test_rerun_in_vain(drive):
    drive()
"""

# Of one server, in a run of its own.
OF_ONE_SERVER = """
from pytest_sglprof import Inconclusive

def test_check_of_too_little(drive, profile_window):
    with profile_window("short") as window:
        drive(10)
    window.check("slowdown", 2.0)

def test_check_of_too_little_caught(drive, profile_window):
    with profile_window("short") as window:
        drive(10)
    with pytest.raises(Inconclusive, match="50 are needed"):
        window.check("slowdown", 2.0)

@pytest.mark.profile_window(num_steps=60)
def test_over_before_it_was_steady(load):
    pass

@pytest.mark.profile_window(num_steps=60)
def test_steady(load):
    load(900)

def test_nsys_by_hand_without_nsys(drive, profile_window):
    with profile_window("w", backend="nsys"):
        pass

def test_wrong_argument_by_hand(drive, profile_window):
    profile_window("w", stepz=3)

seen = []

@pytest.mark.flaky(reruns=1)
@pytest.mark.profile_window(whole_body=True)
def test_flaky(drive):
    seen.append(1)
    drive(10 if len(seen) == 1 else 60)
"""


@pytest.fixture(scope="module")
def outcome_of(run_projects):
    texts = {"two servers": TESTS, "one server": OF_ONE_SERVER}
    return run_projects(texts, "-p", "no:cacheprovider", "--durations=0")


@pytest.fixture(scope="module")
def ran(outcome_of):
    return outcome_of("two servers")


@pytest.fixture(scope="module")
def ran_one_server(outcome_of):
    return outcome_of("one server")


@pytest.fixture
def ran_it(outcome_of, name):
    """The run that has the test `name`."""
    return outcome_of("one server" if f"def {name}(" in OF_ONE_SERVER else "two servers")


WORDS = {
    "test_pass": ("PASSED", "passed", "pass"),
    "test_fail": ("FAILED", "failed", "fail"),
    "test_parameters[60]": ("PASSED", "passed", "pass"),
    "test_known_to_fail": ("XFAIL", "xfailed", "fail"),
    "test_wrongly_known_to_fail": ("FAILED", "failed", "pass"),
    "test_too_short_is_no_known_failure": ("FAILED", "failed", "inconclusive"),
    "test_body_fails": ("FAILED", "failed", "fail"),
    "test_body_xfails": ("XFAIL", "xfailed", None),
    "test_checks": ("FAILED", "failed", "fail"),
    "test_check_of_too_little": ("FAILED", "failed", "inconclusive"),
    "test_check_of_too_little_caught": ("FAILED", "failed", "inconclusive"),
    "test_over_before_it_was_steady": ("FAILED", "failed", "inconclusive"),
    "test_steady": ("PASSED", "passed", "pass"),
    "test_nsys_by_hand_without_nsys": ("FAILED", "failed", None),
    "test_wrong_argument_by_hand": ("FAILED", "failed", None),
    "test_flaky": ("PASSED", "passed", "pass"),
    "test_rerun_in_vain": ("FAILED", "failed", "fail"),
}


@pytest.mark.parametrize("name", WORDS)
def test_terminal_and_results_say_the_same_word(ran_it, name):
    shown, outcome, verdict = WORDS[name]
    assert ran_it.word(name) == shown
    assert (ran_it.test(name)["outcome"], ran_it.test(name)["verdict"]) == (outcome, verdict)


@pytest.mark.parametrize("name", WORDS)
def test_junit_says_the_same(ran_it, name):
    shown, _, verdict = WORDS[name]
    kinds = {child.tag for child in ran_it.cases[name]} & {"failure", "error", "skipped"}
    expected = {"FAILED": {"failure"}, "XFAIL": {"skipped"}}.get(shown, set())
    assert kinds == expected
    properties = ran_it.properties(name)
    assert dict(properties).get("verdict") == verdict
    names = [key for key, _ in properties]
    assert len(names) == len(set(names))


def test_junit_attaches_the_heat_map_of_a_window_that_did_not_pass(ran, ran_one_server):
    values = dict(ran.properties("test_rerun_in_vain"))
    attached = [text for name, text in values.items() if name.startswith("attachment[")]
    assert len(attached) == 1
    path = Path(attached[0].removeprefix("[[ATTACHMENT|").removesuffix("]]"))
    assert path.parent == ran.run_folder.resolve()
    assert "<svg" in path.read_text()
    assert not [
        key for key in dict(ran_one_server.properties("test_steady")) if "attachment" in key
    ]


def test_the_document_is_valid_and_whole(ran):
    assert ran.status == 1
    validate(ran.results)
    assert ran.results["run"]["exit_status"] == 1
    assert ran.results["summary"]["standin"] is True
    windows = {window["id"] for window in ran.results["windows"]}
    assert {w for t in ran.results["tests"] for a in t["attempts"] for w in a["windows"]} == windows
    loads = {load["id"] for load in ran.results["loads"]}
    assert {w["load"] for w in ran.results["windows"]} - {None} <= loads
    assert not [t for t in ran.results["tests"] if "test_of_no_concern" in t["nodeid"]]


def test_each_key_had_one_server_life(ran):
    servers = {server["key"]: server for server in ran.results["servers"]}
    assert sorted(servers) == ["default", "slow"]
    assert len(ran.results["servers"]) == 2
    folders = [path.name for path in (ran.run_folder / "servers").iterdir()]
    assert sorted(folders) == ["default.1", "slow.1"]
    assert (ran.run_folder / servers["slow"]["log"]).is_file()


def test_a_failed_verdict_is_told_at_once(ran):
    text = ran.section("test_fail")
    finding, word, _ = text.split("\n", 2)
    assert re.fullmatch(r"TP1 1\.\d+x slower in moe \(limit 1\.10\), \w+ \+[\d.]+ ms", finding)
    assert word == "profile window verdict: fail"
    assert f"FAILED test_job.py::test_fail - {finding[:30]}" in ran.text
    assert ran.cases["test_fail"].find("failure").get("message") == finding
    assert "TP1" in text
    assert "moe" in text
    assert "rank  compute ms  communication ms" in " ".join(text.split("\n"))
    assert "plugin_session.py" not in text
    window = ran.windows("test_fail")[0]
    judged = {j["threshold"]["scope"]: j for j in window["judgements"]}
    assert judged["moe"]["value"] == pytest.approx(1.4, rel=0.02)
    properties = dict(ran.properties("test_fail"))
    assert (properties["slowest_rank"], properties["scope"]) == ("TP1", "moe")
    assert float(properties["value"]) == pytest.approx(judged["moe"]["value"], rel=1e-4)


def test_the_bodys_failure_wins_and_the_table_goes_below(ran):
    text = ran.section("test_body_fails")
    assert "AssertionError: the body's own words" in text
    assert "profile window verdict" not in text
    below = text[text.index("sglprof window") :]
    assert "TP1" in below
    assert len(ran.windows("test_body_fails")) == 1


def test_windows_of_skipped_bodies_are_discarded(ran):
    assert "the body skips" in ran.text
    assert ran.windows("test_body_skips") == []
    assert ran.windows("test_body_xfails") == []
    assert not list((ran.run_folder / "windows").glob("*test_body_skips*/*"))


def test_windows_by_hand_are_all_judged(ran):
    one, two = ran.windows("test_checks")
    assert [(w["name"], w["verdict"]) for w in (one, two)] == [("one", "pass"), ("two", "fail")]
    thresholds = [judgement["threshold"] for judgement in one["judgements"]]
    assert [(t["origin"], t["limit"]) for t in thresholds if t["origin"] == "check"] == [
        ("check", 1.5)
    ]
    text = ran.section("test_checks")
    assert 'window "two"' in text
    assert 'window "one"' not in text


def test_too_little_data_says_how_much_is_needed(ran, ran_one_server):
    for text in (
        ran_one_server.section("test_check_of_too_little"),
        ran.section("test_too_short_is_no_known_failure"),
    ):
        finding, word, _ = text.split("\n", 2)
        assert finding.startswith("inconclusive: ")
        assert word == "profile window verdict: inconclusive"
        assert "50 are needed" in text
    assert "drive a longer load" in ran_one_server.section("test_over_before_it_was_steady")


def test_a_steady_window_ended_by_its_steps_knows_its_load(ran_one_server):
    (window,) = ran_one_server.windows("test_steady")
    assert window["spec"]["num_steps"] == 60
    assert window["load"] == f"{window['nodeid']}#1.1"
    assert window["state"] == "complete"
    assert window["steps"]["groups"][0]["compared"] >= 29


def test_errors_of_windows_by_hand_say_what_to_do(ran_one_server):
    assert "sglang_server(nsys=True)" in ran_one_server.section("test_nsys_by_hand_without_nsys")
    text = ran_one_server.section("test_wrong_argument_by_hand")
    assert "profile_window('w'): unknown argument stepz" in text
    assert "plugin_session.py" not in text


def test_every_attempt_of_a_rerun_is_kept_and_shown(ran, ran_one_server):
    attempts = ran_one_server.test("test_flaky")["attempts"]
    assert [a["number"] for a in attempts] == [1, 2]
    assert [a["outcome"] for a in attempts] == ["failed", "passed"]
    assert [a["verdict"] for a in attempts] == ["inconclusive", "pass"]
    assert [a["verdict"] for a in ran.test("test_rerun_in_vain")["attempts"]] == ["fail", "fail"]
    assert "test_flaky: 2 attempts: inconclusive, pass" in ran_one_server.text
    assert [w["attempt"] for w in ran_one_server.windows("test_flaky")] == [1, 2]


def test_traces_of_passed_windows_are_not_kept(ran):
    (passed,) = ran.windows("test_pass")
    assert passed["artifacts"] == []
    assert not (ran.run_folder / "windows" / passed["id"]).exists()
    (failed,) = ran.windows("test_fail")
    assert sorted(artifact["rank"] for artifact in failed["artifacts"]) == ["TP0", "TP1"]
    for artifact in failed["artifacts"]:
        assert (ran.run_folder / artifact["path"]).is_file()


def test_a_window_that_passed_shows_its_figure_and_limit(ran, ran_one_server):
    figure = r"slowdown of compute 1\.0\d+ \(limit 1\.10\)"
    for outcome, name in ((ran, "test_pass"), (ran_one_server, "test_steady")):
        line = rf'^PASS test_job\.py::{name} window "{name}" \(.*\): {figure}, slowdown of moe '
        assert re.search(line, outcome.text, re.M)


def test_header_and_summary(ran):
    assert "sglprof: servers default (standin), slow (standin); config sglprof.toml" in ran.text
    assert "STAND-IN server for default, slow" in ran.text
    assert f"results: {ran.run_folder / 'results.json'}" in ran.text
    assert ran.text.count("= sglprof =") == 1


def test_no_journal_is_left(ran):
    names = {path.name for path in ran.run_folder.iterdir()}
    assert "journal.jsonl" not in names
    assert not [name for name in names if name.startswith(".")]
    assert ran.results["run"]["id"] == ran.run_folder.name
