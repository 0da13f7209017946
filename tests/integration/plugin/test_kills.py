"""Somebody is killed in the middle of a window: everything is gone soon, and who lives reports.

tests/integration/keeper/test_kills.py looks at the keeper alone; here it is whole runs of pytest.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time

import psutil
import pytest

from tests.support.project import Project
from tests.support.real_env import real_nsys

GONE_WITHIN = 60.0  # s; what is promised

CONFIG = """
[server]
kind = "standin"
args = ["--tp", "2"]
standin_args = ["--step-ms", "4", "--layers", "1", "--crash-delay", "0.2"]
stop_timeout = 5

[servers.other]
kind = "standin"
args = ["--tp", "2"]
standin_args = ["--step-ms", "4", "--layers", "1"]

[servers.hanging]
kind = "standin"
args = ["--tp", "2"]
standin_args = ["--step-ms", "4", "--layers", "1", "--hang-in-stop-profile"]
stop_timeout = 2

[servers.never]
kind = "standin"
standin_args = ["--never-ready"]

[servers.traced]
kind = "standin"
args = ["--tp", "2"]
nsys = true
"""

# `here.txt` tells that the window is open, and the pids of who can be killed.
TESTS = """
import os, pathlib, signal, time
import psutil

whole = pytest.mark.profile_window(whole_body=True)

def here(server):
    pathlib.Path("here.new").write_text(f"{os.getpid()} {server.pid}")
    os.replace("here.new", "here.txt")

@whole
def test_window(load, sglang_server):
    here(sglang_server)
    load(20_000)

@whole
def test_next(drive):
    drive()

@pytest.mark.sglang_server("other")
@whole
def test_other(drive):
    drive()

@pytest.mark.sglang_server("hanging")
@pytest.mark.profile_window(whole_body=True, timeout=2)
def test_hanging(drive):
    drive()

@pytest.mark.sglang_server("never")
def test_never(sglang_server):
    pass

@pytest.mark.sglang_server("traced")
def test_nsys_killed(drive, sglang_server, profile_window):
    with profile_window("killed", backend="nsys", timeout=30):
        drive(20)
        parents = psutil.Process(sglang_server.pid).parents()
        next(p for p in parents if p.cmdline()[1:2] == ["profile"]).kill()
    with profile_window("after", backend="nsys", timeout=30):
        drive(20)
"""


@pytest.fixture
def project(tmp_path):
    project = Project(tmp_path / "project", TESTS, CONFIG)
    yield project
    for process in project.family():
        process.kill()


def in_window(project: Project, process: subprocess.Popen[str]) -> tuple[int, int]:
    """Waits until the window is open and its load runs; pids of its pytest and its server."""
    here = project.folder / "here.txt"
    wait(lambda: here.exists(), process, project)
    wait(lambda: any("load_driver" in words(p) for p in project.family()), process, project)
    owner, server = here.read_text().split()
    return int(owner), int(server)


def only(*names: str) -> list[str]:
    return [f"test_job.py::test_{name}" for name in names]


def words(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


def wait(what, process, project, limit=60.0):
    deadline = time.monotonic() + limit
    while not what():
        alive = process.poll() is None and time.monotonic() < deadline
        assert alive, (project.folder / "output.txt").read_text()
        time.sleep(0.05)


def test_sigkill_of_the_server_in_a_window(project):
    process = project.start(*only("window", "next", "other"))
    _, server = in_window(project, process)
    os.kill(server, signal.SIGKILL)
    ran = project.outcome(process)
    assert project.left_over(within=5) == []
    assert ran.status == pytest.ExitCode.TESTS_FAILED
    text = ran.section("test_window")
    assert "the server died" in text
    assert re.search(r"exit status (-9|137)|killed", text)
    (window,) = ran.windows("test_window")
    assert (window["state"], window["verdict"]) == ("failed", "inconclusive")
    assert "the server died" in window["reason"]
    assert ran.word("test_next") == "ERROR"
    assert "the server died" in ran.section("test_next")
    assert ran.word("test_other") == "PASSED"
    assert "left behind" not in ran.text


@pytest.mark.parametrize("workers", [(), ("-n", "2")], ids=["alone", "workers"])
def test_ctrl_c_in_a_window(project, workers):
    process = project.start(*workers, *only("window", "other"))
    in_window(project, process)
    began = time.monotonic()
    os.killpg(process.pid, signal.SIGINT)
    ran = project.outcome(process)
    assert project.left_over(within=GONE_WITHIN - (time.monotonic() - began)) == []
    assert ran.status == pytest.ExitCode.INTERRUPTED
    assert "KeyboardInterrupt" in ran.text
    assert "INTERNALERROR" not in ran.text


@pytest.mark.parametrize("workers", [(), ("-n", "2")], ids=["alone", "workers"])
def test_sigkill_of_pytest_itself(project, workers):
    process = project.start(*workers, *only("window"))
    in_window(project, process)
    began = time.monotonic()
    process.kill()
    process.wait()
    assert project.left_over(within=GONE_WITHIN - (time.monotonic() - began)) == []


def test_sigkill_of_a_worker(project):
    process = project.start("-n", "2", *only("window", "other"))
    worker, _ = in_window(project, process)
    assert worker != process.pid
    os.kill(worker, signal.SIGKILL)
    ran = project.outcome(process)
    assert project.left_over(within=GONE_WITHIN) == []
    assert re.search(r"worker 'gw\d' crashed while running 'test_job.py::test_window", ran.text)
    assert ran.test("test_other")["outcome"] == "passed"
    assert ran.windows("test_other")[0]["verdict"] == "pass"
    assert ran.status == pytest.ExitCode.TESTS_FAILED


def test_a_server_that_hangs_in_stop_profile(project):
    began = time.monotonic()
    ran = project.run(*only("hanging"))
    assert project.left_over(within=GONE_WITHIN - (time.monotonic() - began)) == []
    (window,) = ran.windows("test_hanging")
    assert (window["state"], window["verdict"]) == ("failed", "inconclusive")
    text = ran.section("test_hanging")
    assert "\nprofile window verdict: inconclusive\n" in text
    assert "/stop_profile did not answer within" in text


def test_ctrl_c_while_a_server_does_not_get_ready(project):
    process = project.start(*only("never"))
    wait(lambda: any("standin" in words(p) for p in project.family()), process, project)
    os.killpg(process.pid, signal.SIGINT)
    ran = project.outcome(process)
    assert project.left_over(within=GONE_WITHIN) == []
    assert ran.status == pytest.ExitCode.INTERRUPTED
    assert "INTERNALERROR" not in ran.text


@pytest.mark.real_nsys
def test_sigkill_of_nsys_in_a_window(project):
    ran = project.run(*only("nsys_killed"), SGLPROF_NSYS=real_nsys())
    assert project.left_over(within=GONE_WITHIN) == []
    killed, after = ran.windows("test_nsys_killed")
    assert killed["state"] == "complete" or killed["state_reason"]
    assert (after["state"], after["ranks"]) == ("complete", ["TP0", "TP1"])
    assert not [p for p in psutil.process_iter() if str(project.folder) in words(p)]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP, signal.SIGTERM])
@pytest.mark.parametrize("phase", ["launch", "inside"])
def test_fault_3_whatever_becomes_of_the_keeper_is_told_and_cleaned_up(project, phase, number):
    name = "never" if phase == "launch" else "window"
    process = project.start(*only(name))
    if phase == "inside":
        in_window(project, process)
    wait(lambda: any("standin" in words(p) for p in project.family()), process, project)
    (keeper,) = [p for p in project.family() if "pytest_sglprof._server.keeper" in words(p)]
    began = time.monotonic()
    keeper.send_signal(number)
    ran = project.outcome(process)
    assert project.left_over(within=30.0 - (time.monotonic() - began)) == []
    assert time.monotonic() - began < 30.0
    assert f"the keeper process (pid {keeper.pid}) was" in ran.text
    assert ran.status == pytest.ExitCode.TESTS_FAILED
    assert "INTERNALERROR" not in ran.text


def test_fault_3_a_keeper_that_froze_while_the_tests_passed_is_a_warning(project):
    freeze = (
        "\ndef test_frozen(sglang_server):\n"
        "    os.kill(psutil.Process(sglang_server.pid).ppid(), signal.SIGSTOP)\n"
    )
    (project.folder / "test_job.py").write_text(f"import pytest\n{TESTS}{freeze}")
    began = time.monotonic()
    ran = project.run("-W", "default", *only("frozen"))
    assert time.monotonic() - began < 30.0
    assert project.left_over(within=5) == []
    assert ran.status == pytest.ExitCode.OK
    warning = r"Warning: the keeper process \(pid \d+\) was stopped \(SIGSTOP\) and did not"
    assert re.search(warning, ran.text)
    line = r"^server default: the keeper process \(pid \d+\) was stopped .*; the server was ended"
    assert len(re.findall(line, ran.text, re.M)) == 1


@pytest.mark.parametrize("workers", [(), ("-n", "1")], ids=["alone", "workers"])
def test_a_keeper_that_was_killed_while_all_tests_passed_is_in_the_summary(project, workers):
    kill = """
def test_last_of_server(sglang_server):
    keeper = psutil.Process(sglang_server.pid).parent()
    keeper.kill()
    while sglang_server.is_alive():  # pytest ends it after its keeper
        time.sleep(0.1)

def test_without_server(): pass
"""
    (project.folder / "test_job.py").write_text(f"import pytest\n{TESTS}{kill}")
    ran = project.run(*workers, *only("last_of_server", "without_server"))
    assert ran.status == pytest.ExitCode.OK
    line = r"^server default: (the keeper process \(pid \d+\) was killed by signal 9); the server"
    assert len(faults := re.findall(line, ran.text, re.M)) == 1
    assert [server["keeper_fault"] for server in ran.results["servers"]] == faults
    assert project.left_over(within=5) == []
