"""Array types of the readers, and the look-ups that all of them need."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]
Flags = npt.NDArray[np.bool_]


def first_of(ids: Ints, wanted: Ints) -> Ints:
    """Where each of `wanted` stands first in `ids` (ascending); -1 where it does not."""
    if not len(ids):
        return np.full(len(wanted), -1, dtype=np.int64)
    at = np.searchsorted(ids, wanted).clip(max=len(ids) - 1)
    return np.where(ids[at] == wanted, at, -1)


def holding(starts: Ints, ends: Ints, times: Ints) -> Ints:
    """Which interval [start, end) holds each time; -1 for none.

    starts: ascending. Of overlapping intervals only the last that began is looked at.
    """
    if not len(starts):
        return np.full(len(times), -1, dtype=np.int64)
    at = np.searchsorted(starts, times, side="right") - 1
    inside = (at >= 0) & (times < ends[at.clip(min=0)])
    return np.where(inside, at, -1)
