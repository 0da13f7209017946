"""The server of a test: started or attached to, checked, kept to itself, closed, described."""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from pytest_sglprof._config.model import ServerSpec
from pytest_sglprof._config.servers import members_of
from pytest_sglprof._errors import ServerDied, ServerError
from pytest_sglprof._server import lease as leases
from pytest_sglprof._server.client import server_name
from pytest_sglprof._server.command import LAUNCHERS

if TYPE_CHECKING:
    from pytest_sglprof._config.load import Settings
    from pytest_sglprof._report.model import RecordedServer
    from pytest_sglprof._run.folder import RunFolder
    from pytest_sglprof._server.launch import Server

API_KEY_ENV = "SGLPROF_API_KEY"
ADMIN_KEY_ENV = "SGLPROF_ADMIN_API_KEY"
TEST_LEASE_TIMEOUT = 3600.0  # s to wait for another test, which may be long


def open_server(
    spec: ServerSpec,
    settings: Settings,
    folder: RunFolder,
    progress: Callable[[str], None] | None,
) -> Server:
    """Starts the server of `spec`, or attaches to its url, or to that of `--sglprof-server`.

    A `spec` with members is a deployment.
    """
    from pytest_sglprof._server import launch as servers

    if settings.server:
        attached = folder.server("attached")
        return attach_running(settings.server, settings, attached, python=spec.python)
    if spec.url:
        api_key, admin_key = servers.server_keys(spec)
        return attach_running(
            spec.url,
            settings_of_running(spec, settings),
            folder.server(spec.name),
            name=spec.name,
            python=spec.python,
            api_key=api_key,
            admin_key=admin_key,
        )
    if spec.members:
        from pytest_sglprof._server.deployment import launch_deployment

        return launch_deployment(
            spec,
            members_of(spec, settings.servers),
            folder=folder.server,
            nsys_path=settings.nsys or None,
            progress=progress,
        )
    return servers.launch(
        spec,
        folder=folder.server(spec.key),
        nsys_path=settings.nsys or None,
        progress=progress,
    )


def settings_of_running(spec: ServerSpec, settings: Settings) -> Settings:
    """The settings for a running server that the configuration names."""
    return replace(
        settings,
        server_dir=spec.server_dir,
        server_ca=spec.server_ca,
        nsys_session=spec.nsys_session,
    )


def attach_running(
    url: str,
    settings: Settings,
    folder: Path,
    *,
    name: str = "attached",
    python: str = "",
    api_key: str = "",
    admin_key: str = "",
    finds_session: bool = False,
) -> Server:
    """Attaches to a running server as the settings describe it; python: of a load driver.

    finds_session: find the nsys session that it runs in, where the settings name none. Without
    keys they are taken from SGLPROF_API_KEY and SGLPROF_ADMIN_API_KEY.
    """
    from pytest_sglprof._server.launch import attach

    return attach(
        url,
        name=name,
        api_key=api_key or os.environ.get(API_KEY_ENV, ""),
        admin_key=admin_key or os.environ.get(ADMIN_KEY_ENV, ""),
        server_dir=settings.server_dir,
        nsys_session=settings.nsys_session or None,
        finds_session=finds_session,
        nsys_path=settings.nsys or None,
        python=python,
        ca=settings.server_ca,
        folder=folder,
    )


def close_server(server: Server) -> None:
    """Stops a server that was started; raises `ServerError` if something of it remains."""
    was_alive = not server.attached and server.is_alive()
    left = server.stop()
    if server.keeper_fault and was_alive:  # else a test has reported the server's death
        # Only a warning: nothing remains, and the tests are not affected.
        warnings.warn(f"{server.keeper_fault}; its server was ended without it", stacklevel=2)
    if left:
        raise ServerError(
            f"the server {server.url} was stopped, but this is left: {', '.join(left)}",
            expected="no process, nsys session, agent, lock or GPU memory",
            hint=f"end it by hand; {server.folder / 'keeper.log'} says what was tried",
        )


def check_alive(server: Server) -> None:
    """Raises `ServerDied` if the server has died since an earlier test."""
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
    """Keeps other tests of this machine from measuring on the same hardware during the block.

    GPUs are leased for the whole life of a server, so that only attached servers and the cores
    of CPU servers can be shared. The figures of the stand-in do not depend on the machine.
    """
    from pytest_sglprof._server.deployment import servers_of

    if server.attached:
        name, what = f"test-{server_name(server.url)}", f"the server {server.url}"
    elif any(
        LAUNCHERS[each.kind].uses_hardware and each.sizes.is_cpu
        for each in servers_of(server).values()
    ):
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
    """The server as in results.json. root: folder to which the path of its log is relative."""
    from pytest_sglprof._report.results import server_document

    return server_document(
        key=server.spec.key,
        kind=server.kind,
        url=server.url,
        command=server.command,
        version=server.sizes.version,
        sizes=server.sizes.shown(),
        attached=server.attached,
        nsys=server.nsys.tool.version if server.nsys is not None else "",
        standin=LAUNCHERS[server.kind].is_standin,
        model=server.spec.model_path or str(server.info.get("model_path", "")),
        log=os.path.relpath(server.folder / "server.log", root) if server.log else "",
        started=server.started,
        ready_s=server.ready_s,
        left_behind=server.left_behind,
        locked_clocks=server.locked_clocks,
        keeper_fault=server.keeper_fault,
    )
