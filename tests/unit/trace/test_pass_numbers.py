"""The number of a pass: the same on every rank, whatever else stands among its spans."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pytest_sglprof._analysis.groups import step_spans, steps_per_rank
from pytest_sglprof._analysis.work import step_inputs
from pytest_sglprof._trace.passes import DRAFTS, EPOCH, pass_numbers
from pytest_sglprof._trace.read import build_table, read_window
from pytest_sglprof._trace.steps import TraceSteps
from pytest_sglprof._trace.table import GPU, KernelTable, RankActivities, Step
from pytest_sglprof._trace.torch.events import Annotation
from tests.support.kineto import Event, document, event, kernel, write

SPAN = "user_annotation"
GPU_SPAN = "gpu_user_annotation"
LENGTH = 10  # of a span, us
# A span: its text, when it starts (us), how long it is.
Span = tuple[str, float, float]
WAYS = ("launch", "projection", "gpu time")


def in_a_row(texts: list[str]) -> list[Span]:
    return [(text, n * LENGTH, LENGTH) for n, text in enumerate(texts)]


def rank_file(folder: Path, rank: int, spans: list[Span], way: str = "launch") -> Path:
    """One kernel a span, called k0, k1, ... in their order, found in one of three ways.

    launch: by the call inside the span. projection: by the span on the kernel's stream, of the
    same id; the span is on a second stream, too. gpu time: by the only span on the GPU.
    """
    events: list[Event] = []
    for n, (text, start, length) in enumerate(spans):
        own = {"External id": n + 1} if way == "projection" else {}
        name = f"step[{text}]"
        events.append(event(SPAN, name, start, length, **own))
        at = 1000 + 20 * n
        if way == "launch":
            last = start + length - 0.5  # an inner span may have the middle
            events.append(event("cuda_runtime", "cudaLaunchKernel", last, 0.25, 5, 5,
                                correlation=n + 1))  # fmt: skip
        else:
            events.append(event(GPU_SPAN, name, at, 10, **own))
            if way == "projection":
                events.append(event(GPU_SPAN, name, at + 15, 10, 0, 20, **own))
        events.append(kernel(f"k{n}", at + 1, 2, correlation=n + 1))
        if way == "projection":
            events.append(kernel(f"side{n}", at + 16, 2, 20))
    return write(folder, document(events), f"1-TP-{rank}.trace.json")


def kernels(table: KernelTable, rank: str = "TP0", prefix: str = "k") -> list[int]:
    """The step of k0, k1, ..."""
    frame = table.frame[table.frame["rank"] == rank]
    found = dict(zip(frame["full_name"].astype(str), frame["step"], strict=True))
    return [int(found[f"{prefix}{n}"]) for n in range(sum(name[0] == "k" for name in found))]


def ids(*numbers: int | None, word: str = "DECODE") -> list[str]:
    """DECODE with these forward ids; None: a span without one."""
    return [
        "DRAFT_EXTEND_V2 bs=1" if number is None else f"{word} bs=1 forward_id={number}"
        for number in numbers
    ]


@pytest.mark.parametrize("way", WAYS)
def test_a_span_without_an_id_never_renumbers_its_rank(tmp_path: Path, way: str) -> None:
    """Ids 100 to 104 and one span more were numbered 0 to 5, beside a rank one pass later."""
    rank_file(tmp_path, 0, in_a_row(ids(100, 101, None, 102, 103, 104)), "launch")
    rank_file(tmp_path, 1, in_a_row(ids(101, 102, 103, 104)), "launch")
    table = read_window(tmp_path)
    assert kernels(table) == [100, 101, 101, 102, 103, 104]
    assert kernels(table, "TP1") == [101, 102, 103, 104]
    if way != "gpu time":  # without a projection or a launch nothing tells of what it is
        alone = rank_file(tmp_path / way, 0, in_a_row(ids(100, 101, None, 102)), way)
        assert kernels(read_window(alone)) == [100, 101, 101, 102]


@pytest.mark.parametrize("way", ["launch", "projection"])
@pytest.mark.parametrize(
    ("spans", "expected"),
    [
        (in_a_row(ids(None, 5, 6)), [-1, 5, 6]),  # of a pass before the window
        (in_a_row(ids(None, None, 5, None, None, 6)), [-1, -1, 5, 5, 5, 6]),
        (in_a_row(ids(5, 6, None)), [5, 6, 6]),
        # Enclosed by 5, also where another one is inside as well and before it.
        ([(ids(5)[0], 0, 10), (ids(None)[0], 2, 4), (ids(6)[0], 10, 10)], [5, 5, 6]),
        ([(ids(5)[0], 0, 20), (ids(6)[0], 2, 4), (ids(None)[0], 8, 4)], [5, 6, 5]),
        ([(ids(5)[0], 0, 20), (ids(6)[0], 2, 10), (ids(None)[0], 4, 4)], [5, 6, 6]),
        # It starts with the pass that encloses it.
        ([(ids(None)[0], 0, 4), (ids(5)[0], 0, 10), (ids(6)[0], 10, 9)], [5, 5, 6]),
    ],
)  # fmt: skip
def test_of_which_pass_a_span_without_an_id_is(
    tmp_path: Path, way: str, spans: list[Span], expected: list[int]
) -> None:
    table = read_window(rank_file(tmp_path, 0, spans, way))
    assert kernels(table) == expected
    if way == "projection":
        assert kernels(table, prefix="side") == expected
    assert sorted(table.steps["step"]) == sorted({5, 6})


def test_a_pass_of_two_spans_is_one_step_up_to_the_end_of_the_last(tmp_path: Path) -> None:
    texts = [
        "VERIFY bs=2 g_sq=8 g_sqsk=80 g_sk=20 forward_id=5",
        "DRAFT_EXTEND_V2 bs=2",
        "VERIFY bs=3 g_sq=12 g_sqsk=90 g_sk=30 forward_id=6",
        "DRAFT_EXTEND_V2 bs=9",
    ]
    table = read_window(rank_file(tmp_path, 0, in_a_row(texts)))
    steps = table.steps
    assert steps["step"].tolist() == [5, 6]
    assert (steps["end_ns"] - steps["start_ns"]).tolist() == [20_000, 20_000]
    assert steps["substage"].tolist() == ["VERIFY", "VERIFY"]
    assert steps["batch_size"].tolist() == [2, 3]
    assert steps["query_keys"].tolist() == [80, 90]
    assert steps_per_rank(table) == {"TP0": 2}


def test_a_table_with_two_rows_of_a_pass_takes_the_first(tmp_path: Path) -> None:
    table = read_window(rank_file(tmp_path, 0, in_a_row(ids(5, 6))))
    second = table.steps.assign(batch_size=9, step=5, stage="prefill")
    steps = table.steps.astype({"stage": object})
    both = KernelTable(table.frame, table.ranks, pd.concat([steps, second]))
    assert step_inputs(both.steps, [5, 6], ["TP0"]).batch_size.tolist() == [[1], [1]]
    assert step_spans(both)["stage"].tolist() == ["decode", "decode"]
    assert steps_per_rank(both) == {"TP0": 2}


@pytest.mark.parametrize("way", WAYS)
def test_an_id_that_falls_back_begins_an_epoch(tmp_path: Path, way: str) -> None:
    table = read_window(rank_file(tmp_path, 0, in_a_row(ids(7, 8, 1, 2, 3, 1)), way))
    steps = table.steps
    assert steps["forward_id"].tolist() == [7, 8, 1, 2, 3, 1]
    assert steps["step"].tolist() == [0, 1, 2, 3, 4, 5], "in the order in which they ran"
    assert kernels(table) == [0, 1, 2, 3, 4, 5]
    numbers = pass_numbers([Step(-1, "decode", n, n + 1, forward_id=n % 3) for n in range(5)])
    assert numbers == [0, 1, 2, EPOCH, EPOCH + 1]


def test_several_draft_runners_are_one_pass(tmp_path: Path) -> None:
    """Each counts its own passes, so that all three have the same id."""
    texts = [text for n in (4, 5) for text in
             (*ids(n, word="EXTEND"), *ids(n + 3, n + 3, n + 3, word="DRAFT"))]  # fmt: skip
    rank_file(tmp_path, 0, in_a_row(texts))
    late = [(text, at + 3, length) for text, at, length in in_a_row(texts)[4:]]
    rank_file(tmp_path, 1, late)
    table = read_window(tmp_path)
    assert kernels(table) == [0, 1, 1, 1, 2, 3, 3, 3]
    assert kernels(table, "TP1") == [2, 3, 3, 3]
    assert steps_per_rank(table) == {"TP0": 4, "TP1": 2}


def test_the_target_falls_back_and_the_draft_does_not(tmp_path: Path) -> None:
    texts = [text for target, draft in ((7, 4), (8, 5), (1, 6), (2, 7))
             for text in (*ids(target, word="VERIFY"), *ids(draft, word="DRAFT"))]  # fmt: skip
    numbers = pass_numbers(TraceSteps(annotations(texts)).steps)
    assert numbers == [7, DRAFTS + 4, 8, DRAFTS + 5, EPOCH + 1, DRAFTS + 6, EPOCH + 2, DRAFTS + 7]
    rank_file(tmp_path, 0, in_a_row(texts))
    rank_file(tmp_path, 1, in_a_row(texts)[3:])
    table = read_window(tmp_path)
    assert kernels(table) == list(range(8))
    assert kernels(table, "TP1") == list(range(3, 8))


def annotations(texts: list[str]) -> list[Annotation]:
    return [Annotation(0, f"step[{text}]", n, 1, gpu=False) for n, text in enumerate(texts)]


def test_ranks_of_one_pass_may_have_any_stage(tmp_path: Path) -> None:
    """DP attention: at one id a rank extends, one decodes, one has nothing to do."""
    own = [
        ["EXTEND bs=1 toks=9 c_sq=9 c_sqsk=81 c_sk=9 forward_id=3", *ids(4)],
        ["DECODE bs=2 g_sq=2 g_sqsk=50 g_sk=50 forward_id=3", *ids(4)],
        ["IDLE bs=0 forward_id=3", "IDLE bs=0 forward_id=4"],
    ]
    for rank, texts in enumerate(own):
        rank_file(tmp_path, rank, in_a_row(texts))
    table = read_window(tmp_path)
    of_3 = table.steps[table.steps["step"] == 3]
    assert of_3["stage"].tolist() == ["prefill", "decode", "idle"]
    assert of_3["query_keys"].tolist() == [81, 50, 0]
    assert of_3["tokens"].tolist() == [9, 2, 0]
    assert [kernels(table, f"TP{rank}") for rank in range(3)] == [[3, 4]] * 3


def test_a_compilation_in_any_span_of_a_pass_excludes_it(tmp_path: Path) -> None:
    spans = in_a_row(ids(5, None, 6, 7, word="VERIFY"))
    path = rank_file(tmp_path, 0, spans)
    text = path.read_text()
    compiles = event("cuda_driver", "cuModuleLoadData", 15, 1, 5, 5, correlation=77)
    path.unlink()
    events = [json.loads(text)["traceEvents"], [compiles]]
    table = read_window(write(tmp_path, document([*events[0], *events[1]])))
    assert table.steps["excluded"].tolist() == ["jit compilation", "", ""]


# Any server: its passes, the windows of its ranks, and what each span says.


@dataclass(frozen=True)
class Pass:
    """A pass as it was: its model, the id that its spans tell, and its spans."""

    is_draft: bool
    forward_id: int
    with_id: int
    without_id: int


@st.composite
def served(draw: st.DrawFn) -> list[Pass]:
    counts = [draw(st.integers(2, 50)), draw(st.integers(2, 50))]
    size = draw(st.integers(8, 20))
    resets = [draw(st.integers(0, size)) for _ in counts]
    passes = []
    for n in range(2 * size):  # the target and the draft take turns
        draft = n % 2
        counts[draft] = draw(st.integers(0, 1)) if n // 2 == resets[draft] else counts[draft] + 1
        spans = 1 + draft * draw(st.integers(0, 2))
        passes.append(Pass(bool(draft), counts[draft], spans, draw(st.sampled_from([0, 0, 1, 2]))))
    return passes


def recorded(rank: int, passes: list[Pass], first: int, last: int, skip: int) -> RankActivities:
    """What one rank's window holds of them: a span every 1 ms, and one kernel in each.

    skip: the first spans of its first pass that began before the window.
    """
    spans: list[Annotation] = []
    for n in range(first, last):
        one = passes[n]
        word = "DRAFT" if one.is_draft else "VERIFY"
        texts = [f"{word} bs=1 forward_id={one.forward_id}"] * one.with_id
        texts += ["DRAFT_EXTEND_V2 bs=1"] * one.without_id
        for place, text in enumerate(texts):
            if n > first or place >= skip:
                start = n * 10_000_000 + place * 1_000_000 + rank * 1_000
                spans.append(Annotation(0, f"step[{text}]", start, 900_000, gpu=False))
    found = TraceSteps(spans)
    start = np.array([span.start + 10 for span in spans], np.int64)
    none = np.zeros(len(start), np.int64)
    step = found.of_gpu(start, none, start)
    return RankActivities(f"TP{rank}", ["k"], none, ["kernel"], none, start, none + 100, none, step,
                          found.steps, GPU)  # fmt: skip


@settings(deadline=None, max_examples=100)
@given(st.data())
def test_equal_numbers_are_equal_passes(data: st.DataObject) -> None:
    passes = data.draw(served())
    parts = []
    for rank in range(data.draw(st.integers(1, 3))):
        first = data.draw(st.integers(0, len(passes) // 4))
        last = data.draw(st.integers(len(passes) * 3 // 4, len(passes)))
        skip = data.draw(st.integers(0, 2)) if passes[first].without_id else 0
        parts.append(recorded(rank, passes, first, last, min(skip, passes[first].with_id)))
    truth = [(part.start // 10_000_000, part.start // 1_000_000 % 10) for part in parts]
    table = build_table([(Path(part.rank), part) for part in parts])
    number_of: dict[int, int] = {}
    for rank, (which, _) in enumerate(truth):
        steps = table.frame.loc[table.frame["rank"] == f"TP{rank}", "step"].tolist()
        begun = False
        for true, step in zip(which.tolist(), steps, strict=True):
            begun = begun or step >= 0
            assert step >= 0 or not begun, "only before the first id nothing is known"
            if step >= 0:
                assert number_of.setdefault(true, step) == step
    assert len(set(number_of.values())) == len(number_of), "one number, one pass"
    for label, count in steps_per_rank(table).items():
        rows = table.steps[table.steps["rank"] == label]
        assert len(rows) == count == rows["step"].nunique()
