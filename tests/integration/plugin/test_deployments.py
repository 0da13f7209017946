"""Prefill and decode stand-ins behind the real router, and windows on them.

Its runs wait for three servers and a router each: a minute in all.
"""

from __future__ import annotations

import re
import signal

import psutil
import pytest

from pytest_sglprof._report.results import validate
from tests.support.real_env import real_nsys, real_router
from tests.support.running import wait_for

SERVERS = """
[servers.prefill]
kind = "standin"
args = ["--tp", "2"]
standin_args = ["--step-ms", "10", "--layers", "1", "--crash-delay", "0.2"]

[servers.decode]
kind = "standin"
args = ["--tp", "2"]
standin_args = ["--step-ms", "10", "--layers", "1", "--crash-delay", "0.2"]

[servers.slow]
kind = "standin"
args = ["--tp", "2"]
standin_args = ["--step-ms", "10", "--layers", "1", "--slow", "rank=1,factor=1.4"]

[servers.dying]
kind = "standin"
standin_args = ["--step-ms", "10", "--die-after", "4", "--crash-delay", "0.2"]

[servers.broken]
kind = "standin"
standin_args = ["--start-fault", "import"]

[deployments.pd]
prefill = ["prefill"]
decode = ["decode", "slow"]
router = ["--policy", "round_robin"]
router_python = "ROUTER"

[deployments.mortal]
prefill = ["prefill"]
decode = ["decode", "dying"]
router_python = "ROUTER"

[deployments.faulty]
prefill = ["prefill"]
decode = ["broken"]
router_python = "ROUTER"

[gate]
min_steps = 10

[[threshold]]
limit = 1.10

[[threshold]]
role = "prefill"
limit = 1.20
"""

LOAD = """
LOAD = dict(num_prompts=96, max_concurrency=8, random_input_len=16, random_output_len=40,
            random_range_ratio=1.0, warm_up=False, disable_stream=True)
pytestmark = pytest.mark.sglang_server("pd")
"""

TESTS = """
@pytest.mark.profile_window(num_steps=20)
def test_all_roles(bench_serving):
    assert bench_serving(**LOAD).completed == 96

@pytest.mark.profile_window("prompts", num_steps=20, roles=["prefill"])
def test_by_hand(bench_serving, profile_window, sglang_server):
    with bench_serving.running(**LOAD):
        with profile_window("hand", num_steps=20, roles=["decode"], slowdown=2.0) as windows:
            windows.wait()
    assert [each.server for each in windows] == [*sglang_server.members["decode"]]
    assert 1.3 < windows.check("slowdown", 1.6) < 1.5
    assert [each.spec.key for each in sglang_server.members["prefill"]] == ["pd.prefill"]

@pytest.mark.profile_window("again", num_steps=20, repeat=2, roles=["decode"])
def test_repeated(bench_serving):
    bench_serving(**{**LOAD, "num_prompts": 240})

def test_of_one_server(load_watch):
    pass
"""

BAD_ENDS = """
@pytest.mark.sglang_server("mortal")
def test_dies(bench_serving):
    bench_serving(**{**LOAD, "num_prompts": 2000})

@pytest.mark.sglang_server("faulty")
def test_does_not_start(sglang_server):
    pass
"""


@pytest.fixture(scope="module")
def config():
    return SERVERS.replace("ROUTER", real_router())


@pytest.fixture(scope="module")
def ran(make_project, config):
    return make_project(LOAD + TESTS, config).run("-p", "no:cacheprovider")


@pytest.fixture(scope="module")
def badly_ended(make_project, config):
    return make_project(LOAD + BAD_ENDS, config).run("-p", "no:cacheprovider")


def test_each_server_has_a_window_and_the_slow_rank_of_one_fails_the_test(ran):
    validate(ran.results)
    windows = {each["name"]: each for each in ran.windows("test_all_roles")}
    assert {name: each["role"] for name, each in windows.items()} == {
        "test_all_roles-prefill": "prefill",
        "test_all_roles-decode-1": "decode",
        "test_all_roles-decode-2": "decode",
    }
    words = {name: each["verdict"] for name, each in windows.items()}
    assert [words.pop("test_all_roles-decode-2"), *set(words.values())] == ["fail", "pass"]
    slow = windows["test_all_roles-decode-2"]
    assert slow["server"] == "pd.decode-2" and slow["ranks"] == ["TP0", "TP1"]
    assert slow["judgements"][0]["value"] == pytest.approx(1.4, rel=0.03)  # as planted
    limits = {name: each["judgements"][0]["threshold"]["limit"] for name, each in windows.items()}
    assert limits["test_all_roles-prefill"] == 1.20 and limits["test_all_roles-decode-1"] == 1.10
    assert ran.test("test_all_roles")["verdict"] == "fail"
    assert "test_all_roles-decode-2" in ran.section("test_all_roles")


def test_the_page_has_a_row_of_ranks_for_each_server(ran):
    page = (ran.run_folder / "report.html").read_text()
    section = page.partition('id="roles"')[2].partition("</section>")[0]
    roles = re.findall(r'<th scope="row">(\w+)</th>', section)
    assert roles[:3] == ["prefill", "decode", "decode"]
    assert re.search(r'class="word fail">TP1 1\.', section)


def test_the_steps_of_each_window_are_those_of_its_role(ran):
    stages = {
        each["name"].removeprefix("test_all_roles-"): {
            row["stage"] for row in each["budgets"] if row["stage"]
        }
        for each in ran.windows("test_all_roles")
    }
    assert stages == {"prefill": {"prefill"}, "decode-1": {"decode"}, "decode-2": {"decode"}}


def test_windows_are_of_the_roles_that_are_asked_for(ran):
    windows = {each["name"]: each for each in ran.windows("test_by_hand")}
    assert {name: each["role"] for name, each in windows.items()} == {
        "prompts-prefill": "prefill",
        "hand-decode-1": "decode",
        "hand-decode-2": "decode",
    }
    assert {each["verdict"] for each in windows.values()} == {"pass"}
    assert ran.word("test_by_hand") == "PASSED"


def test_windows_are_repeated_on_each_server(ran):
    windows = [(each["name"], each["repeat_index"]) for each in ran.windows("test_repeated")]
    assert sorted(windows) == [(f"again-decode-{n}", at) for n in (1, 2) for at in (1, 2)]
    words = {each["server"]: each["verdict"] for each in ran.windows("test_repeated")}
    assert words == {"pd.decode-1": "pass", "pd.decode-2": "fail"}
    assert "in the median of 2 windows" in ran.section("test_repeated")


def test_all_processes_are_recorded_and_the_load_is_of_the_router(ran):
    servers = {each["key"]: each["kind"] for each in ran.results["servers"]}
    members = dict.fromkeys(("pd.prefill", "pd.decode-1", "pd.decode-2"), "standin")
    assert servers == {**members, "pd": "router"}
    assert {each["server"] for each in ran.results["loads"]} == {"pd"}
    page = (ran.run_folder / "report.html").read_text()
    assert "test_all_roles-decode-2" in page


def test_what_is_about_one_server_is_refused_on_a_deployment(ran):
    assert "load_watch on the deployment pd" in ran.section("test_of_one_server")


def test_a_member_that_dies_is_named_with_its_log(badly_ended):
    text = badly_ended.section("test_dies")
    assert "decode-2 of deployment mortal: the server died" in text
    assert "Scheduler hit an exception" in text


def test_a_member_that_does_not_start_is_named(badly_ended):
    text = badly_ended.section("test_does_not_start")
    assert "decode of deployment faulty: the server ended with exit status 1" in text


def test_a_killed_pytest_leaves_neither_members_nor_the_router(make_project, config):
    slow = LOAD + "def test_waits(sglang_server):\n    import time\n    time.sleep(60)\n"
    project = make_project(slow, config)
    process = project.start("-p", "no:cacheprovider")
    started = wait_for(lambda: pids if len(pids := servers(project)) == 4 else None, 90.0)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert project.left_over(within=30.0) == []
    wait_for(lambda: not any(map(psutil.pid_exists, started)))


def servers(project):
    """The processes of a deployment's servers; the router's title hides its environment."""
    logs = project.folder.glob(".sglprof/run-*/servers/*/keeper.log")
    starts = [re.search(r"server is process (\d+)", log.read_text()) for log in logs]
    return [int(start[1]) for start in starts if start]


NSYS_TEST = """
@pytest.mark.sglang_server("pd", nsys=True)
@pytest.mark.profile_window(backend="nsys", duration=1.5)
def test_under_nsys(bench_serving):
    assert bench_serving(**LOAD).completed == 96
"""


@pytest.mark.real_nsys
def test_each_server_is_recorded_by_an_nsys_session_of_its_own(
    make_project, config, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("SGLPROF_NSYS", real_nsys())
    ran = make_project(LOAD.partition("pytestmark")[0] + NSYS_TEST, config).run()
    windows = ran.windows("test_under_nsys")
    assert [(w["role"], w["backend"], w["state"]) for w in windows] == [
        ("prefill", "nsys", "complete"), ("decode", "nsys", "complete"),
        ("decode", "nsys", "complete"),
    ]  # fmt: skip
    # What they measure is how this machine schedules processes: no rank is planted in ranges.
    assert [w["judgements"][0]["threshold"]["limit"] for w in windows] == [1.2, 1.1, 1.1]
    assert len({w["server"] for w in windows}) == 3
