"""Steps: which forward pass an activity belongs to, and what `settle` leaves."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pytest_sglprof._trace.passes import parse_step
from pytest_sglprof._trace.read import read_window
from pytest_sglprof._trace.steps import self_times
from pytest_sglprof._trace.table import KernelTable, Step
from pytest_sglprof._trace.torch.events import Annotation
from tests.support import plain_traces as plain
from tests.support.kineto import BASE, Event, document, event, kernel, write

SPAN = "user_annotation"
GPU_SPAN = "gpu_user_annotation"


def launch(at: float, correlation: int, cat: str = "cuda_runtime") -> Event:
    return event(cat, "cudaLaunchKernel", at, 1, 5, 5, correlation=correlation)


def step_of(table: KernelTable, rank: str = "TP0") -> dict[str, tuple[int, str]]:
    frame = table.frame[table.frame["rank"] == rank]
    rows = zip(frame["full_name"], frame["step"], frame["stage"], strict=True)
    return {str(name): (int(step), str(stage)) for name, step, stage in rows}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("step[DECODE bs=4]", ("decode", 4, 4, -1)),
        ("step[EXTEND bs=2 toks=14721 forward_id=7]", ("prefill", 2, 14721, 7)),
        ("step[MIXED bs=3 toks=9]", ("mixed", 3, 9, -1)),
        ("step[TARGET_VERIFY bs=3 forward_id=0]", ("decode", 3, 3, 0)),
        ("step[IDLE bs=0]", ("idle", 0, -1, -1)),
        ("step[IDLE bs=0 forward_id=4]", ("idle", 0, 0, 4)),
        ("step[SPLIT_PREFILL bs=1 forward_id=4]", ("prefill", 1, -1, 4)),
        ("step[DRAFT_EXTEND_V2 bs=4]", ("decode", 4, 4, -1)),
        ("step[DRAFT bs=2 forward_id=4]", ("decode", 2, 2, 4)),
        ("step[DRAFT bs=0 forward_id=4]", ("idle", 0, 0, 4)),
        ("step[DRAFT bs=2 toks=30 c_sq=30 c_sk=99 forward_id=4]", ("prefill", 2, 30, 4)),
        ("step[DRAFT bs=3 c=1 g=2 c_sq=30 g_sq=2 forward_id=4]", ("mixed", 3, 32, 4)),
        ("step[DRAFT bs=2 c_sq=8 c_sk=99 forward_id=4]", ("decode", 2, 8, 4)),
        ("step[VERIFY bs=2 g_sq=8 g_sk=99 forward_id=4]", ("decode", 2, 8, 4)),
        (f"step[DECODE bs=1 forward_id={2**40}]", ("decode", 1, 1, -1)),
        ("step[NEW_MODE bs=1]", ("unknown", 1, -1, -1)),
        ("step[DECODE]", ("decode", -1, -1, -1)),
        ("step[DECODE bs=99999999999999999999999]", ("decode", -1, -1, -1)),
    ],
)
def test_the_words_of_a_step(text: str, expected: tuple[str, int, int, int]) -> None:
    step = parse_step(Annotation(0, text, 10, 10, gpu=False))
    assert step is not None
    assert (step.stage, step.batch_size, step.tokens, step.forward_id) == expected
    assert (step.start_ns, step.end_ns) == (10, 20)


@pytest.mark.parametrize("text", ["", "step", "my step[DECODE bs=1]", "step[]", "step[DECODE"])
def test_other_annotations_are_no_steps(text: str) -> None:
    assert parse_step(Annotation(0, text, 0, 1, gpu=False)) is None


@pytest.mark.parametrize("runtime", ["cuda_runtime", "cuda_driver", "hip_runtime"])
def test_a_kernel_belongs_to_the_step_that_launched_it(tmp_path: Path, runtime: str) -> None:
    events = [
        event(SPAN, "step[EXTEND bs=1 toks=9]", 0, 10),
        event(SPAN, "step[DECODE bs=1]", 10, 10),
        launch(5, 1, runtime),
        launch(15, 2, runtime),
        launch(25, 3, runtime),
        # All of them run while the CPU is elsewhere.
        kernel("prefill_gemm", 100, 1, correlation=1),
        kernel("decode_gemm", 101.5, 1, correlation=2),
        kernel("between", 103, 1, correlation=3),
        kernel("unknown_launch", 12, 1, correlation=4),
    ]
    table = read_window(write(tmp_path, document(events)))
    assert step_of(table) == {
        "prefill_gemm": (0, "prefill"),
        "decode_gemm": (1, "decode"),
        "between": (-1, "unknown"),
        "unknown_launch": (-1, "unknown"),
    }


def test_graph_kernels_belong_to_the_annotation_on_the_gpu(tmp_path: Path) -> None:
    events = [
        event(SPAN, "step[DECODE bs=1]", 0, 10),
        event(SPAN, "step[DECODE bs=2]", 10, 10),
        event(GPU_SPAN, "step[DECODE bs=1]", 100, 50),
        event(GPU_SPAN, "step[DECODE bs=2]", 150, 50),
        kernel("first", 110, 1),
        kernel("second", 150, 1),
        kernel("late", 200, 1),
    ]
    table = read_window(write(tmp_path, document(events)))
    assert step_of(table) == {
        "first": (0, "decode"), "second": (1, "decode"), "late": (-1, "unknown")
    }  # fmt: skip
    starts = [(int(row.start_ns) - BASE, int(row.batch_size)) for row in table.steps.itertuples()]
    assert starts == [(0, 1), (10_000, 2)]


def test_gpu_spans_that_cannot_be_matched_are_not_used(tmp_path: Path) -> None:
    """Three on the CPU, two on the GPU: nothing tells which one is missing."""
    events = [event(SPAN, "step[DECODE bs=1]", 10 * n, 10) for n in range(3)]
    events += [event(GPU_SPAN, "step[DECODE bs=1]", 100 + 10 * n, 10) for n in range(2)]
    table = read_window(write(tmp_path, document([*events, kernel("k", 101, 1)])))
    assert step_of(table) == {"k": (-1, "unknown")}
    with_ids = [
        {**found, "name": f"step[DECODE bs=1 forward_id={7 + int(found['ts']) % 100 // 10}]"}
        for found in events
    ]
    table = read_window(write(tmp_path, document([*with_ids, kernel("k", 111, 1)])))
    assert step_of(table) == {"k": (8, "decode")}


def test_steps_only_on_the_gpu_are_steps(tmp_path: Path) -> None:
    events = [event(GPU_SPAN, "step[DECODE bs=1]", 100, 10), kernel("k", 101, 1)]
    table = read_window(write(tmp_path, document(events)))
    assert (step_of(table), len(table.steps)) == ({"k": (0, "decode")}, 1)


def rank_file(folder: Path, rank: int, ids: list[int | None], *, stage: str = "") -> Path:
    """One kernel a step, on the launch's correlation; ids None: no forward_id."""
    word = "EXTEND" if stage == "EXTEND" else "DECODE"
    events = []
    for n, number in enumerate(ids):
        tail = "" if number is None else f" forward_id={number}"
        events += [
            event(SPAN, f"step[{word} bs=1 toks=1{tail}]", 10 * n, 10),
            launch(10 * n + 1, n + 1),
            kernel(f"k{n}{stage}", 1000 + 10 * n, 1, correlation=n + 1),
        ]
    name = f"1-TP-{rank}{'-' if stage else ''}{stage}.trace.json"
    return write(folder, document(events), name)


def test_forward_ids_number_steps_across_ranks(tmp_path: Path) -> None:
    files = [rank_file(tmp_path, 0, [5, 6, 7]), rank_file(tmp_path, 1, [6, 7, 8])]
    table = read_window(files)
    assert step_of(table, "TP0") == {f"k{n}": (5 + n, "decode") for n in range(3)}
    assert step_of(table, "TP1") == {f"k{n}": (6 + n, "decode") for n in range(3)}
    assert list(table.steps["step"]) == list(table.steps["forward_id"])


@pytest.mark.parametrize("second", [[7, None], [7, 7]])
def test_a_span_without_an_id_or_with_the_same_is_of_the_pass_before_it(
    tmp_path: Path, second: list[int | None]
) -> None:
    files = [rank_file(tmp_path, 0, [5, 9]), rank_file(tmp_path, 1, second)]
    table = read_window(files)
    assert step_of(table, "TP0") == {"k0": (5, "decode"), "k1": (9, "decode")}
    assert step_of(table, "TP1") == {"k0": (7, "decode"), "k1": (7, "decode")}


def test_without_an_id_everywhere_all_ranks_count_by_order(tmp_path: Path) -> None:
    files = [rank_file(tmp_path, 0, [5, 9]), rank_file(tmp_path, 1, [None, None])]
    table = read_window(files)
    assert step_of(table, "TP0") == {"k0": (0, "decode"), "k1": (1, "decode")}
    assert step_of(table, "TP1") == step_of(table, "TP0")


def test_stages_in_files_of_their_own_have_distinct_steps(tmp_path: Path) -> None:
    """Ranks with unequal numbers of prefills still agree on the numbers of decodes."""
    for rank, prefills in ((0, 3), (1, 2)):
        rank_file(tmp_path, rank, [None] * prefills, stage="EXTEND")
        rank_file(tmp_path, rank, [None] * 2, stage="DECODE")
    table = read_window(tmp_path)
    for rank, prefills in (("TP0", 3), ("TP1", 2)):
        assert step_of(table, rank) == {
            **{f"k{n}EXTEND": (n, "prefill") for n in range(prefills)},
            **{f"k{n}DECODE": (3 + n, "decode") for n in range(2)},
        }


def test_forward_ids_of_both_stages_stay(tmp_path: Path) -> None:
    rank_file(tmp_path, 0, [5, 8], stage="EXTEND")
    rank_file(tmp_path, 0, [6, 7], stage="DECODE")
    table = read_window(tmp_path)
    assert sorted(table.steps["step"]) == [5, 6, 7, 8]
    assert step_of(table)["k1EXTEND"] == (8, "prefill")


def test_settle_drops_the_first_steps_and_all_of_their_work(tmp_path: Path) -> None:
    path = rank_file(tmp_path, 0, [None] * 5)
    table = read_window(path, settle_s=20e-6)
    assert [int(step) for step in table.steps["step"]] == [2, 3, 4]
    assert step_of(table) == {f"k{n}": (n, "decode") for n in (2, 3, 4)}
    assert table.notes == ("settle: dropped the first 2e-05 s, 2 steps, 2 activities",)
    assert (table.settled, read_window(path).settled) == (2, 0)
    assert len(read_window(path, settle_s=1).frame) == 0


def test_settle_without_steps_counts_from_the_first_activity(tmp_path: Path) -> None:
    path = write(tmp_path, document([kernel(f"k{n}", 10 * n, 1) for n in range(5)]))
    assert sorted(step_of(read_window(path, settle_s=25e-6))) == ["k3", "k4"]


def test_cpu_operators_belong_to_the_step_around_them(tmp_path: Path) -> None:
    events = [
        event(SPAN, "step[DECODE bs=1]", 10, 10),
        event("cpu_op", "aten::mm", 12, 1),
        event("cpu_op", "aten::add", 5, 1),
        event(SPAN, "gloo:all_reduce", 19, 30),
    ]
    assert step_of(read_window(write(tmp_path, document(events)))) == {
        "aten::mm": (0, "decode"),
        "aten::add": (-1, "unknown"),
        "gloo:all_reduce": (0, "decode"),
    }


def test_a_step_on_another_clock() -> None:
    assert Step(0, "decode", 5, 9).shifted(100) == Step(0, "decode", 105, 109)


@given(st.lists(st.tuples(st.integers(0, 40), st.integers(0, 20), st.integers(0, 1)), max_size=30))
def test_self_times_of_any_spans(spans: list[tuple[int, int, int]]) -> None:
    """Nested or not: each moment belongs to the span of its thread that began last."""
    own = self_times(*np.array(spans, dtype=np.int64).reshape(-1, 3).T).tolist()
    for thread in {span[2] for span in spans}:
        at = [i for i, span in enumerate(spans) if span[2] == thread]
        intervals = [(spans[i][0], spans[i][0] + spans[i][1]) for i in at]
        assert [own[i] for i in at] == plain.self_time_of_each(intervals)
        assert sum(own[i] for i in at) == plain.union(intervals)
