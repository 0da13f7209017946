"""Waiting under compute of another stream costs nothing, and blames nobody."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from pytest_sglprof._analysis.collectives import waits
from pytest_sglprof._analysis.exposure import computing
from pytest_sglprof._analysis.straggler import StragglerFinding, stragglers
from pytest_sglprof._trace.table import KernelTable
from tests.support.kernel_tables import from_rows
from tests.support.planted import COLLECTIVE, Plan, window

LATE = Plan(ranks=4, jitter=0.005, late={2: 40_000})
OTHER = 9


def with_kernels(
    table: KernelTable, times: Callable[[pd.DataFrame], tuple[pd.Series, pd.Series]], stream: int
) -> KernelTable:
    """The table with a kernel of another batch for each collective, at (start, duration)."""
    calls = table.frame[table.frame["name"] == COLLECTIVE]
    start, dur = times(calls)
    names = {"name": "gemm_kernel", "full_name": "gemm_kernel", "category": "gemm"}
    beneath = calls.assign(**names, start_ns=start, dur_ns=dur, stream=stream)
    frame = pd.concat([table.frame, beneath[dur > 0]], ignore_index=True)
    kept = {name: frame[name].astype("category") for name in names}
    order = pd.CategoricalDtype(list(table.ranks), ordered=True)
    return replace(table, frame=frame.assign(**kept, rank=frame["rank"].astype(order)))


def only(table: KernelTable) -> StragglerFinding:
    (found,) = stragglers(table)
    return found


def whole(calls: pd.DataFrame) -> tuple[pd.Series, pd.Series]:
    return calls["start_ns"], calls["dur_ns"]


def test_two_batches_in_turn_blame_nobody() -> None:
    """TP2 arrives 40 µs late; each rank computes the other batch for as long as it waits."""
    assert only(window(LATE)).straggler == "TP2"
    found = only(with_kernels(window(LATE), whole, OTHER))
    assert (found.straggler, found.verdict) == (None, "pass")
    assert [rank.wait_ns for rank in found.ranks] == [0, 0, 0, 0]
    assert found.overlapped == pytest.approx(1.0)
    assert only(window(LATE)).overlapped == 0.0


def test_the_waiting_that_is_left_exposed_is_what_is_lost() -> None:
    """Of each wait of 40 µs or so the first 15 µs are beneath the other batch."""

    def first(calls: pd.DataFrame) -> tuple[pd.Series, pd.Series]:
        return calls["start_ns"], calls["dur_ns"].clip(upper=15_000)

    plain, found = only(window(LATE)), only(with_kernels(window(LATE), first, OTHER))
    assert (found.straggler, found.cause) == ("TP2", "host_late")
    for rank, before in zip(found.ranks, plain.ranks, strict=True):
        if rank.rank != "TP2":
            assert rank.wait_ns == pytest.approx(before.wait_ns - 299 * 15_000, rel=0.01)
    late, before = found.ranks[2].late_ns, plain.ranks[2].late_ns
    assert late == pytest.approx(before - 299 * 15_000, rel=0.01)


def test_a_kernel_that_waits_for_the_collective_hides_nothing() -> None:
    """The next kernel of the stream is launched early: it runs, but it only waits."""

    def early(calls: pd.DataFrame) -> tuple[pd.Series, pd.Series]:
        return calls["start_ns"] + 1_000, calls["dur_ns"]

    found = only(with_kernels(window(LATE), early, 7))
    assert found.straggler == "TP2"
    assert found.overlapped == 0.0


def test_one_rank_that_computes_meanwhile_does_not_hide_the_loss_of_the_others() -> None:
    def of_one(calls: pd.DataFrame) -> tuple[pd.Series, pd.Series]:
        return calls["start_ns"], calls["dur_ns"].where(calls["rank"] == "TP0", 0)

    found = only(with_kernels(window(LATE), of_one, OTHER))
    assert found.straggler == "TP2"
    assert found.ranks[0].wait_ns == 0
    assert found.ranks[1].wait_ns > 0


@pytest.mark.parametrize("seed", range(5))
def test_computing_is_counted_as_by_each_nanosecond(seed: int) -> None:
    rng = np.random.default_rng(seed)
    size = 30
    start, dur = rng.integers(0, 900, size), rng.integers(0, 80, size)
    stream = rng.choice([7, 9, 11], size)
    ranks = rng.choice(["TP0", "TP1"], size)
    kind = rng.choice(["gemm", "memory"], size)
    rows = [
        (str(r), "k", str(c), "decode", 0, int(s), int(a), int(d))
        for r, c, s, a, d in zip(ranks, kind, stream, start, dur, strict=True)
    ]
    table = from_rows(rows, ranks=("TP0", "TP1"))
    begin, length = rng.integers(0, 900, (12, 2)), rng.integers(0, 200, (12, 2))
    on = np.full((12, 2), 9)
    found = computing(table, ("TP0", "TP1"), on, begin, length.astype(float))
    for at, rank in np.ndindex(12, 2):
        busy = np.zeros(2_000, bool)
        for label, _, category, _, _, number, first, span in rows:
            if label == f"TP{rank}" and category == "gemm" and number != 9:
                busy[first : first + span] = True
        a, n = int(begin[at, rank]), int(length[at, rank])
        assert found[at, rank] == busy[a : a + n].sum()


def test_collectives_of_unknown_stream_hide_nothing() -> None:
    table = with_kernels(window(LATE), whole, OTHER)
    frame = table.frame.copy()
    frame.loc[frame["name"] == COLLECTIVE, "stream"] = -1
    (found,) = waits(replace(table, frame=frame))
    assert found.overlapped == 0.0
