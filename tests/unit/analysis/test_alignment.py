"""Passes without ids: the shift that makes the ends of symmetric collectives coincide."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pytest_sglprof._analysis.alignment import Alignment, aligned, renumbered
from pytest_sglprof._trace.read import read_window
from pytest_sglprof._trace.table import KernelTable, Step, step_frame
from tests.support.kineto import document, event, kernel, write

Floats = npt.NDArray[np.float64]
PASS_NS = 10_000_000
ONE_HOST = {"TP0 DP0": "a", "TP1 DP1": "a", "TP2 DP2": "a"}
TWO_HOSTS = {"TP0 DP0": "a", "TP1 DP1": "b", "TP2 DP2": "b"}


def server(passes: int, seed: int = 0, uneven: float = 0.3, collectives: int = 3) -> Floats:
    """When each collective of each pass ends, ns, shape (passes, collectives)."""
    rng = np.random.default_rng(seed)
    begins = np.cumsum(PASS_NS * rng.uniform(1 - uneven, 1 + uneven, passes))
    return begins[:, None] + 1_000_000.0 * np.arange(collectives)


def window(
    ends: Mapping[str, Floats],
    hosts: Mapping[str, str],
    *,
    name: str = "ncclDevKernel_AllReduce_Sum_bf16_RING_LL",
    ids: Mapping[str, Sequence[int]] | None = None,
    drop: Mapping[str, Sequence[int]] | None = None,
    **sizes: int,
) -> KernelTable:
    """Each rank's passes counted from 0, one collective kernel for each finite end, and a gemm.

    drop: passes of which a rank has no span, so that it counts on without them.
    """
    rows: list[tuple[Any, ...]] = []
    steps: list[tuple[str, Step]] = []
    for rank, of_rank in ends.items():
        kept = [n for n in range(len(of_rank)) if n not in (drop or {}).get(rank, ())]
        for number, n in enumerate(kept):
            begin = int(np.nanmin(of_rank[n])) - 3_000_000
            key = (ids or {}).get(rank, [-1] * len(of_rank))[n]
            step = key if key >= 0 else number
            steps.append((rank, Step(step, "decode", begin, begin + PASS_NS, forward_id=key)))
            rows.append((rank, "gemm", "gemm", step, begin, 500_000))
            rows += [(rank, name, name, step, int(end) - 40_000, 40_000)
                     for end in of_rank[n] if np.isfinite(end)]  # fmt: skip
    frame = pd.DataFrame(rows, columns=["rank", "name", "full_name", "step", "start_ns", "dur_ns"])
    is_gemm = frame["name"] == "gemm"
    frame = frame.assign(category=np.where(is_gemm, "gemm", "communication"), kind="kernel",
                         stage="decode", stream=7)  # fmt: skip
    texts = ("name", "full_name", "category", "kind", "stage")
    frame = frame.astype({**dict.fromkeys(texts, "category"), "step": np.int64})
    ranks = tuple(ends)
    frame["rank"] = pd.Categorical(frame["rank"], categories=list(ranks), ordered=True)
    table = KernelTable(frame, ranks, step_frame(steps, ranks), hosts=dict(hosts))
    if sizes:
        size = pd.Series(sizes["size"], index=frame.index[~is_gemm], dtype=np.int64)
        found = pd.DataFrame({"group_size": size})
        return KernelTable(frame, ranks, table.steps, hosts=table.hosts, collectives=found)
    return table


def late(
    true: Floats, first: Mapping[str, int], noise: float = 2000.0, **clock: float
) -> dict[str, Floats]:
    """What each rank records from its first pass on. clock: what each is ahead, by DP number."""
    rng = np.random.default_rng(7)
    return {
        rank: true[n:] + rng.normal(0, noise, true[n:].shape) + clock.get(rank[-3:], 0.0)
        for rank, n in first.items()
    }


FIRST = {"TP0 DP0": 0, "TP1 DP1": 1, "TP2 DP2": 3}


@pytest.mark.parametrize("hosts", [ONE_HOST, TWO_HOSTS, {}])
@pytest.mark.parametrize("name", [
    "ncclDevKernel_AllReduce_Sum_bf16_RING_LL", "ncclDevKernel_AllGather_RING_LL",
    "ncclDevKernel_ReduceScatter_Sum_bf16_RING_LL", "void sglang::cross_device_reduce_1stage<8>",
])  # fmt: skip
def test_a_window_that_opened_later_is_moved(hosts: Mapping[str, str], name: str) -> None:
    table = window(late(server(40), FIRST), hosts, name=name)
    found = aligned(table, table.ranks)
    assert found == Alignment(FIRST)
    moved = renumbered(table, found)
    for rows in (moved.frame, moved.steps):
        least = rows.groupby("rank", observed=True)["step"].min().to_dict()
        assert least == FIRST
    assert moved.frame["step"].dtype == np.int64
    # After that, all ranks have the same collectives at the same time.
    ends = moved.frame[moved.frame["category"] == "communication"]
    spread = ends.groupby(["step"])["start_ns"].min()
    assert (spread.diff().dropna() > 0.5 * PASS_NS).all()


def test_a_first_rank_that_opened_last_keeps_all_numbers_from_0(tmp_path: Path) -> None:
    table = window(late(server(40), {"TP0 DP0": 4, "TP1 DP1": 1}), ONE_HOST)
    found = aligned(table, table.ranks)
    assert found.shifts == {"TP0 DP0": 0, "TP1 DP1": -3}
    least = renumbered(table, found).steps.groupby("rank", observed=True)["step"].min()
    assert least.to_dict() == {"TP0 DP0": 3, "TP1 DP1": 0}


def test_activities_outside_of_passes_stay_there() -> None:
    table = window(late(server(20), FIRST), ONE_HOST)
    frame = table.frame.copy()
    frame.loc[frame.index[::5], "step"] = -1
    table = KernelTable(frame, table.ranks, table.steps, hosts=table.hosts)
    moved = renumbered(table, Alignment(FIRST))
    assert ((moved.frame["step"] == -1) == (frame["step"] == -1)).all()


def test_passes_with_ids_are_not_moved() -> None:
    ends = late(server(20), FIRST)
    ids = {rank: list(range(n + 5, 30)) for rank, n in FIRST.items()}
    table = window(ends, ONE_HOST, ids=ids)
    found = aligned(table, table.ranks)
    assert found == Alignment(dict.fromkeys(FIRST, 0))
    assert renumbered(table, found) is table


def test_regular_passes_of_two_hosts_cannot_be_aligned() -> None:
    """Without a common clock, passes that all take as long look alike; with one they do not."""
    ends = late(server(60, uneven=0.0), FIRST)
    table = window(ends, TWO_HOSTS)
    found = aligned(table, table.ranks)
    assert found.shifts is None
    assert found.reason.startswith("passes cannot be aligned: TP1 DP1 beside TP0 DP0: the ends of")
    assert renumbered(table, found) is table
    table = window(ends, ONE_HOST)
    assert aligned(table, table.ranks).shifts == FIRST


def test_another_clock_is_allowed_only_on_another_host() -> None:
    ends = late(server(60), FIRST, DP1=4 * PASS_NS + 0.5 * PASS_NS, DP2=1e12)
    table = window(ends, TWO_HOSTS)
    assert aligned(table, table.ranks).shifts == FIRST
    table = window(ends, ONE_HOST)
    assert aligned(table, table.ranks).shifts is None


@pytest.mark.parametrize(("name", "sizes"), [
    ("deep_ep::intranode::dispatch", {}), ("ncclDevKernel_SendRecv", {}),
    ("ncclDevKernel_Broadcast_RING_LL", {}),
    ("ncclDevKernel_AllReduce_Sum_bf16_RING_LL", {"size": 2}),
])  # fmt: skip
def test_without_a_collective_of_all_ranks_order_is_never_enough(
    name: str, sizes: dict[str, int]
) -> None:
    table = window(late(server(40), FIRST), ONE_HOST, name=name, **sizes)
    found = aligned(table, table.ranks)
    assert found.shifts is None
    assert found.reason == (
        "passes cannot be aligned: TP0 DP0 has no symmetric collective in a pass; "
        "load not known: no batch is recorded (nsys records none)"
    )


def test_a_batch_that_is_recorded_is_not_said_to_be_missing() -> None:
    table = window(late(server(40), FIRST), ONE_HOST, name="ncclDevKernel_SendRecv")
    steps = table.steps.assign(batch_size=[8] + [-1] * (len(table.steps) - 1))
    reason = aligned(replace(table, steps=steps), table.ranks).reason
    assert reason == "passes cannot be aligned: TP0 DP0 has no symmetric collective in a pass"


def test_a_rank_without_passes_cannot_be_aligned() -> None:
    table = window(late(server(40), FIRST), ONE_HOST)
    without = KernelTable(
        table.frame[table.frame["rank"] != "TP1 DP1"], table.ranks,
        table.steps[table.steps["rank"] != "TP1 DP1"], hosts=table.hosts,
    )  # fmt: skip
    reason = aligned(without, table.ranks).reason
    assert "TP1 DP1 has no symmetric collective in a pass; load not known" in reason


def test_too_few_passes_cannot_be_aligned() -> None:
    table = window(late(server(4), {"TP0 DP0": 1, "TP1 DP1": 1}), ONE_HOST)
    assert "too few passes with the same collectives" in aligned(table, table.ranks).reason


@pytest.mark.parametrize("hosts", [ONE_HOST, TWO_HOSTS])
@pytest.mark.parametrize("lost", [20, 50, 80])
def test_a_rank_that_lacks_a_pass_in_the_middle_cannot_be_aligned(
    hosts: Mapping[str, str], lost: int
) -> None:
    """No shift is right for all of its passes: those after the gap are one off."""
    ends = late(server(100), {"TP0 DP0": 0, "TP1 DP1": 1})
    table = window(ends, hosts, drop={"TP1 DP1": [lost]})
    assert "is better in a part of the window" in aligned(table, table.ranks).reason


def test_passes_whose_collectives_differ_are_passed_over() -> None:
    """A pass cut at the edge, and some with fewer collectives on one rank."""
    ends = late(server(60), FIRST)
    ends["TP1 DP1"][0, 1:] = np.nan
    ends["TP2 DP2"][10:14, 2] = np.nan
    table = window(ends, TWO_HOSTS)
    assert aligned(table, table.ranks).shifts == FIRST


def brute_force(ends: Floats, first: Floats, *, shares_clock: bool) -> tuple[float, int, float]:
    """Every shift by every end: the best residual, its shift, the second-best residual."""
    found = []
    few = max(3, -(-min(len(ends), len(first)) // 2))
    for shift in range(-len(ends), len(first)):
        apart = [end - other
                 for n, row in enumerate(ends) if 0 <= n + shift < len(first)
                 for end, other in zip(row, first[n + shift], strict=True)]  # fmt: skip
        if len(apart) >= few * ends.shape[1]:
            middle = 0.0 if shares_clock else statistics.median(apart)
            found.append((statistics.median(abs(each - middle) for each in apart), shift))
    found.sort()
    return found[0][0], found[0][1], found[1][0]


@settings(deadline=None, max_examples=150)
@given(
    seed=st.integers(0, 10**6),
    passes=st.integers(6, 60),
    first=st.tuples(st.integers(0, 4), st.integers(0, 4)),
    uneven=st.sampled_from([0.0, 0.001, 0.05, 0.5]),
    noise=st.sampled_from([100.0, 20_000.0, 300_000.0, 3_000_000.0]),
    shares_clock=st.booleans(),
)
def test_the_shift_is_that_of_all_shifts_tried_one_by_one(
    seed: int, passes: int, first: tuple[int, int], uneven: float, noise: float, shares_clock: bool
) -> None:
    starts = {"TP0 DP0": first[0], "TP1 DP1": first[1]}
    ends = late(server(passes + 4, seed, uneven), starts, noise)
    ends = {rank: np.sort(np.floor(each), axis=1) for rank, each in ends.items()}
    table = window(ends, ONE_HOST if shares_clock else TWO_HOSTS)
    best, shift, second = brute_force(ends["TP1 DP1"], ends["TP0 DP0"], shares_clock=shares_clock)
    found = aligned(table, table.ranks)
    if found.shifts is not None:
        assert found.shifts["TP1 DP1"] == shift == first[1] - first[0]
        assert second >= 3.0 * best
    else:
        # It may also say no where a part of the window speaks for another shift.
        assert second < 3.0 * best or "in a part of" in found.reason
        assert noise >= 300_000.0 or not shares_clock, "clear on one clock"


@pytest.mark.parametrize("hosts", ["a", ""])
def test_files_without_ids_of_windows_that_opened_one_pass_apart(
    tmp_path: Path, hosts: str
) -> None:
    true = server(30, collectives=2) / 1000
    more = {"host_name": hosts} if hosts else {}
    for rank in (0, 1):
        events = []
        for n, row in enumerate(true[rank:].tolist()):
            events.append(event("user_annotation", "step[DECODE bs=1]", row[0] - 3000, 5000))
            for place, end in enumerate(row):
                same = {"correlation": 10 * n + place + 1}
                at = row[0] - 2900 + place
                events.append(event("cuda_runtime", "cudaLaunchKernel", at, 1, 5, 5, **same))
                name = "ncclDevKernel_AllReduce_Sum_bf16_RING_LL"
                events.append(kernel(name, round(end - 40 + rank, 3), 40, **same))
        write(tmp_path, document(events, **more), f"1-TP-{rank}-DP-{rank}.trace.json")
    table = read_window(tmp_path)
    before = table.steps.groupby("rank", observed=True)["step"].min()
    assert before.tolist() == [0, 0], "by order alone, each rank is one off"
    found = aligned(table, table.ranks)
    assert list((found.shifts or {}).values()) == [0, 1]
    steps = renumbered(table, found).steps
    starts = steps.pivot_table(
        index="step", columns="rank", values="start_ns", observed=True
    ).dropna()
    assert (starts.iloc[:, 0] - starts.iloc[:, 1]).abs().max() < 10_000
    assert len(starts) == 29


def test_sixty_four_ranks_take_seconds() -> None:
    """Here 16 ranks of 500 passes; 64 of 1,000 take 2 s of one processor."""
    first = {f"TP{n} DP{n}": n % 4 for n in range(16)}
    true = server(504, collectives=12)
    table = window(late(true, first), dict.fromkeys(first, "a"))
    begun = time.process_time()
    assert aligned(table, table.ranks).shifts == first
    assert time.process_time() - begun < 2.0
