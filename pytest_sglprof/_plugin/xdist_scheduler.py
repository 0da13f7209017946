"""The `loadgroup` scheduling of xdist, with fixes for workers that crash.

After a crash xdist up to 3.8 waits forever: it queues groups again that the dead worker had
finished (pytest-xdist#1323), and leaves the replacement waiting for a second test (#1327). It
also repeats the test that killed the worker (#1371). Imported only if xdist distributes tests.
"""

from __future__ import annotations

import contextlib
from importlib import metadata
from typing import Any

from xdist.scheduler import LoadGroupScheduling

FIXED_IN = (3, 9)


def is_needed() -> bool:
    """True for versions of xdist that wait forever."""
    numbers = metadata.version("pytest-xdist").split(".")[:2]
    return tuple(int(number) for number in numbers if number.isdigit()) < FIXED_IN


class CrashSafeScheduling(LoadGroupScheduling):  # type: ignore[misc,unused-ignore]  # an extra
    """Loses only the test that killed a worker."""

    def remove_node(self, node: Any) -> str | None:
        """Queues what the node has not finished; returns the test that killed it."""
        workload = self.assigned_work.pop(node)
        pending: list[str] = [
            test for unit in workload.values() for test, done in unit.items() if not done
        ]
        if not pending:
            return None
        for scope, unit in workload.items():
            left = {test: False for test in unit if test in pending[1:]}
            if left:
                self.workqueue[scope] = left
        for other in self.assigned_work:
            self._reschedule(other)
        return pending[0]

    def schedule(self) -> None:
        """Also gives a replacement its second group, or tells it that there is none."""
        is_replacement = self.collection is not None
        super().schedule()
        for node in self.nodes if is_replacement else ():
            self._reschedule(node)

    def _reschedule(self, node: Any) -> None:
        # A replacement that still collects is given work when it is ready (#1189).
        if node in self.registered_collections:
            with contextlib.suppress(OSError):  # it died too, which xdist handles next
                super()._reschedule(node)
