"""A run that was killed, keeper and all: what it left is ended, and its tests are told.

`docs/servers.md` promises it for `sglprof clean`, and for the next run of pytest.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from pytest_sglprof import _process as process
from pytest_sglprof._report.results import load_results
from tests.integration.plugin.test_kills import CONFIG, TESTS, in_window, only, words
from tests.support.project import Project
from tests.support.real_env import real_nsys

TRACED = """
@pytest.mark.sglang_server("traced")
def test_traced(load, sglang_server, profile_window):
    with profile_window("open", backend="nsys", timeout=60):
        here(sglang_server)
        load(20_000)
"""


class Dead:
    """A run that was killed inside a window, after a test that had passed."""

    def __init__(
        self, folder: Path, keeper_gets: signal.Signals, *names: str, **environment: str
    ) -> None:
        self.project = Project(folder, TESTS + TRACED, CONFIG)
        self.environment = self.project.environment(**environment)
        pytest_process = self.project.start(*only(*names), **environment)
        in_window(self.project, pytest_process)
        (self.folder,) = (folder / ".sglprof").glob("run-*")
        self.journal = json.loads((self.folder / "run.json").read_text())
        self.living = {each.pid: words(each) for each in self.project.family()}
        (self.keeper,) = [e for e in self.project.family() if "_server.keeper" in words(e)]
        self.keeper.send_signal(keeper_gets)
        pytest_process.kill()
        pytest_process.wait()

    def sglprof(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        ran = subprocess.run(
            [sys.executable, "-m", "pytest_sglprof", *arguments],
            cwd=self.project.folder,
            env=self.environment,
            capture_output=True,
            text=True,
            check=False,
        )
        print(ran.stdout, ran.stderr)
        return ran

    def servers(self) -> list[psutil.Process]:
        return [each for each in self.project.family() if "load_driver" not in words(each)]


def dead_run(folder: Path, keeper_gets: signal.Signals, *names: str, **env: str) -> Iterator[Dead]:
    dead = Dead(folder, keeper_gets, *names, **env)
    yield dead
    for each in dead.project.family():
        each.kill()


@pytest.fixture(scope="module")
def dead(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Dead]:
    yield from dead_run(tmp_path_factory.mktemp("dead"), signal.SIGKILL, "next", "window")


def test_the_journal_names_what_the_run_has(dead: Dead) -> None:
    (server,) = dead.journal["servers"]
    by_pid = {pid for pid, text in dead.living.items() if "load_driver" not in text}
    noted = {server["owner"]["pid"], server["keeper"]["pid"]}
    noted |= {each["pid"] for each in server["processes"]}
    assert noted == by_pid
    main = psutil.Process(server["server"]["pid"])
    assert str(server["ports"][0]) in main.cmdline()
    since_boot = main.create_time() - psutil.boot_time()
    assert server["server"]["start"] == pytest.approx(since_boot * 100, abs=200)
    assert [test["nodeid"] for test in dead.journal["tests"]] == only("window")


def test_what_is_left_is_shown_ended_and_gone_and_a_process_with_its_number_is_not(
    dead: Dead,
) -> None:
    before = {each.pid for each in dead.servers()}
    assert len(before) == 3  # the server and its two ranks
    record = dead.folder / "loads" / "test-1" / ".load-1.raw"  # as a driver writes it, with keys
    record.parent.mkdir(parents=True)
    record.write_text('{"server_info": {"api_key": "secret"}}')
    shown = dead.sglprof("clean", "--dry-run")
    assert shown.returncode == 1
    assert {each.pid for each in dead.servers()} == before
    assert all(f"would end process {pid} " in shown.stdout for pid in before)
    assert "would remove loads/test-1/.load-1.raw" in shown.stdout
    assert record.exists()

    decoy = subprocess.Popen(["sleep", "600"])
    try:
        real = process.identity(decoy.pid)
        assert real is not None
        content = json.loads((dead.folder / "run.json").read_text())
        content["servers"][0]["processes"].append({"pid": real.pid, "start": real.start - 1})
        (dead.folder / "run.json").write_text(json.dumps(content))
        ran = dead.sglprof("clean", str(dead.folder))
        assert decoy.poll() is None
    finally:
        decoy.kill()
        decoy.wait()
    assert ran.returncode == 0
    assert not record.exists()
    assert all(f": ended process {pid} " in ran.stdout for pid in before)
    assert f"left alone: process {decoy.pid} is another one now" in ran.stdout
    assert dead.project.left_over(within=5) == []
    again = dead.sglprof("clean")
    assert (again.returncode, again.stdout) == (0, "nothing is left of runs that were killed\n")


def test_a_cancelled_job_gets_its_results_from_the_journal(dead: Dead) -> None:
    assert not (dead.folder / "results.json").exists()
    assert dead.sglprof("report", str(dead.folder)).returncode == 0
    results = load_results(dead.folder / "results.json")
    assert (dead.folder / "report.html").is_file()
    ended, begun = results.tests
    assert (ended.nodeid, ended.outcome, ended.verdict) == (*only("next"), "passed", "pass")
    assert (begun.nodeid, begun.outcome, begun.verdict) == (*only("window"), "interrupted", None)
    assert "never ended: its run was killed" in begun.reason
    assert "was interrupted" in (results.run.interrupted or "")
    assert results.run.command[0] == "pytest"
    by_state = [(each.nodeid, each.state, each.verdict) for each in results.windows]
    assert by_state[0] == (*only("next"), "complete", "pass")
    assert all(verdict == "inconclusive" for _, _, verdict in by_state[1:])


def test_the_next_run_ends_a_frozen_keeper_and_its_server(tmp_path: Path) -> None:
    for dead in dead_run(tmp_path / "project", signal.SIGSTOP, "window"):
        time.sleep(0.5)
        left = {each.pid for each in dead.servers()}
        assert dead.keeper.pid in left
        (dead.project.folder / "test_plain.py").write_text("def test_plain(): pass")
        ran = dead.project.run("test_plain.py")
        assert ran.status == pytest.ExitCode.OK
        assert dead.project.left_over(within=1) == []
        name = f"{dead.folder.name}/servers/default.1, whose run was killed"
        assert all(f"{name}: ended process {pid} " in ran.text for pid in left)
        assert "left behind" not in ran.text


@pytest.mark.real_nsys
def test_an_nsys_session_ends_with_its_server(tmp_path: Path) -> None:
    nsys = real_nsys()
    for dead in dead_run(tmp_path / "p", signal.SIGKILL, "traced", SGLPROF_NSYS=nsys):
        (server,) = dead.journal["servers"]
        assert server["session"].endswith(server["life"])
        assert any("profile" in words(each) for each in dead.servers())
        ran = dead.sglprof("clean")
        assert (ran.returncode, "left behind" in ran.stdout) == (0, False)
        assert dead.project.left_over(within=1) == []
        assert not [each for each in psutil.process_iter() if str(tmp_path) in words(each)]
        assert server["session"] not in json.dumps(
            json.loads(dead.sglprof("status", "--format", "json").stdout)["nsys_sessions"]
        )


# ---- runs that are not touched ------------------------------------------------------------------


def crafted(output: Path, **changes: Any) -> tuple[Path, dict[str, Any]]:
    """A dead run whose journal names a process of this test as one of its server's."""
    from pytest_sglprof._run.folder import write_run_file

    folder = output / "run-1"
    (folder / "servers" / "s.1").mkdir(parents=True)
    write_run_file(folder, started=0.0, version="1")
    content = json.loads((folder / "run.json").read_text())
    ended = {"pid": content["pid"], "start": content["start"] - 1}
    entry = {"life": "0123456789ab", "folder": "servers/s.1", "since": 0.0, "stop_timeout": 1.0}
    entry |= {"owner": ended, "keeper": ended}
    server = changes.pop("server", {})
    content |= {"start": ended["start"], "servers": [entry | server], **changes}
    (folder / "run.json").write_text(json.dumps(content))
    return folder, content


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"host": "elsewhere"}, "it ran on elsewhere"),
        ({"pid_space": "pid:[1]"}, "it ran in another container"),
        ({"boot": "another"}, ""),
        ({"server": {"folder": "servers/.."}}, None),
        ({"server": {"life": "../../x"}}, None),
    ],
)
def test_nothing_of_another_machine_or_time_is_ended(
    tmp_path: Path, changes: dict[str, Any], why: str | None
) -> None:
    from pytest_sglprof._run.clean import clean

    sleeper = subprocess.Popen(["sleep", "600"])
    try:
        known = process.identity(sleeper.pid)
        assert known is not None
        server = {"processes": [{"pid": known.pid, "start": known.start}]}
        crafted(tmp_path, **{**changes, "server": server | changes.get("server", {})})
        lives = clean(tmp_path, patience=0.0)
        assert sleeper.poll() is None
    finally:
        sleeper.kill()
        sleeper.wait()
    assert [each.ended for each in lives] == ([] if why is None else [()])
    assert [each.alone for each in lives if why] == ([(why,)] if why else [])


def test_a_keeper_at_work_is_not_disturbed(tmp_path: Path) -> None:
    from pytest_sglprof._run.clean import clean, swept
    from pytest_sglprof._run.interrupted import interrupted_results, write_interrupted

    keeper = subprocess.Popen(["sleep", "600"])
    try:
        known = process.identity(keeper.pid)
        assert known is not None
        entry = {"pid": known.pid, "start": known.start}
        folder, _ = crafted(tmp_path, server={"keeper": entry})
        assert swept(tmp_path) == []
        (life,) = clean(tmp_path, patience=0.1)
        with pytest.raises(BlockingIOError, match="a keeper still tears its server down"):
            write_interrupted(interrupted_results(folder), folder)
        assert keeper.poll() is None
    finally:
        keeper.kill()
        keeper.wait()
    left = f"process {keeper.pid} (its keeper, which tears the server down)"
    assert (life.ended, life.left) == ((), (left,))
    assert not (folder / "results.json").exists()


def test_clocks_of_a_gpu_that_another_run_uses_stay_locked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pytest_sglprof._run.clean import clean
    from pytest_sglprof._server import lease

    monkeypatch.setenv("SGLPROF_LEASE_DIR", str(tmp_path / "leases"))
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "support" / "fake_nvml")
    monkeypatch.delitem(sys.modules, "pynvml", raising=False)
    monkeypatch.setenv("FAKE_NVML_CALLS", str(tmp_path / "calls"))
    crafted(tmp_path, server={"gpus": ["1"], "clocks": {"GPU-b": 1410}})
    held = lease.acquire("gpu-1", timeout=0)
    (life,) = clean(tmp_path, patience=0.0)
    held.release()
    assert (life.ended, life.left) == ((), ())
    assert life.alone[-1:] == ("clocks of GPU 1, which another process holds",)
    assert not (tmp_path / "calls").exists()
