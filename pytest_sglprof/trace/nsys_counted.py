"""GPU activities of an nsys report as the engine of a file format added them up."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

Key = tuple[int, int, str, str]
"""Process id, device (-1: none), kind and full name."""


@dataclass(frozen=True)
class Counted:
    """sums: count and total ns of each key. owners: every (process id, device) with an activity.

    owners include those of whole graphs, which have no rows. recorded: process ids that
    stand in the report. notes: what was left out.
    """

    sums: Mapping[Key, tuple[int, int]]
    owners: frozenset[tuple[int, int]]
    recorded: frozenset[int]
    notes: tuple[str, ...] = ()
