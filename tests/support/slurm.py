"""A real Slurm of two nodes, n1 and n2, on this machine: one slurmctld, two slurmd."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

NEEDED = ("slurmctld", "slurmd", "srun", "salloc", "munged")
HOW = "apt-get install slurmctld slurmd slurm-client munge"
LIMIT = 60.0  # s for the two nodes to come
CONF = """
ClusterName=two
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
AuthType=auth/munge
SlurmctldPort={ports[0]}
SlurmdSpoolDir={folder}/spool-%n
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldPidFile={folder}/slurmctld.pid
StateSaveLocation={folder}/state
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/pgid
TaskPlugin=task/none
SelectType=select/cons_tres
AccountingStorageType=accounting_storage/none
MpiDefault=none
ReturnToService=2
SlurmdTimeout=10
SlurmctldTimeout=10
KillWait=30
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=1 RealMemory=2000
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=1 RealMemory=2000
PartitionName=main Nodes=ALL Default=YES State=UP
"""


class Slurm:
    """Where its commands find it: `variables`, for the environment."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.conf = folder / "slurm.conf"
        self.variables = {"SLURM_CONF": str(self.conf)}

    def start(self) -> None:
        _start_munge()
        host = socket.gethostname()
        for name in ("spool-n1", "spool-n2", "state"):
            (self.folder / name).mkdir(parents=True)
        self.conf.write_text(CONF.format(host=host, folder=self.folder, ports=_free_ports(3)))
        self._daemon("slurmctld", "-f", str(self.conf))
        for name in ("n1", "n2"):
            self.start_node(name)
        self.wait_idle()

    def start_node(self, name: str) -> None:
        self._daemon("slurmd", "-N", name, "-f", str(self.conf))

    def kill_node(self, name: str) -> None:
        """SIGKILL of its slurmd, and of what it runs of Slurm's: the machine is gone."""
        pid = int((self.folder / f"slurmd-{name}.pid").read_text())
        steps = [
            int(entry.name)
            for entry in Path("/proc").glob("[0-9]*")
            if _title(entry).startswith("slurmstepd:") and f"SLURMD_NODENAME={name}" in _env(entry)
        ]
        for each in (pid, *steps):
            with contextlib.suppress(ProcessLookupError):
                os.kill(each, signal.SIGKILL)

    def run(self, *words: str) -> str:
        done = subprocess.run(
            words,
            env={**os.environ, **self.variables},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        return done.stdout + done.stderr

    def jobs(self) -> list[str]:
        return self.run("squeue", "--noheader", "--format=%i %j %T").splitlines()

    def wait_idle(self) -> None:
        deadline = time.monotonic() + LIMIT
        while self.run("sinfo", "-h", "-N", "-o", "%N %t").split() != ["n1", "idle", "n2", "idle"]:
            assert time.monotonic() < deadline, self.run("sinfo", "-N", "-l")
            time.sleep(0.3)

    def stop(self) -> None:
        self.run("scancel", "--user=root")
        for name in ("slurmd-n1", "slurmd-n2", "slurmctld"):
            with contextlib.suppress(OSError, ValueError):
                os.kill(int((self.folder / f"{name}.pid").read_text()), signal.SIGTERM)
        deadline = time.monotonic() + 20
        while (
            any(
                _title(e).startswith(("slurmd ", "slurmctld ")) and str(self.conf) in _title(e)
                for e in Path("/proc").glob("[0-9]*")
            )
            and time.monotonic() < deadline
        ):
            time.sleep(0.2)

    def _daemon(self, *words: str) -> None:
        subprocess.run(words, env={**os.environ, **self.variables}, timeout=60, check=True)


@contextlib.contextmanager
def two_nodes(folder: Path) -> Iterator[Slurm]:
    """Starts it; skips the test where it cannot."""
    missing = [name for name in NEEDED if shutil.which(name) is None]
    if missing or os.geteuid() != 0:
        why = f"no {', '.join(missing)}: {HOW}" if missing else "only root may run these daemons"
        if os.environ.get("SGLPROF_REQUIRE_REAL", "") not in ("", "0"):
            pytest.fail(f"no real Slurm: {why}", pytrace=False)
        pytest.skip(f"no real Slurm: {why}")
    slurm = Slurm(folder)
    slurm.start()
    try:
        yield slurm
    finally:
        slurm.stop()


def _start_munge() -> None:
    if subprocess.run(["pgrep", "-x", "munged"], capture_output=True, check=False).returncode == 0:
        return
    folders = [Path(name) / "munge" for name in ("/etc", "/var/log", "/var/lib", "/run")]
    for folder in folders:
        folder.mkdir(exist_ok=True)
    key = folders[0] / "munge.key"
    if not key.exists():
        key.write_bytes(os.urandom(1024))
        key.chmod(0o400)
    subprocess.run(["chown", "-R", "munge:", *map(str, folders)], check=True)
    subprocess.run(["runuser", "-u", "munge", "--", "munged"], check=True)


def _free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


def _title(entry: Path) -> str:
    try:
        return (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except OSError:
        return ""


def _env(entry: Path) -> str:
    try:
        return (entry / "environ").read_bytes().replace(b"\0", b"\n").decode(errors="replace")
    except OSError:
        return ""
