"""Nodes that do not share the folder of the run: each sees a disk of its own in its place."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from pytest_sglprof._server.keeper.protocol import SEND_FILES
from tests.support.nodes import can_hide_disks, on_own_disk
from tests.support.project import Project
from tests.support.real_env import real_nsys

CONFIG = """
[server]
kind = "standin"
args = ["--tp", "2"]
standin_args = ["--step-ms", "4", "--layers", "1", "--slow", "rank=TP1,category=moe,factor=1.5"]
nodes = ["alpha", "beta"]
launcher = "command"
node_command = {words}
stop_timeout = 5
ready_timeout = 60

[output]
keep = "all"

[[threshold]]
metric = "slowdown"
limit = 1.1
"""
TESTS = """
import pathlib

@pytest.mark.profile_window(num_steps=60)
def test_slow(load):
    load(1500)

@pytest.mark.profile_window(backend="nsys", duration=1)
@pytest.mark.sglang_server(nsys=True)
def test_nsys(load):
    load(1500)

@pytest.mark.profile_window(num_steps=60, output_dir="/tmp/elsewhere")
def test_elsewhere(load):
    load(1500)

@pytest.mark.profile_window(whole_body=True)
def test_long(sglang_server, load):
    pathlib.Path("here.txt").write_text(sglang_server.url)
    load(5_000)
"""

pytestmark = pytest.mark.skipif(
    not can_hide_disks(), reason="needs root, for a disk that only one process has"
)


@pytest.fixture
def disks(tmp_path: Path) -> Path:
    return tmp_path / "disks"


@pytest.fixture
def project(tmp_path: Path, disks: Path) -> Iterator[Project]:
    results = tmp_path / "project" / ".sglprof"
    words = [*on_own_disk(f"{disks}/{{node}}", results), "{command}"]
    project = Project(tmp_path / "project", TESTS, CONFIG.format(words=json.dumps(words)))
    results.mkdir()
    yield project
    left = project.left_over(within=30)
    for process in project.family():
        process.kill()
    assert left == []


def files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def senders() -> list[psutil.Process]:
    return [each for each in psutil.process_iter() if SEND_FILES in " ".join(words(each))]


def begun(project: Project) -> subprocess.Popen[bytes]:
    """The run of `test_long`, once its window is open."""
    process = project.start("-k", "long")
    deadline = time.monotonic() + 90
    while not (project.folder / "here.txt").exists():
        assert process.poll() is None, (project.folder / "output.txt").read_text()
        assert time.monotonic() < deadline
        time.sleep(0.1)
    return process


def words(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []


def test_logs_and_traces_come_from_the_nodes(project: Project, disks: Path) -> None:
    ran = project.run("-k", "slow or elsewhere")
    assert ran.status == pytest.ExitCode.TESTS_FAILED
    (window,) = ran.windows("test_slow")
    assert (window["verdict"], window["state"]) == ("fail", "complete")
    assert window["nodes"] == {"TP0": "alpha", "TP1": "beta"}
    assert "TP1" in window["reason"]
    assert [each["rank"] for each in window["artifacts"]] == ["TP0", "TP1"]
    for each in window["artifacts"]:
        assert (ran.run_folder / each["path"]).stat().st_size > 1000
    for name in ("default.1", "default.1.beta"):
        log = (ran.run_folder / "servers" / name / "server.log").read_text()
        assert log.endswith("\n")
        assert "keeper" in (ran.run_folder / "servers" / name / "keeper.log").read_text()
    assert "is a folder of nodes that share no disk" in ran.section("test_elsewhere")
    assert sorted(each.name for each in disks.iterdir()) == ["alpha", "beta"]
    assert files(disks) == []  # all came here, or was the node's alone


@pytest.mark.real_nsys
def test_reports_of_nsys_come_from_the_nodes(
    project: Project, disks: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SGLPROF_NSYS", real_nsys())
    ran = project.run("-k", "nsys")
    (window,) = ran.windows("test_nsys")
    assert window["state"] == "complete"
    kinds = sorted((each["kind"], Path(each["path"]).name) for each in window["artifacts"])
    assert [kind for kind, _ in kinds] == ["nsys-rep", "nsys-rep", "sqlite", "sqlite"]
    assert [name.split(".")[-2] for _, name in kinds] == ["alpha", "beta", "alpha", "beta"]
    assert window["ranks"] == ["TP0", "TP1"]
    assert files(disks) == []


def test_a_connection_that_brings_files_is_lost(project: Project) -> None:
    process = begun(project)
    for sender in senders():
        sender.kill()
    ran = project.outcome(process)
    (window,) = ran.windows("test_long")
    assert window["verdict"] == "inconclusive"
    assert "no complete trace of TP0, TP1" in window["reason"]
    assert "ended with status -9" in ran.text


def test_pytest_is_killed(project: Project) -> None:
    process = begun(project)
    process.kill()
    process.wait()
    assert project.left_over(within=40) == []
    assert senders() == []


def test_a_death_on_a_node_is_told(project: Project) -> None:
    process = begun(project)
    (rank,) = [each for each in project.family() if words(each)[:1] == ["sglang::scheduler_TP1"]]
    rank.kill()
    ran = project.outcome(process)
    assert ran.status == pytest.ExitCode.TESTS_FAILED
    assert "the server on node beta died" in ran.section("test_long")
