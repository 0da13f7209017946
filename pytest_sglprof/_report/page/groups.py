"""Which work groups of a window its page shows: of many, those whose ranks differ most."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from msgspec.structs import replace

from pytest_sglprof._analysis.imbalance import ImbalanceFinding
from pytest_sglprof._report.model import RecordedWindow

MOST_GROUPS = 8


def most_unequal(
    window: RecordedWindow,
) -> tuple[RecordedWindow, tuple[ImbalanceFinding, ...]]:
    """The window with no more than `MOST_GROUPS` groups, and the compute of all others.

    The group of the rank that decided comes first, then those with the largest slowdown.
    """
    every = window.of_scope("compute")
    if len(every) <= MOST_GROUPS:
        return window, ()
    rank = window.deciding.rank if window.deciding is not None else None
    ordered = sorted(every, key=lambda one: (one.figure(rank) is None, -(one.slowdown or 0.0)))
    places = {one.group: at for at, one in enumerate(ordered[:MOST_GROUPS])}
    members = {figure.rank for one in ordered[:MOST_GROUPS] for figure in one.ranks}
    late = [one for one in window.stragglers if any(each.rank in members for each in one.ranks)]
    late.sort(key=lambda one: -(one.lateness or 0.0))
    shown = replace(
        window,
        findings=_kept(window.findings, places),
        stragglers=tuple(late[:MOST_GROUPS]),
        step_times=_kept(window.step_times, places),
        kernels=_kept(window.kernels, places),
        steps=replace(window.steps, groups=_kept(window.steps.groups, places)),
    )
    return shown, tuple(ordered[MOST_GROUPS:])


def _kept(parts: Iterable[Any], places: Mapping[str, int]) -> tuple[Any, ...]:
    kept = [part for part in parts if part.group in places]
    return tuple(sorted(kept, key=lambda part: places[part.group]))
