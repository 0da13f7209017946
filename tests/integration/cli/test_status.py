"""`sglprof status`: what lives on this machine, without changing any of it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pytest_sglprof._cli.main import main
from pytest_sglprof._config.model import ServerSpec
from pytest_sglprof._run.folder import write_run_file
from pytest_sglprof._server import lease
from pytest_sglprof._server.launch import launch
from tests.support.running import ROOT

Output = pytest.CaptureFixture[str]
WRITE = """
import sys, time
from pathlib import Path
from pytest_sglprof._run.folder import write_run_file
folder = Path(sys.argv[1])
folder.mkdir(parents=True)
write_run_file(folder, started=time.time(), version="1")
"""


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = tmp_path / "here"
    here.mkdir()
    (here / "pyproject.toml").write_text("")
    monkeypatch.chdir(here)
    monkeypatch.setenv("SGLPROF_LEASE_DIR", str(tmp_path / "leases"))
    monkeypatch.setenv("SGLPROF_NSYS", str(tmp_path / "no" / "nsys"))


def shown(capsys: Output, *words: str) -> dict[str, Any]:
    capsys.readouterr()
    assert main(["status", "--format", "json", *words]) == 0
    document: dict[str, Any] = json.loads(capsys.readouterr().out)
    return document


def everything_below(folder: Path) -> dict[Path, tuple[int, int]]:
    states = {path: path.lstat() for path in folder.rglob("*")}
    return {path: (state.st_mtime_ns, state.st_size) for path, state in states.items()}


def test_a_server_of_a_run_is_named_with_its_leases_and_recorded_by_its_name(
    tmp_path: Path, capsys: Output
) -> None:
    spec = ServerSpec(name="moe-7", kind="standin", args=("--tp", "2"))
    server = launch(spec, folder=tmp_path / "run-1" / "servers" / "moe-7.1")
    try:
        before = everything_below(tmp_path / "leases")
        status = shown(capsys, server.url)
        assert everything_below(tmp_path / "leases") == before
        alive = {each["name"]: each for each in status["servers"]}["moe-7"]
        assert (alive["url"], alive["pid"]) == (server.url, server.pid)
        assert alive["folder"] == str(server.folder)
        names = {name: each["pid"] for each in status["leases"] for name in each["leases"]}
        assert lease.port_name(server.port) in names
        assert names.keys() == {path.stem for path in (tmp_path / "leases").glob("*.lock")}
        asked = status["server"]
        assert (asked["ranks"], asked["version"]) == (["TP0", "TP1"], server.sizes.version)
        assert [each["running"] for each in asked["load"]] == [0]
        assert asked["profile"].startswith("none of this machine")
        with lease.window_lock(server.url):
            busy = shown(capsys, server.url)["server"]["profile"]
        assert busy == f"a window of process {os.getpid()} is open"
        assert main(["status", server.url]) == 0
        text = capsys.readouterr().out
        assert "moe-7" in text
        assert server.url in text
        assert main(["record", "moe-7", "--seconds", "0.2"]) == 3  # without load
        assert Path("sglprof-window/report.html").exists()
    finally:
        server.stop()
    assert "moe-7" not in [each["name"] for each in shown(capsys)["servers"]]
    assert shown(capsys)["leases"] == []


def test_runs_that_were_killed_are_listed(tmp_path: Path, capsys: Output) -> None:
    killed, alive = Path(".sglprof/run-1"), Path(".sglprof/run-2")
    command = [sys.executable, "-c", WRITE, str(killed)]
    subprocess.run(command, check=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    alive.mkdir()
    write_run_file(alive, started=0.0, version="1")
    (runs,) = shown(capsys)["dead_runs"]
    assert Path(runs["folder"]).name == "run-1"
    (killed / "results.json").write_text("{}")
    assert shown(capsys)["dead_runs"] == []


def test_tools_are_listed_with_what_they_lack(capsys: Output) -> None:
    tools = {each["name"]: each for each in shown(capsys)["tools"]}
    assert "no nsys command" in tools["nsys"]["problem"]
    assert tools["extra xdist"]["problem"] == ""
    assert "sglang" in tools
    assert main(["status"]) == 0
    out = capsys.readouterr().out
    assert "servers of runs that are alive: none" in out or "servers of runs" in out
    assert "nsys sessions: none" in out


def test_a_server_that_does_not_answer(capsys: Output) -> None:
    assert main(["status", "http://127.0.0.1:9"]) == 2
    assert "127.0.0.1:9" in capsys.readouterr().err
