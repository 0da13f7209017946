"""Whoever is killed, however it goes: everything is gone soon, without a next run."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from pytest_sglprof._nsys import NsysSession, NsysTool, find_nsys
from pytest_sglprof._process import variable as process_variable
from pytest_sglprof._process import wait_gone
from tests.integration.keeper.conftest import family, wait_clean, words
from tests.support.real_env import real_nsys
from tests.support.running import wait_for

CLEAN_WITHIN = 60.0  # s; what is promised of a killed pytest

LAUNCHER = """
import sys, time
from pathlib import Path
from pytest_sglprof._server.launch import launch
from pytest_sglprof._config.model import ServerSpec
folder, mode, backend = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
spec = ServerSpec(args=("--device", "cpu", "--tp", "2"), nsys=backend == "nsys",
                  env=(("FAKE_MODE", mode),), ready_timeout=600,
                  stop_timeout=float(sys.argv[4]))
server = launch(spec, folder=folder, progress=lambda text: print(text, flush=True))
if server.nsys is not None and backend == "nsys":
    server.nsys.start(folder.parent / "window" / "open.nsys-rep")
if backend:
    server.announce_window(backend)
    (folder / "traces" / "half.trace.json.gz").write_bytes(b"half")
print("READY", server.pid, server.nsys.name if server.nsys else "-", flush=True)
time.sleep(600)
"""


@pytest.fixture
def launcher(fake_sglang, nothing_left, tmp_path):
    """Starts a process that launches a server; gives it and its READY line's words."""
    running = []

    def start(mode: str = "", backend: str = "", until: str = "READY", limit: float = 60.0):
        process = subprocess.Popen(
            [sys.executable, "-c", LAUNCHER, str(tmp_path / "server"), mode, backend, str(limit)],
            stdout=subprocess.PIPE,
            text=True,
        )
        running.append(process)
        for line in process.stdout:
            if until in line:
                return process, line.split()
        raise AssertionError("the launcher ended")

    yield start
    for process in running:
        process.kill()
        process.wait()
        process.stdout.close()


@pytest.fixture
def tool() -> NsysTool:
    return find_nsys(real_nsys())


def kill_and_wait(process: subprocess.Popen[str], marker: Path) -> float:
    began = time.monotonic()
    process.kill()
    process.wait()
    assert wait_clean(marker, CLEAN_WITHIN) == []
    return time.monotonic() - began


def test_sigkill_of_pytest_while_the_server_runs(launcher, lease_folder):
    process, _ = launcher()
    assert len(family(lease_folder)) >= 4  # pytest's stand-in, keeper, server, two ranks
    assert kill_and_wait(process, lease_folder) < 10


def test_sigkill_of_pytest_while_the_server_starts(launcher, lease_folder, tmp_path):
    process, _ = launcher("never", until="")
    log = tmp_path / "server" / "server.log"
    wait_for(lambda: log.is_file() and "fired up" in log.read_text())
    assert kill_and_wait(process, lease_folder) < 10


def test_sigkill_of_pytest_in_a_torch_window_closes_it_first(launcher, lease_folder, tmp_path):
    process, _ = launcher(backend="torch")
    assert kill_and_wait(process, lease_folder) < 10
    assert "POST /stop_profile" in (tmp_path / "server" / "server.log").read_text()
    assert (tmp_path / "server" / "traces" / "half.trace.json.gz").exists()


def test_a_hang_in_stop_profile_ends_too_and_leaves_no_half_files(launcher, lease_folder, tmp_path):
    process, _ = launcher("hang_stop", backend="torch", limit=2.0)
    assert 2.0 < kill_and_wait(process, lease_folder) < 15
    assert list((tmp_path / "server" / "traces").iterdir()) == []
    assert "could not be closed" in (tmp_path / "server" / "keeper.log").read_text()


def test_a_child_that_holds_the_pipe_open_does_not_keep_the_server(launcher, lease_folder):
    """A forked child of pytest inherits the pipe: the keeper looks at its parent as well."""
    process, _ = launcher()
    keeper = next(
        found for found in family(lease_folder) if "pytest_sglprof._server.keeper" in words(found)
    )
    pipe = os.open(f"/proc/{keeper.pid}/fd/0", os.O_WRONLY)
    try:
        assert kill_and_wait(process, lease_folder) < 10
    finally:
        os.close(pipe)


def test_the_keeper_outlives_ctrl_c_and_obeys_sigterm(launcher, lease_folder):
    process, _ = launcher()
    keeper = next(
        found for found in family(lease_folder) if "pytest_sglprof._server.keeper" in words(found)
    )
    keeper.send_signal(signal.SIGINT)
    keeper.send_signal(signal.SIGHUP)
    time.sleep(0.5)
    assert keeper.is_running()
    keeper.terminate()
    assert wait_gone([keeper], 20) == []
    assert {found.pid for found in family(lease_folder)} == {process.pid}
    kill_and_wait(process, lease_folder)


@pytest.mark.real_nsys
def test_sigkill_of_pytest_in_an_nsys_window(launcher, lease_folder, tmp_path, tool):
    process, opened = launcher(backend="nsys")
    assert NsysSession(tool, opened[2], tmpdir=tmp_path / "server" / "tmp").state() == "Collection"
    assert any("--start-agent" in " ".join(words(p)) for p in family(lease_folder))
    assert kill_and_wait(process, lease_folder) < CLEAN_WITHIN
    assert "report: " in (tmp_path / "server" / "keeper.log").read_text()
    assert NsysSession(tool, opened[2]).state() == ""
    assert not any("nsys" in path.name for path in (tmp_path / "server").rglob("*.nsys-rep.*"))


@pytest.mark.real_nsys
def test_sigkill_of_nsys_in_a_window_leaves_a_usable_server(start, tmp_path, tool):
    server = start("--tp", "2", nsys=True)
    server.nsys.start(tmp_path / "one.nsys-rep")
    killed = command_of(server)
    killed.kill()
    assert server.is_alive()
    assert server.nsys.stop(timeout=60) == tmp_path / "one.nsys-rep"
    server.nsys.start(tmp_path / "two.nsys-rep")
    assert server.nsys.stop(timeout=60).stat().st_size > 0
    config = process_variable(server.pid, "QUADD_INJECTION_CONFIG")
    assert Path(config).is_file()
    assert server.stop() == ()
    assert not Path(config).exists()


@pytest.mark.real_nsys
def test_sigkill_of_the_server_in_an_nsys_window(start, tmp_path, tool):
    server = start("--tp", "2", nsys=True)
    server.nsys.start(tmp_path / "one.nsys-rep")
    server.announce_window("nsys")
    began = time.monotonic()
    os.kill(server.pid, signal.SIGKILL)
    while server.is_alive():
        time.sleep(0.01)
    reason = server.exit_reason()
    assert reason is not None
    assert "died" in reason.what
    assert server.stop() == ()
    # 3 s as a rule; now and then nsys does not notice the death, and is waited for, then ended.
    assert time.monotonic() - began < 60
    assert (server.folder / "nsys" / "first.nsys-rep").stat().st_size > 0


@pytest.mark.real_nsys
def test_the_whole_tree_killed_but_the_agent(start, tmp_path, tool):
    server = start("--tp", "2", nsys=True)
    server.nsys.start(tmp_path / "one.nsys-rep")
    agentless = [command_of(server), *command_of(server).children(recursive=True)]
    for process in agentless:
        process.kill()
    while server.is_alive():
        time.sleep(0.01)
    assert server.exit_reason() is not None
    assert server.stop() == ()


@pytest.mark.real_nsys
def test_secrets_are_not_in_the_environment_of_anything_below_nsys(
    start, tmp_path, monkeypatch, tool, lease_folder
):
    monkeypatch.setenv("HF_TOKEN", "hf_of_the_user")
    monkeypatch.setenv("THE_KEY", "key-of-the-server")
    report = tmp_path / "report.json"
    server = start(api_key_env="THE_KEY", nsys=True, env={"FAKE_REPORT": str(report)})
    texts = [
        Path(f"/proc/{process.pid}/{name}").read_bytes()
        for process in family(lease_folder)
        for name in ("environ", "cmdline")
    ]
    assert len(texts) >= 10
    assert not [text for text in texts if b"hf_of_the" in text or b"key-of-the" in text]
    assert '"token": "hf_of_the_user"' in report.read_text()
    server.nsys.start(tmp_path / "one.nsys-rep")
    found = server.nsys.stop(timeout=60)
    assert found.stat().st_mode & 0o077 == 0


def command_of(server) -> psutil.Process:
    """The nsys command: the ancestor of the server that is called so."""
    parents = psutil.Process(server.pid).parents()
    return next(p for p in parents if p.cmdline()[1:2] == ["profile"])
