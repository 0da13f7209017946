"""The figures of the page's tables, and what travels to its scripts."""

from __future__ import annotations

import pytest

from pytest_sglprof._report.page.figures import heat_maps, kernel_rows, shade
from pytest_sglprof._report.page.page import page
from tests.support.drawn import drawn_of
from tests.support.kernel_tables import build, slow
from tests.support.windows import BALANCED, SHORT, SLOW, as_run, as_window, run, window

EIGHT = tuple(f"TP{at}" for at in range(8))


def test_shades_are_the_same_in_every_page() -> None:
    ratios = (None, 0.5, 1.0, 1.01, 1.049, 1.05, 1.3, 1.6, 9.0)
    assert [shade(ratio) for ratio in ratios] == [0, 0, 0, 1, 2, 3, 5, 7, 7]


def test_cells_are_relative_to_the_mean_of_the_group() -> None:
    (found,) = heat_maps(as_window(window(build(EIGHT, scale=slow("TP5", "moe", 1.4)))))
    moe = [column.scope for column in found.columns].index("moe")
    ratios = [row.cells[moe].ratio for row in found.rows]
    assert ratios == pytest.approx([1 / 1.05] * 5 + [1.4 / 1.05] + [1 / 1.05] * 2)
    assert [row.mark for row in found.rows] == [""] * 5 + ["slowest"] + [""] * 2
    assert [row.cells[moe].top for row in found.rows] == [False] * 5 + [True] + [False] * 2
    outside = [at for at, column in enumerate(found.columns) if not column.compute]
    assert len(outside) == 2
    assert all(row.cells[at].shade == 0 for row in found.rows for at in outside)


def test_who_is_slowest_by_chance_is_not_pointed_at() -> None:
    for table in (BALANCED, SHORT, build(with_steps=False)):
        for found in heat_maps(as_window(window(table))):
            assert [row.mark for row in found.rows] == ["", ""]


def test_arrivals_name_the_straggler() -> None:
    document = window(SLOW)
    document["stragglers"][0] |= {"group": "replica", "straggler": "TP0"}
    (found,) = heat_maps(as_window(document))
    assert [row.mark for row in found.rows] == ["straggler", ""]


def test_times_of_the_whole_window_where_no_step_is_common() -> None:
    table = build(steps=20, scale=slow("TP1", "gemm", 2.0))
    table.steps.loc[table.steps["rank"] == "TP1", "step"] += 100
    table.frame.loc[table.frame["rank"] == "TP1", "step"] += 100
    (found,) = heat_maps(as_window(window(table)))
    assert found.span == "in the whole window, since no step could be compared"
    assert [row.cells[0].ns for row in found.rows] == [22_000_000, 28_000_000]


def test_nobody_is_slowest_in_communication() -> None:
    scale = slow("TP0", "communication", 3.0)
    rows = kernel_rows(as_window(window(build(scale=scale))).kernels[0])
    assert rows[0].name == "all_reduce"
    texts = [cell.text for cell in rows[0].cells]
    assert texts == ["communication", "7.50", "–", "–", "–", "15.0", "50"]
    assert {row.cells[2].text for row in rows} == {"–"}


def test_a_row_of_the_kernel_table() -> None:
    first = kernel_rows(as_window(window(SLOW)).kernels[0])[0]
    assert [cell.text for cell in first.cells] == [
        "moe", "6.00", "100", "TP1", "1.40", "36.0", "50"
    ]  # fmt: skip
    assert first.cells[4].of == "n s6"


def test_scripts_get_the_three_digits_of_the_exact_value() -> None:
    document = window(SLOW)
    document["step_times"][0]["compute_ns"][0] = [1_234_567, 400_460]
    data = drawn_of(page([as_run(run([document]))]))
    assert data["series"][0]["compute_ns"][0] == [1_234_000, 400_400]
    first = document["lanes"]["steps"][0]["lanes"][0]
    lane = data["lanes"]["steps"][0]["lanes"][0]
    end, starts = 0, []
    for gap, dur in zip(lane["gap_ns"], lane["dur_ns"], strict=True):
        starts.append(end + gap)
        end += gap + dur
    assert starts == first["start_ns"]


def test_every_kind_of_run_has_a_page() -> None:
    windows = [
        window(SLOW),
        window(None, window_id="w2", state="failed", reason="it died", log=["OOM"]),
        window(build(silent=("TP0", "TP1")), window_id="w3"),
        window(build(("DP0 TP0", "DP1 TP1")), window_id="w4"),
    ]
    text = page([as_run(run(windows))])
    assert text.count('<details class="window"') == 4
    assert text.count('" open>') == 1
    assert "No profile window was opened" in page([as_run(run([]))])
    assert "sk-very-secret" not in text
