"""What the verdict on a table and the report of it both need, each computed once, when needed."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from pytest_sglprof._analysis.budget import Walls, step_walls
from pytest_sglprof._analysis.collectives import Waits, waits
from pytest_sglprof._analysis.passes import SyncGroup, sync_passes
from pytest_sglprof._analysis.times import GroupCells, sum_times

if TYPE_CHECKING:
    from pytest_sglprof._trace.table import KernelTable


@dataclass(frozen=True)
class Sums:
    """The sums of one table."""

    table: KernelTable

    @cached_property
    def waited(self) -> tuple[Waits, ...]:
        """The waits of each sync group."""
        return waits(self.table)

    @cached_property
    def groups(self) -> tuple[GroupCells, ...]:
        """The cells of each work group."""
        return sum_times(self.table, self.waited)

    @cached_property
    def synced(self) -> tuple[SyncGroup, ...]:
        """The passes of each sync group of several ranks."""
        return sync_passes(self.table, self.waited)

    @cached_property
    def walls(self) -> Walls:
        """What the steps of each rank are made of."""
        return step_walls(self.table, self.waited)
