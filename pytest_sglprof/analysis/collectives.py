"""Which calls of a collective belong together across ranks, row by row.

`analysis.waits` measures them; this names them, so that a picture can join them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from pytest_sglprof.trace.collectives import is_symmetric

if TYPE_CHECKING:
    from pytest_sglprof.trace.table import KernelTable

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
        & frame["full_name"].isin(_symmetric(frame["full_name"]))
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


def _symmetric(names: pd.Series) -> list[str]:
    return [name for name in names.cat.categories if is_symmetric(str(name))]
