"""The clocks of several ranks brought together by what they do at the same moment.

A collective ends everywhere at about the same time. How much later than the others' median
a rank's clock says that it ended is that clock's offset; what is left after the offset was
taken out is how certain it is.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

MIN_ENDS = 20
MAX_PIECES = 16
ENDS_OF_PIECE = 20
CERTAIN_SHARE = 95.0


@dataclass(frozen=True)
class ClockFit:
    """offsets: how far each rank's clock is ahead, shape (instances, ranks), ns.

    uncertainty_ns: 95 % of what is left of the ends' differences is below it.
    """

    offsets: Floats
    uncertainty_ns: float


def fit_clocks(ends: Floats) -> ClockFit | None:
    """Offsets from the ends of matched collectives, shape (instances, ranks), ns, in order.

    Between medians of pieces of the window the offset moves along lines, so that drift is
    followed and single odd ends are not. Too few ends (below 20) give None.
    """
    if len(ends) < MIN_ENDS:
        return None
    middle = np.median(ends, axis=1)
    ahead = ends - middle[:, None]
    pieces = np.array_split(np.arange(len(ends)), min(MAX_PIECES, len(ends) // ENDS_OF_PIECE))
    at = np.array([np.median(middle[piece]) for piece in pieces])
    medians = np.array([np.median(ahead[piece], axis=0) for piece in pieces])
    offsets = np.column_stack([_line(middle, at, column) for column in medians.T])
    left = np.abs(ahead - offsets)
    # Around the median itself a rank has no difference at all: the worst rank counts.
    return ClockFit(offsets, float(np.percentile(left, CERTAIN_SHARE, axis=0).max()))


def _line(when: Floats, at: Floats, values: Floats) -> Floats:
    """`values` at times `at`, on lines between them and beyond the outer two."""
    if len(at) < 2:
        return np.full(len(when), values[0])
    found = np.interp(when, at, values)
    for outside, a, b in ((when < at[0], 0, 1), (when > at[-1], -2, -1)):
        slope = (values[b] - values[a]) / (at[b] - at[a])
        found[outside] = values[a] + slope * (when[outside] - at[a])
    return np.asarray(found, np.float64)
