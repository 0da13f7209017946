"""What the top of a run says: servers, configuration, results, and what this machine lacks."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from pathlib import Path

from pytest_sglprof._config.load import Settings
from pytest_sglprof._config.model import ServerSpec
from pytest_sglprof._config.servers import members_of
from pytest_sglprof._errors import ServerMissing, SglprofError
from pytest_sglprof._nsys import find_nsys
from pytest_sglprof._redact import redact_text
from pytest_sglprof._server.command import Launcher, find_launcher, has_load_driver
from pytest_sglprof._server.launch import server_keys


def header_lines(settings: Settings, folder: Path) -> list[str]:
    """A line with servers, configuration and results, and a warning about any stand-in."""
    config = _short(settings.config_file) if settings.config_file else "none"
    lines = [f"sglprof: {_servers(settings)}; config {config}; results {_short(folder)}"]
    attached = [spec for spec in settings.servers.values() if settings.server or spec.url]
    if attached:
        lines.append(
            "sglprof: a running server is never stopped; while it exports a profile its requests "
            "stall and /health answers 503"
        )
        names_python = all(spec.python for spec in attached)
        if not names_python and not has_load_driver(sys.executable):
            lines.append(
                f"sglprof: {sys.executable} has no SGLang, so loads for a running server are sent "
                "by the embedded driver (`python` of the server names another interpreter)"
            )
    if stand_ins := _stand_ins(settings):
        names = ", ".join(stand_ins)
        lines.append(
            f"sglprof: STAND-IN server for {names}: no SGLang, no GPU; the numbers are synthetic"
        )
    return lines


def _servers(settings: Settings) -> str:
    if settings.server:
        return f"attached to {settings.server}"
    return "servers " + ", ".join(f"{name} ({_kind(settings, name)})" for name in settings.servers)


def lacking_lines(specs: Iterable[ServerSpec], settings: Settings) -> list[str]:
    """A line for each thing that these servers need and this machine lacks."""
    lines = []
    parts = [
        each
        for spec in (() if settings.server else specs)
        for each in (*(member.spec for member in members_of(spec, settings.servers)), spec)
    ]
    for spec in parts:
        for lack in (_lacks_sglang, _lacks_nsys, _lacks_key, _lacks_model):
            try:
                lack(spec, settings)
            except SglprofError as error:
                lines.append(f"sglprof: not on this machine: {error.what} (server {spec.key})")
    return lines


def unread_lines(folders: Iterable[Path], settings: Settings, root: Path) -> list[str]:
    """A line for each sglprof.toml beside or above tests that is not the one that is read.

    One is read for all tests: the nearest above all that are given.
    """
    unread = []
    for folder in folders:
        above = [folder, *(each for each in folder.parents if root in (each, *each.parents))]
        nearest = next(filter(Path.is_file, (each / "sglprof.toml" for each in above)), None)
        if nearest is not None and nearest != settings.config_file:
            unread.append(_short(nearest))
    return [
        f"sglprof: {name} is not read, since it is not above all given tests: give "
        f"--sglprof-config={name}, or only tests below it"
        for name in dict.fromkeys(unread)
    ]


def _lacks_sglang(spec: ServerSpec, settings: Settings) -> None:
    if not spec.url:
        find_launcher(spec)


def _lacks_nsys(spec: ServerSpec, settings: Settings) -> None:
    if spec.nsys or spec.nsys_session:
        find_nsys(settings.nsys or None)


def _lacks_key(spec: ServerSpec, settings: Settings) -> None:
    server_keys(spec)


def _lacks_model(spec: ServerSpec, settings: Settings) -> None:
    model = spec.model_path
    if spec.kind == "sglang" and Path(model).is_absolute() and not Path(model).exists():
        raise ServerMissing(f"the model {model}")


def _kind(settings: Settings, name: str) -> str:
    """The kind of server that is started; one that is missing is an error only then."""
    if url := settings.servers[name].url:
        return redact_text(url)
    launcher = _launcher(settings, name)
    return launcher.name if launcher else f"{settings.servers[name].kind}, which is missing"


def _stand_ins(settings: Settings) -> list[str]:
    launched = [] if settings.server else settings.servers
    launchers = {n: _launcher(settings, n) for n in launched if not settings.servers[n].url}
    return [name for name, launcher in launchers.items() if launcher and launcher.is_standin]


def _launcher(settings: Settings, name: str) -> Launcher | None:
    """What starts the server of this name; None if what it needs is not installed."""
    try:
        return find_launcher(settings.servers[name])
    except ServerMissing:
        return None


def _short(path: Path) -> str:
    relative = os.path.relpath(path)
    return relative if not relative.startswith("..") else str(path)
