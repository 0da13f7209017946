"""Starting and stopping a server: what it is told, what it sees, what is left of it."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import time
from pathlib import Path

import psutil
import pytest

from pytest_sglprof._config.model import ServerSpec
from pytest_sglprof._errors import (
    LeaseError,
    ServerDied,
    ServerNotReady,
    ServerRefused,
    SettingsError,
)
from pytest_sglprof._server import lease
from pytest_sglprof._server.keeper.life import ServerLife
from pytest_sglprof._server.launch import attach, launch


def test_a_server_starts_serves_and_leaves_only_its_log(start, tmp_path, lease_folder):
    server = start("--tp", "2", model_path="some/model")
    assert server.is_alive()
    assert server.exit_reason() is None
    assert server.kind == "sglang"
    assert server.sizes.tp == 2
    assert [rank.label for rank in server.scheduler_ranks().values()] == ["TP0", "TP1"]
    assert server.command[1:5] == ("-m", "sglang.launch_server", "--model-path", "some/model")
    assert f"--port {server.port}" in " ".join(server.command)
    assert "--watchdog-timeout 1800" in " ".join(server.command)
    assert server.url == f"http://127.0.0.1:{server.port}"
    assert (lease_folder / f"port-{server.port}.lock").exists()
    assert os.getsid(server.pid) != os.getsid(0)
    assert server.stop() == ()
    assert not server.is_alive()
    left = sorted(path.name for path in server.folder.rglob("*") if path.is_file())
    assert left == ["keeper.log", "server.log"]
    assert server.stop() == ()


def test_progress_tells_the_time_and_what_the_server_does(fake_sglang, nothing_left, tmp_path):
    told: list[str] = []
    spec = ServerSpec(name="main", ready_timeout=3.0, env=(("FAKE_MODE", "never"),))
    with pytest.raises(ServerNotReady):
        launch(spec, folder=tmp_path / "server", progress=told.append)
    assert any(line.startswith("server main: ") for line in told)
    phase = r"server main: (starting|answering its first request), \d+ s"
    assert all(re.fullmatch(phase, line) for line in told)


def test_keys_and_tokens_reach_the_server_and_nothing_else(start, tmp_path, monkeypatch):
    report = tmp_path / "report.json"
    monkeypatch.setenv("THE_KEY", "key-of-the-server")
    monkeypatch.setenv("HF_TOKEN", "hf_of_the_user")
    server = start(api_key_env="THE_KEY", env={"FAKE_REPORT": str(report)})
    seen = json.loads(report.read_text())
    assert seen["argv"][-2:] == ["--api-key", "key-of-the-server"]
    assert seen["token"] == "hf_of_the_user"
    assert seen["child"]["token"] == "hf_of_the_user"
    assert "key-of-the-server" not in " ".join(seen["cmdline"])
    assert not any("THE_KEY" in word for word in seen["block"])
    assert "key-of-the-server" not in " ".join(server.command)
    assert server.info["api_key"] == "<redacted>"
    for process in psutil.process_iter():
        try:
            words = process.cmdline()
        except psutil.Error:
            continue
        assert "key-of-the-server" not in " ".join(words)
    server.stop()
    for path in server.folder.rglob("*"):
        if path.is_file():
            assert b"key-of-the-server" not in path.read_bytes(), path
    assert "'api_key': '<redacted>'" in (server.folder / "server.log").read_text()


def test_a_key_among_the_arguments_is_hidden_as_well(start):
    server = start("--api-key", "typed-by-hand")
    assert server.client.server_info()["tp_size"] == 1
    line = " ".join(psutil.Process(server.pid).cmdline())
    assert "typed-by-hand" not in line
    server.stop()
    assert "typed-by-hand" not in (server.folder / "server.log").read_text()


def test_a_named_key_that_is_not_set_is_said(tmp_path, fake_sglang):
    with pytest.raises(SettingsError, match="NOT_SET_KEY is not set"):
        launch(ServerSpec(api_key_env="NOT_SET_KEY"), folder=tmp_path / "server")


def test_a_long_folder_gets_a_short_temporary_one(start, tmp_path):
    report = tmp_path / "report.json"
    server = start(env={"FAKE_REPORT": str(report)})
    short = Path(json.loads(report.read_text())["tmpdir"])
    assert len(str(tmp_path / "server-0" / "tmp")) > 60 >= len(str(short))
    assert short.resolve() == (server.folder / "tmp").resolve()
    server.stop()
    assert not short.is_symlink()


def test_death_while_starting_tells_status_and_the_logs_reason(fake_sglang, nothing_left, tmp_path):
    with pytest.raises(ServerDied) as caught:
        launch(ServerSpec(env=(("FAKE_MODE", "die"),)), folder=tmp_path / "server")
    assert "exit status 1" in caught.value.what
    assert caught.value.log[-1] == "RuntimeError: not enough memory for the fake model"
    assert str(tmp_path / "server" / "server.log") in caught.value.hint


def test_a_server_that_ends_at_once_has_run(tmp_path):
    life = object.__new__(ServerLife)
    life.folder, life.session, life._cancelled = tmp_path, None, lambda: False
    life.launcher = subprocess.Popen(["false"])
    life.launcher.wait()
    (tmp_path / "tmp").mkdir()
    (tmp_path / "tmp" / "server.pid").write_text(str(life.launcher.pid))
    life._wait_for_pid()
    assert (life.pid, life.is_alive()) == (life.launcher.pid, False)


def test_an_argument_that_the_server_rejects(fake_sglang, nothing_left, tmp_path):
    with pytest.raises(ServerDied) as caught:
        launch(ServerSpec(args=("--no-such-option",)), folder=tmp_path / "server")
    assert "exit status 2" in caught.value.what
    assert "--no-such-option" in "\n".join(caught.value.log)


def test_a_server_that_is_never_ready(fake_sglang, nothing_left, tmp_path):
    spec = ServerSpec(env=(("FAKE_MODE", "never"),), ready_timeout=0.5)
    began = time.monotonic()
    with pytest.raises(ServerNotReady, match="not ready after"):
        launch(spec, folder=tmp_path / "server")
    assert time.monotonic() - began < 10


def test_a_moving_log_extends_the_limit_up_to_four_times(fake_sglang, nothing_left, tmp_path):
    spec = ServerSpec(env=(("FAKE_MODE", "chatty"),), ready_timeout=0.8)
    began = time.monotonic()
    with pytest.raises(ServerNotReady):
        launch(spec, folder=tmp_path / "server")
    assert 3.0 < time.monotonic() - began < 15


def test_a_deaf_server_is_killed(start):
    server = start("--tp", "2", env={"FAKE_MODE": "deaf"}, stop_timeout=1.0)
    assert server.stop() == ()  # SIGTERM is ignored by it and by its ranks


def test_death_of_a_running_server(start):
    server = start("--tp", "2")
    os.kill(server.pid, signal.SIGKILL)
    while server.is_alive():
        time.sleep(0.01)
    reason = server.exit_reason()
    assert reason is not None
    assert "exit status -9" in reason.what
    assert server.stop() == ()


def test_a_port_that_is_taken_names_its_holder(fake_sglang, nothing_left, tmp_path):
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port = listener.getsockname()[1]
        with pytest.raises(LeaseError, match=rf"port {port} is in use by process {os.getpid()}"):
            launch(ServerSpec(port=port, ready_timeout=1), folder=tmp_path / "server")


def test_a_port_that_another_run_leases_is_waited_for(fake_sglang, nothing_left, tmp_path):
    port, held = lease.free_port()
    told: list[str] = []
    with pytest.raises(LeaseError, match=rf"port {port} is held by process {os.getpid()}"):
        launch(
            ServerSpec(port=port, ready_timeout=0.4), folder=tmp_path / "s", progress=told.append
        )
    held.release()
    assert any(f"waiting: port {port} is held" in line for line in told)


def test_the_keepers_death_loses_no_server(start, lease_folder):
    server = start()
    keeper = server._keepers[0]
    assert keeper is not None
    os.kill(keeper.pid, signal.SIGKILL)
    while keeper.is_running():
        time.sleep(0.01)
    assert server.is_alive()
    assert server.stop() == ()
    assert not server.is_alive()


def test_attach_needs_the_key_and_never_stops(start, tmp_path, monkeypatch):
    monkeypatch.setenv("THE_KEY", "key-of-the-server")
    server = start("--tp", "2", api_key_env="THE_KEY")
    url = server.url.replace("127.0.0.1", "localhost")
    with pytest.raises(ServerRefused) as caught:
        attach(url, folder=tmp_path / "attached")
    assert caught.value.status == 401
    assert "api_key_env" in caught.value.hint
    other = attach(
        url, api_key="key-of-the-server", server_dir=("/on/server", "/here"), folder=tmp_path / "a"
    )
    assert other.attached
    assert other.log is None
    assert other.url == server.url
    assert other.trace_root == Path("/here")
    assert [rank.label for rank in other.scheduler_ranks().values()] == ["TP0", "TP1"]
    with server.window_lock(), pytest.raises(LeaseError, match="profile window"):
        other.window_lock().__enter__()
    assert other.stop() == ()
    assert other.is_alive()
    server.stop()
    assert not other.is_alive()
    assert "nothing listens" in other.exit_reason().what
