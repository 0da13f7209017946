"""Files that are not of one window are not compared, unless somebody says so."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pytest_sglprof._cli.main import main
from pytest_sglprof._config.model import Threshold
from pytest_sglprof._trace.one_window import copies
from pytest_sglprof._trace.read import read_window
from pytest_sglprof._trace.torch import assemble
from pytest_sglprof._verdict.judge import judge
from tests.support.nsys_exports import global_id, kernel, make_export

STEPS = 60
LIMIT = Threshold(metric="slowdown", limit=1.10, scope="compute")
H100, MI300 = [{"id": 0, "name": "NVIDIA H100"}], [{"id": 0, "name": "AMD Instinct MI300X"}]
Facts = dict[str, Any]


def trace(rank: int, *, slow: float = 1.0, later_s: float = 0.0, **facts: Any) -> Facts:
    listed = []
    for step in range(STEPS):
        at = 1000.0 + step * 4000.0 + later_s * 1e6
        name = f"step[DECODE bs=8 forward_id={step}]"
        span = {"ph": "X", "cat": "user_annotation", "name": name, "pid": 1, "tid": 1}
        listed.append({**span, "ts": at, "dur": 3000.0})
        args = {"correlation": step + 1}
        call = {"ph": "X", "cat": "cuda_runtime", "name": "cudaLaunchKernel", "pid": 1, "tid": 1}
        listed.append({**call, "ts": at + 5, "dur": 1.0, "args": args})
        one = {"ph": "X", "cat": "kernel", "name": "gemm", "pid": 0, "tid": 7}
        args = {"device": 0, "stream": 7, "correlation": step + 1}
        # No rank is as long as the other in each step, so that files differ.
        dur = 1000.0 * slow + (step + rank) % 3
        listed.append({**one, "ts": at + 50, "dur": dur, "args": args})
    return {**facts, "traceEvents": listed}


def files(folder: Path, first: Facts, second: Facts) -> Path:
    for rank, content in enumerate((first, second)):
        (folder / f"w-TP-{rank}.trace.json").write_text(json.dumps(content))
    return folder


@pytest.fixture(params=["decoded", "scanned"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ways of reading a file."""
    if request.param == "scanned":
        monkeypatch.setattr(assemble, "SCAN_BYTES", 0)


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize(
    ("first", "second", "text"),
    [
        ({"deviceProperties": H100}, {"deviceProperties": MI300}, "GPU NVIDIA H100 (TP0) and AMD"),
        (
            {"cuda_runtime_version": 12080}, {"cuda_runtime_version": 13000},
            "CUDA runtime 12080 (TP0) and 13000 (TP1)",
        ),
        (
            {"cuda_driver_version": "12.8"}, {"cuda_driver_version": "13.0"},
            "CUDA driver 12.8 (TP0) and 13.0 (TP1)",
        ),
        ({"hip_runtime_version": 1}, {"hip_runtime_version": 2}, "HIP runtime 1 (TP0) and 2 (TP1)"),
        (
            {"distributedInfo": {"rank": 0, "world_size": 2, "nccl_version": "2.27.7"}},
            {"distributedInfo": {"rank": 1, "world_size": 2, "nccl_version": "2.17.1"}},
            "NCCL 2.27.7 (TP0) and 2.17.1 (TP1)",
        ),
        (
            {"distributedInfo": {"rank": 0, "world_size": 2}},
            {"distributedInfo": {"rank": 1, "world_size": 8}},
            "processes 2 (TP0) and 8 (TP1)",
        ),
    ],
)  # fmt: skip
def test_facts_that_differ(tmp_path: Path, first: Facts, second: Facts, text: str) -> None:
    files(tmp_path, trace(0, **first), trace(1, slow=1.3, **second))
    table = read_window(tmp_path)
    judged = judge(table, [LIMIT])
    assert judged.word == "inconclusive"
    assert f"these files are not of one run: {text}" in judged.reason
    forced = read_window(tmp_path, force=True)
    assert judge(forced, [LIMIT]).word == "fail"
    assert f"compared by --force although {table.incomparable}" in forced.notes


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize(
    ("first", "second"),
    [
        ({"deviceProperties": H100}, {"deviceProperties": [{"id": 1, "name": "NVIDIA H100"}] * 2}),
        ({"deviceProperties": H100}, {}),  # not known of one
        ({"deviceProperties": None}, {"deviceProperties": [{}]}),
        ({"cuda_runtime_version": 12080}, {"hip_runtime_version": 7}),
        ({"distributedInfo": {"world_size": "many"}}, {"distributedInfo": None}),
    ],
)
def test_facts_that_agree_or_are_not_known(tmp_path: Path, first: Facts, second: Facts) -> None:
    files(tmp_path, trace(0, **first), trace(1, slow=1.3, **second))
    assert judge(read_window(tmp_path), [LIMIT]).word == "fail"


def test_facts_after_the_events_count_as_well(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(assemble, "SCAN_BYTES", 0)
    for rank, model in enumerate((H100, MI300)):
        content = {**trace(rank), "deviceProperties": model}
        assert list(content)[-1] == "deviceProperties"
        (tmp_path / f"w-TP-{rank}.trace.json").write_text(json.dumps(content))
    assert "GPU NVIDIA H100 (TP0)" in read_window(tmp_path).incomparable


def test_windows_far_apart(tmp_path: Path) -> None:
    files(tmp_path, trace(0), trace(1, slow=1.3, later_s=3600))
    judged = judge(read_window(tmp_path), [LIMIT])
    assert judged.word == "inconclusive"
    assert "TP1 begins 3,600 s after TP0 ended" in judged.reason


def with_collectives(content: Facts, *, first: int = 0, drift_ms: float = 0.0) -> Facts:
    """The trace with a numbered collective at the end of each step."""
    more = []
    for number, event in enumerate(e for e in content["traceEvents"] if e["cat"] == "kernel"):
        ts = 1000.0 * (event["ts"] // 1000 + 3) + number * drift_ms * 1000
        args = {"device": 0, "stream": 20, "correlation": 1000 + number}
        args |= {"Process Group Name": "0", "Collective name": "allreduce", "Seq": first + number}
        name = "ncclDevKernel_AllReduce_Sum_bf16_RING_LL(ncclDevKernelArgsStorage<4096ul>)"
        more.append({**event, "name": name, "tid": 20, "ts": ts, "dur": 50.0, "args": args})
    return {**content, "traceEvents": [*content["traceEvents"], *more]}


@pytest.mark.parametrize(
    ("later_s", "first", "drift_ms", "word"),
    [
        (5, 0, 0.0, "fail"),  # the clocks of two nodes
        (5, 0, 100.0, "inconclusive"),  # the same numbers, but at other times
        (5, 500, 0.0, "inconclusive"),  # other collectives: the next window
        (0.5, 500, 0.0, "fail"),
        (3600, 0, 0.0, "inconclusive"),
    ],
)
def test_ranks_that_wait_for_each_other_run_at_one_time(
    tmp_path: Path, later_s: float, first: int, drift_ms: float, word: str
) -> None:
    other = with_collectives(trace(1, slow=1.3, later_s=later_s), first=first, drift_ms=drift_ms)
    files(tmp_path, with_collectives(trace(0)), other)
    assert judge(read_window(tmp_path), [LIMIT]).word == word


def test_without_collectives_a_second_is_the_limit(tmp_path: Path) -> None:
    files(tmp_path, trace(0), trace(1, slow=1.3, later_s=5))
    judged = judge(read_window(tmp_path), [LIMIT])
    assert judged.word == "inconclusive"
    assert "TP1 begins 5 s after TP0 ended" in judged.reason


def test_replicas_may_run_one_after_the_other(tmp_path: Path) -> None:
    for rank in (0, 1):
        content = json.dumps(trace(rank, later_s=5 * rank))
        (tmp_path / f"w-TP-0-DP-{rank}.trace.json").write_text(content)
    assert read_window(tmp_path).incomparable == ""


def test_one_recording_under_two_names(tmp_path: Path) -> None:
    """Packed anew, a copy has other bytes, but still the id of its profile."""
    files(tmp_path, trace(0, trace_id="C3AB"), trace(1, slow=1.3, trace_id="C3AB"))
    assert read_window(tmp_path).incomparable == "TP0 and TP1 are of one recording (C3AB)"


def test_a_copy_under_another_name(tmp_path: Path) -> None:
    files(tmp_path, trace(0), trace(0))
    expected = "w-TP-0.trace.json and w-TP-1.trace.json have the same contents"
    judged = judge(read_window(tmp_path), [LIMIT])
    assert (judged.word, judged.reason) == ("inconclusive", expected)
    assert judge(read_window(tmp_path, force=True), [LIMIT]).word == "pass"


@pytest.mark.parametrize(
    ("one", "other", "same"), [(b"ab", b"ab", True), (b"ab", b"ac", False), (b"ab", b"abc", False)]
)
def test_contents_are_compared(tmp_path: Path, one: bytes, other: bytes, same: bool) -> None:
    paths = [tmp_path / "a", tmp_path / "b"]
    for path, content in zip(paths, (one, other), strict=True):
        path.write_bytes(content)
    assert bool(copies(paths)) is same
    assert not copies([paths[0], paths[0], tmp_path])


def reports(folder: Path, *tables: dict[str, Any]) -> Path:
    """A report of each rank, with these tables beside its kernels."""
    for rank, more in enumerate(tables):
        rows = [
            kernel(1000 * n, 1000 * n + 500 + rank, globalPid=global_id(100 + rank))
            for n in range(40)
        ]
        strings = [{"id": 1, "value": "gemm"}, {"id": 9, "value": "gemm"}]
        every = {"CUPTI_ACTIVITY_KIND_KERNEL": rows, "StringIds": strings, **more}
        make_export(folder / f"rank{rank}.sqlite", **every)
    return folder


def gpu(model: str) -> dict[str, Any]:
    return {"TARGET_INFO_GPU": [{"id": 0, "name": model}]}


def driver(version: str) -> dict[str, Any]:
    return {"TARGET_INFO_SYSTEM_ENV": [{"name": "CudaDriverVersion", "value": version}]}


def began(utc_s: float, system_s: float | None = None) -> dict[str, Any]:
    """Newer versions write the system's clock as well, which kernels then have."""
    row = {"utcEpochNs": int(utc_s * 1e9)}
    if system_s is not None:
        row["systemClockNs"] = int(system_s * 1e9)
    return {"TARGET_INFO_SESSION_START_TIME": [row]}


@pytest.mark.parametrize(
    ("first", "second", "text"),
    [
        (gpu("NVIDIA H100"), gpu("NVIDIA A100"), "GPU NVIDIA H100 (TP0) and NVIDIA A100 (TP1)"),
        (driver("12040"), driver("13000"), "CUDA driver 12040 (TP0) and 13000 (TP1)"),
        (began(1000), began(4600), "TP1 begins 3,600 s after TP0 ended"),
        (began(1000, 20), began(1000, 10), "TP1 begins 10 s after TP0 ended"),
        (began(1000, 20), began(1980, 1000), ""),  # other clocks, the same moment
        (began(1000), {}, ""),
        ({}, {}, ""),
        (driver("12040"), {"TARGET_INFO_SYSTEM_ENV": [{"name": "CudaDriverVersion"}]}, ""),
        (driver("12040"), {"TARGET_INFO_SYSTEM_ENV": [{"value": "13000"}]}, ""),
    ],
)
def test_reports(tmp_path: Path, first: dict[str, Any], second: dict[str, Any], text: str) -> None:
    table = read_window(reports(tmp_path, first, second))
    assert table.incomparable.endswith(text)
    assert bool(table.incomparable) == bool(text)


def test_the_option(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files(tmp_path, trace(0, deviceProperties=H100), trace(1, slow=1.3, deviceProperties=MI300))
    command = ["check", str(tmp_path), "--limit", "1.10"]
    assert main(command) == 3
    assert "GPU NVIDIA H100 (TP0) and AMD Instinct MI300X (TP1)" in capsys.readouterr().out
    assert main([*command, "--force"]) == 1
    assert "TP1 is 1.30x slower" in capsys.readouterr().out


@pytest.mark.usefixtures("way")
def test_a_table_says_which_run_it_is_of(tmp_path: Path) -> None:
    files(
        tmp_path,
        trace(0, deviceProperties=H100 * 2, cuda_driver_version="12.8"),
        trace(1, deviceProperties=MI300),
    )
    assert dict(read_window(tmp_path).run) == {
        "GPU": "AMD Instinct MI300X, NVIDIA H100",
        "CUDA driver": "12.8",
    }


def test_a_report_says_which_run_it_is_of(tmp_path: Path) -> None:
    both = {**gpu("NVIDIA H200"), **driver("13000")}
    table = read_window(reports(tmp_path, both, gpu("NVIDIA H200")))
    assert dict(table.run) == {"GPU": "NVIDIA H200", "CUDA driver": "13000"}
