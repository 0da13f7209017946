"""Which collective each call of a rank is: its process group, and its number in that group."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from pytest_sglprof.trace.arrays import Ints

if TYPE_CHECKING:
    from pytest_sglprof.trace.columns import Columns

UNKNOWN = -1


@dataclass(frozen=True)
class CollectiveCalls:
    """Activities of a rank whose process group is known; parallel to each other.

    row: index of the activity. group: names of process groups, as torch.distributed numbers
    them alike on every rank. sequence: the number of the collective in its group, -1 unknown.
    """

    row: Ints
    group: Sequence[str]
    sequence: Ints


def calls_of(
    columns: Columns, groups: Sequence[str], sequences: Mapping[int, int]
) -> CollectiveCalls | None:
    """Those of a file's columns; sequences: external id -> number, where kernels lack it."""
    if columns.call is None or columns.calls is None:
        return None
    row = np.flatnonzero(columns.call >= 0).astype(np.int64)
    at = columns.call[row]
    told = columns.calls.sequence[at].tolist()
    external = columns.calls.external[at].tolist()
    return CollectiveCalls(
        row=row,
        group=[groups[code] for code in columns.calls.group[at].tolist()],
        sequence=numbered(told, external, sequences),
    )


def numbered(told: Sequence[int], external: Sequence[int], sequences: Mapping[int, int]) -> Ints:
    """The number of each collective: what its kernel told, else its announcement."""
    pairs = zip(told, external, strict=True)
    found = [own if own >= 0 else sequences.get(key, UNKNOWN) for own, key in pairs]
    return np.array(found, np.int64)


def collective_frame(parts: Sequence[tuple[int, CollectiveCalls | None]]) -> pd.DataFrame:
    """The `collectives` of a table, of (rows of the rank, its calls), in the table's order."""
    rows, sequences = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
    groups: list[str] = []
    before = 0
    for size, calls in parts:
        if calls is not None:
            rows.append(calls.row + before)
            groups += calls.group
            sequences.append(calls.sequence)
        before += size
    values = {"process_group": pd.Categorical(groups), "sequence": np.concatenate(sequences)}
    return pd.DataFrame(values, index=pd.Index(np.concatenate(rows)))
