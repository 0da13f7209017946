"""The page's ranks before, at and after an onset, from documents whose figures are known."""

from __future__ import annotations

from typing import Any

import pytest

from pytest_sglprof._load.samples import BalanceSample, LoadSample, WaitSample
from pytest_sglprof._report.load import load_strip, metric_series, sampled_ratios
from pytest_sglprof._report.page.history import PlacedWindow
from pytest_sglprof._report.page.moments import Moments, moments
from pytest_sglprof._report.results import validate
from tests.support.kernel_tables import build, slow
from tests.support.windows import run, window

LIKE = build(steps=5)
SLOWER = build(steps=60, scale=slow("TP1", "moe", 1.4))


def document(name: str, moment: str, minute: int, table: Any) -> dict[str, Any]:
    made = window(table, keywords={"slowdown": 9.0}, window_id=name)
    opened = f"2026-11-30T00:{minute:02d}:00.000Z"
    return made | {"moment": moment, "moment_of": "at", "opened": opened, "name": name}


def shown(*documents: dict[str, Any]) -> list[Moments]:
    results = validate(run(list(documents)))
    return moments([PlacedWindow(doc, results, doc.id, None, "") for doc in results.windows])


def test_windows_are_side_by_side_in_order_of_time() -> None:
    at = document("at", "at", 2, SLOWER)
    (around,) = shown(at, document("b", "before", 1, LIKE), document("c", "after", 3, LIKE))
    assert [each.moment for each in around.windows] == ["before", "at", "after"]
    assert [each.anchor for each in around.windows] == ["b", "at", "c"]
    slowed = next(row for row in around.rows if row.rank == "TP1")
    compute = SLOWER.frame[~SLOWER.frame["category"].isin(["communication", "memory"])]
    of_ranks = compute.groupby("rank", observed=True)["dur_ns"].sum() / 60
    assert slowed.then[1].compute_ns == pytest.approx(of_ranks["TP1"])
    truth = of_ranks["TP1"] / of_ranks.drop("TP1").median()
    assert slowed.then[1].ratio == pytest.approx(truth)
    assert slowed.then[0].ratio == pytest.approx(1.0, abs=0.05)
    assert slowed.then[0].running is None  # no load is known


def test_a_window_alone_needs_no_table_of_its_own() -> None:
    assert shown(document("at", "at", 2, SLOWER)) == []
    assert shown(window(LIKE)) == []


def test_a_suspicion_that_passed_is_shown_without_an_onset() -> None:
    (around,) = shown(document("b", "before", 1, LIKE))
    assert around.sentence == ""
    assert [each.moment for each in around.windows] == ["before"]


def test_short_windows_count_for_no_verdict() -> None:
    short = document("b", "before", 1, LIKE) | {"verdict": "inconclusive"}
    counts = run([document("at", "at", 2, SLOWER), short])["summary"]["windows"]
    assert sum(counts.values()) == 1


def test_what_costs_nothing_becomes_series() -> None:
    samples = [LoadSample(1.0, "DP0", 8, 0, throughput=400.0), LoadSample(2.0, "DP0", 0, 0)]
    (series,) = load_strip(samples, "log", 0.0, 9.0)
    assert series.token_ms == [20.0, None]  # 8 requests share 400 tokens a second
    measured = metric_series(
        [
            BalanceSample(1.0, "", "dp_tokens", 1.5, source="metrics"),
            WaitSample(1.0, "DP1", 0.002),
            WaitSample(3.0, "DP1", 0.004),
            WaitSample(99.0, "DP1", 1.0),
        ],
        0.0,
        9.0,
    )
    assert [(each.kind, each.rank, each.values) for each in measured] == [
        ("dp_tokens", "", [1.5]),
        ("sync_wait", "DP1", [0.002, 0.004]),
    ]
    (ratios,) = sampled_ratios([(5.0, {"TP1": 0.0}), (6.0, {"TP1": 0.1})])
    assert ratios.ratios == pytest.approx([1.0, 1.10517], abs=1e-4)
