"""All-reduces with a norm in one kernel: ranks arrive at them; how long they take is unknown."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest

from pytest_sglprof._analysis.straggler import StragglerFinding, stragglers
from pytest_sglprof._trace.categories import is_meeting
from pytest_sglprof._trace.table import KernelTable
from tests.support.planted import COLLECTIVE, Plan, window

FUSED = "flashinfer::trtllm_allreduce_fusion::allreduce_fusion_kernel_oneshot_lamport"
LATE = Plan(ranks=4, layers=4, slow={(2, ""): 1.1})
ONE_HOST = {f"TP{rank}": "node1" for rank in range(4)}


def fused(table: KernelTable, layers: Sequence[int], name: str = FUSED) -> KernelTable:
    """The table in which the collectives of these layers are fused."""
    frame = table.frame.copy()
    calls = frame["name"] == COLLECTIVE
    layer = frame[calls].groupby(["rank", "step"], observed=True).cumcount()
    rows = layer.index[layer.isin(list(layers))]
    for column in ("name", "full_name"):
        frame[column] = frame[column].astype(object)
        frame.loc[rows, column] = name
        frame[column] = frame[column].astype("category")
    return replace(table, frame=frame)


def only(table: KernelTable) -> StragglerFinding:
    (found,) = stragglers(table)
    return found


def test_between_other_collectives_fused_ones_are_meetings_too() -> None:
    plain, found = only(window(LATE)), only(fused(window(LATE), [1, 3]))
    assert (found.straggler, found.cause, found.method) == ("TP2", "kernel", "arrival")
    assert found.kinds == {"collective": 800, "fused": 800}
    assert found.collectives == plain.collectives
    waited = [rank.wait_ns for rank in plain.ranks]
    assert [rank.wait_ns for rank in found.ranks] == pytest.approx(waited, rel=1e-2)
    assert found.transfer_ns == pytest.approx(20_000, rel=0.05)


def test_the_clocks_are_those_of_the_other_collectives() -> None:
    plan = replace(LATE, offset={1: 3_000_000}, drift={3: 2e-5})
    table = fused(window(plan), [0, 3])
    frame = table.frame.copy()
    # TP1 does its norm for 100 µs longer: no clock is late by that.
    more = (frame["name"] == FUSED) & (frame["rank"] == "TP1")
    frame.loc[more, "dur_ns"] += 100_000
    found = only(replace(table, frame=frame))
    assert found.straggler == "TP2"
    assert found.clocks is not None
    apart = found.clocks[1].offset_ns - found.clocks[0].offset_ns
    assert apart == pytest.approx(3_000_000, abs=100)
    low, high = found.clocks[1].offset_interval
    assert high - low < 200


def test_alone_they_need_the_clock_of_one_host() -> None:
    every = fused(window(replace(LATE, slow={(2, ""): 1.5})), range(4))
    unknown = only(every)
    assert (unknown.straggler, unknown.verdict) == (None, "inconclusive")
    assert "clocks that are not known well enough" in unknown.reason
    apart = only(replace(every, hosts=ONE_HOST | {"TP3": "node2"}))
    assert apart.straggler is None
    found = only(replace(every, hosts=ONE_HOST))
    assert (found.straggler, found.cause, found.transfer_ns) == ("TP2", "kernel", None)


@pytest.mark.parametrize(
    ("name", "meets"),
    [
        (FUSED, True),
        ("fused_allreduce_rmsnorm_kernel", True),
        ("fused_all_gather_matmul_kernel", False),
        ("gemm_allreduce_kernel", False),
        ("moefinalize_allreduce_fusion_kernel_oneshot_lamport", False),
        ("ncclDevKernel_AllReduce_Sum_bf16_RING_LL", True),
        ("ncclDevKernel_SendRecv", False),
        ("ncclDevKernel_Broadcast_RING_LL", False),
    ],
)
def test_ranks_arrive_at_a_sum_and_not_in_the_middle_of_a_product(name: str, meets: bool) -> None:
    assert is_meeting(name) is meets
    if name.startswith("nccl"):
        return
    found = only(replace(fused(window(LATE), [1, 3], name), hosts=ONE_HOST))
    assert found.collectives == (1600 // 4 if meets else 800 // 4)
