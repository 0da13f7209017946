"""`idle_share` and `pass_wall`: limits on whole steps, judged on each rank without peers."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pytest_sglprof._config.load import load_config
from pytest_sglprof._config.model import Threshold
from pytest_sglprof._config.thresholds import (
    check_limit,
    check_threshold,
    listed_thresholds,
    thresholds_from_keywords,
)
from pytest_sglprof._errors import SettingsError
from pytest_sglprof._report.ci import kernel_table, properties
from pytest_sglprof._report.page.lead import certainty, headline
from pytest_sglprof._report.results import validate
from pytest_sglprof._report.terminal import rank_table
from pytest_sglprof._trace.table import KernelTable, Step
from pytest_sglprof._verdict.judge import Verdict, judge
from pytest_sglprof._verdict.repeats import judge_repeats, judge_until_certain
from tests.support.kernel_tables import build, from_rows
from tests.support.windows import run, window

MS = 1_000_000
IDLE = Threshold("idle_share", 0.2, stage="decode")
WALL = Threshold("pass_wall", 5.0, stage="decode")


def served(
    ranks: Sequence[str] = ("TP0",),
    *,
    launching: int = 2 * MS,
    between: int = 1 * MS,
    steps: int = 60,
    substage: str = "DECODE",
    seed: int = 0,
    noise: float = 0.02,
    **more: float | str,
) -> KernelTable:
    """Steps of two kernels of 3 ms and 4 ms, a gap of `launching` ns between them."""
    rows, spans = [], []
    for rank in ranks:
        lengths = 1 + np.random.default_rng(seed).normal(0, noise, (steps, 2))
        at = 0
        for number in range(steps):
            begin = at
            for dur, gap, factor in zip((3, 4), (launching, between), lengths[number], strict=True):
                row = (rank, "gemm", "gemm", "decode", number, 7, at, dur * MS)
                rows.append(row)
                at += dur * MS + round(gap * factor)
            step = Step(number, "decode", begin, at, 8, 8, substage=substage)
            spans.append((rank, step.changed(**more)))
    return from_rows(rows, steps=spans, ranks=ranks)


def the_only(verdict: Verdict) -> str:
    (judgement,) = verdict.judgements
    assert judgement.finding is None
    assert (judgement.verdict, judgement.reason) == (verdict.word, verdict.reason)
    return verdict.word


def test_one_rank_alone_is_judged_and_the_idle_parts_are_named() -> None:
    verdict = judge(served(), [IDLE])
    assert the_only(verdict) == "fail"
    assert verdict.reason == (
        "TP0's GPU is idle for 29.90 % of a decode step (limit 20.00 %): 20 % while kernels are "
        "launched, 10 % between steps, over 60 steps"
    )
    (judgement,) = verdict.judgements
    assert (judgement.rank, judgement.group) == ("TP0", "")
    assert judgement.value == pytest.approx((60 * 2 + 59 * 1) / (60 * 9 + 59 * 1), rel=0.01)


def test_a_busy_gpu_passes_and_one_near_the_limit_is_inconclusive() -> None:
    busy = judge(served(launching=500_000, between=500_000), [IDLE])
    assert the_only(busy) == "pass"
    assert busy.reason.endswith(" % in this window")
    near = judge(served(noise=0.9), [replace(IDLE, limit=0.29)])
    assert the_only(near) == "inconclusive"
    assert "steps would settle it" in near.reason


def test_the_wall_of_a_step_has_a_limit_in_ms_and_names_its_parts() -> None:
    verdict = judge(served(), [WALL])
    assert the_only(verdict) == "fail"
    assert verdict.reason == (
        "a decode step takes 9.99 ms on TP0 (limit 5.00 ms): 70 % compute, 20 % while kernels are "
        "launched, 10 % between steps over 60 steps"
    )
    assert the_only(judge(served(), [replace(WALL, limit=10.0)])) == "pass"
    assert the_only(judge(served(), [replace(WALL, limit=0.0)])) == "fail"


def test_the_rank_with_the_most_idle_gpu_is_named() -> None:
    slow = served(("TP1",), launching=3 * MS)
    both = from_rows(
        [
            tuple(row)
            for table in (served(("TP0",)), slow)
            for row in table.frame[
                ["rank", "name", "category", "stage", "step", "stream", "start_ns", "dur_ns"]
            ].itertuples(index=False)
        ],
        steps=[
            (rank, Step(number, "decode", number, number + 1))
            for rank in ("TP0", "TP1")
            for number in range(60)
        ],
        ranks=("TP0", "TP1"),
    )
    verdict = judge(both, [IDLE, WALL])
    assert [each.rank for each in verdict.judgements] == ["TP1", "TP1"]
    assert verdict.judgements[0].estimate is not None
    assert verdict.judgements[0].estimate.comparisons == 2
    assert "also beyond their limits: " in verdict.reason
    assert "idle_share of decode steps 36." in verdict.reason


def test_too_few_steps_no_steps_and_other_stages_are_inconclusive() -> None:
    few = judge(served(steps=10), [IDLE])
    assert few.reason == "10 decode steps on the rank with fewest, 50 are needed for a verdict"
    captured = judge(served(excluded="graph capture", substage="VERIFY"), [IDLE])
    assert captured.reason == "no decode step with GPU activity counts"
    none = judge(build(with_steps=False), [Threshold("idle_share", 0.2)])
    assert "no step markers in the trace" in none.reason
    other = judge(served(), [replace(IDLE, stage="prefill")])
    assert other.reason == "no prefill step at all"
    assert {few.word, captured.word, none.word, other.word} == {"inconclusive"}


def test_a_window_without_steps_is_judged_with_consent() -> None:
    verdict = judge(build(with_steps=False), [Threshold("idle_share", 0.2)], min_steps=0)
    assert verdict.word == "fail"
    assert verdict.reason.startswith("TP0's GPU is idle for 34.54 % of the window (limit 20.00 %)")
    wall = judge(build(with_steps=False), [Threshold("pass_wall", 5.0)], min_steps=0)
    assert wall.reason == "pass_wall of steps has no figure in this window"


def test_a_server_on_cpu_is_inconclusive_with_the_reason() -> None:
    verdict = judge(replace(served(), source="cpu_op"), [IDLE, WALL])
    assert verdict.word == "inconclusive"
    assert "activities are CPU operators, which are no intervals on a GPU" in verdict.reason


def test_a_doubt_about_the_window_comes_first() -> None:
    verdict = judge(served(), [IDLE], missing_ranks=["TP1"])
    assert (verdict.word, verdict.reason) == ("inconclusive", "1 rank missing: TP1")
    assert verdict.judgements[0].reason == verdict.reason


def test_an_iteration_of_speculative_decoding_is_called_so() -> None:
    table = served(substage="VERIFY", accept_length=2.5)
    verdict = judge(table, [WALL])
    assert verdict.reason.startswith("a decode iteration takes 9.99 ms on TP0")
    assert verdict.reason.endswith("10 % between iterations over 60 iterations")
    text = "\n".join(rank_table(validate(documented(table, verdict)).windows[0]))
    assert "what a mean VERIFY iteration is made of, ms" in text
    assert "TP0: 3.99 ms an accepted token of a request, 2.50 of which each iteration has" in text


def documented(table: KernelTable, verdict: Verdict) -> dict[str, Any]:
    """The results of a run with this window, as they are read again."""
    limits = {each.threshold.metric: each.threshold.limit for each in verdict.judgements}
    whole: dict[str, Any] = json.loads(json.dumps(run([window(table, keywords=limits)])))
    return whole


def test_results_terminal_junit_and_page_know_them() -> None:
    table = served()
    (recorded,) = validate(documented(table, judge(table, [WALL]))).windows
    judgement = next(each for each in recorded.judgements if each.budget is not None)
    assert judgement.finding is None
    assert judgement.budget is not None
    assert judgement.budget.ranks[0].wall_ns == 60 * 7 * MS + judgement.budget.ranks[0].idle_ns
    assert recorded.budgets is not None
    assert [(each.stage, each.steps) for each in recorded.budgets] == [("decode", 60)]
    assert recorded.deciding == judgement
    text = "\n".join(rank_table(recorded))
    assert "rank  steps  wall ms  compute  launching  between" in text
    named = dict(properties(recorded))
    assert (named["slowest_rank"], named["metric"]) == ("TP0", "pass_wall")
    assert "scope" not in named
    assert headline(judgement) == ("9.99 ms", "pass wall of steps, limit 5.00 ms")
    assert [*certainty(judgement)] == ["may be 9.93 ms to 10.04 ms"]
    assert kernel_table(recorded) == []


def test_results_from_before_have_no_budgets() -> None:
    table = served()
    document = documented(table, judge(table, [WALL]))
    for recorded in document["windows"]:
        del recorded["budgets"]
        for judgement in recorded["judgements"]:
            del judgement["budget"]
    (read,) = validate(document).windows
    assert read.budgets is None
    assert rank_table(read)


def test_windows_that_are_opened_several_times() -> None:
    fast = [judge(served(seed=seed), [replace(WALL, limit=9.0)]) for seed in range(3)]
    together = judge_repeats(fast, 3)
    assert together.word == "fail"
    assert together.reason.startswith("pass_wall of decode steps is 9.99 ms in the median of 3")
    until = judge_until_certain(fast)
    assert until.word == "fail"
    assert "pass_wall of decode steps is 9.98 ms over 3 windows (limit 9.00 ms)" in until.reason


# Thresholds.


def test_a_number_or_stages_limit_them() -> None:
    found = thresholds_from_keywords(
        {"idle_share": {"decode": 0.2, "prefill": 0.1}, "pass_wall": 20}, "marker"
    )
    assert [(t.metric, t.scope, t.stage, t.limit) for t in found] == [
        ("idle_share", "compute", "decode", 0.2),
        ("idle_share", "compute", "prefill", 0.1),
        ("pass_wall", "compute", "", 20.0),
    ]
    assert found[0].describe() == "idle_share of steps in decode <= 0.2"
    assert listed_thresholds([Threshold("pass_wall", 20.0)], "marker", ())[0].limit == 20.0


@pytest.mark.parametrize("subject", [{"scope": "moe"}, {"scope": "all"}, {"kernel": "flash"}])
def test_they_have_no_scope_and_no_kernel(subject: dict[str, str], tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="idle_share is of whole steps"):
        check_threshold(Threshold("idle_share", 0.2, **subject), ("moe",), "here")
    key = f"/{subject['kernel']}/" if "kernel" in subject else subject["scope"]
    with pytest.raises(SettingsError, match="idle_share is of whole steps"):
        thresholds_from_keywords({"idle_share": {f"{key} in decode": 0.2}}, "marker")


@pytest.mark.parametrize(
    ("metric", "limit"),
    [("idle_share", 1.0), ("idle_share", -0.1), ("pass_wall", -1.0), ("pass_wall", float("inf"))],
)
def test_limits_that_nothing_can_exceed_are_refused(metric: str, limit: float) -> None:
    with pytest.raises(SettingsError, match=r"must be ≥ 0\.0"):
        check_limit(metric, limit, "here", "limit")


def test_the_configuration_knows_them(tmp_path: Path) -> None:
    path = tmp_path / "sglprof.toml"
    path.write_text('[[threshold]]\nmetric = "pass_wall"\nlimit = 20.0\nstage = "decode"\n')
    assert load_config(path)["threshold"][0]["metric"] == "pass_wall"
