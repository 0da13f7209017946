"""The file of an nsys report that can be read: an export that is there, or a new one.

What the report holds decides, not times or names: an export of another report that lies
beside it under the right name is never taken.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import shutil
from collections.abc import Iterator
from glob import escape
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from pytest_sglprof.errors import NotATrace, NsysError, NsysMissing, TraceError

if TYPE_CHECKING:
    from pytest_sglprof.nsys_command import NsysTool

EXPORT_TIMEOUT = 1800.0  # s; grows with the report, some reach gigabytes
_DIGITS = 16  # of the digest, in the name of a kept export
_ENDINGS = {"parquet": ".parquetdir", "sqlite": ".sqlite"}


@contextlib.contextmanager
def readable(path: Path, nsys: str | None) -> Iterator[Path]:
    """`path` itself, a Parquet folder or a SQLite file; of a `.nsys-rep` an export.

    That is kept beside the report, in a hidden file or folder named after what the report
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
    from pytest_sglprof.nsys import find_nsys
    from pytest_sglprof.nsys_export import digest_of, exported_from

    if not report.is_file():
        raise NotATrace(f"{report} does not exist", expected="an nsys report")
    digest = digest_of(report)
    beside = report.with_suffix(".sqlite")
    kept = [_kept(report.parent, report, digest, kind) for kind in _kinds()]
    for there in (*kept, beside):
        # Ours carry the digest in their name, those that a window left carry it inside.
        if there.exists() and (there is not beside or exported_from(beside) == digest):
            yield there
            return
    try:
        tool = find_nsys(nsys)
    except NsysMissing as error:
        if beside.is_file():
            error.hint += f"; or give {beside} itself, if you know it to be of this report"
        raise
    if os.access(report.parent, os.W_OK):
        export = _export(tool, report, digest, report.parent)
        _forget_others(report, digest)
        yield export
        return
    with TemporaryDirectory(prefix="sglprof-") as folder:
        yield _export(tool, report, digest, Path(folder))


def _kinds() -> tuple[str, ...]:
    return ("parquet", "sqlite") if importlib.util.find_spec("pyarrow") else ("sqlite",)


def _kept(folder: Path, report: Path, digest: str, kind: str) -> Path:
    return folder / f".{report.stem[:80]}.{digest[:_DIGITS]}{_ENDINGS[kind]}"


def _export(tool: NsysTool, report: Path, digest: str, folder: Path) -> Path:
    from pytest_sglprof.nsys_export import can_export_parquet, export

    parquet = _kept(folder, report, digest, "parquet")
    if "parquet" in _kinds() and can_export_parquet(tool):
        with contextlib.suppress(NsysError):  # then SQLite, whose error says what is wrong
            return export(tool, report, "parquet", parquet, EXPORT_TIMEOUT)
    target = _kept(folder, report, digest, "sqlite")
    return export(tool, report, "sqlite", target, EXPORT_TIMEOUT)


def _forget_others(report: Path, digest: str) -> None:
    """Removes kept exports of what this report held before."""
    for other in report.parent.glob(f".{escape(report.stem[:80])}.*"):
        middle = other.stem.removeprefix(f".{report.stem[:80]}.")
        ours = len(middle) == _DIGITS and set(middle) <= set("0123456789abcdef")
        if ours and other.suffix in _ENDINGS.values() and middle != digest[:_DIGITS]:
            if other.is_dir():
                shutil.rmtree(other, ignore_errors=True)
            else:
                other.unlink(missing_ok=True)
