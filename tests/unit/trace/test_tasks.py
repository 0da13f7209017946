"""Any executor reads the files of a window, and what it loses is read again."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from pytest_sglprof import SglprofError, read_window
from pytest_sglprof._errors import SettingsError, TraceError
from pytest_sglprof._trace import tasks
from pytest_sglprof._trace.executors import Commands, opened
from tests.support.dp_windows import planted, written


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The traces of four ranks."""
    return written(planted("e", 4), tmp_path_factory.mktemp("traces"))


def same_table(folder: Path, executor: Executor) -> None:
    here, there = read_window(folder), read_window(folder, executor=executor)
    for name in ("frame", "steps", "collectives"):
        pd.testing.assert_frame_equal(getattr(here, name), getattr(there, name))
    assert (here.ranks, here.notes, here.run) == (there.ranks, there.notes, there.run)
    assert here.incomparable == there.incomparable


def test_processes_of_somebody_else_make_the_same_table(folder: Path) -> None:
    with ProcessPoolExecutor(2, get_context("spawn")) as executor:
        same_table(folder, executor)


def test_a_command_for_each_task_makes_the_same_table(folder: Path) -> None:
    with Commands("nice {command}") as executor:
        same_table(folder, executor)


class Flawed(ThreadPoolExecutor):
    """Loses or holds up the first attempts at each call, as far as `flaw` does."""

    def __init__(self, flaw: Callable[[], object]) -> None:
        super().__init__(8)
        self.flaw, self.attempts = flaw, 0

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        self.attempts += 1
        attempt, _ = args
        return super().submit(self.run, attempt, lambda: fn(*args, **kwargs))

    def run(self, attempt: int, call: Callable[[], Any]) -> Any:
        if attempt == 1:
            self.flaw()
        return call()


def lose() -> None:
    raise ConnectionResetError("the worker is gone")


def test_what_a_worker_loses_is_read_by_another(folder: Path) -> None:
    with Flawed(lose) as executor:
        same_table(folder, executor)
        assert executor.attempts == 2 * (1 + 4)


def test_a_worker_that_is_stuck_is_not_waited_for(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tasks, "PATIENCE_S", 0.2)
    monkeypatch.setattr(tasks, "FIRST_S", 0.2)
    release = threading.Event()
    with Flawed(lambda: release.wait(60)) as executor:
        began = time.monotonic()
        try:
            same_table(folder, executor)
        finally:
            release.set()
        assert time.monotonic() - began < 50


def test_what_is_always_lost_ends_with_the_reason(folder: Path) -> None:
    class Gone(ThreadPoolExecutor):
        def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
            return super().submit(lose)

    with Gone(1) as executor, pytest.raises(TraceError, match=r"3 times: .*the worker is gone"):
        read_window(folder, executor=executor)


def test_a_worker_that_is_killed_ends_a_pool_with_the_reason(folder: Path) -> None:
    with ProcessPoolExecutor(1, get_context("spawn")) as executor:
        os.kill(executor.submit(os.getpid).result(), signal.SIGKILL)
        with pytest.raises(TraceError, match="BrokenProcessPool"):
            read_window(folder, executor=executor)


def test_a_file_that_fails_by_itself_is_read_once(folder: Path, tmp_path: Path) -> None:
    for file in folder.glob("*.gz"):
        content = file.read_bytes()
        (tmp_path / file.name).write_bytes(
            content[: len(content) // 2] if "TP-2" in file.name else content
        )
    with Flawed(lambda: None) as executor:
        with pytest.raises(TraceError) as there:
            read_window(tmp_path, executor=executor)
        assert executor.attempts <= 1 + 4
    with pytest.raises(TraceError) as here:
        read_window(tmp_path)
    assert str(there.value) == str(here.value)


@pytest.mark.parametrize("names", [("a-r0", "a-r1", "b-r2"), ("rank0of2", "rank1of2")])
def test_names_say_of_single_files_what_they_say_of_all(
    folder: Path, tmp_path: Path, names: tuple[str, ...]
) -> None:
    """`r2` is a rank only beside `r0`, and the files are read by different workers."""
    for name, file in zip(names, sorted(folder.glob("*.gz")), strict=False):
        text = file.read_bytes()
        (tmp_path / f"{name}.json.gz").write_bytes(text)
    try:
        ranks = read_window(tmp_path).ranks
    except SglprofError as error:
        with ThreadPoolExecutor(2) as executor, pytest.raises(type(error)) as there:
            read_window(tmp_path, executor=executor)
        assert str(there.value) == str(error)
    else:
        with ThreadPoolExecutor(2) as executor:
            assert read_window(tmp_path, executor=executor).ranks == ranks


@pytest.mark.parametrize(
    ("address", "reason"),
    [
        ("slurm://here", "not an executor"),
        ("command:srun -N1", "does not say where the call stands"),
    ],
)
def test_addresses_that_are_none_are_refused(address: str, reason: str) -> None:
    with pytest.raises(SettingsError, match=reason), opened(address):
        pass


def test_a_command_that_fails_says_what_it_wrote(folder: Path) -> None:
    failing = Commands("sh -c 'echo no such partition >&2; exit 4' {command}")
    with failing as executor, pytest.raises(TraceError, match="status 4: no such partition"):
        read_window(folder, executor=executor)
