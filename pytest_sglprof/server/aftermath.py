"""Ends what a keeper that was killed left behind, known by a mark that only it carries.

No message of the keeper is needed: it may have been killed before it could send one. All
that it starts inherits the variable `plan.LIFE`, and the plan names its files.
"""

from __future__ import annotations

import contextlib
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from pytest_sglprof import process
from pytest_sglprof.errors import LeaseError
from pytest_sglprof.server import lease
from pytest_sglprof.server.clock_lock import give_back
from pytest_sglprof.server.limits import AGENT_WAIT, FINALISE, ORPHAN_TERM
from pytest_sglprof.server.plan import LIFE, Plan

if TYPE_CHECKING:
    import psutil

INJECTION = "QUADD_INJECTION_CONFIG"  # a file in /tmp that an nsys that was killed leaves


def end_orphans(
    plan: Plan, *, server: int, since: float, clocks: Mapping[str, int]
) -> tuple[str, ...]:
    """Ends the processes, removes the files, gives back the clocks; returns what is left.

    server: its pid, 0 if unknown. since: Unix time of the keeper's start.
    clocks: UUID of a GPU -> MHz that it is locked at. The leases are free already.
    """
    family = _family(plan, server, since)
    injections = {process.variable(member.pid, INJECTION) for member in family}
    shared = process.shared_memory(family, since)
    left = _end(plan, family, server, since)
    process.remove_shared_memory(shared)
    for name in injections:
        remove_injection(name)
    with contextlib.suppress(OSError):
        plan.short_tmpdir.unlink()
    shutil.rmtree(plan.folder / "tmp", ignore_errors=True)
    with contextlib.suppress(LeaseError):  # there is no folder, so there are no leases
        lease.sweep()
    return (*(f"process {pid}" for pid in left), *give_back(clocks))


def remove_injection(name: str) -> None:
    """Removes the file that nsys leaves when it is killed; any other is left alone."""
    if Path(name).name.startswith("injection_config_"):
        with contextlib.suppress(OSError):
            Path(name).unlink()


def _end(plan: Plan, family: list[psutil.Process], server: int, since: float) -> list[int]:
    """Ends the server first, so that nsys may end in order; returns who outlives it."""
    pids = {member.pid for member in family}
    first = [server] if server in pids else process.topmost(family)
    process.terminate_tree(first, min(ORPHAN_TERM, plan.spec.stop_timeout))
    patience = FINALISE if plan.nsys else AGENT_WAIT
    process.wait_gone(_family(plan, server, since), patience)
    deadline = time.monotonic() + process.KILL_WAIT
    # Whoever is being started just now comes to light at the next look.
    while (rest := _family(plan, server, since)) and time.monotonic() < deadline:
        process.kill_all(rest, wait=deadline - time.monotonic())
    return [member.pid for member in rest]


def _family(plan: Plan, server: int, since: float) -> list[psutil.Process]:
    return process.marked(LIFE, plan.life, leader=server, since=since)
