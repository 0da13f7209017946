"""A row of ranks for each server of a deployment, over all windows of one test."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from statistics import median

from pytest_sglprof._report.page.history import PlacedHead
from pytest_sglprof._report.stored import whole
from pytest_sglprof._report.terminal import busy_totals
from pytest_sglprof._verdict.wording import ratio

MOST_RANKS = 16  # of a server, the slowest first


@dataclass(frozen=True)
class RoleRow:
    """One server of a deployment. ranks: label, compute over the median of its ranks."""

    window: PlacedHead
    ranks: tuple[tuple[str, str], ...]
    slow: str
    left_out: int


@dataclass(frozen=True)
class RoleRows:
    """The servers of one test, in the order of their windows."""

    nodeid: str
    rows: tuple[RoleRow, ...]


def role_rows(windows: Sequence[PlacedHead]) -> list[RoleRows]:
    """The windows that have a role, by test; those of other servers are left out."""
    with_role = [window for window in windows if window.doc.role]
    by_test = groupby(with_role, key=lambda window: (window.run.run.id, window.doc.nodeid))
    return [RoleRows(nodeid, tuple(map(_row, rows))) for (_, nodeid), rows in by_test]


def _row(window: PlacedHead) -> RoleRow:
    document = whole(window.doc, window.run)
    spent: dict[str, int] = {}
    for finding in document.of_scope("compute"):
        spent |= busy_totals(document, finding)
    middle = median(spent.values()) if spent else 0
    worst = sorted(spent, key=lambda rank: -spent[rank])
    deciding = document.deciding
    return RoleRow(
        window,
        tuple(
            (rank, ratio(spent[rank] / middle) if middle else "–") for rank in worst[:MOST_RANKS]
        ),
        slow=(deciding.rank or "") if deciding and document.verdict == "fail" else "",
        left_out=max(0, len(worst) - MOST_RANKS),
    )
