"""What results.json tells of servers and loads: when they started, and what is left of them."""

from __future__ import annotations

import time
from datetime import datetime

import pytest

from tests.support.project import CONFTEST, SERVERS, Outcome
from tests.support.running import standin

TESTS = """
def test_first(sglang_server, load):
    load(20)
    load(20)

def test_second(sglang_server, load):
    load(20)

@pytest.mark.sglang_server("slow")
def test_other(sglang_server):
    pass
"""
LATE = SERVERS.replace('"--crash-delay"', '"--ready-delay", "1.5", "--crash-delay"')
LEAVING = """
from pytest_sglprof._server.keeper.link import KeeperLink

really_close_it = KeeperLink.close

def close(self, *given):
    really_close_it(self, *given)
    self.left = (*self.left, "process 4711 of default")

KeeperLink.close = close
"""


def unix(text: str) -> float:
    return datetime.fromisoformat(text.replace("Z", "+00:00")).timestamp()


@pytest.fixture(scope="module")
def ran(make_project) -> Outcome:
    return make_project(TESTS, LATE).run()


def test_fault_20_a_server_tells_when_it_started_and_how_long_that_took(ran):
    run = ran.results["run"]
    default, slow = sorted(ran.results["servers"], key=lambda server: server["key"])
    for server in (default, slow):
        assert unix(run["started"]) <= unix(server["started"]) < unix(run["ended"])
        assert unix(server["started"]) + server["ready_s"] < unix(run["ended"])
    assert 1.5 <= default["ready_s"] < ran.seconds
    assert 0.0 < slow["ready_s"] < ran.seconds
    # One server lives at a time, and the second starts when the first one's tests are over.
    assert unix(default["started"]) + default["ready_s"] < unix(slow["started"])


def test_fault_20_a_load_tells_when_it_started(ran):
    first, second, third = ran.results["loads"]
    server = next(s for s in ran.results["servers"] if s["key"] == "default")
    moment = unix(server["started"]) + server["ready_s"]
    for load in (first, second, third):
        assert unix(load["started"]) >= moment - 0.001
        moment = unix(load["started"]) + load["duration_s"]
    assert moment <= unix(ran.results["run"]["ended"])


def test_fault_20_of_an_attached_server_nobody_knows_its_start(make_project, tmp_path):
    project = make_project("def test_it(sglang_server, load): load(20)")
    with standin(tmp_path, "--tp", "2", "--step-ms", "4") as server:
        before = time.time()
        attached = project.run(f"--sglprof-server={server.url}")
    (document,) = attached.results["servers"]
    assert document["attached"]
    assert (document["started"], document["ready_s"]) == (None, None)
    (load,) = attached.results["loads"]
    assert before <= unix(load["started"]) <= time.time()


@pytest.mark.parametrize("workers", [(), ("-n", "1")], ids=["alone", "workers"])
def test_fault_20_what_a_server_left_behind_is_recorded_and_told(make_project, workers):
    project = make_project(TESTS.partition("@pytest")[0])
    (project.folder / "conftest.py").write_text(CONFTEST + LEAVING)
    left = project.run(*workers)
    assert "1 error" in left.text
    found = {server["key"]: server["left_behind"] for server in left.results["servers"]}
    assert found == {"default": ["process 4711 of default"]}
    assert "server default left behind: process 4711 of default" in left.text
    assert [test["outcome"] for test in left.results["tests"]] == ["passed", "passed"]


def test_fault_20_an_interrupted_run_tells_it_too(make_project):
    body = "def test_it(sglang_server): raise KeyboardInterrupt"
    project = make_project(f"def test_first(sglang_server): pass\n{body}")
    (project.folder / "conftest.py").write_text(CONFTEST + LEAVING)
    left = project.run()
    assert left.status == pytest.ExitCode.INTERRUPTED
    assert "Traceback" not in left.text
    assert "1 passed in" in left.text.splitlines()[-1]
    (server,) = left.results["servers"]
    assert server["left_behind"] == ["process 4711 of default"]


STUBBORN = """
import os, signal
from pytest_sglprof._server.keeper.link import KeeperLink

really_close = KeeperLink.close

def close(self, timeout):
    os.kill(os.getpid(), signal.SIGINT)
    return really_close(self, timeout)

KeeperLink.close = close
"""


def test_fault_18_a_second_ctrl_c_while_the_server_is_stopped_leaves_the_summary(make_project):
    body = "def test_it(sglang_server): raise KeyboardInterrupt"
    project = make_project(f"def test_first(sglang_server): pass\n{body}")
    (project.folder / "conftest.py").write_text(CONFTEST + STUBBORN)
    ran = project.run()
    assert ran.status == pytest.ExitCode.INTERRUPTED
    assert "Traceback" not in ran.text
    assert "server default: interrupted while it was stopped" in ran.text
    assert "1 passed in" in ran.text.splitlines()[-1]
