"""Over several runs: which windows are points, what is drawn of them, and what is unknown."""

from __future__ import annotations

import copy
import json
from typing import Any

import msgspec
import pytest

from pytest_sglprof._report.page.page import page
from pytest_sglprof._trace.table import KernelTable
from tests.support.kernel_tables import build
from tests.support.windows import as_run, run, window


def night(at: int, table: KernelTable | None, **load: Any) -> dict[str, Any]:
    made = run([window(table, state="failed" if table is None else "complete")])
    made["run"]["id"] = f"night-{at}"
    made["windows"][0]["opened"] = f"2026-11-0{at}T00:00:00.000Z"
    made["loads"][0] |= load
    found: dict[str, Any] = json.loads(json.dumps(made))
    return found


def at_factor(factor: float, *, batches: tuple[int, ...] = (8,), **more: Any) -> KernelTable:
    """MoE of all ranks takes `factor` times as long, and so many times the batch."""

    def scale(rank: str, category: str, step: int) -> float:
        return batches[step % len(batches)] / 8 * (factor if category == "moe" else 1.0)

    table = build(scale=scale, **more)
    if not table.steps.empty:
        table.steps["batch_size"] = [batches[step % len(batches)] for step in table.steps["step"]]
    return table


def drawn(nights: list[dict[str, Any]]) -> dict[str, Any]:
    from pytest_sglprof._report.page.history import PlacedWindow, history

    runs = [*map(as_run, nights)]
    windows = [
        PlacedWindow(doc=w, run=document, anchor=f"a{at}", load=document.loads[0], base="")
        for at, document in enumerate(runs)
        for w in document.windows
    ]
    (found,) = history(runs, windows)
    plain: dict[str, Any] = msgspec.to_builtins(found)
    return plain


def charts(found: dict[str, Any]) -> dict[str, Any]:
    return {chart["title"]: chart["series"] for chart in found["drawn"]["charts"]}


def test_equal_work_does_not_follow_the_mix_of_batches() -> None:
    found = drawn(
        [
            night(1, at_factor(1.0, batches=(8, 16))),
            night(2, at_factor(1.0, batches=(8, 16, 16, 16, 16))),
            night(3, at_factor(1.3, batches=(8, 16))),
        ]
    )
    steps = [point["rows"][0]["compute_ns"] for point in found["points"]]
    assert steps[1] == pytest.approx(1_100_000 * 1.8)
    (line,) = charts(found)["Compute of equal work / first run"]
    assert line["label"] == "decode"
    assert line["values"] == pytest.approx([1.0, 1.0, 1 + 0.3 * 600 / 1100])


def test_other_work_and_dead_windows_are_gaps() -> None:
    found = drawn(
        [
            night(1, at_factor(1.0)),
            night(2, at_factor(1.0, batches=(64,))),
            night(3, None),
            night(4, at_factor(1.1)),
        ]
    )
    (line,) = charts(found)["Compute of equal work / first run"]
    assert [value is None for value in line["values"]] == [False, True, True, False]
    assert found["points"][2]["rows"] == ()


def test_stages_are_lines_of_their_own_and_the_oldest_run_is_the_first() -> None:
    def stage(step: int) -> str:
        return "prefill" if step % 3 == 0 else "decode"

    found = drawn([night(2, at_factor(1.2, stage=stage)), night(1, at_factor(1.0, stage=stage))])
    assert [point["run"] for point in found["points"]] == ["night-1", "night-2"]
    assert found["stages"] == ("decode", "prefill")
    assert {line["label"] for line in charts(found)["Compute of equal work / first run"]} == {
        "decode",
        "prefill",
    }


def test_figures_of_the_load_are_drawn_where_two_runs_have_them() -> None:
    found = drawn(
        [
            night(1, at_factor(1.0), tpot={"mean": 4.0}, output_throughput=100.0),
            night(2, at_factor(1.0), tpot={"mean": 5.0}),
        ]
    )
    assert charts(found)["TPOT, mean, ms"] == ({"label": "", "values": [4.0, 5.0]},)
    assert charts(found)["TTFT, mean, ms"] == ({"label": "", "values": [1.5, 1.5]},)
    assert "Output tokens/s" not in charts(found)


def test_a_stand_in_is_no_reference_and_old_results_have_a_history() -> None:
    nights = [night(at, at_factor(1.0)) for at in (1, 2, 3)]
    nights[1]["windows"][0]["standin"] = True
    found = drawn(nights)
    assert [point["work"] for point in found["points"]] == [{"decode": 1.0}, {}, {"decode": 1.0}]
    for one in nights:
        one["windows"][0]["strata"] = []
    assert "Compute of equal work / first run" not in charts(drawn(nights))
    assert 'id="history-data"' in page([*map(as_run, nights)])


def test_one_run_alone_has_no_history() -> None:
    one = night(1, at_factor(1.0))
    assert 'id="history"' not in page([as_run(one)])
    other = copy.deepcopy(one)
    other["windows"][0]["name"] = "other"
    assert '<section id="history"' not in page([as_run(one), as_run(other)])
