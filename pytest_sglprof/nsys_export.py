"""Turns an nsys report into a file that can be read, without the credentials in it."""

from __future__ import annotations

import contextlib
import re
import shutil
import sqlite3
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from pytest_sglprof.errors import NsysError
from pytest_sglprof.nsys_command import NsysTool, run
from pytest_sglprof.nsys_origin import digest_of as digest_of
from pytest_sglprof.nsys_origin import origin_of, sign, signed_origin
from pytest_sglprof.redact import HIDDEN, is_secret_env

_HELP_TIMEOUT = 30.0  # s
_ASSIGNMENT = re.compile(rb"(^|[\x00;\n])([A-Za-z_][A-Za-z0-9_]*)=([^\x00;\n]+)")
_BARE = re.compile(rb"^([A-Za-z_][A-Za-z0-9_]*)=([^\x00]+)$", re.S)


def export(
    tool: NsysTool,
    report: Path,
    kind: Literal["sqlite", "parquet"],
    target: Path,
    timeout: float,
) -> Path:
    """Exports `report` to `target`: a SQLite file, or a folder of Parquet files.

    The target appears only when it is complete; one that exists is replaced. nsys puts
    the environment of every readable process into a report: an export is given without
    the values of variables that are named like credentials. A SQLite export also says
    which report it was made of (see `exported_from`).
    """
    if not report.is_file():
        raise NsysError(f"{report}: no such report", expected="a .nsys-rep file")
    target.parent.mkdir(parents=True, exist_ok=True)
    suffix = ".sqlite" if kind == "sqlite" else ""
    partial = target.with_name(f".{target.name[:80]}.{threading.get_native_id()}.partial{suffix}")
    option = "sqlite" if kind == "sqlite" else "parquetdir"
    words = [f"--type={option}", "--force-overwrite=true", f"--output={partial}", str(report)]
    origin = origin_of(report) if kind == "sqlite" else None  # of what nsys is about to read
    try:
        process = run([tool.path, "export", *words], timeout)
        if process.returncode != 0 or not partial.exists():
            raise NsysError(
                f"nsys {tool.version} could not export {report} as {kind} "
                f"(exit {process.returncode})",
                expected="a complete report that this or an older nsys wrote",
                hint="a report of a newer nsys needs an export by that one",
                log=process.stdout.strip().splitlines()[-8:],
            )
        if origin is not None:
            hide_credentials(partial)
            sign(partial, origin)
        else:
            _hide_in_folder(partial)
        _put(partial, target)
    finally:
        _remove(partial)
    return target


def can_export_parquet(tool: NsysTool) -> bool:
    """Whether this nsys writes folders of Parquet files."""
    with contextlib.suppress(NsysError):
        return "parquetdir" in run([tool.path, "export", "--help"], _HELP_TIMEOUT).stdout
    return False


def exported_from(database: Path) -> str:
    """The digest of the report that `export` made a SQLite file of; "" where it does not say."""
    origin = signed_origin(database)
    return origin.whole if origin else ""


def _put(partial: Path, target: Path) -> None:
    """A file is replaced in one step; a folder cannot be, so the old one is moved away first."""
    if not target.is_dir():
        partial.replace(target)
        return
    old = partial.with_name(f"{partial.name}.old")
    target.rename(old)
    partial.replace(target)
    _remove(old)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def import_again(tool: NsysTool, stream: Path, timeout: float, said: Sequence[str]) -> Path:
    """Makes the report of a raw ``.qdstrm`` whose import failed; returns its path.

    On a loaded machine the importer of 2023.4 now and then stumbles over a race of its
    own and works the second time; where it is broken it fails again. said: what it printed.
    """
    report = stream.with_suffix(".nsys-rep")
    importer = Path(tool.path).resolve().parent.parent / "host-linux-x64" / "QdstrmImporter"
    words = [str(importer), "--input-file", str(stream), "--output-file", str(report)]
    with contextlib.suppress(NsysError):
        if importer.is_file() and run([*words, "--force-overwrite"], timeout).returncode == 0:
            stream.unlink(missing_ok=True)
            if report.is_file() and report.stat().st_size:
                return report
    raise NsysError(
        f"nsys left only {stream}, no report: its importer did not work",
        expected="a .nsys-rep file",
        hint="the importer is in nsys's host-linux-x64 folder, which must lie beside "
        "target-linux-x64, and needs libssh.so.4 (Debian: libssh-4, linked as "
        "host-linux-x64/libssh.so)",
        log=said,
    )


def hide_credentials(database: Path) -> int:
    """Hides values of secret variables in every text of an export; returns how many rows."""
    changed = 0
    with contextlib.closing(sqlite3.connect(database)) as connection:
        connection.execute("PRAGMA secure_delete = ON")  # else the old text stays in the file
        tables = _text_columns(connection)
        connection.text_factory = bytes  # an environment may hold any bytes
        for table, column in tables:
            # As blobs: for LIKE and GLOB a text ends at its first NUL, an environment's does not.
            rows = connection.execute(
                f'SELECT rowid, "{column}" FROM "{table}" '
                f"WHERE instr(CAST(\"{column}\" AS BLOB), X'3D') > 0"
            ).fetchall()
            hidden = [(_hide(text), row) for row, text in rows if _hide(text) != text]
            connection.executemany(
                f'UPDATE "{table}" SET "{column}" = CAST(? AS TEXT) WHERE rowid = ?', hidden
            )
            changed += len(hidden)
        connection.commit()
    return changed


def _text_columns(connection: sqlite3.Connection) -> list[tuple[str, str]]:
    """Where environments stand: string pools and descriptions, never the events."""
    found = []
    tables = connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")
    for (table,) in tables.fetchall():
        if table == "StringIds" or table.startswith(("TARGET_INFO", "META_DATA")):
            columns = connection.execute(f'PRAGMA table_info("{table}")').fetchall()
            found += [(table, column[1]) for column in columns if column[2].upper() == "TEXT"]
    return found


def _hide_in_folder(folder: Path) -> None:
    """As `hide_credentials`; without pyarrow the files that may hold any are removed."""
    for file in folder.glob("*.parquet"):
        if file.stem != "StringIds" and not file.stem.startswith(("TARGET_INFO", "META_DATA")):
            continue
        try:
            import pyarrow
            import pyarrow.parquet
        except ImportError:
            file.unlink()
            continue
        try:
            table = pyarrow.parquet.read_table(file)
            for at, field in enumerate(table.schema):
                if pyarrow.types.is_string(field.type):
                    texts = [None if t is None else _hidden(t) for t in table[at].to_pylist()]
                    table = table.set_column(at, field, [pyarrow.array(texts, field.type)])
            pyarrow.parquet.write_table(table, file)
        except (OSError, ValueError, pyarrow.ArrowException) as error:
            raise NsysError(
                f"nsys wrote {file.name}, which cannot be read: {error}",
                expected="a complete Parquet export",
                hint="export to SQLite instead",
            ) from error


def _hidden(text: str) -> str:
    raw = text.encode("utf-8", errors="surrogateescape")
    return _hide(raw).decode("utf-8", errors="replace")


def _hide(text: bytes) -> bytes:
    """`A=1;MY_TOKEN=x` with the value of MY_TOKEN hidden; also for one bare assignment."""
    bare = _BARE.match(text)
    if bare and _is_secret(bare[1]):
        return bare[1] + b"=" + HIDDEN.encode()
    return _ASSIGNMENT.sub(
        lambda m: m[1] + m[2] + b"=" + HIDDEN.encode() if _is_secret(m[2]) else m[0], text
    )


def _is_secret(name: bytes) -> bool:
    return is_secret_env(name.decode("ascii"))
