"""The parts of a step's wall, counted here nanosecond by nanosecond in plain Python."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pytest_sglprof._analysis.budget import (
    StepBudget,
    budget_of,
    budgets,
    estimate,
    idle_of_wall,
    mean_wall,
    step_walls,
)
from pytest_sglprof._analysis.certainty import pool, side_by_side
from pytest_sglprof._trace.table import KernelTable, Step
from tests.support.kernel_tables import build, from_rows
from tests.support.planted import Plan, matrix, window
from tests.unit.analysis.test_rates import SEEDS, most_by_chance

ALL_REDUCE = "ncclDevKernel_AllReduce_Sum_bf16_RING_LL"
NAMES = {"gemm": "gemm", "communication": ALL_REDUCE, "memory": "Memcpy HtoD"}
PARTS = ("compute", "transfer", "waiting", "communication", "copies", "launching", "between")
OWN, OTHER = 7, 9


@dataclass(frozen=True)
class Row:
    """One activity; step -1 for none."""

    rank: str
    category: str
    step: int
    start: int
    dur: int
    stream: int = OWN

    @property
    def end(self) -> int:
        return self.start + self.dur


def table(rows: Sequence[Row], steps: Sequence[Step], ranks: Sequence[str]) -> KernelTable:
    listed = [
        (r.rank, NAMES[r.category], r.category, "decode", r.step, r.stream, r.start, r.dur)
        for r in rows
    ]
    return from_rows(listed, steps=[(rank, s) for rank in ranks for s in steps], ranks=ranks)


def steps(*substages: str, **more: object) -> list[Step]:
    stages = {"EXTEND": "prefill", "IDLE": "idle"}
    return [
        Step(n, stages.get(name, "decode"), n, n + 1, substage=name).changed(**more)  # type: ignore[arg-type]
        for n, name in enumerate(substages)
    ]


# The same figures by plain Python.


def arrival(rows: Sequence[Row], at: int) -> int:
    """When all that began earlier on the stream of a call had ended."""
    call = rows[at]
    before = [
        r.end
        for n, r in enumerate(rows)
        if r.rank == call.rank and r.stream == call.stream and (r.start, n) < (call.start, at)
    ]
    return min(call.end, max([call.start, *before])) if call.stream >= 0 else call.start


def meetings(rows: Sequence[Row], ranks: Sequence[str]) -> dict[str, list[tuple[int, int, int]]]:
    """By rank (arrival, arrival of the last, end) of the calls that all ranks made as often.

    Of fewer than twenty the clocks are not known: the last is who spends least time in it.
    """
    calls: dict[int, dict[str, list[int]]] = defaultdict(lambda: {rank: [] for rank in ranks})
    for at, row in enumerate(rows):
        if row.category == "communication" and row.step >= 0:
            calls[row.step][row.rank].append(at)
    found: dict[str, list[tuple[int, int, int]]] = {rank: [] for rank in ranks}
    for of_rank in calls.values():
        if len(ranks) < 2 or len({len(each) for each in of_rank.values()}) > 1:
            continue
        lists = [sorted(each, key=lambda at: rows[at].start) for each in of_rank.values()]
        for together in zip(*lists, strict=True):
            least = min(rows[at].end - arrival(rows, at) for at in together)
            for at in together:
                found[rows[at].rank].append((arrival(rows, at), rows[at].end - least, rows[at].end))
    return found


def swept(
    rows: Sequence[Row], units: Sequence[set[int]], met: Sequence[tuple[int, int, int]]
) -> list[dict[str, int]]:
    """The parts of each unit (numbers of steps) of one rank, instant by instant."""
    spans = [
        (min(r.start for r in rows if r.step in unit), max(r.end for r in rows if r.step in unit))
        for unit in units
        if any(r.step in unit for r in rows)
    ]
    spans.sort(key=lambda span: span[0])
    found = [dict.fromkeys(PARTS, 0) for _ in spans]
    for t in range(spans[0][0], max(end for _, end in spans)):
        begun = [n for n, (begin, _) in enumerate(spans) if begin <= t]
        found[begun[-1]][_part_at(t, rows, met, [spans[n][1] for n in begun])] += 1
    return found


def _part_at(
    t: int, rows: Sequence[Row], met: Sequence[tuple[int, int, int]], ends: Sequence[int]
) -> str:
    running = [r for r in rows if r.start <= t < r.end]
    calls = [r for r in rows if r.category == "communication" and r.end > t]
    for row in running:
        waits = [c for c in calls if 0 <= c.stream == row.stream and c.start < row.start]
        if row.category == "gemm" and not waits:
            return "compute"
    if any(last <= t < end for _, last, end in met):
        return "transfer"
    if any(arrived <= t < last for arrived, last, _ in met):
        return "waiting"
    for kind, part in (("communication", "communication"), ("memory", "copies")):
        if any(r.category == kind for r in running):
            return part
    return "launching" if t < max(ends) else "between"


def parts(budget: StepBudget, rank: str) -> dict[str, int]:
    """The figures of a rank by the names of `PARTS`, communication without what is split."""
    found = budget.figure(rank)
    assert found is not None
    split, waiting = found.transfer_ns or 0, found.waiting_ns or 0
    if found.launching_ns is not None and found.between_ns is not None:
        assert found.launching_ns + found.between_ns == found.idle_ns
    assert found.wall_ns == (
        found.compute_ns + found.communication_ns + found.copies_ns + found.idle_ns
    )
    values = (found.compute_ns, split, waiting, found.communication_ns - split - waiting)
    rest = (found.copies_ns, found.launching_ns or 0, found.between_ns or 0)
    return dict(zip(PARTS, (*values, *rest), strict=True))


def assert_as_swept(
    rows: Sequence[Row], passes: Sequence[Step], ranks: Sequence[str], units: Sequence[set[int]]
) -> StepBudget:
    found = budget_of(step_walls(table(rows, passes, ranks)))
    met = meetings(rows, ranks)
    for rank in ranks:
        own = [row for row in rows if row.rank == rank]
        if not any(row.step >= 0 for row in own):
            assert found.figure(rank) is None
            continue
        counted = swept(own, units, met[rank])
        sums = {part: sum(each[part] for each in counted) for part in PARTS}
        assert parts(found, rank) == sums
    return found


def decode(number: int = 3) -> list[Step]:
    return steps(*["DECODE"] * number)


def test_every_part_of_one_step_of_one_rank() -> None:
    """A copy, a kernel, a hole, a call that nobody else made, a hole; then the next step."""
    rows = [
        Row("TP0", "memory", 0, 100, 10),
        Row("TP0", "gemm", 0, 105, 35),
        Row("TP0", "communication", 0, 150, 20),
        Row("TP0", "gemm", 1, 200, 30),
    ]
    found = assert_as_swept(rows, decode(2), ("TP0",), [{0}, {1}])
    assert parts(found, "TP0") == {
        "compute": 35 + 30,
        "transfer": 0,
        "waiting": 0,
        "communication": 20,
        "copies": 5,
        "launching": 10,
        "between": 30,
    }
    (rank,) = found.ranks
    assert (rank.steps, rank.wall_ns, rank.median_wall_ns) == (2, 130, 65.0)
    assert (rank.longest_between_ns, rank.transfer_ns, rank.waiting_ns) == (30, None, None)
    assert found.idle_share == pytest.approx(40 / 130)
    assert (found.idle_rank, found.wall_rank) == ("TP0", "TP0")
    assert found.pass_wall == pytest.approx(65e-6)


def test_one_step_has_nothing_behind_it() -> None:
    rows = [
        Row("TP0", "gemm", 0, 10, 5),
        Row("TP0", "gemm", 0, 20, 5),
        Row("TP0", "gemm", -1, 40, 9),
    ]
    found = assert_as_swept(rows, decode(1), ("TP0",), [{0}])
    assert parts(found, "TP0")["launching"] == 5
    assert found.ranks[0].wall_ns == 15
    assert (found.idle_interval, found.wall_interval) == (None, None)


def test_two_streams_count_once() -> None:
    rows = [
        Row("TP0", "gemm", 0, 0, 50),
        Row("TP0", "gemm", 0, 20, 60, OTHER),
        Row("TP0", "memory", 0, 70, 30, OTHER),
        Row("TP0", "gemm", 1, 110, 10),
    ]
    found = assert_as_swept(rows, decode(2), ("TP0",), [{0}, {1}])
    assert parts(found, "TP0") | {"launching": 0} == {
        **dict.fromkeys(PARTS, 0),
        "compute": 90,
        "copies": 20,
        "between": 10,
    }


def two_ranks_that_meet(stream: int, beneath: int) -> list[Row]:
    """TP1 arrives 30 ns after TP0, which computes `beneath` ns meanwhile on `stream`."""
    rows = [
        Row("TP0", "gemm", 0, 0, 20),
        Row("TP0", "communication", 0, 20, 50),
        Row("TP1", "gemm", 0, 0, 50),
        Row("TP1", "communication", 0, 50, 20),
    ]
    return [*rows, Row("TP0", "gemm", 0, 25, beneath, stream)] if beneath else rows


def test_waiting_and_transfer_are_told_apart_where_calls_are_matched() -> None:
    found = assert_as_swept(two_ranks_that_meet(OWN, 0), decode(1), ("TP0", "TP1"), [{0}])
    assert parts(found, "TP0")["waiting"] == 30
    assert parts(found, "TP1")["waiting"] == 0
    assert [rank.transfer_ns for rank in found.ranks] == [20, 20]


@pytest.mark.parametrize(("stream", "compute", "waiting"), [(OTHER, 30, 20), (OWN, 20, 30)])
def test_compute_hides_waiting_only_on_another_stream(
    stream: int, compute: int, waiting: int
) -> None:
    """On its own stream the kernel was launched early, and waits for the collective itself."""
    rows = two_ranks_that_meet(stream, 10)
    found = assert_as_swept(rows, decode(1), ("TP0", "TP1"), [{0}])
    assert parts(found, "TP0")["compute"] == compute
    assert parts(found, "TP0")["waiting"] == waiting


def test_a_kernel_that_is_launched_beneath_a_collective_computes_from_its_end_on() -> None:
    rows = [
        Row("TP0", "communication", 0, 0, 40),
        Row("TP0", "gemm", 0, 30, 30),
        Row("TP0", "gemm", 0, 70, 5, OTHER),
    ]
    found = assert_as_swept(rows, decode(1), ("TP0",), [{0}])
    assert parts(found, "TP0") | {"launching": 0} == {
        **dict.fromkeys(PARTS, 0),
        "compute": 25,
        "communication": 40,
    }


def test_a_replayed_graph_whose_nodes_run_side_by_side() -> None:
    """All nodes begin together on three streams; a graph leaves no hole but the one at its end."""
    rows = [
        Row("TP0", "gemm", step, 100 * step + at, dur, stream)
        for step in range(3)
        for at, dur, stream in ((0, 40, 7), (0, 60, 13), (0, 20, 14), (60, 10, 7))
    ]
    found = assert_as_swept(rows, decode(), ("TP0",), [{0}, {1}, {2}])
    assert parts(found, "TP0")["compute"] == 3 * 70
    assert (parts(found, "TP0")["launching"], parts(found, "TP0")["between"]) == (0, 60)


def test_steps_that_overlap_belong_to_the_one_that_began_last() -> None:
    """Step 1 begins on another stream while step 0 runs; step 0 ends behind it."""
    rows = [
        Row("TP0", "gemm", 0, 0, 50),
        Row("TP0", "gemm", 1, 40, 20, OTHER),
        Row("TP0", "gemm", 0, 70, 30),
        Row("TP0", "gemm", 2, 120, 10),
    ]
    walls = step_walls(table(rows, decode(), ("TP0",)))
    assert walls.ranks[0].parts.sum(axis=1).tolist() == [40, 80, 10]
    found = assert_as_swept(rows, decode(), ("TP0",), [{0}, {1}, {2}])
    # Between 60 and 70 step 0 has still work to come, so nothing is between steps.
    assert (parts(found, "TP0")["launching"], parts(found, "TP0")["between"]) == (10, 20)


def test_what_is_in_no_step_is_work_all_the_same() -> None:
    """Sampling behind the span of a step: the GPU is not idle then, but is around it."""
    rows = [
        Row("TP0", "gemm", 0, 0, 50),
        Row("TP0", "gemm", -1, 60, 10),
        Row("TP0", "gemm", 1, 90, 10),
    ]
    found = assert_as_swept(rows, decode(2), ("TP0",), [{0}, {1}])
    assert parts(found, "TP0")["compute"] == 70
    assert parts(found, "TP0")["between"] == 30


def test_a_pass_without_work_is_between_the_others() -> None:
    """An idle pass that replays its graph is a step of its own kind; one that runs nothing not."""
    rows = [
        Row("TP0", "gemm", 0, 0, 50),
        Row("TP0", "gemm", 1, 60, 10),
        Row("TP0", "gemm", 3, 200, 10),
    ]
    passes = steps("DECODE", "IDLE", "IDLE", "DECODE")
    found = budgets(step_walls(table(rows, passes, ("TP0",))))
    assert [(each.stage, each.steps) for each in found] == [("decode", 2), ("idle", 1)]
    assert parts(found[0], "TP0")["between"] == 10
    assert parts(found[1], "TP0")["between"] == 130


def test_ranks_may_have_other_steps_and_none() -> None:
    """Replicas with requests of their own: each has the steps that it ran."""
    rows = [
        Row("DP0 TP0", "gemm", 0, 0, 10),
        Row("DP0 TP0", "gemm", 1, 30, 10),
        Row("DP1 TP0", "gemm", 0, 5, 10),
    ]
    ranks = ("DP0 TP0", "DP1 TP0", "DP2 TP0")
    found = assert_as_swept(rows, decode(), ranks, [{0}, {1}])
    assert [(rank.rank, rank.steps) for rank in found.ranks] == [(ranks[0], 2), (ranks[1], 1)]
    assert found.steps == 1  # as many as the rank with fewest


def test_steps_with_a_compilation_do_not_count() -> None:
    passes = [*decode(2), Step(2, "decode", 2, 3, substage="DECODE", excluded="jit compilation")]
    rows = [Row("TP0", "gemm", n, 100 * n, 50) for n in range(3)]
    found = budget_of(step_walls(table(rows, passes, ("TP0",))))
    assert (found.steps, found.dropped_steps, found.ranks[0].wall_ns) == (2, 1, 200)
    all_of_them = [step.changed(excluded="graph capture") for step in passes]
    found = budget_of(step_walls(table(rows, all_of_them, ("TP0",))))
    assert (found.ranks, found.reason) == ((), "no step with GPU activity counts")


def test_without_steps_the_window_is_one() -> None:
    rows = [Row("TP0", "gemm", -1, 10, 20), Row("TP0", "memory", -1, 50, 20)]
    (found,) = budgets(step_walls(table(rows, [], ("TP0",))))
    (rank,) = found.ranks
    assert (found.steps, found.has_steps, found.unit, found.pass_wall) == (
        None,
        False,
        "window",
        None,
    )
    assert (rank.wall_ns, rank.compute_ns, rank.copies_ns, rank.idle_ns) == (60, 20, 20, 20)
    assert (rank.launching_ns, rank.between_ns, rank.median_wall_ns) == (None, None, None)
    assert found.idle_share == pytest.approx(1 / 3)
    assert estimate(step_walls(table(rows, [], ("TP0",))), "idle_of_wall") is None


@pytest.mark.parametrize(
    ("source", "words"), [("cpu_op", "CPU operators"), ("nvtx", "NVTX ranges")]
)
def test_a_server_on_cpu_has_no_figure(source: str, words: str) -> None:
    rows = [Row("TP0", "gemm", n, 10 * n, 5) for n in range(3)]
    (found,) = budgets(step_walls(replace(table(rows, decode(), ("TP0",)), source=source)))
    assert found.reason.startswith(f"activities are {words}, which are no intervals on a GPU")
    assert (found.ranks, found.idle_share, found.pass_wall) == ((), None, None)


def test_nothing_at_all() -> None:
    (found,) = budgets(step_walls(from_rows([], ranks=("TP0", "TP1"))))
    assert found.reason == "no rank has a step with any GPU activity"
    only_decode = step_walls(table([Row("TP0", "gemm", 0, 0, 5)], decode(1), ("TP0",)))
    assert budget_of(only_decode, "prefill").reason == "no prefill step at all"


# Speculative decoding.


EAGLE = (
    "VERIFY",
    "DRAFT",
    "DRAFT",
    "DRAFT",
    "VERIFY",
    "DRAFT",
    "DRAFT",
    "DRAFT",
    "VERIFY",
    "DRAFT",
)


def speculative(names: Sequence[str], **more: object) -> KernelTable:
    """Each pass has 10 ns of work and 5 ns of nothing; 25 before the drafts of an iteration."""
    rows, at = [], 0
    for number in range(len(names)):
        rows.append(Row("TP0", "gemm", number, at, 10))
        extends = names[number].startswith("DRAFT") and names[number - 1] in ("VERIFY", "EXTEND")
        at += 30 if extends else 15
    return table(rows, steps(*names, **more), ("TP0",))


def test_an_iteration_drafts_verifies_and_extends() -> None:
    """The draft behind a verify extends the draft model; those behind it draft for the next."""
    (found,) = budgets(step_walls(speculative(EAGLE, accept_length=2.5)))
    assert (found.stage, found.substage, found.unit) == ("decode", "VERIFY", "iteration")
    (rank,) = found.ranks
    # 1 pass and its extension; two iterations of 2 drafts, 1 verify, 1 extension.
    assert (rank.steps, rank.compute_ns) == (3, 100)
    assert (rank.launching_ns, rank.between_ns) == (5 + 15 + 15, 2 * 20)
    assert (rank.accepted, rank.ns_per_accepted) == (7.5, rank.wall_ns / 7.5)
    assert rank.wall_ns == 175


def test_without_accept_lengths_nothing_is_said_of_tokens() -> None:
    (found,) = budgets(step_walls(speculative(EAGLE)))
    assert (found.ranks[0].accepted, found.ranks[0].ns_per_accepted) == (None, None)


def test_decode_steps_accept_no_tokens() -> None:
    passes = [step.changed(accept_length=2.0) for step in decode(2)]
    rows = [Row("TP0", "gemm", n, 20 * n, 10) for n in range(2)]
    (found,) = budgets(step_walls(table(rows, passes, ("TP0",))))
    assert found.substage == ""
    assert found.ranks[0].accepted is None


@pytest.mark.parametrize(
    ("names", "expected", "dropped"),
    [
        # A prefill is extended too, and its drafts are those of the first verify.
        (["EXTEND", "DRAFT", "DRAFT", "VERIFY", "DRAFT"], {"prefill": 2, "decode": 3}, 0),
        # One span for all drafts, and a name of its own for the extension.
        (["VERIFY", "DRAFT_EXTEND_V2", "DRAFT_LOOP", "VERIFY"], {"decode": 4}, 0),
        (["VERIFY", "DRAFT_LOOP", "VERIFY", "DRAFT_LOOP", "VERIFY"], {"decode": 5}, 0),
        # Drafts by n-grams run no model.
        (["VERIFY", "VERIFY", "VERIFY"], {"decode": 3}, 0),
        # The window begins within an iteration, which does not count.
        (["DRAFT", "DRAFT", "VERIFY", "DRAFT", "DRAFT", "VERIFY"], {"decode": 2}, 1),
        # It ends in one: its drafts are behind the last wall.
        (["VERIFY", "DRAFT", "DRAFT", "DRAFT"], {"decode": 2}, 0),
        # Only drafts: no iteration at all.
        (["DRAFT", "DRAFT"], {}, 0),
    ],
)
def test_which_passes_make_an_iteration(
    names: list[str], expected: dict[str, int], dropped: int
) -> None:
    found = budgets(step_walls(speculative(names)))
    work = {each.stage: each.ranks[0].compute_ns // 10 for each in found if each.ranks}
    assert work == expected
    assert sum(each.dropped_steps for each in found) == dropped
    if not expected:
        assert found[0].reason == "no rank has a step with any GPU activity"


def test_the_last_iteration_ends_where_the_drafts_of_another_begin() -> None:
    (found,) = budgets(step_walls(speculative(["VERIFY", "DRAFT", "DRAFT"])))
    assert (found.ranks[0].wall_ns, found.ranks[0].between_ns) == (45, 20)


# Any table of a few activities.


RANKS = ("TP0", "TP1")
ACTIVITY = st.builds(
    Row,
    rank=st.sampled_from(RANKS),
    category=st.sampled_from(("gemm", "gemm", "communication", "memory")),
    step=st.integers(-1, 3),
    start=st.integers(0, 90),
    dur=st.integers(1, 25),
    stream=st.sampled_from((-1, OWN, OTHER)),
)


@settings(max_examples=300, deadline=None)
@given(st.lists(ACTIVITY, min_size=1, max_size=14), st.permutations(range(4)))
def test_any_table_is_split_as_instant_by_instant(rows: list[Row], order: list[int]) -> None:
    if any(row.step >= 0 for row in rows):
        assert_as_swept(rows, [decode(4)[at] for at in order], RANKS, [{n} for n in range(4)])


@settings(max_examples=100, deadline=None)
@given(st.lists(ACTIVITY, min_size=1, max_size=14), st.lists(st.booleans(), min_size=4, max_size=4))
def test_walls_lie_end_to_end(rows: list[Row], drafts: list[bool]) -> None:
    """Also of iterations: the walls of a rank add up to the time from the first to the last."""
    passes = steps(*["DRAFT" if each else "VERIFY" for each in drafts])
    for walls in step_walls(table(rows, passes, RANKS)).ranks:
        own = [row for row in rows if row.rank == walls.rank]
        total = int(walls.parts.sum())
        assert total <= max(r.end for r in own) - min(r.start for r in own)
        assert (walls.parts >= 0).all()


def test_planted_windows_have_the_parts_that_were_planted() -> None:
    """TP2 idles 40 µs before each of 3 layers, so the others wait; a transfer takes 20 µs."""
    found = budget_of(step_walls(window(Plan(ranks=4, jitter=0.0, late={2: 40_000}))))
    late, other = found.figure("TP2"), found.figure("TP0")
    assert late is not None
    assert other is not None
    in_each = 100 * 3
    assert late.transfer_ns == pytest.approx(in_each * 20_000, rel=0.01)
    assert other.waiting_ns == pytest.approx(in_each * 40_000, rel=0.01)
    assert late.waiting_ns == pytest.approx(0, abs=0.01 * in_each * 40_000)
    assert late.compute_ns == other.compute_ns == in_each * 300_000
    assert late.idle_ns == pytest.approx(other.idle_ns + in_each * 40_000, rel=0.01)
    # One of the three is at the head of a step, and ahead of the first step there is none.
    assert late.between_ns == pytest.approx(99 * 42_000, rel=0.01)
    assert (found.idle_rank, found.steps) == ("TP2", 100)


def test_other_clocks_change_nothing() -> None:
    plan = Plan(ranks=4, late={2: 40_000})
    here, there = (
        budget_of(step_walls(window(each)))
        for each in (plan, replace(plan, offset={1: 3_000_000}, drift={3: 2e-5}))
    )
    for one, other in zip(here.ranks, there.ranks, strict=True):
        assert other.waiting_ns == pytest.approx(one.waiting_ns or 0, rel=0.01, abs=100_000)
        assert other.wall_ns == pytest.approx(one.wall_ns, rel=0.001)


# How certain the figures are.


def parts_of(walls: np.ndarray, busy: int = 700_000) -> np.ndarray:
    """Steps of so many ns, of which all beyond `busy` is idle."""
    found = np.zeros((len(walls), len(PARTS)), np.int64)
    found[:, 0], found[:, PARTS.index("launching")] = busy, walls - busy
    return found


@pytest.mark.parametrize("inherited", [0.0, 0.6])
def test_ranks_that_wait_for_each_other_know_no_more_than_one(inherited: float) -> None:
    """Eight ranks whose steps take the same time: the truth is in the ends as of one rank."""
    beyond = {"idle_of_wall": 0, "mean_wall": 0}
    for seed in range(SEEDS):
        walls = matrix(2, seed, jitter=0.05, inherited=inherited)[:, 0]
        for function, truth in ((idle_of_wall, 0.3), (mean_wall, 1.0)):
            alone = function(parts_of(walls))
            assert alone is not None
            found = side_by_side([alone] * 8)
            assert found.effective == alone.effective
            low, high = found.interval or (truth, truth)
            beyond[function.__name__] += not low <= truth <= high
    assert all(count <= most_by_chance(SEEDS) for count in beyond.values())


def test_windows_of_ranks_that_wait_for_each_other_are_as_many_as_they_are() -> None:
    """The spread between four windows has three degrees of freedom, however many ranks share it."""
    windows = []
    for seed, level in enumerate((1.0, 1.2, 0.9, 1.1)):
        alone = mean_wall(parts_of((level * matrix(2, seed)[:, 0]).astype(np.int64)))
        assert alone is not None
        windows.append(side_by_side([alone] * 8))
    assert pool(windows, 0.005).freedom == (3.0,) * 8


def test_the_ends_are_those_of_the_figure() -> None:
    table_of_two = build(steps=60)
    found = budget_of(step_walls(table_of_two))
    for value, ends in (
        (found.idle_share, found.idle_interval),
        (found.pass_wall, found.wall_interval),
    ):
        assert ends is not None
        assert value is not None
        assert ends[0] <= value <= ends[1]
