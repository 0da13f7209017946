"""The folder of the lock files: one for a user, and nothing else in it is touched."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from pytest_sglprof._config.model import ServerSpec
from pytest_sglprof._errors import LeaseError, ServerError
from pytest_sglprof._server import lease
from pytest_sglprof._server.launch import launch
from tests.integration.keeper.test_lease import kill_holder_of

URL = "http://127.0.0.1:30000"


@pytest.fixture
def default_folder(tmp_path, monkeypatch) -> Path:
    """The folder of a user who chose none, below a root of the test's own."""
    monkeypatch.delenv("SGLPROF_LEASE_DIR")
    (tmp_path / "root").mkdir()
    monkeypatch.setattr(lease, "ROOT", tmp_path / "root")
    return tmp_path / "root" / f"sglprof-{os.getuid()}"


def contents(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in folder.iterdir() if path.is_file()}


@pytest.mark.parametrize("name", ["TMPDIR", "TMP", "TEMP", "XDG_RUNTIME_DIR", "HOME"])
def test_fault_e_all_processes_of_a_user_agree_whatever_their_environment(
    name, tmp_path, monkeypatch
):
    monkeypatch.delenv("SGLPROF_LEASE_DIR")
    print_folder = "from pytest_sglprof._server import lease; print(lease.lease_dir())"
    told = set()
    for value in (None, str(tmp_path)):
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
        environment.pop(name, None)
        environment |= {} if value is None else {name: value}
        command = [sys.executable, "-c", print_folder]
        told.add(subprocess.check_output(command, env=environment, text=True).strip())
    assert told == {f"/tmp/sglprof-{os.getuid()}"}


def test_fault_e_the_folder_is_private(default_folder):
    assert lease.lease_dir() == default_folder
    assert stat.S_IMODE(default_folder.stat().st_mode) == 0o700
    default_folder.chmod(0o777)
    lease.acquire("gpu-0", timeout=0).release()
    assert stat.S_IMODE(default_folder.stat().st_mode) == 0o700


@pytest.mark.parametrize("mode", [0o777, 0o770, 0o1777, 0o722])
def test_fault_e_a_chosen_folder_that_others_may_write_to_is_refused(lease_folder, mode):
    lease_folder.mkdir()
    lease_folder.chmod(mode)
    with pytest.raises(LeaseError, match="other users may write to it") as caught:
        lease.acquire("gpu-0", timeout=0)
    assert f"chmod go-w {lease_folder}" in caught.value.hint
    assert stat.S_IMODE(lease_folder.stat().st_mode) == mode
    lease_folder.chmod(0o755)
    lease.acquire("gpu-0", timeout=0).release()


@pytest.mark.parametrize("target", ["victim", "nowhere"])
def test_fault_e_a_link_for_the_folder_is_refused(default_folder, tmp_path, target):
    victim = tmp_path / "victim"
    victim.mkdir()
    (victim / "gpu-0.lock").write_text("sglprof 1\n")
    default_folder.symlink_to(tmp_path / target)
    for use in (lease.sweep, lease.lease_dir, lambda: lease.acquire("gpu-0", timeout=0)):
        with pytest.raises(LeaseError, match="it is a link"):
            use()
    assert contents(victim) == {"gpu-0.lock": "sglprof 1\n"}
    assert not (tmp_path / "nowhere").exists()


def test_fault_e_a_folder_of_somebody_else_is_refused(default_folder, monkeypatch):
    default_folder.mkdir()
    monkeypatch.setattr("os.getuid", lambda: int(default_folder.name.rpartition("-")[2]) + 1)
    monkeypatch.setenv("SGLPROF_LEASE_DIR", str(default_folder))
    with pytest.raises(LeaseError, match="belongs to another user") as caught:
        lease.lease_dir()
    assert "SGLPROF_LEASE_DIR" in caught.value.hint


@pytest.mark.parametrize("name", ["gpu-0", "port-4711", "contested"])
def test_fault_e_a_link_for_a_lock_file_is_not_followed(lease_folder, tmp_path, name):
    lease_folder.mkdir()
    victim = tmp_path / "victim.txt"
    for text in ("precious", "", "12\n"):
        victim.write_text(text)
        link = lease_folder / f"{name}.lock"
        link.symlink_to(victim)
        with pytest.raises(LeaseError, match="it is a link"):
            lease.try_acquire(name)
        lease.sweep()
        assert victim.read_text() == text
        assert link.is_symlink()
        link.unlink()
        victim.unlink()
        link.symlink_to(victim)  # of nothing: what it names must not come to be
        with pytest.raises(LeaseError, match="it is a link"):
            lease.try_acquire(name)
        assert not victim.exists()
        link.unlink()


def test_fault_e_a_second_name_of_a_file_is_not_written_to(lease_folder, tmp_path):
    lease_folder.mkdir()
    (tmp_path / "victim").write_text("12\n")
    os.link(tmp_path / "victim", lease_folder / "gpu-0.lock")
    with pytest.raises(LeaseError, match="it has a second hard link"):
        lease.try_acquire("gpu-0")
    lease.sweep()
    assert (tmp_path / "victim").read_text() == "12\n"


@pytest.mark.parametrize("make", [Path.mkdir, os.mkfifo], ids=["folder", "fifo"])
def test_fault_e_what_is_no_file_is_refused_at_once(lease_folder, make):
    lease_folder.mkdir()
    make(lease_folder / "gpu-0.lock")
    with pytest.raises(LeaseError, match=r"the lock file .* cannot be used"):
        lease.try_acquire("gpu-0")
    lease.sweep()
    assert (lease_folder / "gpu-0.lock").exists()


FOREIGN = {
    "yarn.lock": "# yarn lockfile v1\n",
    "poetry.lock": "",
    "app.lock": "4711\n",
    "other.lock": "sglprof 4711\n",
    "gpu-0.lock": "4711\n",
    "gpu-1.lock": "a note about this GPU\n",
    "gpu-2.lock": "sglprof 12\nand more\n",
    "port-80.lock": "",
    "window-manager.lock": "sglprof 12\n",
    "port-80.lock.bak": "sglprof 12\n",
}


def test_fault_e_sweep_removes_our_own_files_only(lease_folder):
    kill_holder_of("gpu-GPU-1234")
    kill_holder_of("port-4711")
    kill_holder_of(f"window-{lease.server_name(URL)}")
    kill_holder_of("test-cpu")
    assert len(contents(lease_folder)) == 4
    for name, text in FOREIGN.items():
        (lease_folder / name).write_text(text)
        (lease_folder / name).chmod(0o644)
    lease.sweep()
    assert contents(lease_folder) == FOREIGN


def test_fault_e_a_foreign_file_of_a_leases_name_is_not_written_to(lease_folder):
    lease_folder.mkdir()
    (lease_folder / "gpu-1.lock").write_text("a note about this GPU\n")
    with pytest.raises(LeaseError, match="it does not hold a process id") as caught:
        lease.acquire("gpu-1", timeout=5)
    assert caught.value.expected
    assert "SGLPROF_LEASE_DIR" in caught.value.hint
    assert contents(lease_folder) == {"gpu-1.lock": "a note about this GPU\n"}


def test_fault_e_a_file_that_was_replaced_is_not_removed(lease_folder):
    """A cleaner of /tmp took our file away and somebody else holds the new one."""
    first = lease.acquire("gpu-0", timeout=0)
    first.path.unlink()
    second = lease.acquire("gpu-0", timeout=0)
    first.release()
    assert lease.try_acquire("gpu-0") is None
    second.release()
    assert contents(lease_folder) == {}


@pytest.mark.parametrize("folder", ["/proc/nope", "/dev/null", "/dev/null/below"])
def test_fault_e_a_folder_that_cannot_be_made_says_what_to_do(
    folder, tmp_path, monkeypatch, fake_sglang
):
    monkeypatch.setenv("SGLPROF_LEASE_DIR", folder)
    spec = ServerSpec(args=("--device", "cpu"), ready_timeout=5)
    uses = (
        lease.lease_dir,
        lease.sweep,
        lease.free_port,
        lambda: lease.holder("gpu-0"),
        lambda: lease.window_lock(URL).__enter__(),
        lambda: launch(spec, folder=tmp_path / "server"),
    )
    for use in uses:
        with pytest.raises(
            ServerError, match=f"the lease folder {folder} cannot be used"
        ) as caught:
            use()
        assert type(caught.value) is LeaseError
        assert caught.value.expected
        assert "SGLPROF_LEASE_DIR" in caught.value.hint
    assert "Traceback" not in (tmp_path / "server" / "keeper.log").read_text()
