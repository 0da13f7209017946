"""A deployment: prefill and decode servers, and the router before them, each under its keeper.

They start one after the other, the router last, and stop in the reverse order.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from pytest_sglprof._config.model import ROLES, Member, MemberRole, ServerSpec
from pytest_sglprof._errors import (
    ServerDied,
    ServerNotReady,
    SettingsError,
    SglprofError,
    do_every,
    note,
)
from pytest_sglprof._server import lease
from pytest_sglprof._server.arguments import option
from pytest_sglprof._server.command import find_launcher
from pytest_sglprof._server.keeper.life import choose_gpus, visible_gpus
from pytest_sglprof._server.launch import Progress, Server, launch
from pytest_sglprof._server.starting import POLL

BOOTSTRAP = "--disaggregation-bootstrap-port"  # at which a prefill server hands over
ROUTER = "router"  # the label of the part that is no member


class Deployment(Server):
    """The servers behind a router. Its `url`, `client` and `log` are those of the router.

    members: role ("prefill", "decode") -> its servers, in the order in which they started; each
    is a `Server` of its own. parts: all of it by its names, the router last. It lives as long as
    all of them live. A load is driven by the load driver of the first one.
    """

    __module__ = "pytest_sglprof"

    def __init__(
        self,
        members: Sequence[Member],
        parts: Mapping[str, Server],
        leases: contextlib.ExitStack,
    ) -> None:
        router, first = parts[ROUTER], parts[members[0].label]
        vars(self).update(vars(router))
        self.parts = dict(parts)
        self.members: dict[MemberRole, tuple[Server, ...]] = {
            role: tuple(parts[each.label] for each in members if each.role == role)
            for role in ROLES
        }
        self.spec = replace(
            router.spec,
            model_path=first.spec.model_path,
            env=first.spec.env,
            secrets=first.spec.secrets,
        )
        self.info = {**router.info, "model_path": first.info.get("model_path")}
        self.python = first.python
        self.driver_kind = first.driver_kind
        self.driver_variables = first.driver_variables
        self.ready_s = sum(each.ready_s or 0.0 for each in parts.values())
        self._leases = leases

    @property
    def labels(self) -> Mapping[str, Server]:
        """Its servers by their names here: "prefill", "decode-2"."""
        return {label: each for label, each in self.parts.items() if label != ROUTER}

    def is_alive(self) -> bool:
        """True while all of its processes run."""
        return all(each.is_alive() for each in self.parts.values())

    def exit_reason(self) -> ServerDied | None:
        """Why one of its parts died, with its name; None while all of them live."""
        return _death(self.spec, self.parts)

    def note_load(self, result: object) -> None:
        """Keeps a load that is over with each of its servers."""
        for server in self.labels.values():
            server.note_load(result)

    def stop(self) -> tuple[str, ...]:
        """Stops all of it, the router first, and returns what could not be removed. Idempotent."""
        if self._left is None:
            self._left = ()
            try:
                do_every(each.stop for each in reversed([*self.parts.values()]))
            finally:
                self._leases.close()
                self._sum_up()
        return self._left

    def _sum_up(self) -> None:
        parts = self.parts.items()
        self._left = tuple(f"{label}: {left}" for label, each in parts for left in each.left_behind)
        self.problems = tuple(line for _, each in parts for line in each.problems)
        faults = [f"{label}: {each.keeper_fault}" for label, each in parts if each.keeper_fault]
        self.keeper_fault = "; ".join(faults) or None


def servers_of(server: Server) -> Mapping[str, Server]:
    """Those that compute, by their names: of a deployment its members, else the server, as ""."""
    return server.labels if isinstance(server, Deployment) else {"": server}


def processes_of(server: Server) -> tuple[Server, ...]:
    """All that was started for it: with the router of a deployment."""
    return tuple(server.parts.values()) if isinstance(server, Deployment) else (server,)


def launch_deployment(
    spec: ServerSpec,
    members: Sequence[Member],
    *,
    folder: Callable[[str], Path],
    nsys_path: str | None = None,
    progress: Progress | None = None,
) -> Deployment:
    """Starts the servers in order, then the router, and returns when all are ready.

    folder: makes one for the server of a name. Raises as `launch` does, with the name of the part
    that did not start, after those before it have been stopped.
    """
    _refuse_shared_gpus(members)
    running: dict[str, Server] = {}
    leases = contextlib.ExitStack()
    start = partial(launch, nsys_path=nsys_path, progress=progress)
    words: list[str] = ["--pd-disaggregation"]
    try:
        for member in members:
            with _named(member.label, spec):
                one, port = _with_bootstrap(member, leases)
                running[member.label] = server = start(one, folder=folder(one.key))
            words += [f"--{member.role}", server.url, *([port] if port else [])]
        with _named(ROUTER, spec):
            api_key = members[0].spec.api_key_env
            args = (*words, *spec.args)
            one = replace(spec, args=args, nsys=False, api_key_env=api_key)
            running[ROUTER] = start(one, folder=folder(f"{spec.name}.{ROUTER}"))
        _await_members(spec, running)
        return Deployment(members, running, leases)
    except BaseException as error:
        with contextlib.ExitStack() as stopping:  # stops all of them, the last one first
            stopping.callback(leases.close)
            for server in running.values():
                stopping.callback(server.stop)
        for label, server in running.items():
            if server.left_behind:
                note(error, f"left behind of {label}: {', '.join(server.left_behind)}")
        raise


def _await_members(spec: ServerSpec, running: Mapping[str, Server]) -> None:
    """Waits until the router, which answers before that, has taken up all servers."""
    router, count = running[ROUTER], len(running) - 1
    deadline = time.monotonic() + spec.ready_timeout
    while (known := router.client.server_info().get("workers_count", count)) < count:
        if reason := _death(spec, running):
            raise reason
        if time.monotonic() > deadline:
            raise ServerNotReady(
                f"the router of deployment {spec.name} has taken up {known} of {count} servers in "
                f"{spec.ready_timeout:g} s",
                expected="all of them, since all are ready",
                hint=f"read {router.folder / 'server.log'}",
            )
        time.sleep(POLL)


def _death(spec: ServerSpec, parts: Mapping[str, Server]) -> ServerDied | None:
    """Why the first of the dead parts died, with its name; None while all of them live."""
    for label, server in parts.items():
        if reason := server.exit_reason():
            reason.what = f"{label} of deployment {spec.name}: {reason.what}"
            return reason
    return None


@contextlib.contextmanager
def _named(label: str, spec: ServerSpec) -> Iterator[None]:
    """Puts the name of a part before the errors of its start."""
    try:
        yield
    except SglprofError as error:
        error.what = f"{label} of deployment {spec.name}: {error.what}"
        raise


def _with_bootstrap(member: Member, leases: contextlib.ExitStack) -> tuple[ServerSpec, str]:
    """The server with a bootstrap port of its own, and that port; "" for one that decodes."""
    spec = member.spec
    if member.role != "prefill":
        return spec, ""
    if given := option(spec.args, BOOTSTRAP):
        return spec, given
    port, held = lease.free_port()
    leases.callback(held.release)
    return replace(spec, args=(*spec.args, BOOTSTRAP, str(port))), str(port)


def _refuse_shared_gpus(members: Sequence[Member]) -> None:
    """Raises `SettingsError` for two servers on one GPU: the second would wait for the first."""
    taken: dict[str, str] = {}
    for label, spec in ((each.label, each.spec) for each in members):
        if not find_launcher(spec).uses_hardware or option(spec.args, "--device") == "cpu":
            continue
        visible = visible_gpus({**os.environ, **dict(spec.env)})
        for gpu in choose_gpus(spec.gpus, visible):
            if gpu in taken:
                raise SettingsError(
                    f"{taken[gpu]} and {label} of a deployment would both take GPU {gpu}",
                    expected="GPUs of its own for each server",
                    hint="set gpus of each server, such as gpus = [0, 1]",
                )
            taken[gpu] = label
