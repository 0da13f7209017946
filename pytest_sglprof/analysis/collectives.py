"""Which calls of a collective belong together across ranks, row by row.

`analysis.waits` measures them; this names them, so that a picture can join them too.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from pytest_sglprof.trace.collectives import collective_kind, is_symmetric

if TYPE_CHECKING:
    from pytest_sglprof.trace.table import KernelTable

Ints = npt.NDArray[np.int64]
COLUMNS = ("rank", "name", "step", "start_ns", "dur_ns", "match")


def communication(table: KernelTable) -> pd.DataFrame:
    """All communication of a table; the index is that of `table.frame`.

    Columns `rank, name, step, start_ns, dur_ns`, `kind` (as `collective_kind`), `waits`
    (whether all ranks wait for the last, and the step is known where any is),
    `process_group` ("" unknown), `sequence` (its number in the group, -1 unknown).
    """
    frame = table.frame
    rows = frame.loc[frame["category"] == "communication"]
    texts = ["rank", "name", "full_name"]
    rows = rows[[*texts, "step", "start_ns", "dur_ns"]].astype(dict.fromkeys(texts, object))
    if (frame["kind"] == "collective").any():
        # The server's own operators wrap the annotations: one meeting would count twice.
        rows = rows[(frame.loc[rows.index, "kind"] == "collective").to_numpy(bool)]
    names = [str(name) for name in rows["full_name"].unique()]
    kind = rows["full_name"].map({name: collective_kind(name) for name in names})
    symmetric = rows["full_name"].map({name: is_symmetric(name) for name in names})
    known = rows["step"] >= 0 if (frame["step"] >= 0).any() else True
    told = table.collectives.reindex(rows.index)
    return rows.drop(columns="full_name").assign(
        kind=kind.astype(object),
        waits=symmetric.astype(bool) & known,
        process_group=told["process_group"].astype(object).fillna(""),
        sequence=told["sequence"].fillna(-1).astype(np.int64),
    )


def match(calls: pd.DataFrame, ranks: Sequence[str]) -> pd.DataFrame:
    """The collectives of `communication` that all of `ranks` entered, with a column `match`.

    Rows with equal `match` (0, 1, ... in the order of the first arrival) are one collective,
    one row a rank. Of a name in a step they are told apart by process group and number in it
    where every call there has them; else by the order of the calls, of each process group
    where every call has one. By order, a name (in its group) that some rank called more or
    less often in the step is left out there, since nobody knows which call is missing; by
    number, only the missing one is. Empty for less than two ranks.
    """
    calls = calls[calls["waits"] & calls["rank"].isin(list(ranks))]
    if len(ranks) < 2 or calls.empty:
        return calls.iloc[:0].assign(match=np.zeros(0, np.int64))
    calls = calls.sort_values("start_ns", kind="stable")
    key = _keys(calls)
    owner = pd.Index(ranks).get_indexer(pd.Index(calls["rank"])).astype(np.int64)
    counts = np.zeros((key.max() + 1, len(ranks)), np.int64)
    np.add.at(counts, (key, owner), 1)
    whole = (counts == counts[:, :1]).all(axis=1)[key]
    calls, key, owner = calls[whole], key[whole], owner[whole]
    order = np.asarray(calls.groupby(_pairs(key, owner)).cumcount(), np.int64)
    return calls.assign(match=_pairs(key, order))


def _keys(calls: pd.DataFrame) -> Ints:
    """What tells calls apart, but for their order: step and name, group and number if known."""
    steps, names = (_codes(calls[column]) for column in ("step", "name"))
    place = _pairs(steps, names)
    groups = calls["process_group"].to_numpy(object)
    known = _everywhere(groups != "", place)
    if not known.any():
        return place
    number = calls["sequence"].to_numpy(np.int64)
    numbered = known & _everywhere(number >= 0, place)
    own = _pairs(place, _codes(np.where(known, groups, "")))
    return _pairs(own, _codes(np.where(numbered, number, -1)))


def _everywhere(flag: npt.NDArray[np.bool_], place: Ints) -> npt.NDArray[np.bool_]:
    """Whether `flag` holds for all rows of a row's place."""
    found: npt.NDArray[np.bool_] = (np.bincount(place, weights=~flag) == 0)[place]
    return found


def _pairs(first: Ints, second: Ints) -> Ints:
    """Codes (0, 1, ... by appearance) of pairs of codes."""
    return _codes(first * (int(second.max(initial=0)) + 1) + second)


def _codes(values: Any) -> Ints:
    """Codes (0, 1, ... by appearance) of values."""
    codes: Ints = pd.factorize(values)[0].astype(np.int64)
    return codes


def matched_collectives(table: KernelTable, ranks: Sequence[str]) -> pd.DataFrame:
    """`match` of a table, with `COLUMNS`; the index is that of `table.frame`."""
    return match(communication(table), ranks)[list(COLUMNS)]
