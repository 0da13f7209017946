"""Large windows: scanning and decoding give the same table, in one process and in many."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import psutil
import pytest

from pytest_sglprof._errors import TraceError, TraceTruncated
from pytest_sglprof._trace.read import read_window
from pytest_sglprof._trace.table import KernelTable
from pytest_sglprof._trace.torch import pool
from pytest_sglprof._trace.torch.collect import ScanRequest
from tests.support.kineto import Event, document, event, kernel, write

GPU_FILES = (
    "a100-nccl/rank-0.json.gz",
    "sglang-mi300x/sglang_Qwen3-8B_decode.json.gz",
    "sglang-mi300x/sglang_Qwen3-8B_prefilldecode.json.gz",
)


@pytest.fixture
def scanned(monkeypatch: pytest.MonkeyPatch) -> Callable[..., KernelTable]:
    def read(path: Path | list[Path], **options: Any) -> KernelTable:
        with monkeypatch.context() as patch:
            patch.setattr("pytest_sglprof._trace.torch.assemble.SCAN_BYTES", 0)
            patch.setattr("pytest_sglprof._trace.torch.assemble.POOL_BYTES", 0)
            return read_window(path, **options)

    return read


def same(left: KernelTable, right: KernelTable) -> None:
    order = ["rank", "start_ns", "stream", "full_name"]
    frames = [
        table.frame.astype(dict.fromkeys(table.frame.select_dtypes("category"), str))
        .sort_values(order)
        .reset_index(drop=True)
        for table in (left, right)
    ]
    pd.testing.assert_frame_equal(*frames)
    pd.testing.assert_frame_equal(left.steps, right.steps)
    assert (left.ranks, left.source, left.notes) == (right.ranks, right.source, right.notes)


def step(number: int, start: float, *, external: int, gpu: bool, forward: bool = True) -> Event:
    tail = f" forward_id={number}" if forward else ""
    name = f"step[DECODE bs=4{tail}]"
    if gpu:
        span = event("gpu_user_annotation", name, start, 90, 0, 7)
    else:
        span = event("user_annotation", name, start, 40, 5, 5)
    return span | {"args": {"External id": external}}


def window(*, projected: bool, launched: bool = True, forward: bool = True) -> list[Event]:
    """Ten steps of three kernels that run long after the CPU's span of their step."""
    found = []
    for number in range(10):
        start = 1000.0 + 100 * number
        found.append(step(number, start, external=number + 1, gpu=False, forward=forward))
        if projected:
            late = start + 500
            found.append(step(number, late, external=number + 1, gpu=True, forward=forward))
        for position in range(3):
            tie = 10 * number + position + 1
            if launched:
                at = start + 5 * position
                found.append(
                    event("cuda_runtime", "cudaLaunchKernel", at, 2, 5, 5, correlation=tie)
                )
            found.append(kernel("gemm", start + 500 + 20 * position, 10.5, correlation=tie))
    found.append(kernel("outside", 5000, 1, correlation=999))
    return found


@pytest.mark.parametrize("name", GPU_FILES)
def test_real_traces(shared_data: Path, scanned: Callable[..., KernelTable], name: str) -> None:
    same(scanned(shared_data / "torch" / name), read_window(shared_data / "torch" / name))


def test_a_span_that_only_begins_like_a_step_is_none(
    tmp_path: Path, scanned: Callable[..., KernelTable]
) -> None:
    stray = event("user_annotation", "step[", 990.0, 5, 5, 5)
    path = write(tmp_path, document([stray, *window(projected=True)]))
    table = scanned(path)
    assert len(table.steps) == 10
    same(table, read_window(path))


def test_cpu_traces_are_decoded(shared_data: Path, scanned: Callable[..., KernelTable]) -> None:
    path = shared_data / "torch/sglang-cpu-mixtral-tp2ep2"
    same(scanned(path), read_window(path))


@pytest.mark.parametrize("forward", [True, False])
@pytest.mark.parametrize("launched", [True, False])
@pytest.mark.parametrize("projected", [True, False])
def test_steps_by_projection_and_by_launch(
    tmp_path: Path,
    scanned: Callable[..., KernelTable],
    projected: bool,
    launched: bool,
    forward: bool,
) -> None:
    events = window(projected=projected, launched=launched, forward=forward)
    table = scanned(write(tmp_path, document(events)))
    gemms = table.frame[table.frame["name"] == "gemm"]
    known = projected or launched
    expected = [number if known else -1 for number in range(10) for _ in range(3)]
    assert gemms.sort_values("start_ns")["step"].tolist() == expected
    assert table.frame[table.frame["name"] == "outside"]["step"].tolist() == [-1]
    if launched:
        same(table, read_window(write(tmp_path, document(events))))


def test_launches_that_cannot_be_read_are_not_left_out_in_silence(
    tmp_path: Path, scanned: Callable[..., KernelTable]
) -> None:
    odd = {**event("cuda_runtime", "x", 1003.0, 2, 5, 5), "name": None}
    path = write(tmp_path, document([odd, *window(projected=False)]))
    table = scanned(path)
    assert sorted(table.frame["step"].unique().tolist()) == [-1, *range(10)]
    assert "decoded as a whole, since" in table.notes[-1]


def test_each_rank_of_a_merged_file_has_its_own_notes(
    tmp_path: Path, scanned: Callable[..., KernelTable]
) -> None:
    own = [
        {**kernel("gemm", 1000.0, 5), "pid": "[TP00] 0"},
        {**kernel("gemm", 1000.0, -5), "pid": "[TP01] 0"},
    ]
    names = [
        {"ph": "M", "name": "process_name", "ts": 0.0, "pid": f"[TP0{rank}] 0"} for rank in range(3)
    ]
    path = write(tmp_path, document([own[0], *names, *own]), "merged-1.trace.json")
    table = scanned(path)
    assert table.notes == ("TP1: skipped 1 kernel events with a negative time",)
    assert table.ranks == ("TP0", "TP1", "TP2")  # one had nothing that is right, one nothing
    same(table, read_window(path))


@pytest.mark.parametrize("keys", [("rank", "name"), ("step",), ("stage", "step", "name")])
def test_sums_are_the_same_part_by_part(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, keys: tuple[str, ...]
) -> None:
    monkeypatch.setattr("pytest_sglprof._trace.table._GROUPED", 7)
    table = read_window(write(tmp_path, document(window(projected=True))))
    truth: dict[tuple[object, ...], tuple[int, int]] = {}
    for row in table.frame.astype(object).to_dict("records"):
        key = tuple(row[name] for name in keys)
        count, total = truth.get(key, (0, 0))
        truth[key] = (count + 1, total + row["dur_ns"])
    sums = table.by(*keys)
    found = sums.astype(object).to_numpy().tolist()
    assert {tuple(row[:-2]): (row[-2], row[-1]) for row in found} == truth
    assert sums["total_ns"].dtype == "int64"
    assert sums["count"].dtype == "int64"


def test_merged_files_are_split(tmp_path: Path, scanned: Callable[..., KernelTable]) -> None:
    events = []
    for rank in range(2):
        for entry in window(projected=False):
            owner = f"[TP{rank:02d}-DP00] {entry['pid']}"
            scale = {"dur": entry["dur"] * (rank + 1)} if entry["cat"] == "kernel" else {}
            events.append({**entry, **scale, "pid": owner})
    table = scanned(write(tmp_path, document(events), "merged-1.trace.json.gz"))
    assert table.ranks == ("DP0 TP0", "DP0 TP1")
    totals = table.by("rank")
    assert totals["total_ns"].tolist() == [316_000, 632_000]
    assert (table.frame[table.frame["name"] == "gemm"]["step"] >= 0).all()


def ranks(folder: Path, count: int = 5) -> list[Path]:
    found = []
    for rank in range(count):
        name = f"1-TP-{rank}.trace.json.gz"
        found.append(write(folder, document(window(projected=True) * (rank + 1)), name))
    return found


def test_processes_change_nothing(tmp_path: Path, scanned: Callable[..., KernelTable]) -> None:
    ranks(tmp_path)
    alone = scanned(tmp_path, processes=1)
    table = scanned(tmp_path, processes=2)
    same(table, alone)


def test_one_of_the_processes_is_this_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    jobs = [(path, ScanRequest()) for path in ranks(tmp_path)]
    start, started = pool._start, []

    def counted() -> subprocess.Popen[bytes]:
        started.append(start())
        return started[-1]

    monkeypatch.setattr(pool, "_start", counted)
    contents = pool.read_in_processes(jobs, 3)
    assert [content.path for content in contents] == [path for path, _ in jobs]
    assert all(len(content.columns) for content in contents)
    assert len(started) == 2


def test_a_broken_file_among_many_is_named(
    tmp_path: Path, scanned: Callable[..., KernelTable]
) -> None:
    broken = ranks(tmp_path)[3]
    broken.write_bytes(broken.read_bytes()[:-30])
    with pytest.raises(TraceTruncated, match="TP-3") as caught:
        scanned(tmp_path, processes=2)
    assert caught.value.hint
    assert caught.value.expected
    table = scanned(tmp_path, processes=2, allow_partial=True)
    assert table.partial
    assert len(table.ranks) == 5


def test_a_reader_that_dies_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool, "_MAIN", "import sys; sys.exit(7) # {path}")
    jobs = [(path, ScanRequest()) for path in ranks(tmp_path, 2)]
    with pytest.raises(TraceError, match="ended with status 7"):
        pool.read_in_processes(jobs, 2)


def test_an_error_of_the_caller_ends_the_readers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs = [(path, ScanRequest()) for path in ranks(tmp_path, 3)]

    def stop(stream: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(pool, "receive", stop)
    with pytest.raises(KeyboardInterrupt):
        pool.read_in_processes(jobs, 2)
    left = [" ".join(child.cmdline()) for child in psutil.Process().children()]
    assert not [command for command in left if "torch.pool" in command]


def test_workers_import_neither_numpy_nor_pandas() -> None:
    code = "import pytest_sglprof._trace.torch.pool, sys; print(*sorted(sys.modules))"
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert not {"numpy", "pandas"} & set(done.stdout.split())


def test_an_interrupt_ends_an_unguarded_script_at_once(tmp_path: Path) -> None:
    """The caller's module is never imported again, and nothing outlives Ctrl-C."""
    folder = tmp_path / "window"
    ranks(folder, 2)
    script = tmp_path / "script.py"
    script.write_text(
        "from pytest_sglprof._trace.torch import assemble as torch_window\n"
        "from pytest_sglprof import read_window\n"
        "print('imported', flush=True)\n"
        "torch_window.SCAN_BYTES = torch_window.POOL_BYTES = 0\n"
        "while True:\n"
        f"    assert len(read_window({str(folder)!r}, processes=2).ranks) == 2\n"
    )
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    running = subprocess.Popen(
        [sys.executable, str(script)],
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        assert running.stdout is not None
        assert running.stdout.readline() == "imported\n"
        readers: list[psutil.Process] = []
        while not readers:
            readers = psutil.Process(running.pid).children()
        os.killpg(running.pid, signal.SIGINT)
        _, err = running.communicate(timeout=10)
        assert running.returncode == -signal.SIGINT
        assert err.count("Traceback") == 1  # ours, none of a reader
        assert psutil.wait_procs(readers, timeout=3)[1] == []
    finally:
        if running.poll() is None:
            os.killpg(running.pid, signal.SIGKILL)
            running.wait()
