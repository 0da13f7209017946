"""Commands whose files a Dask cluster of two worker processes reads."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from pytest_sglprof._cli.main import main
from tests.support.dp_windows import planted, written

pytest.importorskip("distributed", reason="needs the extra [cluster]: dask.distributed")
RANKS = 8
ROOT = Path(__file__).parents[3]


def dask(*words: str) -> list[str]:
    return [sys.executable, "-W", "ignore", "-m", f"distributed.cli.dask_{words[0]}", *words[1:]]


@dataclass
class Cluster:
    """A scheduler of this machine, and its workers, which nobody starts again."""

    folder: Path
    until: ExitStack
    workers: list[subprocess.Popen[bytes]] = field(default_factory=list)

    @property
    def address(self) -> str:
        """As `--executor` takes it."""
        tcp: str = json.loads((self.folder / "scheduler.json").read_text())["address"]
        return tcp.replace("tcp", "dask")

    def start(self, *words: str) -> subprocess.Popen[bytes]:
        words = (*words, "--scheduler-file", str(self.folder / "scheduler.json"), "--no-dashboard")
        with (self.folder / "log").open("ab") as log:
            process = subprocess.Popen(
                dask(*words), stdout=log, stderr=log, cwd=ROOT, start_new_session=True
            )
        self.until.callback(process.wait)
        self.until.callback(process.kill)
        return process

    def add_worker(self) -> None:
        local = ("--local-directory", str(self.folder), "--nthreads", "1", "--no-nanny")
        self.workers.append(self.start("worker", *local))


@contextmanager
def client_of(cluster: Cluster) -> Iterator[Any]:
    from distributed import Client

    with Client(cluster.address.replace("dask", "tcp"), set_as_default=False) as client:
        yield client


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with ExitStack() as until:
        cluster = Cluster(tmp_path_factory.mktemp("dask"), until)
        cluster.start("scheduler", "--host", "127.0.0.1", "--port", "0")
        cluster.add_worker()
        cluster.add_worker()
        while not (cluster.folder / "scheduler.json").exists():
            time.sleep(0.05)
        with client_of(cluster) as client:
            client.wait_for_workers(2, timeout=60)
        yield cluster


@pytest.fixture(scope="module")
def traces(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written(planted("e", RANKS), tmp_path_factory.mktemp("traces"))


def said(capsys: pytest.CaptureFixture[str], *words: str | Path) -> tuple[int, str]:
    capsys.readouterr()
    status = main([str(word) for word in words])
    return status, capsys.readouterr().out


@pytest.mark.parametrize(
    "command", [("check", "--limit", "1.05"), ("kernels", "--by", "rank,name")]
)
def test_commands_say_what_they_say_of_files_that_are_read_here(
    cluster: Cluster, traces: Path, command: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    words = (command[0], traces, *command[1:], "--format", "json")
    here = said(capsys, *words)
    assert said(capsys, *words, "--executor", cluster.address) == here


# `getrusage` would count the memory of this process, from which it is forked.
PEAK = """
import re, sys
from pytest_sglprof._cli.main import main
status = main(sys.argv[1:])
print(re.search(r"VmHWM:\\s*(\\d+)", open("/proc/self/status").read())[1])
sys.exit(status)
"""


def peak_mb(*words: str | Path) -> float:
    """Of a command in a process of its own."""
    command = [sys.executable, "-c", PEAK, *map(str, words)]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True, cwd=ROOT)
    return int(done.stdout.split()[-1]) / 1024


def test_the_memory_of_the_client_does_not_grow_with_the_ranks(
    cluster: Cluster, traces: Path, tmp_path: Path
) -> None:
    """It holds what is left of one rank at a time: traces of two, and of all eight."""
    elsewhere = ("-o", tmp_path / "node.parquet", "--executor", cluster.address)
    few, every = (
        peak_mb("reduce", *paths, *elsewhere)
        for paths in (sorted(traces.glob("*.gz"))[:2], [traces])
    )
    assert every < few + 5


def test_a_file_that_is_damaged_is_an_error_of_that_file(
    cluster: Cluster, traces: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for number, file in enumerate(traces.glob("*.gz")):
        content = file.read_bytes()
        (tmp_path / file.name).write_bytes(content[: len(content) // (1 if number else 2)])
    assert main(["check", str(tmp_path)]) == 2
    here = capsys.readouterr().err
    assert main(["check", str(tmp_path), "--executor", cluster.address]) == 2
    assert capsys.readouterr().err == here


def test_a_scheduler_that_is_not_there_is_named(
    traces: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pytest_sglprof._trace.executors.CONNECT_S", 0.5)
    assert main(["check", str(traces), "--executor", "dask://127.0.0.1:9"]) == 2
    assert "no scheduler answers there" in capsys.readouterr().err


def test_a_worker_that_is_killed_in_the_middle_changes_nothing(
    cluster: Cluster, traces: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """The last test of this cluster: one worker is left. It is killed while it reads a file."""
    cluster.add_worker()
    answer = tmp_path / "check.json"
    words = ["check", str(traces), "--format", "json", "-o"]
    elsewhere = ["--executor", cluster.address]
    with client_of(cluster) as client:
        client.wait_for_workers(3, timeout=60)
        pids = {worker: int(pid) for worker, pid in client.run(os.getpid).items()}
        command = [sys.executable, "-m", "pytest_sglprof", *words, str(answer), *elsewhere]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        busy = pids_that_read(client, pids)
        for pid in busy[:2]:
            os.kill(pid, signal.SIGKILL)
        assert process.wait(120) in (0, 1)
        assert len(client.scheduler_info()["workers"]) == 1
    here = tmp_path / "here.json"
    main([*words, str(here)])
    assert answer.read_text() == here.read_text()


def pids_that_read(client: Any, pids: dict[str, int]) -> list[int]:
    """Of the workers that are at a task, once all of them are."""
    while True:
        reading = [worker for worker, tasks in client.processing().items() if tasks]
        if len(reading) == len(pids):
            return [pids[worker] for worker in reading]
        time.sleep(0.005)
