"""Ends a server in the order that loses nothing, and reports what is left.

The open window first, then the server's tree, then nsys; afterwards nothing of ours may remain:
no process, no session, no agent, no context on a GPU. Every step has its limit; their sum is
`limits.teardown_limit`, and as a rule it takes seconds.
"""

from __future__ import annotations

import contextlib
import logging
import os
import subprocess
import time
from pathlib import Path

from pytest_sglprof import _nsys as nsys
from pytest_sglprof import _process as process
from pytest_sglprof._config.backends import BACKENDS
from pytest_sglprof._config.model import Backend
from pytest_sglprof._errors import NsysError, SglprofError
from pytest_sglprof._server.command import local_url
from pytest_sglprof._server.keeper.life import ServerLife, processes_on_gpus
from pytest_sglprof._server.keeper.protocol import (
    AGENT_WAIT,
    FINALISE,
    GPU_WAIT,
    GRACE,
    LAUNCHER_GRACE,
    SHUTDOWN,
)

log = logging.getLogger("sglprof.keeper")

CLOCK_STEP = 0.1  # s; a file's time is that of the last tick, a little in the past


def tear_down(life: ServerLife, window: Backend | None, opened: float, limit: float) -> list[str]:
    """Does it all; returns what could not be removed, [] when nothing is left.

    window: the backend of a window that is still open, opened at Unix time `opened`.
    limit: s for closing it.
    """
    left: list[str] = []
    try:
        life.remember()
        if window is not None and life.is_alive():
            _close_window(life, window, opened, limit)
        if life.is_alive():
            log.info("SIGTERM to the server's tree")
            life.remember()
            process.terminate_tree([life.pid], min(GRACE, life.plan.spec.stop_timeout))
        _end_launcher(life)
        _end_session(life)
        left += _end_rest(life)
        left += _check_session(life)
        left += _check_gpus(life)
    finally:  # whatever went wrong: nothing else gives the clocks back
        left += _unlock_clocks(life)
    life.free()
    for text in left:
        log.error("left behind: %s", text)
    log.info("teardown is over")
    return left


def _close_window(life: ServerLife, window: Backend, opened: float, limit: float) -> None:
    log.info("closing the open %s window, limit %.0f s", window, limit)
    try:
        if BACKENDS[window].needs_session and life.session is not None:
            if life.session.state() in nsys.COLLECTING:
                log.info("report: %s", life.session.stop(timeout=limit))
        else:
            _stop_profile(life, limit)
    except (SglprofError, OSError) as error:
        log.warning("the window could not be closed: %s", error)
        _remove_halves(life.folder / "traces", opened)


def _stop_profile(life: ServerLife, limit: float) -> None:
    from pytest_sglprof._server.client import SglangClient

    client = SglangClient(
        local_url(life.host, life.port),
        api_key=life.plan.api_key,
        admin_key=life.plan.admin_key,
    )
    try:
        ended = client.stop_profile(limit)
        log.info("profile %s", "ended" if ended else "was not running any more")
    finally:
        client.close()


def _remove_halves(traces: Path, opened: float) -> None:
    """Files of a window that was cut off: they are written in place, so they are halves."""
    for path in traces.rglob("*.json*"):
        with contextlib.suppress(OSError):
            if path.stat().st_mtime >= opened - CLOCK_STEP:
                path.unlink()


def _end_launcher(life: ServerLife) -> None:
    """nsys ends by itself after its target, once the report is written."""
    if life.launcher is None:
        return
    try:
        life.launcher.wait(FINALISE)
    except subprocess.TimeoutExpired:
        log.warning("the launched command does not end by itself: SIGTERM")
        process.terminate_tree([life.launcher.pid], LAUNCHER_GRACE)


def _end_session(life: ServerLife) -> None:
    """For an nsys command that was killed: its session and agent live on."""
    if life.session is None:
        return
    try:
        if life.session.state() not in nsys.GONE:
            log.info("nsys shutdown of %s", life.session.name)
            life.session.shutdown(timeout=SHUTDOWN, discard=True)
    except NsysError as error:
        log.warning("%s", error)


def _end_rest(life: ServerLife) -> list[str]:
    """Kills whatever still descends from this process; it adopted all orphans."""
    _reap(life)
    rest = process.descendants(os.getpid())
    rest = process.wait_gone(rest, AGENT_WAIT) if rest else rest
    if rest:
        log.warning("SIGKILL to %s", ", ".join(str(member.pid) for member in rest))
    alive = process.kill_all(rest)
    _reap(life)
    return [f"process {pid}" for pid in alive]


def _check_session(life: ServerLife) -> list[str]:
    if life.session is None:
        return []
    try:
        state = life.session.state()
    except NsysError as error:
        return [f"nsys session {life.session.name}: {error.what}"]
    return [] if state in nsys.GONE else [f"nsys session {life.session.name} ({state})"]


def _check_gpus(life: ServerLife) -> list[str]:
    deadline = time.monotonic() + GPU_WAIT
    while held := processes_on_gpus(life.seen):
        if time.monotonic() > deadline:
            return [f"process {pid} on a GPU" for pid in held]
        time.sleep(0.25)
    return []


def _unlock_clocks(life: ServerLife) -> list[str]:
    """While the leases are held: nobody else's server may run on these GPUs yet."""
    if life.clocks is None:
        return []
    log.info("clocks are given back: %s", ", ".join(life.clocks.held))
    return life.clocks.release()


def _reap(life: ServerLife) -> None:
    if life.launcher is not None:
        life.launcher.poll()
    process.reap_orphans()
