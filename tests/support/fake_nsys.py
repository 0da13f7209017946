"""Fake nsys commands: shell scripts that answer as the real one was seen to."""

from __future__ import annotations

import stat
from pathlib import Path

HELP = "usage: nsys profile [<args>]\n\t-Y, --start-later=\n"
VERSION = "NVIDIA Nsight Systems version 2023.4.4.54-234433681190v0"


def fake_nsys(
    folder: Path,
    *,
    version: str = VERSION,
    help_text: str = HELP,
    sessions: str = "",
    commands: str = "",
) -> Path:
    """An executable; `commands` are cases of a shell `case "$1" in`."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "sessions").write_text(sessions)
    path = folder / "nsys"
    path.write_text(
        f"""#!/bin/sh
echo "$@" >> {folder}/calls
case "$1" in
{commands}
--version) echo '{version}' ;;
profile) cat <<'EOF'
{help_text}
EOF
;;
sessions) cat {folder}/sessions ;;
esac
"""
    )
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


def calls(path: Path) -> list[str]:
    """The first words of every call that was made to a fake."""
    return [line.split()[0] for line in (path.parent / "calls").read_text().splitlines()]


def listed(name: str, state: str) -> str:
    """A line of `nsys sessions list`."""
    return f"          107281        00:03           {state}      1 {name}\n"
