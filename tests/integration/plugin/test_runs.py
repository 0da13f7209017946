"""Whole runs with an option each: stopping, workers, servers that do not start."""

from __future__ import annotations

import os
import re

import pytest

from pytest_sglprof._report.results import validate
from tests.support.project import SERVERS

# ---- inconclusive verdicts -------------------------------------------------------------------

INCONCLUSIVE = """
whole = pytest.mark.profile_window(whole_body=True)

@whole
def test_always_short(drive):
    drive(10)

def test_check_always_short(drive, profile_window):
    with profile_window("checked") as window:
        drive(10)
    window.check("slowdown", 1.1)

def test_check_long_enough(drive, profile_window):
    with profile_window("checked") as window:
        drive(60)
    assert window.check("slowdown", 1.1) < 1.1

@whole
def test_body_fails(drive):
    drive(60)
    assert 1 + 1 == 3, "the body's own words"

@whole
def test_passes(drive):
    drive()
"""


@pytest.fixture(scope="module")
def short(make_project):
    options = ("--sglprof-allow-inconclusive", "--sglprof-set=output.keep=all")
    summary = {"GITHUB_STEP_SUMMARY": "summary.md"}
    return make_project(INCONCLUSIVE).run("-p", "no:cacheprovider", *options, **summary)


@pytest.mark.parametrize(
    ("name", "outcome", "verdict"),
    [
        ("test_always_short", "skipped", "inconclusive"),
        ("test_check_always_short", "skipped", "inconclusive"),
        ("test_check_long_enough", "passed", "pass"),
        ("test_body_fails", "failed", "pass"),
        ("test_passes", "passed", "pass"),
    ],
)
def test_a_window_is_opened_once_and_judged_whatever_its_verdict(short, name, outcome, verdict):
    assert short.test(name)["outcome"] == outcome
    assert [window["verdict"] for window in short.windows(name)] == [verdict]
    assert len(short.test(name)["attempts"]) == 1
    if outcome != "failed":
        assert dict(short.properties(name))["verdict"] == verdict


def test_allowed_inconclusive_is_skipped_with_the_reason_and_never_passed(short):
    for name in ("test_always_short", "test_check_always_short"):
        assert short.cases[name].find("skipped").get("message").startswith("inconclusive: ")
    assert re.search(r"SKIPPED .*inconclusive: .*50 are needed", short.text)
    assert "the body's own words" in short.section("test_body_fails")
    assert short.results["run"]["exit_status"] == short.status == 1


def test_all_windows_happened_on_one_warm_server(short):
    assert len(short.results["servers"]) == 1
    validate(short.results)


def test_kept_traces_of_all_windows(short):
    for window in short.results["windows"]:
        assert [a["rank"] for a in window["artifacts"]] == ["TP0", "TP1"]
        assert all((short.run_folder / a["path"]).is_file() for a in window["artifacts"])


def test_the_summary_of_a_github_step_is_appended(short):
    text = (short.folder / "summary.md").read_text()
    assert "test_always_short" in text
    assert "inconclusive" in text


# ---- stopping and repeating ------------------------------------------------------------------

STOPPING = """
whole = pytest.mark.profile_window(whole_body=True)

@pytest.mark.sglang_server("slow")
@whole
def test_slow(drive):
    drive()

@pytest.mark.sglang_server("slow")
@whole
def test_never_run(drive):
    drive()
"""


def test_x_stops_at_a_bad_verdict_and_lf_repeats_it(make_project):
    project = make_project(STOPPING)
    stopped = project.run("-x")
    assert stopped.status == pytest.ExitCode.TESTS_FAILED
    assert "1 failed" in stopped.text
    assert [t["nodeid"] for t in stopped.results["tests"]] == ["test_job.py::test_slow"]
    again = project.run("--lf", "-k", "slow or never", "--sglprof-set=output.keep=none")
    assert [t["nodeid"] for t in again.results["tests"]] == ["test_job.py::test_slow"]
    assert again.run_folder != stopped.run_folder
    assert not list((again.run_folder / "windows").iterdir())


# ---- workers ---------------------------------------------------------------------------------

WORKERS = """
import os

whole = pytest.mark.profile_window(whole_body=True)

@whole
@pytest.mark.parametrize("n", range(2))
def test_fast(drive, n):
    drive()

@pytest.mark.sglang_server("slow")
@whole
@pytest.mark.parametrize("n", range(2))
def test_slow(drive, n):
    drive()

@pytest.mark.xdist_group("mine")
def test_plain():
    pass
"""


def test_workers_write_one_document(make_project):
    ran = make_project(WORKERS).run("-p", "no:cacheprovider", "-n", "2")
    assert ran.status == pytest.ExitCode.TESTS_FAILED
    validate(ran.results)
    outcomes = {t["nodeid"].partition("::")[2]: t["outcome"] for t in ran.results["tests"]}
    assert outcomes == {
        "test_fast[0]": "passed",
        "test_fast[1]": "passed",
        "test_slow[0]": "failed",
        "test_slow[1]": "failed",
    }
    attempts = [attempt for test in ran.results["tests"] for attempt in test["attempts"]]
    assert {attempt["worker"] for attempt in attempts} <= {"gw0", "gw1"}
    assert len(ran.results["servers"]) == 2, "each server is started by one worker"
    assert {window["verdict"] for window in ran.windows("test_slow[1]")} == {"fail"}
    assert ran.text.count("= sglprof =") == 1
    assert "profile window verdict: fail" in ran.text
    named = [name for name in ran.cases if "@" in name]
    assert named == []
    runs = [path.name for path in (ran.folder / ".sglprof").glob("run-*")]
    assert runs == [ran.run_folder.name]


# ---- servers that do not start ---------------------------------------------------------------

BROKEN = f"""{SERVERS}
[servers.dies]
kind = "standin"
standin_args = ["--start-fault", "import", "--crash-delay", "0"]

[servers.hangs]
kind = "standin"
standin_args = ["--never-ready"]
ready_timeout = 1

[servers.needs_key]
kind = "standin"
api_key_env = "NO_SUCH_KEY"

[servers.taken]
kind = "standin"
port = PORT
"""

NOT_STARTING = """
@pytest.mark.sglang_server("dies")
@pytest.mark.profile_window(whole_body=True)
def test_dies(sglang_server): pass

@pytest.mark.sglang_server("hangs")
def test_hangs(sglang_server): pass

@pytest.mark.sglang_server("needs_key")
def test_needs_key(sglang_server): pass

@pytest.mark.sglang_server("taken")
def test_taken(sglang_server): pass

@pytest.mark.profile_window(whole_body=True)
def test_works(drive): drive()
"""


@pytest.fixture(scope="module")
def not_starting(make_project):
    import socket

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        config = BROKEN.replace("PORT", str(taken.getsockname()[1]))
        return make_project(NOT_STARTING, config).run("-p", "no:cacheprovider")


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("test_dies", ["the server ended with exit status", "No module named", "server.log"]),
        ("test_hangs", ["the server was not ready after", "within 1 s", "raise ready_timeout"]),
        ("test_needs_key", ["the environment variable NO_SUCH_KEY is not set"]),
        ("test_taken", ["port ", " is in use by", "expected: a free port"]),
    ],
)
def test_faults_on_opening_are_errors_of_setup_in_plain_words(not_starting, name, said):
    assert not_starting.word(name) == "ERROR"
    text = not_starting.section(name)
    assert [words for words in said if words not in text] == []
    # The server's own traceback names its files, wherever the package is installed.
    ours = re.sub(r'File "\S+/pytest_sglprof/standin/\S+", line \d+', "", text)
    assert "site-packages" not in ours
    assert "plugin_session.py" not in text
    assert not_starting.test(name)["outcome"] == "error"
    assert not_starting.cases[name].find("error") is not None


def test_the_run_goes_on_with_the_next_server(not_starting):
    assert not_starting.word("test_works") == "PASSED"
    assert "4 errors" in not_starting.text


# ---- servers that die ------------------------------------------------------------------------

DYING = """
import os, signal

whole = pytest.mark.profile_window(whole_body=True)

@whole
def test_killed(drive, sglang_server):
    os.kill(sglang_server.pid, signal.SIGKILL)

@whole
def test_next_of_the_same_server(drive):
    drive()
"""


def test_a_death_between_tests_is_told_to_the_next_one(make_project):
    ran = make_project(DYING).run("-p", "no:cacheprovider")
    assert ran.word("test_killed") == "FAILED"
    assert ran.word("test_next_of_the_same_server") == "ERROR"
    assert "the server died" in ran.section("test_next_of_the_same_server")
    (window,) = ran.windows("test_killed")
    assert (window["state"], window["verdict"]) == ("failed", "inconclusive")
    assert os.path.isfile(ran.run_folder / "servers" / "default.1" / "server.log")  # noqa: PTH113
