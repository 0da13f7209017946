"""The one server that a worker has alive: started or attached, recorded, stopped."""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from pytest_sglprof.errors import ServerDied, ServerError
from pytest_sglprof.server import lease as leases
from pytest_sglprof.server.address import server_name
from pytest_sglprof.values import ServerSpec

if TYPE_CHECKING:
    from pytest_sglprof.report.model import RecordedServer
    from pytest_sglprof.server.server import Server
    from pytest_sglprof.session.run import RunFolder
    from pytest_sglprof.settings import Settings

ADMIN_KEY_ENV = "SGLPROF_ADMIN_API_KEY"
TEST_LEASE_TIMEOUT = 3600.0  # s; another test may be long, and it ends by its own limits
API_KEY_ENV = "SGLPROF_API_KEY"


def open_server(
    spec: ServerSpec,
    settings: Settings,
    folder: RunFolder,
    progress: Callable[[str], None] | None,
) -> Server:
    """Starts the server of `spec`, or attaches to `--sglprof-server`.

    An attached server's keys come from SGLPROF_API_KEY and SGLPROF_ADMIN_API_KEY.
    """
    from pytest_sglprof.server import server as servers

    if settings.server:
        return servers.attach(
            settings.server,
            api_key=os.environ.get(API_KEY_ENV, ""),
            admin_key=os.environ.get(ADMIN_KEY_ENV, ""),
            server_dir=settings.server_dir,
            nsys_session=settings.nsys_session or None,
            nsys_path=settings.nsys or None,
            python=settings.python,
            folder=folder.server("attached"),
        )
    return servers.launch(
        spec,
        folder=folder.server(spec.key),
        nsys_path=settings.nsys or None,
        progress=progress,
    )


def close_server(server: Server) -> None:
    """Stops a server that is ours; raises `ServerError` when something is left of it."""
    left = server.stop()
    if server.keeper_fault:
        # The tests have passed, and nothing is left: a warning, since something is amiss here.
        warnings.warn(f"{server.keeper_fault}; its server was ended without it", stacklevel=2)
    if left:
        raise ServerError(
            f"the server {server.url} was stopped, but this is left: {', '.join(left)}",
            expected="no process, nsys session, agent, lock or GPU memory",
            hint=f"end it by hand; {server.folder / 'keeper.log'} tells what was tried",
        )


def check_alive(server: Server) -> None:
    """Raises `ServerDied` when an earlier test's server is gone."""
    if server.attached or server.is_alive():
        return
    reason = server.exit_reason()
    if reason is not None:
        raise reason
    raise ServerDied(
        f"the server {server.url} is gone",
        expected="a running server",
        hint=f"look at {server.folder / 'server.log'}",
    )


@contextlib.contextmanager
def undisturbed(server: Server, progress: Callable[[str], None] | None) -> Iterator[None]:
    """While a test measures, no other test of this machine measures on the same hardware.

    A server's GPUs are leased for its whole life; what is left to share are the cores of
    CPU servers, and an attached server. The stand-in's figures do not depend on the machine.
    """
    if server.attached:
        name, what = f"test-{server_name(server.url)}", f"the server {server.url}"
    elif server.kind == "sglang" and server.sizes.is_cpu:
        name, what = "test-cpu", "the processor, by a test of another CPU server"
    else:
        yield
        return
    lease = leases.acquire(name, timeout=TEST_LEASE_TIMEOUT, what=what, progress=progress)
    try:
        yield
    finally:
        lease.release()


def describe_server(server: Server, root: Path) -> RecordedServer:
    """The server as results hold it; its log's path is relative to `root`."""
    from pytest_sglprof.report.results import server_document

    return server_document(
        key=server.spec.key,
        kind=server.kind,
        url=server.url,
        command=server.command,
        version=server.sizes.version,
        sizes=server.sizes,
        attached=server.attached,
        nsys=server.nsys.tool.version if server.nsys is not None else "",
        standin=server.kind == "standin",
        model=server.spec.model_path or str(server.info.get("model_path", "")),
        log=os.path.relpath(server.folder / "server.log", root) if server.log else "",
        started=server.started,
        ready_s=server.ready_s,
        left_behind=server.left_behind,
        locked_clocks=server.locked_clocks,
    )
