"""Nodes of this machine that see a disk of their own in place of a folder."""

from __future__ import annotations

import subprocess
from functools import cache
from pathlib import Path

# The first word after the script is `sh`'s $0: the folder that stands for the disk of the node.
_SCRIPT = 'mkdir -p "$0" && mount --bind "$0" "{folder}" && exec "$@"'


@cache
def can_hide_disks() -> bool:
    """Whether a process may have mounts of its own."""
    return not subprocess.run(["unshare", "-m", "true"], check=False).returncode


def on_own_disk(disk: Path | str, folder: Path) -> list[str]:
    """The words before a command that sees `disk` in place of `folder`."""
    return ["unshare", "-m", "sh", "-c", _SCRIPT.format(folder=folder), str(disk)]
