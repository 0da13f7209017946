"""`run.json`, by which a run's folder is known to be ours, and `prune`, which removes old ones."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import platform
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pytest_sglprof import process
from pytest_sglprof.files import atomic_write
from pytest_sglprof.redact import redact
from pytest_sglprof.report.plain import utc

RUN_PREFIX = "run-"
RUN_FILE = "run.json"
FORMAT = "pytest-sglprof run"
FORMAT_VERSION = 1
_MAX_RUN_FILE = 1 << 20  # bytes; what is larger is not ours


def write_run_file(
    folder: Path, *, started: float, version: str, settings: Mapping[str, Any] | None = None
) -> None:
    """Marks the folder of a run as ours. started: Unix time in s. settings: `Settings.stored`."""
    born = process.create_time(os.getpid())
    content = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "id": folder.name,
        "started": utc(started),
        "host": platform.node(),
        "pid": os.getpid(),
        "process_started": utc(born),
        "version": version,
        "settings": redact(dict(settings or {})),
    }
    atomic_write(folder / RUN_FILE, json.dumps(content, indent=1) + "\n")


def prune(output: Path, *, keep_runs: int, keep_bytes: int) -> list[str]:
    """Removes the oldest ended runs beyond `keep_runs` or `keep_bytes`; names them.

    Only folders that a run marked as its own, never the newest. What cannot be read or
    removed stays, and so does a run that another process holds: nothing is raised. Of runs
    that end at once one prunes.
    """
    output = Path(os.path.realpath(output))  # it may be a link; a run's folder may not
    with _locked(output) as alone:
        return _prune(output, keep_runs, keep_bytes) if alone else []


def _prune(output: Path, keep_runs: int, keep_bytes: int) -> list[str]:
    runs = _runs(output)
    sizes = {path: _size(path) for path in runs}
    removed = []
    for path in runs[:-1]:
        too_many = len(sizes) > keep_runs
        too_large = sum(sizes.values()) > keep_bytes
        if not (too_many or too_large):
            break
        with _locked(path) as ended:
            if ended and _remove(path):
                removed.append(path.name)
                del sizes[path]
    return removed


def _runs(output: Path) -> list[Path]:
    """The folders of runs, oldest first."""
    try:
        folders = sorted(output.glob(f"{RUN_PREFIX}*"))
    except OSError:
        return []
    return [folder for folder in folders if is_run_folder(folder)]


def is_run_folder(folder: Path) -> bool:
    """Whether a run made this very folder: not a link to it, nor a copy under another name."""
    file = folder / RUN_FILE
    try:
        if folder.is_symlink() or file.is_symlink() or not file.is_file():
            return False
        if file.stat().st_size > _MAX_RUN_FILE:
            return False
        content = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError):
        return False
    return (
        isinstance(content, dict)
        and content.get("format") == FORMAT
        and content.get("id") == folder.name
    )


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[bool]:
    """Holds the lock of a folder; False where another process does, or it cannot be had."""
    try:
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        yield False
        return
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            yield False
        else:
            yield True
    finally:
        os.close(handle)


def _remove(folder: Path) -> bool:
    """Whether all of the folder is gone. run.json goes last: what is left stays ours."""
    with contextlib.suppress(OSError):
        for path in folder.iterdir():
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            elif path.name != RUN_FILE:
                with contextlib.suppress(OSError):
                    path.unlink()
        if list(folder.iterdir()) == [folder / RUN_FILE]:
            (folder / RUN_FILE).unlink()
            folder.rmdir()
            return True
    return False


def _size(folder: Path) -> int:
    """Bytes of all files below; what cannot be read counts as nothing."""
    total = 0
    for place, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(OSError):
                total += (Path(place) / name).lstat().st_size
    return total
