"""The table of ranks with different input: a part of its cells keep their bounds here too."""

from __future__ import annotations

import pytest

from benchmarks.dp_truth import CASES, PHI, Cell, Tally, missed, tally_of
from benchmarks.dp_windows import table_of
from pytest_sglprof._analysis.imbalance import estimate, imbalance_of_groups
from pytest_sglprof._analysis.passes import sync_passes
from pytest_sglprof._config.model import Threshold
from pytest_sglprof._verdict.judge import judge_finding
from pytest_sglprof.standin.dp_model import make

CASE = {case.name: case for case in CASES}


@pytest.mark.parametrize("ranks", [2, 8])
@pytest.mark.parametrize("name", ["a", "b", "c", "d", "e", "f", "g", "h", "i"])
def test_a_cell_keeps_its_bounds(name: str, ranks: int) -> None:
    cell = Cell(CASE[name], ranks, 0.02, with_counts=True)
    tally = tally_of(cell, range(8))
    assert (tally.windows, missed(cell, tally)) == (8, [])
    if name in "de":
        assert tally.named >= 6
    if name == "f":
        assert (tally.blamed, tally.named) == (0, 0)


def test_all_of_compute_blames_the_loaded_rank() -> None:
    """So the cases are not harmless: this is what comparing ranks as if they were peers says."""
    blamed = 0
    for seed in range(5):
        (group,) = sync_passes(table_of(make(CASE["b"].make(8, seed, 0.02, PHI))))
        (finding,) = imbalance_of_groups([group.cells])
        estimated = estimate(group.cells, "typical_ratio")
        blamed += judge_finding(finding, Threshold(limit=1.05), estimated).verdict == "fail"
    assert blamed == 5


def test_a_missed_bound_is_named() -> None:
    cell = Cell(CASE["b"], 8, 0.02, with_counts=True)
    wrong = Tally(windows=100, blamed=20, known=100, category=100, part=50, speed=100, speed_of=100)
    assert missed(cell, wrong) == [
        "b, 8 ranks, sd 2 %: not blamed 80 %, at least 99.5 asked",
        "b, 8 ranks, sd 2 %: part 50 %, at least 95 asked",
    ]
