"""The file of an nsys report that can be read: an export that is there, or a new one.

What the report holds decides, not names: an export of another report that lies beside it
under the right name is never taken (see `Origin.is_of`). Several processes may read one
report at a time: it is exported once, by the one that holds the lock of the report's file,
and what somebody reads is not removed. Both are locks of the kernel (`flock`) on files that
are there anyway: nothing is left behind, and they end with their process. A file system
without them only costs: two exports instead of one, and old exports that stay.
"""

from __future__ import annotations

import contextlib
import fcntl
import importlib.util
import os
import re
import shutil
import threading
from collections.abc import Iterator
from glob import escape
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from pytest_sglprof._errors import NotATrace, NsysError, NsysMissing, TraceError

if TYPE_CHECKING:
    from pytest_sglprof._nsys import NsysTool
    from pytest_sglprof._nsys_export import Origin

EXPORT_TIMEOUT = 1800.0  # s; grows with the report, some reach gigabytes
_DIGITS = 16  # of each digest, in the name of a kept export
_ORIGIN = re.compile(rf"([0-9a-f]{{{_DIGITS}}})-(-?[0-9a-f]+)-([0-9a-f]{{{_DIGITS}}})")
_ENDINGS = {"parquet": ".parquetdir", "sqlite": ".sqlite"}


@contextlib.contextmanager
def readable(path: Path, nsys: str | None) -> Iterator[Path]:
    """`path` itself, a Parquet folder or a SQLite file; of a `.nsys-rep` an export.

    That is kept beside the report, in a hidden file or folder whose name says what the report
    holds: Parquet where pyarrow is installed and the nsys can write it, else SQLite. nsys:
    the command that exports.

    Raises `NotATrace` or `TraceError`; `NsysError` (`NsysMissing`) when the export fails.
    """
    if path.suffix == ".nsys-rep":
        with _exported(path, nsys) as export:
            yield export
        return
    if path.suffix == ".qdstrm":
        raise TraceError(
            f"{path} is what nsys recorded, but nsys has made no report of it",
            expected="a .nsys-rep file",
            hint="the host half of nsys is missing or broken (libssh, host-linux-x64 beside "
            "target-linux-x64): import the file with QdstrmImporter of the same version",
        )
    if not path.exists():
        raise NotATrace(f"{path} does not exist", expected="an nsys report or an export of one")
    yield path


@contextlib.contextmanager
def _exported(report: Path, nsys: str | None) -> Iterator[Path]:
    from pytest_sglprof._nsys import find_nsys

    if not report.is_file():
        raise NotATrace(f"{report} does not exist", expected="an nsys report")
    with contextlib.ExitStack() as reading:
        if export := _there(report, reading):
            yield export
            return
        try:
            tool = find_nsys(nsys)
        except NsysMissing as error:
            beside = report.with_suffix(".sqlite")
            if beside.is_file():
                error.hint += f"; or give {beside} itself, if you know it to be of this report"
            raise
        if not os.access(report.parent, os.W_OK):
            folder = reading.enter_context(TemporaryDirectory(prefix="sglprof-"))
            yield _export(tool, report, Path(folder))
            return
        with report.open("rb") as stream:
            with contextlib.suppress(OSError):
                fcntl.flock(stream, fcntl.LOCK_EX)
            export = _there(report, reading)  # another process may have made it meanwhile
            if export is None:
                export = _export(tool, report, report.parent)
                reading.enter_context(_held(export))
                _forget_others(report)
        yield export


def _there(report: Path, reading: contextlib.ExitStack) -> Path | None:
    """An export of this report that lies beside it; it stays there while `reading` lasts."""
    from pytest_sglprof._nsys_export import signed_origin

    kept = {path: origin for path, origin in _kept(report).items() if path.suffix in _endings()}
    # Parquet first, which is read faster; ours carry their origin in their name, those that
    # a window left carry it inside.
    candidates = sorted(kept, key=lambda path: (_endings().index(path.suffix), path.name))
    beside = report.with_suffix(".sqlite")
    for path in (*candidates, beside):
        origin = kept[path] if path in kept else signed_origin(path)
        if origin is not None and origin.is_of(report) and reading.enter_context(_held(path)):
            return path
    return None


def _endings() -> list[str]:
    return [".parquetdir", ".sqlite"] if importlib.util.find_spec("pyarrow") else [".sqlite"]


def _kept(report: Path) -> dict[Path, Origin]:
    """Every export that was kept of a report of this name, and of which report."""
    from pytest_sglprof._nsys_export import Origin

    start = f".{report.stem[:80]}."
    exports: dict[Path, Origin] = {}
    for path in report.parent.glob(f"{escape(start)}*"):
        match = _ORIGIN.fullmatch(path.stem.removeprefix(start))
        if match and path.suffix in (".parquetdir", ".sqlite"):
            exports[path] = Origin(match[1], int(match[2], 16), match[3])
    return exports


@contextlib.contextmanager
def _held(export: Path) -> Iterator[bool]:
    """Keeps an export from being removed; False when it has been removed already."""
    try:
        handle = os.open(export, os.O_RDONLY)
    except OSError:
        yield False
        return
    try:
        with contextlib.suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_SH)
        yield _is_still(handle, export)
    finally:
        os.close(handle)


def _is_still(handle: int, path: Path) -> bool:
    with contextlib.suppress(OSError):
        return os.path.samestat(os.fstat(handle), path.stat())
    return False


def _export(tool: NsysTool, report: Path, folder: Path) -> Path:
    from pytest_sglprof._nsys_export import can_export_parquet, export, origin_of

    origin = origin_of(report)
    key = f"{origin.sample[:_DIGITS]}-{origin.modified:x}-{origin.whole[:_DIGITS]}"
    target = folder / f".{report.stem[:80]}.{key}"
    if ".parquetdir" in _endings() and can_export_parquet(tool):
        with contextlib.suppress(NsysError):  # then SQLite, whose error says what is wrong
            # First under another name: what is complete is never taken away from a reader.
            fresh = folder / f"{target.name}.{threading.get_native_id()}"
            export(tool, report, "parquet", fresh, EXPORT_TIMEOUT)
            return _keep_first(fresh, target.with_name(f"{target.name}.parquetdir"))
    target = target.with_name(f"{target.name}.sqlite")
    return export(tool, report, "sqlite", target, EXPORT_TIMEOUT)


def _keep_first(fresh: Path, target: Path) -> Path:
    """Renames a folder; where the same one is there already, that stays and this one goes."""
    try:
        fresh.rename(target)
    except OSError:
        if not target.is_dir():
            raise
        shutil.rmtree(fresh, ignore_errors=True)
    return target


def _forget_others(report: Path) -> None:
    """Removes kept exports of what this report held before, but for those that are being read."""
    for export, origin in _kept(report).items():
        with contextlib.suppress(OSError):  # held by a reader, or gone
            if not origin.is_of(report):
                _forget(export)


def _forget(export: Path) -> None:
    handle = os.open(export, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if export.is_dir():
            # Out of the way first: a reader that comes now finds none, and not half of one.
            gone = export.with_name(f"{export.name}.{threading.get_native_id()}.old")
            shutil.rmtree(export.rename(gone), ignore_errors=True)
        else:
            export.unlink()
    finally:
        os.close(handle)
