"""Which calls of a collective belong together across ranks, and how long each rank waits in it.

Definitions stand in docs/metrics.md, "Waits".
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from pytest_sglprof.analysis.cells import Ints

if TYPE_CHECKING:
    from pytest_sglprof.trace.table import KernelTable

# Only one side of these waits, or each rank moves another number of bytes: the last arrival
# says nothing about who is slow.
_NOT_SYMMETRIC = re.compile(
    r"send|recv|p2p|all_?to_?all|dispatch|combine|internode|intranode|fused|memcpy", re.I
)
COLUMNS = ("rank", "name", "step", "start_ns", "dur_ns", "match")


def matched_collectives(table: KernelTable, ranks: Sequence[str]) -> pd.DataFrame:
    """The symmetric collectives of `ranks` that all of them entered, one row a call and rank.

    Columns `rank, name, step, start_ns, dur_ns, match`; the index is that of `table.frame`.
    Rows with equal `match` (0, 1, ... in the order of the first arrival) are one collective:
    the k-th call of its name in its step on every rank. A name that some rank called more or
    less often in a step is left out there, since nobody knows which call is missing. Without
    steps the k-th call of the whole window is taken. Empty where less than two ranks are.
    """
    frame = table.frame
    mine = frame[
        (frame["category"] == "communication")
        & frame["rank"].isin(list(ranks))
        & ~frame["name"].isin(_asymmetric(frame["name"]))
    ]
    if len(table.steps):
        mine = mine[mine["step"] >= 0]
    mine = mine[["rank", "name", "step", "start_ns", "dur_ns"]].astype(
        {"rank": object, "name": object}
    )
    if len(ranks) < 2 or mine.empty:
        return mine.iloc[:0].assign(match=np.zeros(0, np.int64))
    mine = mine.sort_values("start_ns", kind="stable")
    counts = mine.groupby(["step", "name", "rank"]).size().unstack("rank")
    counts = counts.reindex(columns=list(ranks))
    whole = counts.nunique(axis=1).eq(1) & counts.notna().all(axis=1)
    keys = pd.MultiIndex.from_frame(mine[["step", "name"]])
    mine = mine[whole.reindex(keys).to_numpy(bool)]
    call = mine.groupby(["step", "name", "rank"]).cumcount()
    match = pd.MultiIndex.from_arrays([mine["step"], mine["name"], call]).factorize()[0]
    return mine.assign(match=match.astype(np.int64))


def waits(matched: pd.DataFrame) -> pd.Series:
    """wait(r) = latest start of the collective - start on r, ns, for each row of `matched`.

    At most the call's own duration: a rank cannot wait in a call that it has left.
    """
    latest = matched.groupby("match")["start_ns"].transform("max")
    waited = (latest - matched["start_ns"]).clip(upper=matched["dur_ns"])
    return waited.rename("wait_ns")


def wait_matrix(matched: pd.DataFrame, numbers: Sequence[int], ranks: Sequence[str]) -> Ints | None:
    """Wait of each rank in each step, shape (steps, ranks), ns; None where nothing matched."""
    if matched.empty:
        return None
    sums = waits(matched).groupby([matched["step"], matched["rank"]]).sum().unstack("rank")
    full = sums.reindex(index=list(numbers), columns=list(ranks)).fillna(0)
    found: Ints = full.to_numpy(np.int64, copy=True)
    return found


def _asymmetric(names: pd.Series) -> list[str]:
    return [name for name in names.cat.categories if _NOT_SYMMETRIC.search(str(name))]
