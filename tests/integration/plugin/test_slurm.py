"""A server on two nodes of a real Slurm: the stand-in, started, profiled and lost.

tests/real/test_two_nodes.py has a real SGLang there.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from pytest_sglprof._server.keeper.gather import Gathering
from pytest_sglprof._server.keeper.protocol import SEND_FILES
from tests.support.dp_windows import planted, written
from tests.support.nodes import can_hide_disks, on_own_disk
from tests.support.project import Outcome, Project
from tests.support.slurm import Slurm, two_nodes

CONFIG = """
[server]
kind = "standin"
args = ["--tp", "2"]
standin_args = ["--step-ms", "4", "--layers", "1", "--slow", "rank=TP1,category=moe,factor=1.5"]
nodes = 2
launcher = "slurm"
stop_timeout = 5
ready_timeout = 60

[servers.third]
kind = "standin"
nodes = ["n1", "n3"]
launcher = "slurm"

[[threshold]]
metric = "slowdown"
limit = 1.1
"""
TESTS = """
@pytest.mark.profile_window(num_steps=60)
def test_slow(load):
    load(1500)

@pytest.mark.profile_window(whole_body=True)
def test_long(sglang_server, load):
    import pathlib
    pathlib.Path("here.txt").write_text(sglang_server.url)
    load(20_000)

@pytest.mark.sglang_server("third")
def test_third(sglang_server):
    pass
"""


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    with two_nodes(tmp_path_factory.mktemp("slurm")) as slurm:
        yield slurm


@pytest.fixture
def project(tmp_path: Path, slurm: Slurm) -> Iterator[Project]:
    slurm.wait_idle()
    project = Project(tmp_path / "project", TESTS, CONFIG)
    yield project
    left = project.left_over(within=30)
    for process in project.family():
        process.kill()
    assert left == []
    assert slurm.jobs() == []


def lost(project: Project, slurm: Slurm, lose: object) -> Outcome:
    """What becomes of a run in whose window something is lost."""
    process = project.start("-k", "long", **slurm.variables)
    deadline = time.monotonic() + 90
    while not (project.folder / "here.txt").exists():
        assert process.poll() is None, (project.folder / "output.txt").read_text()
        assert time.monotonic() < deadline
        time.sleep(0.1)
    time.sleep(2)
    assert callable(lose)
    lose()
    return project.outcome(process)


def test_the_slow_rank_is_named_with_its_node(project: Project, slurm: Slurm) -> None:
    ran = project.run("-k", "slow", **slurm.variables)
    assert ran.status == pytest.ExitCode.TESTS_FAILED
    (window,) = ran.windows("test_slow")
    assert window["verdict"] == "fail"
    assert window["nodes"] == {"TP0": "n1", "TP1": "n2"}
    assert "TP1" in window["reason"]
    assert re.search(r"^TP1 \(n2\) ", ran.section("test_slow"), re.M)
    logs = project.folder.glob(".sglprof/run-*/servers/*/server.log")
    assert sorted(path.parent.name for path in logs) == ["default.1", "default.1.n2"]


def test_inside_of_an_allocation(project: Project, slurm: Slurm) -> None:
    slurm.run("salloc", "--nodes=2", "--no-shell")
    (job,) = [line.split()[0] for line in slurm.jobs()]
    try:
        ran = project.run("-k", "slow", SLURM_JOB_ID=job, SLURM_JOB_NODELIST="n[1-2]",
                          **slurm.variables)  # fmt: skip
        (window,) = ran.windows("test_slow")
        assert window["nodes"] == {"TP0": "n1", "TP1": "n2"}
        assert [line.split()[0] for line in slurm.jobs()] == [job]  # it is not ours to end
    finally:
        slurm.run("scancel", job)
        slurm.wait_idle()


def test_a_cancelled_job(project: Project, slurm: Slurm) -> None:
    ran = lost(project, slurm, lambda: slurm.run("scancel", "--user=root"))
    assert ran.status == pytest.ExitCode.TESTS_FAILED
    assert re.search(r"node n[12]", ran.section("test_long"))
    assert "sent SIGTERM by another process" in ran.text


def test_a_node_that_is_gone(project: Project, slurm: Slurm) -> None:
    try:
        ran = lost(project, slurm, lambda: slurm.kill_node("n2"))
    finally:
        slurm.start_node("n2")
    assert ran.status == pytest.ExitCode.TESTS_FAILED
    assert "node n2" in ran.section("test_long")


def test_files_of_a_node_come_through_srun(slurm: Slurm, tmp_path: Path) -> None:
    if not can_hide_disks():
        pytest.skip("needs a disk that only one process has")
    slurm.wait_idle()
    here, there = tmp_path / "run", tmp_path / "disk"
    here.mkdir()
    there.mkdir()
    content = bytes(range(256)) * 20_000 + b"without a newline"
    (there / "a.trace.json.gz").write_bytes(content)
    words = ["srun", "--nodes=1", "--nodelist=n2", *on_own_disk(there, here), sys.executable]
    files = Gathering(
        subprocess.Popen(
            [*words, "-m", "pytest_sglprof._server.keeper", SEND_FILES],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, **slurm.variables},
        ),
        here,
        "n2",
    )
    files.catch_up()
    (there / "w.sqlite").write_bytes(content)
    files.bring(here / "w.sqlite", 30)
    assert files.close() == ()
    assert {path.name: path.read_bytes() for path in here.iterdir()} == {
        "a.trace.json.gz": content,
        "w.sqlite": content,
    }
    assert list(there.iterdir()) == []


def test_traces_are_read_by_steps_on_the_nodes_one_of_which_is_cancelled(
    slurm: Slurm, tmp_path: Path
) -> None:
    slurm.wait_idle()
    traces = written(planted("e", 4), tmp_path / "traces")
    words = [sys.executable, "-m", "pytest_sglprof", "check", str(traces), "--limit", "1.05"]
    words += ["--format", "json", "-o"]
    here = subprocess.run([*words, str(tmp_path / "here.json")], check=False).returncode
    process = subprocess.Popen(
        [*words, str(tmp_path / "there.json"), "--executor", "command:srun -N1 -n1 {command}"],
        env={**os.environ, **slurm.variables},
    )
    deadline = time.monotonic() + 60
    while len(jobs := slurm.jobs()) < 2 and time.monotonic() < deadline:
        assert process.poll() is None
    slurm.run("scancel", jobs[0].split()[0])
    assert process.wait(180) == here == 1
    assert (tmp_path / "there.json").read_text() == (tmp_path / "here.json").read_text()
    assert slurm.jobs() == []


def test_a_node_that_does_not_come(project: Project, slurm: Slurm) -> None:
    ran = project.run("-k", "third", **slurm.variables)
    assert ran.status == pytest.ExitCode.TESTS_FAILED
    assert "Slurm refused the nodes of server 'third' (n1, n3)" in ran.text
    assert "Invalid node name" in ran.text


def test_a_killed_pytest_leaves_neither_job_nor_server(project: Project, slurm: Slurm) -> None:
    process = project.start("-k", "long", **slurm.variables)
    deadline = time.monotonic() + 90
    while not (project.folder / "here.txt").exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    deadline = time.monotonic() + 30
    while slurm.jobs() and time.monotonic() < deadline:
        time.sleep(0.2)
    assert slurm.jobs() == []
