"""Who is compared: ranks with the same input, or all that meet; and replicas, which never meet."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from pytest_sglprof._config.model import Threshold
from pytest_sglprof._report.ci import properties
from pytest_sglprof._report.page.figures import heat_maps
from pytest_sglprof._report.results import validate
from pytest_sglprof._report.terminal import rank_table
from pytest_sglprof._trace.table import KernelTable
from pytest_sglprof._verdict.judge import Judgement, Verdict, judge
from pytest_sglprof._verdict.repeats import judge_repeats
from tests.support.kernel_tables import build, slow
from tests.support.passes import APART, FOUR, REPLICAS, TWO, decoding, slower
from tests.support.windows import run, window

OPEN = Threshold("slowdown", 1.05)
PEERS = replace(OPEN, across="peers")
SYNC = replace(OPEN, across="sync")
SAME_WORK = "gemm, norm and quantization of equal shapes"


def the_only(verdict: Verdict) -> Judgement:
    (judgement,) = verdict.judgements
    return judgement


# Ranks that meet.


def test_ranks_with_a_peer_are_compared_with_it_unless_sync_is_asked_for() -> None:
    both_slow = decoding(
        scale=lambda rank, category: slower(rank, 1.2)(rank, category) if "DP1" in rank else 1.0
    )
    open_verdict = judge(both_slow, [OPEN])
    assert open_verdict.word == "pass"  # each is as slow as its peer
    assert [each.group for each in open_verdict.judgements] == ["DP0", "DP1"]
    assert judge(both_slow, [PEERS]).reason == open_verdict.reason
    one_slow = decoding(scale=slower("DP1 TP3", 1.2))
    peers, sync = judge(one_slow, [PEERS]), judge(one_slow, [SYNC])
    assert (peers.word, sync.word) == ("fail", "fail")
    assert peers.reason.startswith("DP1 TP3 is 1.20x slower than its peers in compute (limit 1.05)")
    assert sync.reason.startswith(
        f"DP1 TP3 is 1.20x slower than the other ranks in {SAME_WORK} (limit 1.05)"
    )
    judgement = the_only(sync)
    assert judgement.finding is not None
    assert (judgement.group, judgement.finding.across) == ("", "sync")
    assert [figure.rank for figure in judgement.finding.ranks] == list(FOUR)
    # Only gemm and norm count: 0.4 ms a pass of 1 ms of compute, 80 passes.
    slowest = judgement.finding.figure("DP1 TP3")
    assert slowest is not None
    assert slowest.busy_ns == pytest.approx(80 * 400_000 * 1.2, rel=0.01)


def test_what_only_load_makes_longer_is_no_slow_rank_across_sync() -> None:
    loaded = decoding(scale=slower("DP1 TP3", 1.6, "attention", "moe"))
    assert judge(loaded, [PEERS]).word == "fail"
    assert judge(loaded, [SYNC]).word == "pass"


def test_where_nobody_has_a_peer_sync_is_the_default() -> None:
    table = decoding(TWO, scale=slower("DP1 TP1", 1.2))
    assert judge(table, [OPEN]).word == "fail"
    assert judge(table, [OPEN]).reason == judge(table, [SYNC]).reason
    alone = judge(table, [PEERS])
    assert alone.word == "inconclusive"
    assert "DP0: DP0 TP0 is the only rank with this input" in alone.reason
    assert judge(decoding(TWO), [OPEN]).word == "pass"


def test_under_tensor_parallel_across_changes_nothing_unless_it_is_asked_for() -> None:
    table = build(scale=slow("TP1", "moe", 1.4))
    assert judge(table, [OPEN]).reason == judge(table, [PEERS]).reason
    assert "than its peers in compute" in judge(table, [OPEN]).reason
    (finding,) = (each.finding for each in judge(table, [OPEN]).judgements)
    assert finding is not None
    assert finding.across == "peers"


def test_what_waiting_costs_has_no_scope_and_says_how_many_steps_are_needed() -> None:
    lost = Threshold("sync_lost_share", 0.1)
    assert judge(decoding(TWO, passes=20), [lost]).reason.startswith("20 steps, 50 are needed")
    verdict = judge(decoding(TWO, scale=slower("DP1 TP1", 1.5)), [lost])
    assert the_only(verdict).value is not None


def test_two_thresholds_of_one_figure_are_told_apart_in_lists() -> None:
    table = decoding(scale=slower("DP1 TP3", 1.2))
    verdict = judge(table, [PEERS, SYNC])
    assert verdict.word == "fail"
    listed = verdict.reason.split("also beyond their limits: ")[1]
    assert "slowdown of compute across " in listed
    together = judge_repeats([verdict, verdict], 2)
    assert [spread.group for spread in together.spreads] == ["DP0", "DP1", ""]
    assert any(
        "slowdown of compute across sync is 1.20" in each.reason for each in together.spreads
    )


def test_a_window_that_is_judged_across_sync_is_stored_and_shown() -> None:
    table = decoding(scale=slower("DP1 TP3", 1.2))
    document = window(table, keywords={"slowdown": {"compute across sync": 1.05}})
    whole = json.loads(json.dumps(run([document])))
    (recorded,) = validate(whole).windows
    threshold = recorded.judgements[0].threshold
    assert (threshold.across, recorded.judgements[0].finding.across) == ("sync", "sync")
    lines = rank_table(recorded)
    (head,) = (line for line in lines if line.startswith("rank "))
    assert "compute across sync ms" in head
    (row,) = (line.split() for line in lines if line.startswith("DP1 TP3 ") and line[-1] == "%")
    assert float(row[4]) == pytest.approx(80 * 0.4 * 1.2, rel=0.01)
    assert any("longer on DP1 TP3 than on the others" in line for line in lines)
    assert ("across", "sync") in properties(recorded)
    assert "across" not in dict(properties(validate(as_peers()).windows[0]))
    assert len(heat_maps(recorded)) == 2
    for judgement in whole["windows"][0]["judgements"]:  # as an earlier version wrote it
        del judgement["threshold"]["across"], judgement["finding"]["across"]
    (older,) = validate(whole).windows
    assert older.judgements[0].threshold.across == ""
    assert "compute ms" in "".join(rank_table(older))


def as_peers() -> object:
    return json.loads(json.dumps(run([window(build(scale=slow("TP1", "moe", 1.4)))])))


# Replicas of plain data parallel, of one rank each.


def apart(**changed: object) -> KernelTable:
    return decoding(APART, settings=REPLICAS, **changed)  # type: ignore[arg-type]


@pytest.mark.parametrize("threshold", [OPEN, SYNC])
def test_replicas_are_compared_in_passes_of_one_batch_whenever_these_ran(
    threshold: Threshold,
) -> None:
    """Neither numbers nor times of their passes have anything in common."""
    drawn = {"first": {"DP1": 5000}, "passes": {"DP0": 120, "DP1": 90}}
    found = judge(apart(scale=slower("DP1", 1.15), **drawn), [threshold])
    assert found.word == "fail"
    assert found.reason.startswith(f"DP1 is 1.15x slower than the other ranks in {SAME_WORK}")
    finding = the_only(found).finding
    assert finding is not None
    # Nobody waited, so nothing was lost, and no pass has a slowest rank.
    assert (finding.lost_ns, finding.lost_share, finding.spike_share) == (0, None, None)
    assert [figure.slowest_share for figure in finding.ranks] == [None, None]
    assert finding.steps == 90
    assert judge(apart(**drawn), [threshold]).word == "pass"


def test_only_passes_of_the_same_graph_are_compared() -> None:
    """The batches of DP1 are twice as large in most passes: then its kernels take twice as long."""

    def batch(rank: str, number: int) -> int:
        return 16 if rank == "DP1" and number % 4 else 8

    table = apart(batch=batch, passes=280)
    large = table.frame["step"].to_numpy() % 4 > 0
    of_dp1 = (table.frame["rank"] == "DP1").to_numpy()
    table.frame.loc[large & of_dp1, "dur_ns"] *= 2
    verdict = judge(table, [OPEN])
    assert verdict.word == "pass"
    finding = the_only(verdict).finding
    assert finding is not None
    assert finding.steps == 70
    never = apart(batch=lambda rank, number: 16 if rank == "DP1" else 8)
    assert judge(never, [OPEN]).reason == (
        "replicas that never meet: DP0, DP1; 0 passes of one kind and batch on each, 20 are needed"
    )


def test_replicas_without_a_pass_or_with_too_few_are_named() -> None:
    silent = apart(passes={"DP0": 0, "DP1": 80})
    assert judge(silent, [OPEN]).reason == "replicas that never meet: DP0, DP1; DP0 had no pass"
    few = judge(apart(passes={"DP0": 19, "DP1": 80}), [OPEN], min_steps=5)
    assert few.reason == (
        "replicas that never meet: DP0, DP1; 19 passes of one kind and batch on each, 20 are needed"
    )
    assert judge(apart(passes=30), [OPEN], min_steps=5).word == "pass"
    short = judge(apart(passes=30), [OPEN]).reason
    assert short.startswith(f"30 steps with {SAME_WORK}, 50 are needed for a verdict")


def test_stages_of_pipelines_are_compared_with_their_counterparts() -> None:
    ranks = ("DP0 PP0", "DP0 PP1", "DP1 PP0", "DP1 PP1")

    def scale(rank: str, category: str) -> float:
        return (3.0 if "PP1" in rank else 1.0) * (1.2 if rank == "DP1 PP1" else 1.0)

    verdict = judge(decoding(ranks, scale=scale, settings=REPLICAS), [OPEN])
    assert [(each.group, each.verdict, each.rank) for each in verdict.judgements] == [
        ("PP0", "pass", verdict.judgements[0].rank),
        ("PP1", "fail", "DP1 PP1"),
    ]


def test_without_step_markers_there_are_no_passes() -> None:
    for ranks in (TWO, APART):
        verdict = judge(build(ranks, with_steps=False), [OPEN], min_steps=0)
        assert verdict.word == "inconclusive"
        assert verdict.reason.startswith("no step markers in the trace: ranks with different input")


def test_without_numbers_of_passes_replicas_are_still_compared() -> None:
    table = apart(scale=slower("DP1", 1.2))
    table.steps["forward_id"] = -1
    assert judge(table, [OPEN]).word == "fail"
    table = decoding(TWO)
    table.steps["forward_id"] = -1
    assert "passes cannot be aligned" in judge(table, [OPEN]).reason


@pytest.mark.parametrize("metric", ["lost_share", "spike_share", "imbalance_factor"])
def test_replicas_lose_nothing_by_waiting(metric: str) -> None:
    verdict = judge(apart(), [Threshold(metric, 1.1 if "factor" in metric else 0.1)])
    assert verdict.reason == "replicas that never meet: DP0, DP1, so none waits for another"
    assert judge(apart(), [replace(OPEN, scope="moe")]).reason.startswith("moe has other work")


def test_a_replica_without_passes_beside_one_of_several_ranks() -> None:
    ranks = ("DP0 TP0", "DP0 TP1", "DP1 TP0", "DP1 TP1")
    counts = dict(zip(ranks, (0, 0, 80, 80), strict=True))
    table = decoding(ranks, passes=counts, settings=REPLICAS)
    for threshold in (OPEN, SYNC):
        verdict = judge(table, [threshold])
        words = {each.group: (each.verdict, each.reason) for each in verdict.judgements}
        assert words["DP0"] == (
            "inconclusive",
            "DP0: replicas that never meet: DP0, DP1; DP0 had no pass",
        )
        assert words["DP1"][0] == "pass"


def test_healthy_replicas_are_hardly_ever_blamed_and_the_interval_holds_the_truth() -> None:
    """Of 100 windows whose passes resemble each other, at 5 % of noise."""
    truths, blamed, held = np.random.default_rng(7).uniform(1.0, 1.2, 100), 0, []
    for seed, truth in enumerate(truths):
        given = {"sd": 0.05, "phi": 0.6, "passes": {"DP0": 180, "DP1": 140}, "seed": seed}
        blamed += judge(apart(**given), [OPEN]).word == "fail"
        finding = the_only(judge(apart(scale=slower("DP1", truth), **given), [OPEN])).finding
        assert finding is not None
        if finding.interval is not None:
            held.append(finding.interval[0] <= truth <= finding.interval[1])
    assert blamed <= 3
    assert len(held) >= 80  # in the others the passes are worth too few independent ones
    assert held.count(False) <= 4
