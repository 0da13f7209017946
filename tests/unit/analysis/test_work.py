"""More work told apart from slowness, and what an output token costs."""

from __future__ import annotations

from dataclasses import replace

import pytest

from pytest_sglprof._analysis.imbalance import ImbalanceFinding, imbalance
from pytest_sglprof._analysis.straggler import stragglers
from pytest_sglprof._analysis.times import sum_times
from pytest_sglprof._analysis.work import Work
from pytest_sglprof._config.model import Threshold
from pytest_sglprof._trace.table import KernelTable
from pytest_sglprof._verdict.judge import judge
from tests.support.kernel_tables import build, slow
from tests.support.planted import Plan, window


def with_input(table: KernelTable, rank: str, **values: object) -> KernelTable:
    """The table in which one rank's steps tell other inputs; other columns are made of -1."""
    steps = table.steps.copy()
    for name, value in values.items():
        if name not in steps:
            steps[name] = -1
        steps.loc[steps["rank"] == rank, name] = value
    return replace(table, steps=steps)


def slower(by: float, **values: object) -> ImbalanceFinding:
    table = build(scale=lambda rank, category, step: by if rank == "TP1" else 1.0)
    return imbalance(with_input(table, "TP1", **values))


def test_a_planted_rank_with_more_tokens_has_more_work_and_a_slow_one_has_not() -> None:
    more = imbalance(window(Plan(ranks=4, tokens={1: 1.5})))
    assert (more.slowest, more.work) == ("TP1", Work("more_work", 1.5, "tokens"))
    assert more.other_input_steps == 100
    same = imbalance(window(Plan(ranks=4, slow={(1, ""): 1.5})))
    assert (same.slowest, same.work) == ("TP1", Work("same_work", 1.0, "tokens"))
    assert same.other_input_steps == 0


@pytest.mark.parametrize(
    ("by", "values", "work"),
    [
        (1.5, {"tokens": 12}, Work("more_work", 1.5, "tokens")),
        (1.5, {"tokens": 10}, Work("more_work", 1.25, "tokens")),  # half of it
        (1.5, {"tokens": 9}, Work("same_work", 1.125, "tokens")),
        (1.5, {"tokens": 4}, Work("same_work", 0.5, "tokens")),  # less work, and slower
        (1.5, {"tokens": -1, "batch_size": 12}, Work("more_work", 1.5, "requests")),
        (1.5, {"tokens": -1, "batch_size": -1}, Work()),
        # Equal requests, but a graph for more of them was replayed.
        (1.5, {"padded_batch": 16}, Work("more_work", 2.0, "padded batch")),
        (1.5, {"padded_batch": 8}, Work("same_work", 1.0, "tokens")),
    ],
)
def test_input_explains_a_difference_or_does_not(
    by: float, values: dict[str, object], work: Work
) -> None:
    assert slower(by, **values).work == work


def test_the_kv_cache_counts_for_attention_only() -> None:
    table = build(scale=slow("TP1", "attention", 1.5))
    table = with_input(with_input(table, "TP0", kv_tokens=1000), "TP1", kv_tokens=1600)
    assert imbalance(table, scope="attention").work == Work("more_work", 1.6, "KV tokens")
    assert imbalance(table, kernel="flash").work.word == "more_work"
    assert imbalance(table).work == Work("same_work", 1.0, "tokens")
    # Less than a bucket apart: no other graph.
    assert imbalance(table).other_input_steps == 0
    assert imbalance(with_input(table, "TP1", kv_tokens=2000)).other_input_steps == 50


def test_steps_with_other_input_stay_compared_and_the_verdict_says_more_work() -> None:
    table = build(scale=lambda rank, c, step: 1.5 if rank == "TP1" else 1.0)
    table = with_input(table, "TP1", batch_size=12, tokens=12, padded_batch=12)
    (cells,) = sum_times(table)
    assert len(cells.steps.numbers) == 50
    assert cells.inputs is not None
    assert cells.inputs.other.sum() == 50
    verdict = judge(table, [Threshold(limit=1.1)])
    assert verdict.word == "fail"
    assert "slowest in 100 % of the steps, with 1.50x the tokens: more work;" in verdict.reason
    slowed = judge(
        with_input(table, "TP1", batch_size=9, tokens=9, padded_batch=9), [Threshold(limit=1.1)]
    )
    assert ", which its 1.12x the tokens do not explain;" in slowed.reason


def test_finding_and_straggler_agree() -> None:
    table = window(Plan(ranks=4, tokens={2: 1.4}))
    (late,) = stragglers(table)
    assert (late.cause, imbalance(table).work.word) == ("more_work", "more_work")
    assert "1.41x the tokens" in late.reason  # round(64 * 1.4) = 90


def test_input_of_other_groups_does_not_matter() -> None:
    ranks = ("DP0 TP0", "DP0 TP1", "DP1 TP0", "DP1 TP1")
    table = build(ranks, scale=slow("DP0 TP1", "moe", 1.5))
    table = with_input(table, "DP1 TP0", tokens=-1, batch_size=-1)
    assert imbalance(table, scope="moe").work == Work("same_work", 1.0, "tokens")


def test_an_output_token_costs_its_share_of_the_decode_steps() -> None:
    table = build(steps=40, scale=slow("TP1", "moe", 1.5))
    found = imbalance(table)
    # 8 requests a step, one token each: 1.4 ms on the slower, 1.1 ms on the other.
    assert found.output_tokens == 320
    assert found.ns_per_token == pytest.approx(1_400_000 / 8)
    assert found.lost_ns_per_token == pytest.approx(150_000 / 8)
    assert found.lost_ns_per_step == pytest.approx(150_000)


def test_accepted_tokens_count_and_drafts_make_none() -> None:
    table = build(steps=40, scale=slow("TP1", "moe", 1.5))
    steps = table.steps.assign(accept_length=2.5, substage="VERIFY")
    steps.loc[steps["step"] % 2 == 0, "substage"] = "DRAFT"
    found = imbalance(replace(table, steps=steps))
    assert found.output_tokens == 20 * 8 * 2.5
    # The time of the drafts is part of what a token costs.
    assert found.ns_per_token == pytest.approx(40 * 1_400_000 / 400)


def test_prefill_makes_no_output_tokens_and_is_left_out() -> None:
    table = build(
        steps=40,
        stage=lambda step: "prefill" if step < 10 else "decode",
        scale=lambda rank, c, step: 9.0 if step < 10 else 1.0,
    )
    found = imbalance(table)
    assert (found.output_tokens, found.ns_per_token) == (240, pytest.approx(1_100_000 / 8))
    assert imbalance(table, stage="decode").ns_per_token == found.ns_per_token
    prefill = imbalance(table, stage="prefill")
    assert (prefill.output_tokens, prefill.ns_per_token, prefill.lost_ns_per_token) == (None,) * 3


def test_without_batch_sizes_or_steps_no_figure_per_token() -> None:
    table = build(steps=40)
    table.steps.loc[table.steps["step"] == 7, "batch_size"] = -1
    assert imbalance(table).ns_per_token is None
    assert imbalance(build(with_steps=False)).ns_per_token is None


def test_less_than_half_of_the_steps_matched_gives_no_figures() -> None:
    table = build(steps=60, scale=slow("TP1", "moe", 2.0))

    def shifted(by: int) -> KernelTable:
        frame, steps = table.frame.copy(), table.steps.copy()
        frame.loc[frame["rank"] == "TP1", "step"] += by
        steps.loc[steps["rank"] == "TP1", "step"] += by
        return replace(table, frame=frame, steps=steps)

    half = imbalance(shifted(20))
    assert (half.reason, half.steps, half.dropped_steps) == ("", 40, 40)
    few = imbalance(shifted(24))
    assert few.reason == (
        "only 36 of 84 steps are on all of TP0, TP1 in the same stage; at least half are required"
    )
    assert (few.slowdown, few.slowest, few.dropped_steps) == (None, None, 48)
    assert judge(shifted(24), [Threshold(limit=1.1)]).word == "inconclusive"


def test_each_stage_is_matched_by_itself() -> None:
    table = build(steps=80, stage=lambda step: "prefill" if step < 20 else "decode")
    steps = table.steps
    other = (steps["rank"] == "TP1") & (steps["step"] < 15)
    steps.loc[other, "stage"] = "mixed"
    assert imbalance(table).reason == ""
    assert imbalance(table, stage="decode").reason == ""
    assert imbalance(table, stage="prefill").reason == (
        "only 5 of 20 prefill steps are on all of TP0, TP1 in the same stage; at least "
        "half are required"
    )


def test_steps_excluded_on_purpose_are_matched() -> None:
    table = build(steps=80)
    marks = ["jit compilation" if step < 45 else "" for step in table.steps["step"]]
    found = imbalance(replace(table, steps=table.steps.assign(excluded=marks)))
    assert (found.reason, found.compared_steps, found.dropped_steps) == ("", 35, 45)
