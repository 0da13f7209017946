"""What a step tells beside its stage, and which steps may not be compared."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest

import pytest_sglprof._trace.torch.assemble as torch_window
from pytest_sglprof._analysis.groups import compared_steps, step_spans
from pytest_sglprof._trace.completeness import ANY_LAUNCH
from pytest_sglprof._trace.passes import parse_step
from pytest_sglprof._trace.read import read_window
from pytest_sglprof._trace.steps import interruption
from pytest_sglprof._trace.table import KernelTable
from pytest_sglprof._trace.torch.collect import IdleCalls
from pytest_sglprof._trace.torch.events import Annotation
from tests.support.kineto import Event, document, event, kernel, write

SPAN = "user_annotation"


def launch(at: float, correlation: int, name: str = "cudaLaunchKernel") -> Event:
    return event("cuda_runtime", name, at, 1, 5, 5, correlation=correlation)


def rank_file(
    folder: Path,
    rank: int,
    texts: list[str],
    *,
    calls: dict[int, str] | None = None,
    nodes: tuple[int, ...] = (),
) -> Path:
    """A step of 10 us for each text with two kernels; `calls`: one more call in a step.

    nodes: steps of which the first kernel is a node of a graph.
    """
    events = []
    for n, text in enumerate(texts):
        events.append(event(SPAN, f"step[{text}]", 10 * n, 10))
        for half in (0, 1):
            number = 2 * n + half + 1
            node = {"graph node id": 77} if n in nodes and not half else {}
            found = kernel(f"k{n}", 1000 + 5 * number, 1, correlation=number)
            found["args"].update(node)
            events += [launch(10 * n + 1 + half, number), found]
        if calls and n in calls:
            events.append(launch(10 * n + 5, 1000 + n, calls[n]))
    return write(folder, document(events), f"1-TP-{rank}.trace.json")


def column(table: KernelTable, name: str) -> list[object]:
    return table.steps.sort_values("start_ns")[name].tolist()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("DECODE bs=4 g_sq=4 g_sqsq=4 g_sqsk=4096 g_sk=4096 forward_id=1", 4096),
        ("VERIFY bs=2 g_sq=8 g_sqsq=32 g_sqsk=800 g_sk=200 forward_id=1", 800),
        ("EXTEND bs=2 toks=9 c_sq=9 c_sqsq=41 c_sqsk=50 c_sk=11 forward_id=1", 50),
        ("DRAFT bs=2 c_sq=9 c_sqsq=41 c_sqsk=50 c_sk=11 forward_id=1", 50),
        ("MIXED bs=3 c=1 g=2 c_sq=9 c_sk=11 c_sqsq=81 c_sqsk=99 g_sq=2 g_sk=30 g_sqsq=2 g_sqsk=30 "
         "forward_id=1", 129),
        ("IDLE bs=0 forward_id=1", 0),
        ("IDLE bs=0", -1),
        ("DECODE bs=4", -1),
        ("DECODE bs=4 forward_id=1", -1),
    ],
)  # fmt: skip
def test_query_keys_are_the_products_of_query_and_kv_tokens(text: str, expected: int) -> None:
    step = parse_step(Annotation(0, f"step[{text}]", 0, 1, gpu=False))
    assert step is not None
    assert step.query_keys == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("DECODE bs=4", ("DECODE", 4, -1, -1)),
        ("VERIFY bs=4 forward_id=9", ("VERIFY", 4, -1, -1)),
        ("DECODE bs=4 g_sq=4 g_sqsq=4 g_sqsk=4096 g_sk=4096 forward_id=1", ("DECODE", 4, -1, 4096)),
        ("EXTEND bs=2 toks=9 c_sq=9 c_sqsq=41 c_sqsk=50 c_sk=11", ("EXTEND", 2, -1, 11)),
        ("MIXED bs=3 c_sq=9 c_sk=11 c_sqsq=1 c_sqsk=1 g_sq=1 g_sk=30", ("MIXED", 3, -1, 41)),
        ("DRAFT_LOOP raw_bs=5 bs=8 topk=1", ("DRAFT_LOOP", 5, 8, -1)),
    ],
)
def test_what_the_text_of_a_step_tells(text: str, expected: tuple[str, int, int, int]) -> None:
    step = parse_step(Annotation(0, f"step[{text}]", 0, 1, gpu=False))
    assert step is not None
    assert (step.substage, step.batch_size, step.padded_batch, step.kv_tokens) == expected


def test_what_no_source_tells_is_minus_one_or_empty(tmp_path: Path) -> None:
    table = read_window(rank_file(tmp_path, 0, ["DECODE bs=1"] * 3))
    for name in ("padded_batch", "kv_tokens", "graph_share", "accept_length"):
        assert column(table, name) == [-1, -1, -1]
    assert column(table, "excluded") == ["", "", ""]


@pytest.fixture(params=["decoded", "scanned"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Small files are decoded and large ones scanned; both must tell the same."""
    if request.param == "scanned":
        monkeypatch.setattr(torch_window, "SCAN_BYTES", 0)


@pytest.mark.usefixtures("way")
def test_the_share_of_kernels_that_are_nodes_of_graphs(tmp_path: Path) -> None:
    path = rank_file(tmp_path, 0, ["EXTEND bs=1 toks=3", *["DECODE bs=1"] * 2], nodes=(1, 2))
    assert column(read_window(path), "graph_share") == [0.0, 0.5, 0.5]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("cuModuleLoadData", "jit compilation"),
        ("cuModuleLoadDataEx", "jit compilation"),
        ("cuLibraryLoadData", "jit compilation"),
        ("hipModuleLoad", "jit compilation"),
        ("nvrtcCompileProgram", "jit compilation"),
        ("cudaStreamBeginCapture", "graph capture"),
        ("cudaGraphInstantiateWithFlags", "graph capture"),
        ("hipGraphInstantiate", "graph capture"),
        ("hipModuleLaunchKernel", ""),
        ("hipExtModuleLaunchKernel", ""),
        ("cudaGraphLaunch", ""),
        ("hipStreamIsCapturing", ""),
        ("hipStreamGetCaptureInfo", ""),
        ("cudaStreamIsCapturing", ""),
        ("cudaLaunchKernel", ""),
    ],
)
def test_calls_that_interrupt(name: str, expected: str) -> None:
    assert interruption(name) == expected


@pytest.mark.parametrize("name", [
    "cudaLaunchKernel", "cuLaunchKernelEx", "hipExtModuleLaunchKernel", "cudaGraphLaunch_v10000",
    "cudaMemcpyAsync", "hipMemcpyWithStream", "cudaMemsetAsync", "cuMemsetD32Async",
    "cudaMallocAsync", "cudaFreeAsync", "cudaStreamBeginCapture", "cudaStreamEndCapture_v10000",
    "cudaGraphInstantiate", "cuModuleLoadData", "nvrtcCompileProgram", "cudaEvent", "kernel",
])  # fmt: skip
def test_calls_that_are_looked_for_are_never_passed_over(name: str) -> None:
    assert not IdleCalls()[name]


@pytest.mark.parametrize("name", [
    "cudaEventRecord", "cudaEventRecord_v3020", "cudaStreamIsCapturing", "cuEventQuery",
    "hipGetDevicePropertiesR0600", "cudaStreamWaitEvent", "cudaFuncSetAttribute", "cudaSetDevice",
    "cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags", "cudaDeviceSynchronize_v3020",
    "cudaStreamGetCaptureInfo_v2_v11030", "hipPointerGetAttributes", "cudaPeekAtLastError",
])  # fmt: skip
def test_calls_that_start_nothing_are_passed_over(name: str) -> None:
    assert IdleCalls()[name] and not interruption(name) and not ANY_LAUNCH.match(name)


@pytest.mark.usefixtures("way")
def test_calls_that_start_nothing_change_no_figure(tmp_path: Path) -> None:
    stages = ["DECODE bs=1"] * 5
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    plain = read_window(rank_file(tmp_path / "a", 0, stages, calls={1: "cuModuleLoadData"}))
    calls = {1: "cuModuleLoadData", 2: "cudaEventRecord", 3: "cudaStreamIsCapturing"}
    more = read_window(rank_file(tmp_path / "b", 0, stages, calls=calls))
    assert more.frame.equals(plain.frame)
    assert more.steps.equals(plain.steps)


@pytest.mark.usefixtures("way")
def test_steps_around_a_compilation_or_a_capture_are_excluded(tmp_path: Path) -> None:
    calls = {1: "cuModuleLoadData", 3: "cudaGraphInstantiate"}
    table = read_window(rank_file(tmp_path, 0, ["DECODE bs=1"] * 5, calls=calls))
    assert column(table, "excluded") == ["", "jit compilation", "", "graph capture", ""]
    assert [note for note in table.notes if "inside the window" in note] == [
        "TP0: graph capture inside the window (1 calls), in 1 steps, which are not compared",
        "TP0: jit compilation inside the window (1 calls), in 1 steps, which are not compared",
    ]


def test_a_step_that_one_rank_excludes_is_compared_on_none(tmp_path: Path) -> None:
    texts = [f"DECODE bs=1 forward_id={n}" for n in range(8)]
    rank_file(tmp_path, 0, texts)
    rank_file(tmp_path, 1, texts, calls={3: "cuModuleLoadData"})
    table = read_window(tmp_path)
    none = pd.DataFrame({"rank": [], "step": [], "count": []})
    steps = compared_steps(step_spans(table), none, table.ranks)
    assert steps.numbers == (0, 1, 2, 4, 5, 6, 7)
    assert (steps.excluded, steps.unmatched, steps.cut, steps.dropped) == (1, 0, 0, 1)


def test_target_and_draft_count_their_passes_each_by_itself(tmp_path: Path) -> None:
    """The same forward ids twice; the second rank's window opened one pass later."""
    texts = []
    for n in range(4):
        texts += [f"DRAFT bs=1 forward_id={n + 5}", f"VERIFY bs=1 forward_id={n + 4}"]
    rank_file(tmp_path, 0, texts)
    # Its clock runs like the first one's, its spans stand elsewhere.
    events = []
    for n, text in enumerate(texts[1:], start=1):
        events += [event(SPAN, f"step[{text}]", 10 * n + 2, 5), launch(10 * n + 3, n)]
        events.append(kernel(f"k{n}", 2000 + 5 * n, 1, correlation=n))
    write(tmp_path, document(events), "1-TP-1.trace.json")
    table = read_window(tmp_path)
    by_rank = {
        rank: {int(s.step): (s.substage, int(s.forward_id)) for s in part.itertuples()}
        for rank, part in table.steps.groupby("rank", observed=True)
    }
    assert len(by_rank["TP0"]) == 8
    assert list(by_rank["TP0"]) == list(range(8)), "in the order in which they ran"
    assert by_rank["TP1"] == {n: by_rank["TP0"][n] for n in range(1, 8)}
    kernels = table.frame.groupby(["rank", "step"], observed=True).size()
    assert kernels["TP1"].to_dict() == dict.fromkeys(range(1, 8), 1)
