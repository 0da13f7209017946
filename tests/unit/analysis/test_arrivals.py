"""When a rank arrives at a collective that was launched before the rank was done."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from pytest_sglprof._analysis.collectives import waits
from pytest_sglprof._analysis.straggler import StragglerFinding, stragglers
from pytest_sglprof._trace.table import KernelTable
from tests.support.kernel_tables import from_rows
from tests.support.planted import Plan, window

FOUR = Plan(ranks=4, jitter=0.005)


def only(table: KernelTable) -> StragglerFinding:
    (found,) = stragglers(table)
    return found


@pytest.mark.parametrize("early", [{2: 40_000}, {0: 40_000, 1: 40_000, 2: 90_000}])
def test_a_collective_that_is_launched_early_blames_nobody(early: dict[int, int]) -> None:
    """By their starts the others would be late, by a tenth of the work."""
    found = only(window(replace(FOUR, early_meeting=early)))
    assert (found.straggler, found.verdict, found.method) == (None, "pass", "arrival")
    assert found.transfer_ns == pytest.approx(20_000, rel=0.05)
    plain = only(window(FOUR))
    waited = [rank.wait_ns for rank in plain.ranks]
    assert [rank.wait_ns for rank in found.ranks] == pytest.approx(waited, rel=1e-3)


def test_the_rank_that_is_late_is_found_though_it_launches_early() -> None:
    plan = replace(FOUR, slow={(2, ""): 1.1}, early_meeting={2: 60_000})
    found = only(window(plan))
    assert (found.straggler, found.cause) == ("TP2", "kernel")
    on_time = only(window(replace(plan, early_meeting={})))
    assert found.lateness == pytest.approx(on_time.lateness, rel=1e-4)


def test_only_what_runs_before_on_the_same_stream_of_the_rank_counts() -> None:
    """(rank, name, category, stage, step, stream, start, dur); TP0 waits on stream 7."""
    rows = [
        ("TP0", "gemm", "gemm", "decode", 0, 7, 0, 100),
        ("TP0", "all_reduce", "communication", "decode", 0, 7, 60, 90),
        ("TP0", "copy", "memory", "decode", 0, 9, 0, 500),
        ("TP1", "gemm", "gemm", "decode", 0, 7, 0, 40),
        ("TP1", "all_reduce", "communication", "decode", 0, 7, 60, 90),
        # It contains the call: the rank is done only when it ends.
        ("TP0", "gemm", "gemm", "decode", 0, 7, 200, 100),
        ("TP0", "all_reduce", "communication", "decode", 0, 7, 210, 50),
        ("TP1", "all_reduce", "communication", "decode", 0, 7, 210, 50),
    ]
    (found,) = waits(from_rows(rows))
    assert found.start.tolist() == [[100, 60], [260, 210]]
    assert found.end.tolist() == [[150, 150], [260, 260]]
    assert found.transfer.tolist() == [50, 0]
    unknown = [(*row[:5], -1, *row[6:]) for row in rows]
    (found,) = waits(from_rows(unknown))
    assert found.start.tolist() == [[60, 60], [210, 210]]


def test_ranks_that_do_not_wait_are_not_taken_for_waiting() -> None:
    """Overlap of the kernels before a collective changes no arrival."""
    one = waits(window(FOUR))[0]
    other = waits(window(replace(FOUR, early={1: 30_000})))[0]
    assert np.array_equal(one.start, other.start)
