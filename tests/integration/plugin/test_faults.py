"""Cells of the matrix of faults that no other test runs, each as `python -m ci.faults` runs it.

docs/reliability.md shows all of them. Kills of a server, a keeper, a worker or pytest are in
test_kills.py, full disks in test_unwritable.py, stale locks in test_lease.py, kills of the load
driver in unit/bench_serving.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import pytest

from ci.fault_cells import CannotRun, Cell, Outcome, run_cell
from ci.faults import judged

CELLS = (
    Cell("second", "pytest", "inside"),
    Cell("rank", "KILL", "closing"),
    Cell("folder", "gone", "warm-up"),
    Cell("clock", "-1 h", "inside"),
    Cell("descriptors", "exhausted", "warm-up"),
    Cell("folder", "read-only", "opening"),
)


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[Cell, Future[Outcome]]]:
    """All cells, two at a time: most of a run is a load, which sleeps."""
    folder = tmp_path_factory.mktemp("faults")
    with ThreadPoolExecutor(2) as pool:
        yield {cell: pool.submit(run_cell, cell, folder) for cell in CELLS}


@pytest.mark.parametrize("cell", CELLS, ids=lambda cell: cell.name)
def test_a_fault_is_reported_and_leaves_nothing(
    outcomes: dict[Cell, Future[Outcome]], cell: Cell
) -> None:
    try:
        outcome = outcomes[cell].result()
    except CannotRun as missing:
        pytest.skip(str(missing))
    print(outcome.text)
    result = judged(cell, outcome)
    assert (result.faults, result.not_run) == ((), "")
