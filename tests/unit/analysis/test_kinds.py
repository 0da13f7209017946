"""SendRecv is what transfers between two ranks and all-to-alls are both made of."""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median

import numpy as np
import pandas as pd
import pytest

from pytest_sglprof._analysis.collectives import waits
from pytest_sglprof._analysis.straggler import StragglerFinding, stragglers
from pytest_sglprof._analysis.times import sum_times
from pytest_sglprof._report.series import lanes
from pytest_sglprof._trace.read import read_window
from pytest_sglprof._trace.table import BOTH_WAYS, KernelTable
from tests.support.planted import P2P, Plan, window

LATE = Plan(ranks=4, all_to_all=True, slow={(1, ""): 1.1})
PAIR = replace(LATE, ranks=2)


def renamed(table: KernelTable, labels: Sequence[str]) -> KernelTable:
    """The table with other labels for its ranks."""

    def with_labels(frame: pd.DataFrame) -> pd.DataFrame:
        codes = frame["rank"].cat.codes
        return frame.assign(rank=pd.Categorical.from_codes(codes, list(labels), ordered=True))

    frame, steps = with_labels(table.frame), with_labels(table.steps)
    return replace(table, frame=frame, steps=steps, ranks=tuple(labels))


def asked_for(table: KernelTable, operation: str, size: int = -1) -> KernelTable:
    """The table of which torch.distributed recorded what each SendRecv is."""
    rows = table.frame.index[table.frame["name"] == P2P]
    told = {
        "process_group": "0",
        "sequence": -1,
        "operation": pd.Categorical([operation] * len(rows)),
        "group_size": size,
    }
    return replace(table, collectives=pd.DataFrame(told, index=rows))


def only(table: KernelTable) -> StragglerFinding:
    (found,) = stragglers(table)
    return found


@pytest.mark.parametrize("plan", [PAIR, LATE])
def test_an_all_to_all_job_gets_a_verdict(plan: Plan) -> None:
    found = only(window(plan))
    assert (found.straggler, found.verdict, found.method) == ("TP1", "fail", "arrival")
    assert found.kinds == {"all_to_all": 300 * plan.ranks}
    balanced = only(window(replace(plan, slow={}, jitter=0.005)))
    assert (balanced.straggler, balanced.verdict) == (None, "pass")


@pytest.mark.parametrize("ranks", [2, 4])
def test_a_transfer_of_which_the_sender_does_not_wait_blames_nobody(ranks: int) -> None:
    for slow in (1.0, 1.1):  # a receiver
        found = only(window(Plan(ranks=ranks, p2p_only=True, slow={(1, ""): slow})))
        assert (found.straggler, found.verdict) == (None, "inconclusive")
        assert "only p2p communication" in found.reason


def test_a_rank_that_has_fewer_calls_than_its_peers_does_not_meet_them() -> None:
    table = window(LATE)
    is_call = (table.frame["name"] == P2P) & (table.frame["rank"] == "TP3")
    gone = table.frame.index[is_call][::3]
    found = only(replace(table, frame=table.frame.drop(index=gone)))
    assert (found.straggler, set(found.kinds or ())) == (None, {"p2p"})


STAGES = ("PP0 TP0", "PP0 TP1", "PP1 TP0", "PP1 TP1")
EXPERTS = ("TP0 EP0", "TP1 EP1", "TP2 EP2", "TP3 EP3")
BOTH = ("PP0 TP0 EP0", "PP0 TP1 EP1", "PP1 TP0 EP0", "PP1 TP1 EP1")


@pytest.mark.parametrize(
    ("labels", "kind", "reason"),
    [
        (STAGES, "p2p", "only p2p communication"),
        (EXPERTS, "all_to_all", "TP1 EP1 arrives"),
        (BOTH, "unknown", "it is not known whether"),
    ],
)
def test_the_sizes_of_the_server_say_what_sendrecv_is(
    labels: Sequence[str], kind: str, reason: str
) -> None:
    for found in stragglers(renamed(window(LATE), labels)):
        assert set(found.kinds or ()) == {kind}
        assert reason in found.reason
        assert (found.straggler is None) == (kind != "all_to_all")


def test_two_ranks_of_unknown_place_may_be_two_stages() -> None:
    """Both ends of a transfer end together, too, and the receiver always waits."""
    table = renamed(window(PAIR), ("GPU0", "GPU1"))
    found = only(table)
    assert (found.straggler, found.kinds) == (None, {"unknown": 600})
    assert "it is not known whether the ranks' SendRecv is p2p or all-to-all" in found.reason
    both = only(asked_for(table, BOTH_WAYS))
    assert (both.straggler, both.kinds) == ("GPU1", {"all_to_all": 600})
    # Four that meet can be no chain of stages.
    four = only(renamed(window(LATE), ("GPU0", "GPU1", "GPU2", "GPU3")))
    assert four.straggler == "GPU1"


def test_few_calls_say_nothing() -> None:
    found = only(window(replace(PAIR, steps=6)))
    assert found.kinds == {"unknown": 36}
    assert only(window(replace(PAIR, steps=7))).kinds == {"all_to_all": 42}


@pytest.mark.parametrize(
    ("operation", "labels", "kind", "straggler"),
    [
        ("send", ("TP0", "TP1"), "p2p", None),
        ("recv", ("TP0", "TP1"), "p2p", None),
        ("all_to_all", ("GPU0", "GPU1"), "all_to_all", "GPU1"),
        ("all_to_allv", ("TP0", "TP1"), "all_to_all", "TP1"),
        ("_allgather_base", ("GPU0", "GPU1"), "collective", "GPU1"),
        ("broadcast", ("TP0", "TP1"), "collective", None),
        ("coalesced", ("GPU0", "GPU1"), "unknown", None),
        ("", ("TP0", "TP1"), "all_to_all", "TP1"),
    ],
)
def test_what_torch_recorded_of_a_call_comes_first(
    operation: str, labels: Sequence[str], kind: str, straggler: str | None
) -> None:
    found = only(asked_for(renamed(window(PAIR), labels), operation))
    assert (set(found.kinds or ()), found.straggler) == ({kind}, straggler)


def test_an_all_to_all_between_stages_is_one_where_torch_says_so() -> None:
    first, second = stragglers(asked_for(renamed(window(LATE), STAGES), "all_to_all"))
    assert (first.straggler, second.straggler) == ("PP0 TP1", None)


def test_a_group_of_fewer_ranks_is_no_meeting_of_all() -> None:
    table = asked_for(window(LATE), "_allgather_base", 2)
    assert only(table).straggler is None
    assert only(asked_for(window(LATE), "_allgather_base", 4)).straggler == "TP1"


def test_an_all_to_all_whose_bytes_differ_blames_nobody() -> None:
    """Ranks that receive more end later: their ends are no meeting."""
    table = asked_for(window(PAIR), "all_to_allv")
    frame = table.frame.copy()
    calls = frame["name"] == P2P
    more = np.random.default_rng(5).integers(0, 60_000, int(calls.sum()))
    frame.loc[calls, "dur_ns"] += more
    found = only(replace(table, frame=frame))
    assert (found.straggler, found.verdict) == (None, "inconclusive")
    assert "only all_to_all communication" in found.reason


@pytest.mark.parametrize("name", ["before", "after"])
def test_a_real_report_of_an_all_to_all_is_judged(shared_data: Path, name: str) -> None:
    """Two GPUs that exchange: NCCL's own ranges say that each call sends and receives."""
    path = shared_data / "nsys" / f"mfu_2gpu_{name}.sqlite"
    with sqlite3.connect(path) as base:
        spans = base.execute(
            "SELECT deviceId, start, end FROM CUPTI_ACTIVITY_KIND_KERNEL JOIN StringIds "
            "ON id = shortName WHERE value = 'ncclDevKernel_SendRecv' ORDER BY start"
        ).fetchall()
    calls = [[(a, b) for device, a, b in spans if device == gpu] for gpu in (0, 1)]
    table = read_window(path)
    (found,), (waited,) = stragglers(table, min_steps=20), waits(table)
    pairs = list(zip(*calls, strict=True))
    assert (found.collectives, found.kinds) == (len(pairs), {"all_to_all": 2 * len(pairs)})
    assert waited.transfer.tolist() == [min(b - a for a, b in pair) for pair in pairs]
    # The clocks are one clock here, but for what the ends of the exchanges differ by.
    apart = median(abs(pair[0][1] - pair[1][1]) for pair in pairs)
    for at in (0, 1):
        plain = sum(max(p[0][0], p[1][0]) - p[at][0] for p in pairs[1:])
        assert found.ranks[at].wait_ns == pytest.approx(plain, abs=2 * apart * len(pairs))
    assert found.lateness is not None
    assert "which may be chance" in found.reason


def test_the_page_joins_the_calls_of_an_all_to_all_in_each_step_that_it_draws() -> None:
    """One step has three calls, of which nothing tells what they are; the window has 300."""
    table = window(LATE)
    for step in lanes(table, sum_times(table)).steps:
        joined = [match for lane in step.lanes for match in lane.match if match >= 0]
        assert sorted(joined) == [0] * 4 + [1] * 4 + [2] * 4
