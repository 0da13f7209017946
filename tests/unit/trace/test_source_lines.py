"""The lines behind kernels: real traces with stacks against every open span, by plain `json`."""

from __future__ import annotations

import gzip
import json
from collections import Counter
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from pytest_sglprof._trace.read import read_window
from pytest_sglprof._trace.torch.source_lines import SourceLine, source_lines

ON_GPU = "torch/sglang-mi300x/sglang_Qwen3-8B_prefilldecode.json.gz"
GRAPHS = "torch/sglang-mi300x/sglang_Qwen3-8B_decode.json.gz"
ON_CPU = "torch/sglang-cpu-tp2/1795489880.7971315-TP-1.trace.json.gz"
Events = list[dict[str, Any]]


def events_of(path: Path) -> Events:
    document = json.loads(gzip.decompress(path.read_bytes()), parse_float=Decimal)
    spans: Events = [event for event in document["traceEvents"] if event["ph"] == "X"]
    return spans


def open_around(spans: Events, moment: Decimal) -> Events:
    """From the outermost to the innermost."""
    around = [each for each in spans if each["ts"] <= moment < each["ts"] + each["dur"]]
    return sorted(around, key=lambda each: (each["ts"], -each["dur"]))


def line_of(around: Events) -> str:
    """The innermost function of SGLang."""
    names = [each["name"] for each in around if each["cat"] == "python_function"]
    inside = [name for name in names if "sglang/srt/" in name or "sglang/jit_kernel/" in name]
    return "sglang/" + inside[-1].rpartition("sglang/")[2]


@pytest.mark.parametrize("name", [ON_GPU, GRAPHS])
def test_every_kernel_has_the_line_that_was_open_at_its_launch(
    shared_data: Path, name: str
) -> None:
    path = shared_data / name
    events = events_of(path)
    spans = [each for each in events if each["cat"] in ("cpu_op", "python_function")]
    launches = {
        event["args"]["correlation"]: event
        for event in events
        if event["cat"] == "cuda_runtime" and "correlation" in event["args"]
    }
    on_gpu = [event for event in events if event["cat"] in ("kernel", "gpu_memcpy", "gpu_memset")]
    lines: Counter[tuple[str, str]] = Counter()
    for kernel in on_gpu:
        launch = launches[kernel["args"]["correlation"]]
        around = open_around([s for s in spans if s["tid"] == launch["tid"]], launch["ts"])
        operators = [each["name"] for each in around if each["cat"] == "cpu_op"]
        lines[(operators[-1] if operators else "", line_of(around))] += int(1000 * kernel["dur"])
    read: Counter[tuple[str, str]] = Counter()
    for row in source_lines(path):
        read[(row.operator, row.line)] += row.total_ns
    assert read == lines
    assert sum(row.count for row in source_lines(path)) == len(on_gpu)


def test_a_graph_has_the_line_that_replays_it(shared_data: Path) -> None:
    most, *_ = source_lines(shared_data / GRAPHS)
    assert most.line == "sglang/srt/model_executor/cuda_graph_runner.py(1333): replay"
    assert most.operator == ""


def test_operators_of_a_cpu_have_their_times_of_the_kernel_table(shared_data: Path) -> None:
    rows = source_lines(shared_data / ON_CPU)
    frame = read_window(shared_data / ON_CPU).frame
    table = frame[frame["kind"] == "op"].groupby("name", observed=True)["dur_ns"].sum().to_dict()
    read: Counter[str] = Counter()
    for row in rows:
        read[row.kernel] += row.total_ns
    assert dict(read) == table
    flash = [row for row in rows if "flash_attention" in row.kernel]
    (decode,) = {row.line for row in flash}
    assert decode.endswith("torch_native_backend.py(176): _run_sdpa_forward_decode")


def test_a_trace_without_stacks_has_none(shared_data: Path) -> None:
    (folder,) = (shared_data / "torch").glob("sglang-cpu-tp2-nostack")
    assert source_lines(next(folder.glob("*TP-0.trace.json.gz"))) == ()


def span(cat: str, name: str, ts: float, dur: float, **args: int) -> dict[str, Any]:
    return {
        "ph": "X", "cat": cat, "name": name, "ts": ts, "dur": dur, "pid": 1, "tid": 7, "args": args
    }  # fmt: skip


@pytest.mark.parametrize(
    ("frames", "line"),
    [
        (
            ["/x/sglang/python/sglang/srt/a.py(3): f", "torch/nn/m.py(1): g"],
            "sglang/srt/a.py(3): f",
        ),
        (["sglang/srt/a.py(3): f", "flashinfer/decode.py(9): run"], "sglang/srt/a.py(3): f"),
        (["runpy.py(1): run", "flashinfer/a.py(9): f", "<built-in x>"], "flashinfer/a.py(9): f"),
        (["runpy.py(1): run", "torch/a.py(2): g"], "torch/a.py(2): g"),
    ],
)
def test_the_innermost_function_of_sglang_is_named_else_that_of_a_library(
    tmp_path: Path, frames: list[str], line: str
) -> None:
    events = [
        *(span("python_function", name, at, 100 - 2 * at) for at, name in enumerate(frames)),
        span("cuda_runtime", "cudaLaunchKernel", 50, 1, correlation=4),
        span("python_function", "sglang/srt/later.py(1): late", 52, 3),
        span("kernel", "gemm", 200, 9, correlation=4, device=0, stream=7),
    ]
    path = tmp_path / "w-TP-0.trace.json"
    path.write_text(json.dumps({"traceEvents": events}))
    assert source_lines(path) == (SourceLine("gemm", "", line, 9000, 1),)
