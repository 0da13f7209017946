"""One figure over many nights: each beside the newest, at equal work, and where it changed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import mean

from pytest_sglprof._analysis.e_divisive import change_points
from pytest_sglprof._baselines.figures import IDLE_SHARE, Figure, life_values
from pytest_sglprof._baselines.records import LifeRecord

Nights = list[float | None]


def night_values(records: Sequence[LifeRecord], figure: Figure) -> Nights:
    """The figure of each life, None where it has none or cannot be compared.

    Over many nights hardly a kind of step is in all lives. So each life is compared with the
    newest one that has the figure, over the kinds that these two share, and its value is that of
    the newest times their ratio. Shares and figures of the load are as they are.
    """
    newest = next((each for each in reversed(records) if _own(each, figure)), None)
    if newest is None:
        return [None] * len(records)
    scale = _own(newest, figure)
    return [_beside(record, newest, figure, scale) for record in records]


def night_changes(values: Nights) -> tuple[int, ...]:
    """Indices of `values` at which a new level begins; nights without a figure are left out."""
    known = [(at, value) for at, value in enumerate(values) if value is not None]
    return tuple(known[at][0] for at in change_points([value for _, value in known]))


def level_means(values: Nights, changes: Sequence[int], at: int) -> tuple[float, float]:
    """The mean of the level that ends at the change `at`, and that of the one that begins there."""
    ends = [0, *changes, len(values)]
    place = ends.index(at, 1)
    sides = (values[ends[place - 1] : at], values[at : ends[place + 1]])
    before, now = (mean(value for value in side if value is not None) for side in sides)
    return before, now


def _own(record: LifeRecord, figure: Figure) -> float | None:
    values = life_values([record], figure)
    return None if isinstance(values, str) else values[0]


def _beside(
    record: LifeRecord, newest: LifeRecord, figure: Figure, scale: float | None
) -> float | None:
    values = life_values([record, newest], figure)
    if isinstance(values, str):
        return None
    value, reference = values
    if figure.is_of_load or figure.name == IDLE_SHARE:
        return value
    if value is None or not reference or not scale:
        return None
    beside = value / reference * scale
    return beside if math.isfinite(beside) else None
