"""Servers over several nodes: keepers that a command starts, and what becomes of a lost one.

The commands start them on this machine; tests/integration/plugin/test_slurm.py has a real Slurm.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from pytest_sglprof._config.model import ServerSpec
from pytest_sglprof._errors import ServerDied, ServerMissing, ServerNotReady, SettingsError
from pytest_sglprof._server.launch import Server, launch
from tests.integration.keeper.conftest import wait_clean

pytestmark = pytest.mark.usefixtures("nothing_left")

HERE = ("env", "ON_NODE={node}", "{command}")
SECOND_ONLY = ("sh", "-c", "if [ {rank} = 1 ]; then %s; fi; exec {quoted}")


def spec(**fields: object) -> ServerSpec:
    values: dict[str, object] = {
        "kind": "standin",
        "args": ("--tp", "2"),
        "standin_args": ("--step-ms", "4", "--layers", "1"),
        "nodes": ("alpha", "beta"),
        "launcher": "command",
        "node_command": HERE,
        "stop_timeout": 5.0,
    }
    return ServerSpec(**{**values, **fields})  # type: ignore[arg-type]


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    server = launch(spec(), folder=tmp_path / "servers" / "two")
    yield server
    server.stop()


def wait_dead(server: Server) -> ServerDied:
    deadline = time.monotonic() + 30
    while server.is_alive() and time.monotonic() < deadline:
        time.sleep(0.1)
    reason = server.exit_reason()
    assert reason is not None
    return reason


def test_each_node_runs_its_ranks(server: Server) -> None:
    assert [node.name for node in server.nodes] == ["alpha", "beta"]
    ranks = [node.scheduler_ranks() for node in server.nodes]
    assert [[rank.label for rank in each.values()] for each in ranks] == [["TP0"], ["TP1"]]
    assert server.node_names() == {"TP0": "alpha", "TP1": "beta"}
    assert server.scheduler_ranks() == {}  # pids alone do not say on which node
    pid = next(iter(ranks[1]))
    assert psutil.Process(pid).environ()["ON_NODE"] == "beta"
    assert "node-rank" not in server.url
    assert server.info["nnodes"] == 2
    temporary = list(Path("/tmp").glob("sglprof-" + "[0-9a-f]" * 12))
    assert server.stop() == ()
    gone = [path for path in temporary if not path.exists()]
    assert len(gone) >= 2  # the nodes' own, also of sockets


def test_a_node_whose_keeper_is_killed_is_named_and_cleaned(
    server: Server, lease_folder: Path
) -> None:
    (keeper,) = [
        process
        for process in psutil.process_iter()
        if process.ppid() == os.getpid() and process.pid == server.nodes[1].link.pid
    ]
    os.kill(keeper.pid, signal.SIGKILL)
    reason = wait_dead(server)
    assert "node beta" in reason.what
    assert "killed by signal 9" in reason.what
    assert server.stop() == ()
    assert wait_clean(lease_folder, 5.0) == []


def test_a_server_that_dies_on_one_node(server: Server) -> None:
    pid = next(iter(server.nodes[1].scheduler_ranks()))
    os.kill(pid, signal.SIGKILL)
    reason = wait_dead(server)
    assert "the server on node beta died" in reason.what
    assert server.stop() == ()


def test_a_node_that_never_comes(tmp_path: Path) -> None:
    command = [word.replace("%s", "echo waiting for n2 >&2; sleep 600") for word in SECOND_ONLY]
    with pytest.raises(ServerNotReady) as caught:
        launch(spec(node_command=tuple(command), ready_timeout=3.0), folder=tmp_path / "s" / "two")
    assert "node beta sent nothing for 3 s" in caught.value.what
    assert any("waiting for n2" in line for line in caught.value.log)


def test_a_node_that_refuses(tmp_path: Path) -> None:
    command = [word.replace("%s", "echo no such pod >&2; exit 7") for word in SECOND_ONLY]
    with pytest.raises(ServerDied) as caught:
        launch(spec(node_command=tuple(command)), folder=tmp_path / "s" / "two")
    assert "node beta" in caught.value.what
    assert any("no such pod" in line for line in caught.value.log)


OVERLAY = """
mount -t tmpfs none "$0" && mkdir "$0/up" "$0/work" && cd / &&
mount -t overlay none -o "lowerdir={folder},upperdir=$0/up,workdir=$0/work" {folder} && exec "$@"
"""


def test_a_folder_whose_changes_do_not_come_back(tmp_path: Path) -> None:
    """A node reads what is written here, and what it writes is not seen."""
    folder, disk = tmp_path / "servers" / "two.beta", tmp_path / "disk"
    folder.mkdir(parents=True)
    disk.mkdir()
    script = OVERLAY.format(folder=folder)
    on_node = ["unshare", "-m", "sh", "-c", script, str(disk)]
    if subprocess.run([*on_node, "true"], check=False, capture_output=True).returncode:
        pytest.skip("needs root and overlays, for a folder of which a node has another version")

    def words(spec: ServerSpec, node: str, rank: int, command: list[str]) -> list[str]:
        return [*on_node, *command] if rank else list(command)

    with pytest.raises(SettingsError) as caught:
        launch(spec(node_command=words), folder=folder.with_name("two"))
    assert f"node beta does not write into {folder}" in caught.value.what
    assert "share" in str(caught.value.expected)


def test_a_function_instead_of_a_template(tmp_path: Path) -> None:
    asked = []

    def on_node(spec: ServerSpec, node: str, rank: int, command: list[str]) -> list[str]:
        asked.append((spec.name, node, rank))
        return ["env", *command]

    server = launch(
        spec(name="mine", nodes=2, node_command=on_node), folder=tmp_path / "servers" / "f"
    )
    assert server.stop() == ()
    assert asked == [("mine", "node0", 0), ("mine", "node1", 1)]


def test_no_slurm_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ServerMissing, match="no srun here"):
        launch(spec(launcher="slurm"), folder=tmp_path / "servers" / "s")


def test_a_command_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ServerMissing, match="kubectl-of-nobody could not be started"):
        launch(
            spec(node_command=("kubectl-of-nobody", "{command}")),
            folder=tmp_path / "servers" / "k",
        )
