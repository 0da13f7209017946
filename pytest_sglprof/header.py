"""The lines of pytest's header: what will run, on what, and where the results go."""

from __future__ import annotations

import os
from pathlib import Path

from pytest_sglprof.errors import ServerMissing
from pytest_sglprof.settings import Settings


def header_lines(settings: Settings, folder: Path) -> list[str]:
    """One line of settings, and one that shouts where the stand-in takes SGLang's place."""
    config = _short(settings.config_file) if settings.config_file else "none"
    lines = [f"sglprof: {_servers(settings)}; config {config}; results {_short(folder)}"]
    if settings.server:
        lines.append(
            "sglprof: it is never stopped; while it exports a profile its requests stall, and "
            "/health answers 503"
        )
    elif stand_ins := _stand_ins(settings):
        names = ", ".join(stand_ins)
        lines.append(
            f"sglprof: STAND-IN server for {names}: no SGLang, no GPU; the numbers are synthetic"
        )
    return lines


def _servers(settings: Settings) -> str:
    if settings.server:
        return f"attached to {settings.server}"
    return "servers " + ", ".join(f"{name} ({_kind(settings, name)})" for name in settings.servers)


def _kind(settings: Settings, name: str) -> str:
    """Its resolved kind; a missing SGLang is told when the server is to be started."""
    from pytest_sglprof.server.command import find_entry

    try:
        return find_entry(settings.servers[name]).kind
    except ServerMissing:
        return "sglang, which is missing"


def _stand_ins(settings: Settings) -> list[str]:
    return [name for name in settings.servers if _kind(settings, name) == "standin"]


def _short(path: Path) -> str:
    relative = os.path.relpath(path)
    return relative if not relative.startswith("..") else str(path)
