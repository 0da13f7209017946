"""What waiting for each other costs, and why: on planted windows, by the truth of the model."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from benchmarks.dp_windows import table_of
from pytest_sglprof._analysis.passes import sync_passes
from pytest_sglprof._analysis.sums import Sums
from pytest_sglprof._analysis.sync import RankSplit, SyncFinding, sync_finding, sync_findings
from pytest_sglprof._config.model import Threshold
from pytest_sglprof._server.log_lines import ServerFacts, SyncWait
from pytest_sglprof._trace.read import read_window
from pytest_sglprof._verdict.judge import judge
from pytest_sglprof.standin.dp_model import CASES, DpPlan, DpWindow, make, split
from pytest_sglprof.standin.dp_traces import server_info, write_traces
from tests.support.dp_windows import planted, read_back
from tests.support.passes import TWO, decoding

PLANS = {case.name: case.make for case in CASES}


def plan(name: str, ranks: int = 4, seed: int = 2) -> DpPlan:
    return PLANS[name](ranks, seed, 0.02, 0.6)


def finding_of(window: DpWindow, *, with_counts: bool = True) -> tuple[SyncFinding, RankSplit]:
    table = table_of(window, with_counts=with_counts)
    (group,) = sync_passes(table)
    finding = sync_finding(group)
    return finding, finding.ranks[window.plan.about]


@pytest.fixture
def from_files(tmp_path: Path) -> Callable[[DpWindow], SyncFinding]:
    """The finding of a window that was written as traces and read back."""

    def read(window: DpWindow) -> SyncFinding:
        write_traces(window, tmp_path)
        (tmp_path / "server_info.json").write_text(json.dumps(server_info(window)))
        table = read_window([tmp_path])
        (group,) = sync_passes(table)
        return sync_finding(group)

    return read


@pytest.mark.parametrize("name", ["b", "h"])
def test_the_cost_is_what_was_planted(
    from_files: Callable[[DpWindow], SyncFinding], name: str
) -> None:
    """Sampling, which lies outside of the spans of passes, is no idling; nor are drafts."""
    window = make(plan(name, ranks=2))
    cost = from_files(window).cost
    wall = float((window.end[1:] - window.end[:-1]).sum())
    assert cost is not None
    assert cost.waiting == pytest.approx(1000 * window.waiting[1:].sum() / wall, abs=0.001)
    idle = 1000 * window.head_idle_beside_busy[1:].sum() / wall
    assert cost.idle == pytest.approx(idle, abs=0.0002)
    assert cost.lost == pytest.approx(cost.waiting + cost.idle + (cost.padding or 0.0))
    beyond = window.bucket - np.minimum(window.batch, window.bucket)
    if name == "b":
        assert cost.padded_rows == pytest.approx(beyond.sum() / window.bucket.sum(), abs=0.002)


@pytest.mark.parametrize("name", ["a", "b"])
def test_load_is_load(name: str) -> None:
    window = make(plan(name))
    finding, rank = finding_of(window)
    truth = split(window, window.plan.about)["attention"].load
    attention = next(each for each in rank.categories if each.category == "attention")
    assert attention.load is not None
    assert attention.load.ns / 1000 == pytest.approx(truth, rel=0.1)
    assert rank.load_share is not None
    low, high = rank.load_share.interval
    assert low > 0.8 and high - low < 0.3
    assert rank.slower_in == ()
    assert "--load-balance-method" in finding.sentence


def test_a_slow_gpu_is_slow_in_every_category() -> None:
    window = make(plan("d"))
    _, rank = finding_of(window)
    assert rank.speed_ratio == pytest.approx(1.10, abs=0.02)
    assert set(rank.slower_in) == {"gemm", "norm", "quantization"}
    truth = split(window, window.plan.about)
    planted = sum(truth[name].speed for name in ("attention", "moe", "gemm"))
    parts = [
        each.speed for each in rank.categories if each.category in ("attention", "moe", "gemm")
    ]
    assert sum(part.ns for part in parts if part) / 1000 == pytest.approx(planted, rel=0.12)


def test_load_and_speed_of_one_rank_are_both_seen() -> None:
    window = make(plan("e"))
    _, rank = finding_of(window)
    truth = split(window, window.plan.about)["attention"]
    attention = next(each for each in rank.categories if each.category == "attention")
    assert attention.load and attention.speed
    assert attention.load.ns / 1000 == pytest.approx(truth.load, rel=0.1)
    assert attention.speed.ns / 1000 == pytest.approx(truth.speed, rel=0.2)


def test_hot_experts_are_load_if_counted_and_else_not_known() -> None:
    window = make(plan("c"))
    _, counted = finding_of(window)
    moe = next(each for each in counted.categories if each.category == "moe")
    assert moe.load is not None
    assert moe.load.ns / 1000 == pytest.approx(
        split(window, window.plan.about)["moe"].load, rel=0.1
    )
    finding, rank = finding_of(window, with_counts=False)
    moe = next(each for each in rank.categories if each.category == "moe")
    assert moe.load is None and "was not recorded" in moe.reason
    assert "hot experts" in finding.sentence
    assert rank.slower_in == ()


def test_a_balance_of_experts_says_how_unequal_and_never_which_rank() -> None:
    window = make(plan("c"))
    table = table_of(window)
    told = replace(table, facts=ServerFacts(balancedness=0.62))
    (plain,), (finding,) = (sync_findings(Sums(each)) for each in (table, told))
    measure = "; SGLang's balancedness is 0.62 (mean / max over the ranks)"
    assert measure in finding.sentence and measure not in plain.sentence
    for rank, same in zip(finding.ranks, plain.ranks, strict=True):
        for each, of_plain in zip(rank.categories, same.categories, strict=True):
            more = measure if each.category == "moe" else ""
            assert (each.load, each.reason) == (of_plain.load, of_plain.reason + more)
    # Where tokens were counted, the balance says nothing new.
    counted = replace(table_of(window, with_counts=True), facts=told.facts)
    assert "balancedness" not in str(sync_findings(Sums(counted)))


def own_waits(window: DpWindow) -> tuple[SyncWait, ...]:
    """What SGLang's histogram says of the planted waits in front of all passes but the first."""
    synced = ~window.is_draft.any(axis=1)
    seconds = window.cpu_wait[synced][1:].mean(axis=0) / 1e6
    return tuple(SyncWait(dp, each, int(synced.sum()) - 1) for dp, each in enumerate(seconds))


@pytest.mark.parametrize("has_overlap", [True, False])
def test_idle_heads_stand_beside_the_waits_of_the_schedulers(
    tmp_path: Path, has_overlap: bool
) -> None:
    """The CPUs wait for each other while the GPUs run, or while none has anything to do."""
    window = planted("a", 4, has_overlap=has_overlap, cpu_us_a_request=20.0)
    table = read_back(window, tmp_path)
    table = replace(table, facts=ServerFacts(sync_waits=own_waits(window)))
    (finding,) = sync_findings(Sums(table))
    assert [head.rank for head in finding.heads] == list(table.ranks)
    idle = 1000 * window.head_idle_beside_busy[1:].mean(axis=0)
    waited = 1000 * window.cpu_wait[1:].mean(axis=0)
    for dp, head in enumerate(finding.heads):
        assert head.idle_ns == pytest.approx(idle[dp], abs=1500)
        assert head.waited_ns == pytest.approx(waited[dp])
        assert (head.passes, head.waited_passes) == (59, 59)
        assert head.disagrees == (dp != window.plan.about)  # it has most requests, so never waits
    assert "but its GPU idles beside busy peers only" in finding.sentence


def test_ranks_without_a_measure_of_their_own_have_none() -> None:
    window = make(plan("b"))
    table = table_of(window)
    table = replace(table, hosts=dict.fromkeys(table.ranks, "one"))
    assert sync_findings(Sums(table))[0].heads == ()
    told = replace(table, facts=ServerFacts(sync_waits=own_waits(window)[1:2]))
    assert [head.rank for head in sync_findings(Sums(told))[0].heads] == [table.ranks[1]]


@pytest.mark.parametrize("name", ["a", "b", "c", "g", "h"])
def test_load_blames_no_gpu(name: str) -> None:
    verdict = judge(table_of(make(plan(name))), [Threshold(limit=1.05)])
    assert verdict.word == "pass"


def test_disjoint_batches_in_the_local_regime_are_inconclusive() -> None:
    verdict = judge(table_of(make(plan("f"))), [Threshold(limit=1.05)])
    assert verdict.word == "inconclusive"
    assert "no pass has equally many rows on all ranks" in verdict.reason


def test_a_slow_gpu_fails_and_one_slow_category_does_not() -> None:
    def slow(*categories: str) -> Callable[[str, str], float]:
        return lambda rank, category: 1.2 if rank == TWO[1] and category in categories else 1.0

    failed = judge(decoding(TWO, scale=slow("gemm", "norm")), [Threshold(limit=1.05)])
    assert (failed.word, failed.deciding and failed.deciding.finding) != ("fail", None)
    assert failed.deciding is not None and failed.deciding.finding is not None
    assert failed.deciding.finding.slowest == TWO[1]
    one = judge(decoding(TWO, scale=slow("gemm")), [Threshold(limit=1.05)])
    assert one.word == "inconclusive"
    assert "slower in gemm alone" in one.reason
    asked = judge(decoding(TWO, scale=slow("gemm")), [Threshold(limit=1.05, scope="gemm")])
    assert asked.word == "fail"


def test_padding_has_a_price_where_batches_vary() -> None:
    """Two graphs by turns: rows cost what the longer one takes more."""
    table = decoding(
        TWO,
        batch=lambda rank, number: (12 if number % 2 else 6) if rank == TWO[0] else 4,
        scale=lambda rank, category: 1.0,
    )
    rows = np.where(table.frame["step"] % 2 == 1, 16, 8)
    static = table.frame["category"].isin(["gemm", "norm"])
    longer = np.where(static, table.frame["dur_ns"] + 5_000 * rows, table.frame["dur_ns"])
    table.frame["dur_ns"] = longer.astype(np.int64)
    (group,) = sync_passes(table)
    cost = sync_finding(group).cost
    assert cost is not None and cost.padding is not None
    beyond = (16 - 12) + (16 - 4) + (8 - 6) + (8 - 4)
    assert cost.padded_rows == pytest.approx(beyond / (2 * 16 + 2 * 8), abs=0.01)
    planted = 2 * 5_000 * beyond / 2 / 2  # gemm and norm, a pass and rank
    assert cost.padding * cost.wall_ns / (79 * 2) == pytest.approx(planted, rel=0.1)
