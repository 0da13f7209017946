"""Ranks with requests of their own, on the stand-in under DP attention: who is slow is found with
nothing configured but the limit."""

from __future__ import annotations

import pytest

from pytest_sglprof._report.results import validate
from tests.integration.plugin.conftest import OutcomeOf, RunProjects

CONFIG = """
[server]
kind = "standin"
args = ["--tp", "2", "--dp", "2", "--enable-dp-attention"]
standin_args = ["--step-ms", "4", "--layers", "1"]

[servers.slow]
kind = "standin"
args = ["--tp", "2", "--dp", "2", "--enable-dp-attention"]
standin_args = ["--step-ms", "4", "--layers", "1", "--slow", "rank=1,category=compute,factor=1.4"]

[servers.replicas]
kind = "standin"
args = ["--dp", "2"]
standin_args = ["--step-ms", "4", "--layers", "1", "--slow", "rank=1,category=compute,factor=1.4"]

[servers.measured]
kind = "standin"
args = ["--tp", "2", "--dp", "2", "--enable-dp-attention", "--enable-metrics"]
standin_args = ["--step-ms", "4", "--layers", "1"]
env = { SGLANG_ENABLE_METRICS_DP_ATTENTION = "1" }

[[threshold]]
limit = 1.10
"""

TESTS = {
    "healthy": """
@pytest.mark.profile_window(whole_body=True)
def test_healthy(load):
    load(400)

@pytest.mark.profile_window(whole_body=True, slowdown=1.2, across="peers")
def test_peers(load):
    load(100)
""",
    "slow": """
@pytest.mark.sglang_server("slow")
@pytest.mark.profile_window(whole_body=True)
def test_slow(load):
    load(400)

@pytest.mark.sglang_server("slow")
def test_by_hand(load, profile_window):
    with profile_window("w", slowdown=1.6, across="sync") as window:
        load(400)
    assert window.check("slowdown", 1.7, across="sync") == pytest.approx(1.4, rel=0.05)
    with pytest.raises(Exception, match="did you mean sync"):
        window.check("slowdown", 1.7, across="snyc")
""",
    "measured": """
import time

@pytest.mark.sglang_server("measured")
@pytest.mark.profile_window(whole_body=True)
def test_own_measures(load, sglang_server):
    load(200)
    line = time.strftime("[%Y-%m-%d %H:%M:%S TP0 EP0] [Expert Balancedness] forward_pass_id=12 ")
    with sglang_server.log.path.open("a") as log:
        log.write(line + "current_pass_balancedness=0.620 last_10_average_balancedness=0.3\\n")
""",
    "replicas": """
@pytest.mark.sglang_server("replicas")
@pytest.mark.profile_window(whole_body=True)
def test_replicas(load):
    load(400)

@pytest.mark.sglang_server("replicas")
@pytest.mark.profile_window(whole_body=True)
def test_one_has_nothing_to_do(drive):
    drive()
""",
}


@pytest.fixture(scope="module")
def outcome_of(run_projects: RunProjects) -> OutcomeOf:
    return run_projects(TESTS, "-p", "no:cacheprovider", config=CONFIG)


def test_a_slow_rank_is_found_across_sync(outcome_of: OutcomeOf) -> None:
    slow = outcome_of("slow")
    assert slow.word("test_slow") == "FAILED"
    assert "in gemm, norm and quantization of equal shapes (limit 1.10)" in slow.section(
        "test_slow"
    )
    (window,) = (each for each in validate(slow.results).windows if "test_slow" in each.nodeid)
    (judgement,) = window.judgements
    assert judgement.finding is not None
    assert (judgement.threshold.across, judgement.finding.across) == ("", "sync")
    assert judgement.rank == "DP1 TP1"
    assert judgement.value == pytest.approx(1.4, rel=0.05)
    assert judgement.finding.steps is not None
    assert judgement.finding.steps >= 200
    assert dict(slow.properties("test_slow"))["across"] == "sync"


def test_by_hand_the_ranks_that_are_compared_can_be_chosen(outcome_of: OutcomeOf) -> None:
    slow = outcome_of("slow")
    assert slow.word("test_by_hand") == "PASSED"
    thresholds = [each["threshold"] for each in slow.windows("test_by_hand")[0]["judgements"]]
    assert [(each["limit"], each["across"]) for each in thresholds] == [
        (1.6, "sync"),
        (1.7, "sync"),
    ]


def test_healthy_ranks_pass_and_have_no_peers(outcome_of: OutcomeOf) -> None:
    healthy = outcome_of("healthy")
    assert healthy.word("test_healthy") == "PASSED"
    assert "at most 1." in healthy.test("test_healthy")["reason"]
    assert healthy.word("test_peers") == "FAILED"
    assert healthy.test("test_peers")["verdict"] == "inconclusive"
    assert "has no peer to compare with" in healthy.test("test_peers")["reason"]


def test_replicas_are_compared_although_they_never_meet(outcome_of: OutcomeOf) -> None:
    replicas = outcome_of("replicas")
    assert replicas.word("test_replicas") == "FAILED"
    (reason,) = (each["reason"] for each in replicas.windows("test_replicas"))
    assert reason.startswith("DP1 TP0 is 1.")
    assert "the other ranks in gemm, norm and quantization of equal shapes (limit 1.10)" in reason
    idle = replicas.test("test_one_has_nothing_to_do")
    assert idle["verdict"] == "inconclusive"
    assert "replicas that never meet: DP0, DP1; DP" in idle["reason"]
    assert idle["reason"].endswith(" had no pass")


def test_what_the_server_measures_of_itself_stands_beside_the_trace(outcome_of: OutcomeOf) -> None:
    """The window asks for `/metrics` before and after, since SGLang says that it has them."""
    (window,) = validate(outcome_of("measured").results).windows
    assert window.syncs is not None
    (sync,) = window.syncs
    assert [head.rank for head in sync.heads] == list(window.ranks)
    for head in sync.heads:
        assert head.passes > 100
        assert 0.5 * head.passes < head.waited_passes < 2 * head.passes
        # 8 µs for each request that the busiest rank has more; the load goes to both in turn.
        assert 0 <= head.waited_ns <= 8e3
        assert head.long_waits == 0
    moe = [
        each
        for rank in sync.ranks
        for each in rank.categories
        # Ranks that start apart prefill beside decodes for a few passes, which have no law.
        if each.category == "moe" and each.kind != "prefill beside decode"
    ]
    assert len(moe) >= len(sync.ranks)
    for each in moe:
        assert each.load is None
        assert each.reason.endswith("SGLang's balancedness is 0.62 (mean / max over the ranks)")
    (plain,) = (
        each for each in validate(outcome_of("slow").results).windows if "by_hand" in each.nodeid
    )
    assert plain.syncs is not None
    assert plain.syncs[0].heads == ()
