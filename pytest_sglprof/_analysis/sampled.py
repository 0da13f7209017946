"""How much longer than its peers each rank computes, in a window of a few steps."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pytest_sglprof._analysis.certainty import typical_ratio
from pytest_sglprof._analysis.times import sum_times

if TYPE_CHECKING:
    from pytest_sglprof._trace.table import KernelTable


def log_ratios(table: KernelTable) -> dict[str, float]:
    """Rank -> log of its compute over its peers' in a typical step (`typical_ratio`).

    Only ranks with the same input as others, in the steps that all of them have.
    """
    ratios: dict[str, float] = {}
    for cells in sum_times(table):
        if cells.doubt or not cells.has_steps:
            continue
        typical = typical_ratio(cells.matrix(cells.select("compute")))
        if typical is not None:
            ratios |= dict(zip(cells.group.ranks, typical.values, strict=True))
    return ratios
