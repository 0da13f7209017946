"""Ends a server in an order that loses no data, and reports what is left.

First the open window is closed, then the server's processes are ended, then nsys. Afterwards
no process, nsys session, nsys agent or GPU context may remain. Every step has a limit;
`protocol.teardown_limit` is their sum. A teardown usually takes seconds.
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
from pytest_sglprof._config.backends import BACKENDS, Backend
from pytest_sglprof._errors import NsysError, SglprofError
from pytest_sglprof._server import tls
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

CLOCK_STEP = 0.1  # s; the kernel dates a file by its last clock tick, a little in the past


def tear_down(life: ServerLife, window: Backend | None, opened: float, limit: float) -> list[str]:
    """Tears the server down; returns what could not be removed.

    window: the backend of the window that is open, None if none is. opened: Unix time in s
    at which it was opened. limit: s for closing it.
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
    finally:  # nothing else would unlock the clocks
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
            if life.session.state() not in nsys.IDLE | nsys.GONE:
                log.info("report: %s", life.session.stop(timeout=limit))
        else:
            _stop_profile(life, limit)
    except (SglprofError, OSError) as error:
        log.warning("the window could not be closed: %s", error)
        _remove_incomplete(life.folder / "traces", opened)


def _stop_profile(life: ServerLife, limit: float) -> None:
    from pytest_sglprof._server.client import SglangClient

    client = SglangClient(
        local_url(life.host, life.port, tls=bool(life.certificates)),
        api_key=life.plan.api_key,
        admin_key=life.plan.admin_key,
        verify=tls.trust(life.certificates, any_name=True),
    )
    try:
        ended = client.stop_profile(limit)
        log.info("profile %s", "ended" if ended else "was not running any more")
    finally:
        client.close()


def _remove_incomplete(traces: Path, opened: float) -> None:
    """Removes the traces of a window that was cut off: they are incomplete."""
    for path in traces.rglob("*.json*"):
        with contextlib.suppress(OSError):
            if path.stat().st_mtime >= opened - CLOCK_STEP:
                path.unlink()


def _end_launcher(life: ServerLife) -> None:
    """Waits for nsys, which ends after the server once its report is written."""
    if life.launcher is None:
        return
    try:
        life.launcher.wait(FINALISE)
    except subprocess.TimeoutExpired:
        log.warning("the launched command does not end by itself, so it gets SIGTERM")
        process.terminate_tree([life.launcher.pid], LAUNCHER_GRACE)


def _end_session(life: ServerLife) -> None:
    """Shuts the nsys session down if it still exists, as after a kill of the nsys command."""
    if life.session is None:
        return
    try:
        if life.session.state() not in nsys.GONE:
            log.info("nsys shutdown of %s", life.session.name)
            life.session.shutdown(timeout=SHUTDOWN, discard=True)
    except NsysError as error:
        log.warning("%s", error)


def _end_rest(life: ServerLife) -> list[str]:
    """Kills all remaining descendants of this process, which adopts orphans."""
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
    """Unlocks them while the GPUs are still leased, before another server can use them."""
    if life.clocks is None:
        return []
    log.info("unlocking clocks: %s", ", ".join(life.clocks.held))
    return life.clocks.release()


def _reap(life: ServerLife) -> None:
    if life.launcher is not None:
        life.launcher.poll()
    process.reap_orphans()
