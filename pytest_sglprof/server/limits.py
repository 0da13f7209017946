"""Time limits that pytest and the keeper share, all in s.

Whoever waits for the other waits as long as that may take: his limit is the sum of the
other's. It ends early when the other one ends.
"""

from __future__ import annotations

from pytest_sglprof.nsys import QUICK as NSYS_QUICK
from pytest_sglprof.process import KILL_WAIT, TERM_WAIT

# The keeper starts a server.
START_LIMIT = 120.0  # for nsys and the interpreter to take their secrets; once more for the pid
PORT_WAIT = 10.0  # for a port to be free again after its last server
SLACK = 15.0  # for files, NVML and a busy machine; no step of its own
# It reports every second while it waits for a lease; nothing else takes longer than this.
SILENCE_LIMIT = 2 * START_LIMIT + PORT_WAIT + NSYS_QUICK + SLACK

# The server ended by itself; the keeper finds out its exit status.
RANK_GRACE = 1.0  # for the ranks of a dead server to end by themselves
STATUS_WAIT = 60.0  # for nsys to write the report of a dead target and pass on its status
HURRIED_WAIT = 10.0  # for the same when everything is to end
EXIT_LIMIT = RANK_GRACE + KILL_WAIT + STATUS_WAIT + SLACK

# The keeper tears down.
GRACE = 12.0  # after SIGTERM; SGLang needs about 5
FINALISE = 10.0  # for nsys to end after its target
LAUNCHER_GRACE = 2.0  # for a command that did not end by itself, after SIGTERM
SHUTDOWN = 8.0  # for `nsys shutdown`, and for the session to be gone after it
AGENT_WAIT = 2.0  # the agent of nsys ends a moment after its session
GPU_WAIT = 10.0  # for the driver to drop the contexts of killed processes
PUMP_WAIT = 5.0  # for the last lines of the log

# Pytest looks after the keeper.
FROZEN_LIMIT = 5.0  # for a keeper that was stopped (SIGSTOP) to go on
ORPHAN_GRACE = 3.0  # for pytest itself to end, in order, a server whose keeper was killed
ORPHAN_TERM = 5.0  # after SIGTERM to such a server: its promise is to be gone within 30


def teardown_limit(stop_timeout: float, *, nsys: bool) -> float:
    """The longest time that a keeper may take to stop.

    stop_timeout: the spec's, for closing an open window. nsys: the server runs under it.
    """
    total = RANK_GRACE + KILL_WAIT + HURRIED_WAIT  # a death that was just being looked into
    total += stop_timeout
    total += min(GRACE, stop_timeout) + TERM_WAIT + KILL_WAIT
    total += FINALISE + LAUNCHER_GRACE + TERM_WAIT + KILL_WAIT
    total += AGENT_WAIT + KILL_WAIT
    total += GPU_WAIT + PUMP_WAIT + SLACK
    if nsys:
        total += 2 * NSYS_QUICK + stop_timeout  # two looks at the session; a report read again
        total += 3 * NSYS_QUICK + 2 * SHUTDOWN
        total += NSYS_QUICK
    return total
