"""A GPU was used, but its kernels were not recorded: never compared, never by CPU operators."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pytest_sglprof._cli.main import main
from pytest_sglprof._errors import NoKernels, NotATrace, TraceError
from pytest_sglprof._trace.nsys.report import read_report
from pytest_sglprof._trace.read import read_window
from pytest_sglprof._trace.torch import assemble
from tests.support.kineto import Event, document, event, kernel, write
from tests.support.nsys_exports import STRINGS, global_id, make_export, nvtx, to_parquet
from tests.support.nsys_exports import kernel as nsys_kernel

GPUS = [{"id": 0, "name": "NVIDIA B200"}]
OPERATORS = [event("cpu_op", "aten::mm", 10 * n, 5, 1, 1) for n in range(4)]


def launch(name: str, ts: int = 1, category: str = "cuda_runtime") -> Event:
    return event(category, name, ts, 1, 1, 1, correlation=ts)


@pytest.fixture(params=[False, True], ids=["decoded", "scanned"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param:
        monkeypatch.setattr(assemble, "SCAN_BYTES", 0)


EVIDENCE: dict[str, tuple[list[Event], dict[str, Any], str]] = {
    "CUDA runtime": ([launch("cudaLaunchKernel", n) for n in range(40)], {}, "40 launches"),
    "one launch": ([launch("cudaLaunchKernelExC")], {}, "1 launch,"),
    "CUDA driver": ([launch("cuLaunchKernelEx", 1, "cuda_driver")], {}, "1 launch"),
    "graphs": ([launch("cudaGraphLaunch")], {}, "1 launch"),
    "HIP": ([launch("hipExtModuleLaunchKernel", 1, "hip_runtime")], {}, "1 launch"),
    "old words": ([launch("cudaLaunchKernel", 1, "Runtime")], {}, "1 launch"),
    "copies alone": (
        [launch("cudaLaunchKernel"), event("gpu_memcpy", "Memcpy", 5, 1, stream=7)],
        {},
        "1 launch",
    ),
    "spans": ([event("gpu_user_annotation", "step[DECODE bs=4]", 1, 9)], {}, "1 span on the GPU"),
    "devices": ([], {"deviceProperties": GPUS}, "1 GPU, but no"),
    "MTIA": ([event("mtia_ccp_events", "k", 1, 9)], {}, r"events of MTIA \(1 mtia_ccp_events\)"),
    "HPU": ([event("hpu_op", "k", 1, 9)], {}, "events of HPU"),
    "XPU": ([event("xpu_runtime", "urEnqueueKernelLaunch", 1, 9)], {}, "events of XPU"),
    "NPU": ([event("privateuse1_runtime", "k", 1, 9)], {}, "events of a PrivateUse1 device"),
}


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("what", EVIDENCE)
def test_a_gpu_trace_without_kernels_is_no_cpu_trace(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], what: str
) -> None:
    events, more, words = EVIDENCE[what]
    path = write(tmp_path, document([*OPERATORS, *events], rank=0, **more))
    with pytest.raises(NoKernels, match=words) as caught:
        read_window(path)
    assert "TP0 (1-TP-0.trace.json)" in caught.value.what
    assert main(["kernels", str(path)]) == 2
    assert "no kernels were recorded" in capsys.readouterr().err
    assert main(["check", str(path)]) == 3
    assert "inconclusive: TP0" in capsys.readouterr().out
    out = tmp_path / "merged.json"
    assert main(["export", "--to", "perfetto", str(path), "-o", str(out)]) == 2
    assert not out.exists()


@pytest.mark.usefixtures("way")
def test_kernels_of_accelerators_that_kineto_calls_so_are_read(tmp_path: Path) -> None:
    events = [event("xpu_runtime", "urEnqueueKernelLaunch", 1, 9), kernel("gemm", 2, 3)]
    table = read_window(write(tmp_path, document([*OPERATORS, *events], rank=0)))
    assert (table.source, list(table.frame["dur_ns"])) == ("gpu", [3_000])


@pytest.mark.usefixtures("way")
def test_a_cpu_server_is_read_by_its_operators(tmp_path: Path) -> None:
    calls = [launch("cudaGetDeviceCount"), launch("cudaLaunchHostFunc", 2)]
    doc = document([*OPERATORS, *calls], rank=0, deviceProperties=[])
    table = read_window(write(tmp_path, doc))
    assert (table.source, len(table.frame)) == ("cpu_op", 4)


def window(folder: Path, second: list[Event], **more: Any) -> Path:
    """TP0 has a kernel; TP1 has `second`."""
    write(folder, document([kernel("gemm", 1, 5), launch("cudaLaunchKernel")], rank=0))
    write(folder, document([*OPERATORS, *second], rank=1, **more), "1-TP-1.trace.json")
    return folder


@pytest.mark.usefixtures("way")
def test_one_rank_without_its_kernels_makes_the_window_inconclusive(tmp_path: Path) -> None:
    window(tmp_path, [launch("cudaLaunchKernel", n) for n in range(7)])
    with pytest.raises(NoKernels, match=r"^TP1 \(1-TP-1\.trace\.json\): 7 launches, but"):
        read_window(tmp_path)
    assert main(["check", str(tmp_path)]) == 3


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("name", ["cudaLaunchKernel", "cudaEventQuery"])
def test_a_rank_of_a_merged_file_without_its_kernels_is_told(tmp_path: Path, name: str) -> None:
    first = {**kernel("gemm", 1, 5), "pid": "[TP00] 0"}
    names = [{"ph": "M", "name": "process_name", "pid": f"[TP0{n}] 8", "args": {"name": "x"}}
             for n in range(2)]  # fmt: skip
    calls = [{**launch(name, n), "pid": "[TP01] 8"} for n in range(1, 4)]
    path = write(tmp_path, document([first, *names, *calls]), "merged-1.trace.json")
    if name == "cudaEventQuery":
        assert read_window(path).ranks == ("TP0", "TP1")
        return
    with pytest.raises(NoKernels, match=r"^TP1 \(merged-1\.trace\.json\): 3 launches"):
        read_window(path)


@pytest.mark.usefixtures("way")
def test_an_idle_rank_is_still_an_answer(tmp_path: Path) -> None:
    table = read_window(window(tmp_path, [], deviceProperties=GPUS))
    assert (table.ranks, table.source, len(table.frame)) == (("TP0", "TP1"), "gpu", 1)


@pytest.mark.parametrize(
    "name",
    [
        "graph_capture_profile/cuda_graph_capture-DecodeCudaGraphRunner-TP-0.json.gz",
        "capture_traces/bs_64_rank0.json.gz",
    ],
)
def test_traces_of_capturing_graphs_are_refused_by_name(tmp_path: Path, name: str) -> None:
    path = write(tmp_path, document(OPERATORS, rank=0), name)
    for given in (path, path.parent):
        with pytest.raises(NotATrace, match="capturing CUDA graphs"):
            read_window(given)


def test_a_capture_trace_beside_ranks_is_left_out(tmp_path: Path) -> None:
    write(tmp_path, document([kernel("gemm", 1, 5)], rank=0), "1-TP-0.json.gz")
    write(tmp_path, document(OPERATORS, rank=0), "cuda_graph_capture-X-TP-0.json.gz")
    assert read_window(tmp_path).source == "gpu"


# nsys ----------------------------------------------------------------------------------------


def call(name: int, pid: int = 100) -> dict[str, Any]:
    return {"start": 1, "end": 2, "globalTid": global_id(pid, pid), "correlationId": 1,
            "nameId": name}  # fmt: skip


NAMES = [
    {"id": 1, "value": "cudaLaunchKernel_v7000"},
    {"id": 2, "value": "cudaGetDevice_v3020"},
    {"id": 3, "value": "cuLaunchHostFunc"},
]
REPORTS: dict[str, tuple[dict[str, Any], str, str]] = {
    "launches": ({"CUPTI_ACTIVITY_KIND_RUNTIME": [call(1)] * 3}, "3 launches", "Blackwell"),
    "calls": (
        {"CUPTI_ACTIVITY_KIND_RUNTIME": [call(2), call(3)]},
        "2 CUDA calls",
        "CuptiUseRawGpuTimestamps",
    ),
    "launches beside ranges": (
        {"CUPTI_ACTIVITY_KIND_RUNTIME": [call(1)], "NVTX_EVENTS": [nvtx(0, 9, "x")]},
        "1 launch,",
        "no rights",
    ),
    "whole graphs": (
        {
            "CUPTI_ACTIVITY_KIND_GRAPH_TRACE": [
                {"start": 1, "end": 5, "globalPid": global_id(100), "deviceId": 0}
            ]
        },
        "1 launch of whole CUDA graphs",
        "--cuda-graph-trace=node",
    ),
    "nothing": ({}, "recorded without CUDA", "--trace=cuda"),
}


@pytest.mark.parametrize("parquet", [False, True])
@pytest.mark.parametrize("what", REPORTS)
def test_a_report_without_kernels_says_why(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], what: str, parquet: bool
) -> None:
    tables, words, hint = REPORTS[what]
    path = make_export(tmp_path / "x.sqlite", StringIds=NAMES, **tables)
    path = to_parquet(path, tmp_path / "pq") if parquet else path
    with pytest.raises(NoKernels, match=words) as caught:
        read_window(path)
    assert hint in caught.value.hint
    for command in (["kernels"], ["kernels", "--by", "rank,stream"], ["export", "--to", "nsight"]):
        if parquet and "export" in command:
            continue
        assert main([*command, str(path)]) == 2, command
        out, err = capsys.readouterr()
        assert "no kernels were recorded" in err
        assert out == ""
    assert main(["check", str(path), "--format", "json"]) == 3
    assert "no kernels were recorded" in json.loads(capsys.readouterr().out)["reason"]


def test_a_report_of_a_cpu_server_has_ranges(tmp_path: Path) -> None:
    path = make_export(
        tmp_path / "x.sqlite",
        StringIds=NAMES,
        NVTX_EVENTS=[nvtx(0, 9, "x")],
        CUPTI_ACTIVITY_KIND_RUNTIME=[call(2), call(3)],
    )
    assert read_window(path).source == "nvtx"


def test_a_known_process_without_its_kernels_is_told(tmp_path: Path) -> None:
    path = make_export(
        tmp_path / "x.sqlite",
        StringIds=[*NAMES, *STRINGS[1:]],
        CUPTI_ACTIVITY_KIND_KERNEL=[nsys_kernel(0, 9, 2)],
        CUPTI_ACTIVITY_KIND_RUNTIME=[call(1), *[call(1, 101)] * 2],
    )
    assert read_window(path, pid_ranks={100: "TP0"}).ranks == ("TP0",)
    idle = read_window(path, pid_ranks={100: "TP0", 102: "TP2"})
    assert idle.ranks == ("TP0", "TP2")
    with pytest.raises(NoKernels, match=r"^TP1 \(x\.sqlite\): 2 launches"):
        read_window(path, pid_ranks={100: "TP0", 101: "TP1"})


@pytest.mark.parametrize("table", ["KERNEL_V3", "KERNEL_V12", "CONCURRENT_KERNEL_V2", "MEMCPY4"])
@pytest.mark.parametrize("parquet", [False, True])
def test_an_unknown_schema_is_named(tmp_path: Path, table: str, parquet: bool) -> None:
    name = f"CUPTI_ACTIVITY_KIND_{table}"
    path = make_export(tmp_path / "x.sqlite", StringIds=STRINGS, **{name: [nsys_kernel(0, 1)]})
    path = to_parquet(path, tmp_path / "pq") if parquet else path
    with pytest.raises(TraceError, match=f"schema that sglprof does not know.*{name}"):
        read_report(path)
    assert main(["kernels", str(path)]) == 2


def test_a_database_of_rocprof_is_named(tmp_path: Path) -> None:
    path = make_export(tmp_path / "x.sqlite", rocpd_kernel_dispatch=[{"id": 1}])
    path.write_bytes(path.read_bytes().replace(b"META_DATA_EXPORT", b"META_DATA_OTHERS"))
    with pytest.raises(NotATrace, match="rocprofv3"):
        read_report(path)
