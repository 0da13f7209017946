"""Which calls of a collective belong together: one of each rank."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    import pandas as pd

Ints = npt.NDArray[np.int64]


def match(calls: pd.DataFrame, ranks: Sequence[str]) -> pd.DataFrame:
    """The rows of `kinds.communication` that all of `ranks` entered, with a column `match`.

    Rows with equal `match` (0, 1, ... in order of the first arrival) are one collective, one
    row for each rank. Calls of one name in one step are matched by process group and sequence
    number if every such call has them, else by process group and order if every call has a
    group, else by order alone. If ranks differ in the number of calls, matching by number
    drops only the calls that some rank lacks; matching by order drops them all, since it is
    not known which one is missing. Empty for fewer than two ranks.
    """
    import pandas as pd

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
    """Keys of calls, apart from their order: step and name, and group and number if known."""
    steps, names = (_codes(calls[column]) for column in ("step", "name"))
    place = _pairs(steps, names)
    groups = calls["process_group"].to_numpy(object)
    known = _everywhere(groups != "", place)
    if not known.any():
        return place
    number = calls["sequence"].to_numpy(np.int64)
    numbered = known & _everywhere(number >= 0, place)
    in_group = _pairs(place, _codes(np.where(known, groups, "")))
    return _pairs(in_group, _codes(np.where(numbered, number, -1)))


def _everywhere(flag: npt.NDArray[np.bool_], place: Ints) -> npt.NDArray[np.bool_]:
    """For each row, whether `flag` is True in all rows with the same `place`."""
    everywhere: npt.NDArray[np.bool_] = (np.bincount(place, weights=~flag) == 0)[place]
    return everywhere


def _pairs(first: Ints, second: Ints) -> Ints:
    """Encodes pairs of codes as 0, 1, ... in order of appearance."""
    return _codes(first * (int(second.max(initial=0)) + 1) + second)


def _codes(values: Any) -> Ints:
    """Encodes values as 0, 1, ... in order of appearance."""
    import pandas as pd

    codes: Ints = pd.factorize(values)[0].astype(np.int64)
    return codes


class Meetings(NamedTuple):
    """Matched collectives in order of time; step and is_fused: shape (collectives,).

    arrived: when each rank had done all before. dur: from then to the end, ns. stream: on which
    it is, -1 if unknown; shape (collectives, ranks). is_fused: whether its duration includes
    other work.
    """

    step: Ints
    arrived: Ints
    dur: Ints
    stream: Ints
    is_fused: npt.NDArray[np.bool_]

    def take(self, chosen: npt.NDArray[np.bool_]) -> Meetings:
        """The collectives that a mask selects."""
        return Meetings(
            step=self.step[chosen],
            arrived=self.arrived[chosen],
            dur=self.dur[chosen],
            stream=self.stream[chosen],
            is_fused=self.is_fused[chosen],
        )


def meetings(matched: pd.DataFrame, ranks: Sequence[str]) -> Meetings:
    """The rows of `match` as arrays."""
    import pandas as pd

    owner = pd.Index(ranks).get_indexer(pd.Index(matched["rank"]))
    matched = matched.iloc[np.lexsort((owner, matched["match"]))]
    columns = ("step", "arrived_ns", "start_ns", "dur_ns", "stream")
    step, arrived, start, dur, stream = (
        matched[name].to_numpy(np.int64).reshape(-1, len(ranks)) for name in columns
    )
    fused = (matched["kind"] == "fused").to_numpy(bool).reshape(-1, len(ranks))[:, 0]
    end = start + dur
    # The first rank's clock suffices: every rank runs the collectives in the same order.
    at = np.argsort(end[:, 0], kind="stable")
    return Meetings(step[at, 0], arrived[at], (end - arrived)[at], stream[at], fused[at])
