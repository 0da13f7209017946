"""A page of many groups begins with those whose ranks differ most, and counts the others."""

from __future__ import annotations

from dataclasses import replace

import msgspec
import pytest

from benchmarks.page import large_table
from pytest_sglprof._capture.recording import WindowCapture
from pytest_sglprof._config.model import Threshold, WindowSpec
from pytest_sglprof._report.build import window_document
from pytest_sglprof._report.model import RecordedWindow
from pytest_sglprof._report.page.figures import MOST_RANKS, heat_maps
from pytest_sglprof._report.page.groups import MOST_GROUPS, most_unequal
from pytest_sglprof._report.page.page import page
from pytest_sglprof._trace.table import KernelTable
from pytest_sglprof._verdict.judge import judge
from tests.support.windows import as_run, run


def document(table: KernelTable) -> RecordedWindow:
    return window_document(
        WindowCapture("many", WindowSpec(name="many"), "complete", 1.79e9, 1.79e9 + 12),
        table,
        judge(table, [Threshold()]),
        nodeid="tests::many",
        attempt=1,
        server_key="none",
        standin=False,
        load=None,
    )


def replicas(table: KernelTable, size: int) -> KernelTable:
    """The same activities, of replicas of so many ranks."""
    labels = [f"DP{at // size} TP{at % size}" for at in range(len(table.ranks))]
    names = dict(zip(table.ranks, labels, strict=True))
    frame, steps = (
        each.assign(rank=each["rank"].cat.rename_categories(names))
        for each in (table.frame, table.steps)
    )
    return replace(table, frame=frame, steps=steps, ranks=tuple(labels))


@pytest.fixture(scope="module")
def window() -> RecordedWindow:
    """Of twelve replicas; the slow rank is the first of DP6 (`large_table`)."""
    return document(replicas(large_table(24, 60, 8), 2))


def test_the_group_of_the_slow_rank_comes_first_and_all_are_there(window: RecordedWindow) -> None:
    shown, others = most_unequal(window)
    groups = [finding.group for finding in shown.of_scope("compute")]
    assert groups[0] == "DP6"
    assert len(groups) == MOST_GROUPS
    assert {*groups, *(one.group for one in others)} == {f"DP{at}" for at in range(12)}
    assert min(one.slowdown for one in shown.of_scope("compute")) >= max(o.slowdown for o in others)
    for parts in (shown.kernels, shown.step_times, shown.steps.groups):
        assert [part.group for part in parts] == groups
    assert shown.lanes is not None and shown.lanes.steps[0].group == "DP6"


def test_a_window_of_few_groups_is_shown_as_it_is() -> None:
    window = document(replicas(large_table(8, 60, 8), 2))
    assert most_unequal(window) == (window, ())


def test_of_many_ranks_the_slowest_stand_first_and_the_rest_behind_a_button() -> None:
    (table,) = heat_maps(document(large_table(MOST_RANKS + 8, 60, 8)))
    assert table.rows[0].rank == f"TP{(MOST_RANKS + 8) // 2}"
    assert [row.is_more for row in table.rows] == [False] * MOST_RANKS + [True] * 8
    busy = [row.cells[0].ns for row in table.rows]
    assert busy == sorted(busy, reverse=True)


def test_the_page_says_how_many_groups_are_behind_more(window: RecordedWindow) -> None:
    results = msgspec.structs.replace(as_run(run([])), windows=(window,))
    text = page([results])
    assert "4 more groups, whose ranks differ less" in text
    assert text.index("DP6: time of each rank") < text.index("4 more groups")
